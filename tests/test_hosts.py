"""Hosts that come and go: real processes, a coordinator, one killed; fewer and more of them.

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


def hosts(count, config, workdir, *arguments):
    """One command a host, each with one device."""
    address = f"localhost:{free_port()}"
    return [
        tiny_run.command(
            config, workdir, *arguments,
            JAX_NUM_CPU_DEVICES="1",
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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_run_and_costs_nothing_that_was_saved(tmp_path, victim):
    config = write_config(tmp_path, steps=STEPS, optimizer__schedule="constant")
    to_the_end(hosts(2, config, tmp_path / "whole"))
    workdir = tmp_path / "run"
    processes = hosts(2, config, workdir, "--config.steps=1000000")
    wait_for_step(workdir, 4, processes)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    results = tiny_run.finish(*processes, timeout=240)
    took = time.monotonic() - began
    assert results[victim][0] == -signal.SIGKILL
    assert results[1 - victim][0] != 0
    assert took < 180, f"the other host noticed after {took:.0f} s only"
    saved = latest_step(workdir)
    assert saved >= 4
    end = f"--config.steps={max(STEPS, saved + 4)}"
    to_the_end(hosts(2, config, workdir, end))
    to_the_end(hosts(2, config, tmp_path / "whole", end))
    assert_same_run(workdir, tmp_path / "whole", steps=int(end.split("=")[1]))


def test_four_hosts_then_two_then_four(tmp_path):
    config = write_config(tmp_path, steps=STEPS, optimizer__schedule="constant")
    to_the_end(hosts(1, config, tmp_path / "one"))
    workdir = tmp_path / "run"
    for count, steps in ((4, 4), (2, 8), (4, STEPS)):
        to_the_end(hosts(count, config, workdir, f"--config.steps={steps}"))
        assert latest_step(workdir) == steps
    expected = tiny_run.curve(tmp_path / "one")
    np.testing.assert_allclose(tiny_run.curve(workdir), expected, rtol=1e-5)
