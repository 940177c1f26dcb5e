"""What a run leaves beside its weights: its record, traces, another dashboard."""

import gzip
import hashlib
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from jaxpercept import environment
from jaxpercept.checkpoints.card import base_license
from jaxpercept.config import check_config
from jaxpercept.data.datasets import open_dataset
from jaxpercept.errors import UserError
from jaxpercept.training.dashboard import ID_FILE
from jaxpercept.training.loop import train
from jaxpercept.training.metric_writer import MetricWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of eight steps, stopped after four; two of the later ones are traced."""
    folder = tmp_path_factory.mktemp("record")
    data = tiny_run.dataset(folder / "data")
    changes = {"save_every": 4, "optimizer__schedule": "constant", **tiny_run.on_folder(data)}
    workdir = folder / "a_run"
    train(tiny_run.autoencoder_config(steps=4, **changes), workdir)
    train(tiny_run.autoencoder_config(steps=8, profile="6:7", **changes), workdir)
    return workdir


def test_every_start_is_on_record(run):
    facts = tiny_run.facts(run)
    assert facts["flops"] > 0
    assert [start["step"] for start in facts["starts"]] == [0, 4]
    for start in facts["starts"]:
        assert start["versions"]["jax"]
        assert start["host"]["cpus"] >= 1
        assert "pytest" in start["command"] or "-c" in start["command"]  # or a worker of xdist
        (data,) = start["data"]
        assert (data["dataset"], data["examples"]) == ("folder", 12)
        names = sorted(path.name for path in (run.parent / "data" / "rgb").iterdir())
        stems = open_dataset("folder", data_dir=run.parent / "data", depth_scale=1000.0)
        assert [stems[i]["name"] for i in range(12)] == stems.source.names
        assert len(names) == len(stems.source.names)
        digest = hashlib.sha256("\n".join(stems.source.names).encode()).hexdigest()
        assert data["names_sha256"] == digest


def test_the_folder_says_what_it_is(run):
    text = (run / "README.md").read_text()
    assert "# a_run" in text
    assert "from_pretrained" in text
    assert "license: " in text
    # Both starts, all that lies there and nothing that does not, the whole config.
    assert len([line for line in text.splitlines() if line.startswith(("| 0 | ", "| 4 | "))]) == 2
    for path in run.iterdir():
        listed = path.name in ("README.md", "tensorboard") or f"`{path.name}" in text
        assert listed, path.name
    assert "`evaluation/`" not in text
    assert '"batch_size": 8' in text
    assert base_license(str(run)) == "unknown"


def test_the_steps_that_were_asked_for_are_traced(run):
    (trace,) = run.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e}
    assert steps == {"6", "7"}


@pytest.mark.parametrize("profile", ["10", "0:3", "5:4", "a:b", "5:", "-1:2"])
def test_steps_that_cannot_be_traced_are_refused(profile):
    with pytest.raises(UserError, match="is not FIRST:LAST"):
        check_config(tiny_run.config("sd-tiny", profile=profile), 1)


def test_the_revision_of_a_checkout():
    found = environment.revision()
    root = Path(environment.__file__).parents[1]
    if not (root / ".git").exists():
        assert found is None
        return
    head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
    assert found.rstrip("+") == head


def wandb_records(file):
    """The records of a .wandb file: a LevelDB log after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into what is left of the block
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):
            return  # still being written
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def test_weights_and_biases_gets_the_same_numbers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rng = np.random.default_rng()
    losses = rng.normal(size=3)
    writer = MetricWriter(tmp_path, project="ours", config={"steps": 3, "task": "depth"})
    for step, loss in enumerate(losses, 1):
        writer.scalars(step, {"loss": float(loss), "bad": float("nan")})
    writer.picture(3, "panel", rng.integers(0, 256, (8, 12, 3)).astype(np.uint8))
    writer.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # a process of its own writes it
    while not any(record.HasField("exit") for record in wandb_records(file)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records = list(wandb_records(file))
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.run_id) == ("ours", (tmp_path / ID_FILE).read_text())
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["task"] == "depth"
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in line.item}
        for line in (record.history for record in records if record.HasField("history"))
    ]
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == dict(enumerate(losses, 1))
    assert not any("bad" in row for row in rows)
    assert any("pictures/panel" in name for row in rows for name in row)
    assert len(list(file.parent.glob("files/media/**/*.png"))) == 1
    # The folder has the numbers, too.
    assert [line["loss"] for line in tiny_run.metrics(tmp_path)] == list(losses)
