"""The train command, killed and run again: the same weights to the bit as without."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run

from jaxpercept.checkpoints.load import latest_step
from jaxpercept.checkpoints.orbax import array_handler

# A save is complete when Orbax renames its temporary folder.
IN_A_SAVE = """
from orbax.checkpoint._src.path import atomicity
finalize = atomicity.AtomicRenameTemporaryPath.finalize
async def fail(self, *args, **kwargs):
    if self.get_final().name == '8':
        {failure}
    await finalize(self, *args, **kwargs)
atomicity.AtomicRenameTemporaryPath.finalize = fail
"""


def write_config(folder: Path, **changes) -> Path:
    """A small autoencoder of which the decoder's end is trained, on images that lie in files."""
    c = tiny_run.autoencoder_config(
        trainable=("vae/decoder.up_blocks", "vae/decoder.conv_out"),
        batch_size=4,
        save_every=4,
        ema_decay=0.5,
        **tiny_run.on_folder(tiny_run.dataset(folder / "data")),
        **changes,
    )
    return tiny_run.write_config(folder / "tiny.py", c)


def last_step(workdir):
    return max((line["step"] for line in tiny_run.metrics(workdir)), default=0)


def read_arrays(folder):
    """A tree as Orbax wrote it."""
    handler, folder = array_handler(), folder.resolve()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
    )
    return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same_run(workdir, other, steps):
    """Weights, averaged weights, optimizer, position in the data, and the curves: to the bit."""
    left, right = (folder / "checkpoints" / str(steps) for folder in (workdir, other))
    for item in ("params", "state"):
        arrays = [read_arrays(folder / item) for folder in (left, right)]
        assert len(tiny_run.leaves(arrays[0])) > 10
        tiny_run.assert_bit_equal(*arrays)
    assert (left / "data/metadata").read_text() == (right / "data/metadata").read_text()
    for name in ("loss", "l1", "kl", "grad_norm", "learning_rate"):
        curves = [tiny_run.curve(folder, name) for folder in (workdir, other)]
        assert len(curves[0]) == steps
        np.testing.assert_array_equal(*curves, err_msg=name)


def test_a_run_killed_in_a_save_and_run_again_gives_the_same_weights(tmp_path):
    config, workdir, whole = write_config(tmp_path, steps=12), tmp_path / "run", tmp_path / "whole"

    # SIGKILL while step 8 is being saved and the steps after it are being taken.
    die = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    program = tiny_run.train_door(IN_A_SAVE.format(failure=die))
    ((status, error),) = tiny_run.finish(tiny_run.command(config, workdir, program=program))
    assert status == -signal.SIGKILL, error
    assert list((workdir / "checkpoints").glob("8.*tmp*"))
    assert latest_step(workdir) == 4
    assert last_step(workdir) > 4

    # The same command again; and, beside it, an undisturbed run.
    again, undisturbed = tiny_run.finish(
        tiny_run.command(config, workdir), tiny_run.command(config, whole)
    )
    assert again[0] == undisturbed[0] == 0, (again[1], undisturbed[1])
    assert "continuing from step 4" in again[1]
    assert "continuing" not in undisturbed[1]
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_same_run(workdir, whole, steps=12)


def test_a_save_that_fails_ends_the_run_with_a_sentence_and_loses_nothing(tmp_path):
    config, workdir = write_config(tmp_path, steps=12), tmp_path / "run"
    program = tiny_run.train_door(
        IN_A_SAVE.format(failure="raise OSError(28, 'No space left on device')")
    )
    # Threads of Orbax that wait for the save would keep the process for many minutes.
    process = tiny_run.command(config, workdir, program=program)
    ((status, error),) = tiny_run.finish(process, timeout=120)
    assert status == 1, error
    (sentence,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "a checkpoint could not be written" in sentence
    assert "No space left on device" in sentence
    assert latest_step(workdir) == 4


def wait_for(condition, process):
    """Until something is true of a run in progress."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow  # five runs, some with worker processes
def test_worker_processes_sigterm_and_a_finished_run(tmp_path):
    config = write_config(tmp_path, optimizer__schedule="constant")
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    # More steps than are ever taken: each run is stopped on the way.
    endless = ("--config.steps=1000000", "--config.data.num_workers=2")

    # Killed from outside in the middle of a save, with worker processes alive.
    hang = tiny_run.train_door(IN_A_SAVE.format(failure="import time; time.sleep(1000)"))
    process = tiny_run.command(config, workdir, *endless, program=hang)
    manifest = "8.*tmp*/params*/manifest.ocdbt"
    wait_for(lambda: list((workdir / "checkpoints").glob(manifest)), process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert latest_step(workdir) == 4
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the one they work for"
        time.sleep(0.1)
    process.communicate()

    # Continued, and stopped by SIGTERM: saves, says so, 143.
    process = tiny_run.command(config, workdir, *endless)
    wait_for(lambda: (latest_step(workdir) or 0) > 4, process)
    process.terminate()
    ((status, error),) = tiny_run.finish(process)
    assert status == 143, error
    assert "continuing from step 4" in error
    stopped = latest_step(workdir)
    last_line = error.strip().splitlines()[-1]
    assert last_line == f"stopped by SIGTERM after step {stopped}; the state is saved."

    # To the end, without worker processes; and, beside it, an undisturbed run.
    end = stopped + 5
    runs = [
        tiny_run.command(config, folder, f"--config.steps={end}") for folder in (workdir, whole)
    ]
    again, undisturbed = tiny_run.finish(*runs)
    assert again[0] == undisturbed[0] == 0, (again[1], undisturbed[1])
    assert f"continuing from step {stopped}" in again[1]
    assert_same_run(workdir, whole, steps=end)

    # Once more: nothing changes.
    before = {p: p.stat().st_mtime_ns for p in (whole / "checkpoints").rglob("*")}
    lines = tiny_run.metrics(whole)
    ((status, error),) = tiny_run.finish(tiny_run.command(config, whole, f"--config.steps={end}"))
    assert status == 0, error
    assert {p: p.stat().st_mtime_ns for p in (whole / "checkpoints").rglob("*")} == before
    assert tiny_run.metrics(whole) == lines
