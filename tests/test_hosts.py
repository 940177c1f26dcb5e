"""Fewer and more hosts from one part of a run to the next: real processes and a coordinator."""

import numpy as np
import pytest
import tiny_run
from test_processes import free_port
from test_resume import write_config

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


def test_four_hosts_then_two_then_four(tmp_path):
    config = write_config(tmp_path, steps=STEPS, optimizer__schedule="constant")
    to_the_end(hosts(1, config, tmp_path / "one"))
    workdir = tmp_path / "run"
    for count, steps in ((4, 4), (2, 8), (4, STEPS)):
        to_the_end(hosts(count, config, workdir, f"--config.steps={steps}"))
        assert latest_step(workdir) == steps
    expected = tiny_run.curve(tmp_path / "one")
    np.testing.assert_allclose(tiny_run.curve(workdir), expected, rtol=1e-5)
