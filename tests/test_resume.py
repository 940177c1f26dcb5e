"""The train command, killed and run again: the same weights to the bit as without."""

import subprocess
import time

import numpy as np
import pytest
import tiny_run

from jaxpercept.checkpoints.load import latest_step, load_model
from jaxpercept.checkpoints.orbax import load_params

# Minutes of whole runs, each in a process of its own that is killed.
pytestmark = pytest.mark.slow

STEPS = 120


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    c = tiny_run.autoencoder_config(steps=STEPS, save_every=7, ema_decay=0.5)
    return tiny_run.write_config(tmp_path_factory.mktemp("config") / "tiny.py", c)


def wait_for(condition, process):
    """Until something is true of a run in progress."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_step(workdir):
    return max((line["step"] for line in tiny_run.metrics(workdir)), default=0)


def kill(process):
    process.kill()
    process.communicate()


def finish(process):
    """Exit status, and what was written to stderr."""
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def children(pid):
    done = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(child) for child in done.stdout.split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, error = finish(tiny_run.command(config_file, workdir))
    assert status == 0, error
    return workdir


def test_a_run_that_is_killed_again_and_again_gives_the_same_weights(
    config_file, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"

    # Killed in the middle of the run.
    process = tiny_run.command(config_file, workdir)
    wait_for(lambda: latest_step(workdir), process)
    kill(process)
    first = latest_step(workdir)
    assert first < STEPS
    assert first % 7 == 0

    # Continued with worker processes; stopped by SIGTERM: saves, says so, 143.
    reached = last_step(workdir)
    process = tiny_run.command(config_file, workdir, "--config.data.num_workers=2")
    wait_for(lambda: last_step(workdir) > reached, process)
    process.terminate()
    status, error = finish(process)
    assert status == 143, error
    second = latest_step(workdir)
    assert reached < second < STEPS - 7
    assert f"continuing from step {first}" in error
    last_line = error.strip().splitlines()[-1]
    assert last_line == f"stopped by SIGTERM after step {second}; the state is saved."

    # Killed in the middle of a save, with worker processes alive.
    process = hanging_save(config_file, workdir, "--config.data.num_workers=2")
    unfinished = second - second % 7 + 7
    manifest = f"{unfinished}.*tmp*/params*/manifest.ocdbt"
    wait_for(lambda: list((workdir / "checkpoints").glob(manifest)), process)
    workers = children(process.pid)
    assert workers
    kill(process)
    assert latest_step(workdir) == second
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the one they work for"
        time.sleep(0.1)

    # To the end.
    status, error = finish(tiny_run.command(config_file, workdir))
    assert status == 0, error
    assert f"continuing from step {second}" in error

    steps = workdir / "checkpoints" / str(STEPS)
    whole = uninterrupted / "checkpoints" / str(STEPS)
    for item in ("params", "state"):
        tiny_run.assert_bit_equal(load_params(steps / item), load_params(whole / item))
    assert (steps / "data" / "metadata").read_text() == (whole / "data" / "metadata").read_text()
    np.testing.assert_array_equal(tiny_run.curve(workdir), tiny_run.curve(uninterrupted))


def hanging_save(config_file, workdir, *arguments):
    """The train command on a disk that never finishes a save."""
    code = (
        "import sys, time\n"
        "from orbax.checkpoint._src.path import atomicity\n"
        "async def hang(self): time.sleep(1000)\n"
        "atomicity.AtomicRenameTemporaryPath.finalize = hang\n"
        "from jaxpercept import cli, train\n"
        "cli.run(train.main, required=('config',))\n"
    )
    process = tiny_run.command(config_file, workdir, *arguments, program=("-c", code))
    return process


def test_a_second_run_of_a_finished_one_changes_nothing(config_file, uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")}
    status, error = finish(tiny_run.command(config_file, uninterrupted))
    assert status == 0, error
    assert {p: p.stat().st_mtime_ns for p in (uninterrupted / "checkpoints").rglob("*")} == before
    assert len(tiny_run.curve(uninterrupted)) == STEPS
    _, params = load_model(str(uninterrupted))
    assert set(params) == {"vae"}
