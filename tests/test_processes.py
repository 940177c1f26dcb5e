"""Two processes train and evaluate like one, from disjoint data; results are written once."""

import functools
import json
import os
import socket
import zlib

import jax
import numpy as np
import pytest
import tiny_run

from jaxpercept.checkpoints.load import load_model
from jaxpercept.inference.observers import evaluation_observer
from jaxpercept.training import sharding
from jaxpercept.training.loop import train

STEPS, BATCH = 20, 8

# Every process notes which examples it hands to its devices.
NOTE_ITS_DATA = """
import sys
sys.path.insert(0, {tests!r})
import test_processes
test_processes.note_data({file!r})
"""


def note_data(file, patch=setattr):
    """From now on, append (index, checksum of the image) of every batch to a file, by line."""
    put_batch = sharding.put_batch

    def noted(batch, *args, **kwargs):
        rows = zip(batch["index"], batch["rgb"], strict=True)
        with open(file, "a") as lines:
            lines.write(json.dumps([(int(i), zlib.crc32(x.tobytes())) for i, x in rows]) + "\n")
        return put_batch(batch, *args, **kwargs)

    patch(sharding, "put_batch", noted)


def read_notes(file):
    """[steps, rows, 2]: what `note_data` wrote."""
    return np.array([json.loads(line) for line in file.read_text().splitlines()])


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two runs of the same config: `two`, of two processes, and `one`, of this one."""
    folder = tmp_path_factory.mktemp("processes")
    config = tiny_run.config(
        tiny_run.base(folder / "base"),
        steps=STEPS,
        batch_size=BATCH,
        accumulate=2,
        trainable=("unet/conv_norm_out", "unet/conv_out"),
        method={"name": "one_step", "latent_weight": 1.0},
        data__augment={"flip": 0.5, "scale": (0.5, 1.0), "brightness": 0.2},
        evaluation__dataset="folder",
        eval_every=STEPS // 2,
        **tiny_run.on_folder(tiny_run.dataset(folder / "data")),
    )
    file = tiny_run.write_config(folder / "tiny.py", config)
    address = f"localhost:{free_port()}"
    processes = []
    for number in range(2):
        notes = str(folder / f"two_{number}.jsonl")
        note = NOTE_ITS_DATA.format(tests=os.path.dirname(__file__), file=notes)
        process = tiny_run.command(
            file,
            folder / "two",
            program=tiny_run.train_door(note),
            JAX_NUM_CPU_DEVICES="1",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        processes.append(process)
    try:
        with pytest.MonkeyPatch.context() as patch:
            note_data(folder / "one.jsonl", patch.setattr)
            workdir, mesh = folder / "one", sharding.make_mesh(devices=jax.devices()[:1])
            observer = functools.partial(evaluation_observer, workdir=workdir)
            train(config, workdir, mesh=mesh, observer=observer)
    finally:
        results = tiny_run.finish(*processes)
    for status, error in results:
        assert status == 0, error
    return folder


def test_two_processes_give_the_loss_curve_of_one(runs):
    facts = tiny_run.facts(runs / "two")
    assert (facts["processes"], facts["devices"]) == (2, 2)
    for name in ("loss", "latent_mse", "grad_norm"):
        expected = tiny_run.curve(runs / "one", name)
        assert len(expected) == STEPS
        np.testing.assert_allclose(tiny_run.curve(runs / "two", name), expected, rtol=1e-4)


def test_the_processes_saw_disjoint_halves_of_the_same_data(runs):
    one, *two = (read_notes(runs / f"{name}.jsonl") for name in ("one", "two_0", "two_1"))
    assert two[0].shape == two[1].shape == (STEPS, BATCH // 2, 2)
    indices = [set(part[..., 0].ravel()) for part in two]
    assert indices[0].isdisjoint(indices[1])
    # Step by step, the same augmented images.
    np.testing.assert_array_equal(one[..., 0].ravel(), range(STEPS * BATCH))
    together = np.stack(two, axis=2).reshape(one.shape)
    np.testing.assert_array_equal(together, one)


def test_one_process_writes(runs):
    # Each step once; a second writer would double the lines, and have an event file of its own.
    assert [line["step"] for line in tiny_run.metrics(runs / "two")] == list(range(1, STEPS + 1))
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1


def test_what_two_processes_saved_opens_in_one(runs):
    (_, one), (_, two) = (load_model(str(runs / name)) for name in ("one", "two"))
    one, two = tiny_run.leaves(one), tiny_run.leaves(two)
    assert one.keys() == two.keys()
    for path, value in one.items():
        np.testing.assert_allclose(two[path], value, rtol=1e-3, atol=1e-5, err_msg=path)


def test_two_processes_evaluate_like_one(runs):
    one, two = (tiny_run.metrics(runs / name) for name in ("one", "two"))
    for line, expected in zip(two, one, strict=True):
        assert ("folder/abs_rel" in line) == (line["step"] % (STEPS // 2) == 0)
        scores = {name: value for name, value in expected.items() if name.startswith("folder/")}
        assert {name: line[name] for name in scores} == pytest.approx(scores, rel=1e-3, nan_ok=True)
    assert len(list((runs / "two" / "pictures").iterdir())) == 2
    tables = [
        (runs / name / "evaluation/folder/per_image.csv").read_text() for name in ("one", "two")
    ]
    assert len({len(table.splitlines()) for table in tables}) == 1
