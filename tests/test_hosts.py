"""Hosts that are killed, preempted, fewer or more: real processes and a coordinator.

Each test starts several runs of several processes, some minutes on two cores.
"""

import signal
import time

import numpy as np
import pytest
import tiny_run
from test_processes import free_port
from test_resume import assert_same_run, write_config

from jaxpercept.checkpoints.load import latest_step

pytestmark = pytest.mark.slow

STEPS = 16


def hosts(count, config, workdir, *arguments, devices=1):
    """One command a host, each with its own devices."""
    address = f"localhost:{free_port()}"
    return [
        tiny_run.command(
            config, workdir, *arguments,
            JAX_NUM_CPU_DEVICES=str(devices),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(number),
        )
        for number in range(count)
    ]  # fmt: skip


def to_the_end(processes):
    for status, error in tiny_run.finish(*processes):
        assert status == 0, error


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 240
    while (latest_step(workdir) or 0) < step:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def disturbed(config, workdir, number, how):
    """Exit statuses of an endless run of two hosts, one of which gets a signal."""
    processes = hosts(2, config, workdir, "--config.steps=1000000")
    wait_for_step(workdir, 4, processes)
    processes[number].send_signal(how)
    began = time.monotonic()
    statuses = [status for status, _ in tiny_run.finish(*processes, timeout=240)]
    took = time.monotonic() - began
    assert took < 180, f"the hosts ended after {took:.0f} s only"
    return statuses


def assert_nothing_lost(config, workdir, undisturbed):
    """Run on from the last checkpoint, the run has the weights of one that was not disturbed."""
    steps = latest_step(workdir) + 4
    for folder in (workdir, undisturbed):
        to_the_end(hosts(2, config, folder, f"--config.steps={steps}"))
    assert_same_run(workdir, undisturbed, steps=steps)


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, steps=STEPS, optimizer__schedule="constant")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_run_and_costs_nothing_that_was_saved(config, tmp_path, victim):
    workdir = tmp_path / "run"
    statuses = disturbed(config, workdir, victim, signal.SIGKILL)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] != 0
    assert_nothing_lost(config, workdir, tmp_path / "whole")


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_is_preempted_saves_with_all_others(config, tmp_path, number):
    # Saved by the notice alone: nothing else is due after the first few steps.
    workdir = tmp_path / "run"
    assert disturbed(config, workdir, number, signal.SIGTERM) == [143, 143]
    last = latest_step(workdir)
    assert tiny_run.metrics(workdir)[-1]["step"] == last
    assert_nothing_lost(config, workdir, tmp_path / "whole")


def test_four_hosts_then_two_then_four(config, tmp_path):
    to_the_end(hosts(1, config, tmp_path / "one"))
    workdir = tmp_path / "run"
    for count, steps in ((4, 4), (2, 8), (4, STEPS)):
        to_the_end(hosts(count, config, workdir, f"--config.steps={steps}"))
        assert latest_step(workdir) == steps
    expected = tiny_run.curve(tmp_path / "one")
    np.testing.assert_allclose(tiny_run.curve(workdir), expected, rtol=1e-5)


@pytest.mark.parametrize("preset", ["fsdp", "hybrid"])
def test_weights_split_over_hosts_or_within_each(config, tmp_path, preset):
    to_the_end(hosts(1, config, tmp_path / "one"))
    to_the_end(hosts(2, config, tmp_path / "two", f"--config.mesh.preset={preset}", devices=2))
    facts = tiny_run.facts(tmp_path / "two")
    data = 2 if preset == "hybrid" else 1
    assert facts["mesh"] == {"data": data, "fsdp": 4 // data, "tensor": 1}
    curves = [tiny_run.curve(tmp_path / name) for name in ("two", "one")]
    np.testing.assert_allclose(*curves, rtol=1e-5)
