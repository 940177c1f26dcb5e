"""The command analyze: what it keeps, what it writes, and what it refuses."""

import csv
import functools
import json

import numpy as np
import pytest
import tiny_model
import tiny_run
from analysis_cases import (  # noqa: F401
    COURSE,
    STEPS,
    checkpoint_of_module,
    data_of_module,
    description,
    params_of_module,
    weights,
)
from commands import door, restore_logging  # noqa: F401
from PIL import Image

from jaxpercept import analyze, presets
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.inference import plots
from jaxpercept.inference.analysis import Analysis, Course
from jaxpercept.inference.evaluation import open_model
from jaxpercept.training.setup import set_up

pytestmark = pytest.mark.usefixtures("restore_logging")

opened_once = functools.cache(open_model)


@pytest.fixture
def runs(monkeypatch):
    """Seeds that are really run; what they find does not matter. Models are opened once."""
    done = []
    monkeypatch.setattr(analyze, "open_model", opened_once)

    def run(self, seed):
        done.append(seed)
        rng = np.random.default_rng(seed)

        def curve(count):
            return {name: rng.random(count).tolist() for name in self.metrics}

        once = dict.fromkeys(self.metrics, 0.5)
        drift = rng.random(len(self.timesteps)).tolist()
        steps, starts = curve(len(self.timesteps)), curve(len(self.starts))
        return Course(steps, starts if self.starts else {}, once, once, drift, drift, 1.0)

    monkeypatch.setattr(Analysis, "run", run)
    return done


def arguments(checkpoint, data, output, **changes):
    values = {"checkpoint": checkpoint, "dataset": "folder", "data_dir": data, "output": output}
    values |= {**COURSE, "seeds": "0,1,2", **changes}
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def test_the_command_writes_what_training_reads(checkpoint, data, tmp_path, runs, capsys):
    out = tmp_path / "out"
    assert door(analyze, *arguments(checkpoint, data, out)) == 0
    printed = capsys.readouterr().out
    table, content = (json.loads((out / n).read_text()) for n in ("table.json", "analysis.json"))
    for name in ("table.json", "analysis.json", "curves.csv", "quality.png", "weights.png"):
        assert str(out / name) in printed
    with Image.open(out / "drift.png") as image:
        assert image.size == (960, 600)
    assert table["metric"] == content["metric"] == "delta1"
    assert (table["seeds"], table["images"], table["steps"]) == ([0, 1, 2], 3, STEPS)
    assert sum(table["weights"]) == pytest.approx(100)
    assert f"{table['weights'][0]:.2f}" in printed
    assert np.shape([table[name] for name in ("weights", "low", "high", "gain")]) == (4, 3)

    c = presets.denoising(tiny_run.config(checkpoint), "gaussian")
    c.method.timesteps = f"file:{out / 'table.json'}"
    method = set_up(c).method
    drawn = method.timesteps.distribution(method.solver.schedule)
    shares = [part.sum() for part in np.split(drawn, [333, 666])]
    np.testing.assert_allclose(shares, np.array(table["weights"]) / 100)

    curves = np.array([course["trajectory"]["delta1"] for course in content["courses"].values()])
    np.testing.assert_allclose(content["trajectory"]["mean"], curves.mean(axis=0))
    gain = np.diff(np.concatenate([[0.5], content["trajectory"]["mean"]]))
    assert sum(table["gain"]) == pytest.approx(gain.sum(), abs=0.3)
    with (out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["timestep"]) for row in rows] == content["timesteps"]
    assert [float(row["drift_mean"]) for row in rows] == content["drift"]["mean"]
    finished = [row["finished_mean"] for row in rows]
    assert [i for i, value in enumerate(finished) if value] == content["starts"] == [0, 2, 5]


def test_seeds_that_are_there_are_taken(checkpoint, data, tmp_path, runs, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_: [])

    def again(**changes):
        runs.clear()
        assert door(analyze, *arguments(checkpoint, data, tmp_path, **changes)) == 0
        return list(runs)

    assert again(seeds="0,1") == [0, 1]
    first = json.loads((tmp_path / "table.json").read_text())
    assert again(seeds="0,1,4") == [4]
    assert again(seeds="1,0") == []
    assert json.loads((tmp_path / "table.json").read_text())["weights"] == first["weights"]
    # Another metric, other bins and another floor are worked out of what there is.
    assert again(seeds="0,1", metric="abs_rel", bins=2, floor=0.2) == []
    other = json.loads((tmp_path / "table.json").read_text())
    assert other["metric"] == "-abs_rel"
    assert len(other["weights"]) == 2
    assert min(other["weights"]) >= 20
    (tmp_path / "seeds/1.json").write_text("{")
    assert again(seeds="0,1") == [1]
    assert again(seeds="0,1", starts=2) == [0, 1]
    assert again(seeds="0", starts=2, images=2) == [0]
    assert again(seeds="0", starts=2, images=2, steps=7) == [0]
    assert again(seeds="0", starts=2, images=2, steps=7, dtype="bfloat16") == [0]


def test_without_matplotlib_there_are_numbers(
    checkpoint, data, tmp_path, runs, monkeypatch, caplog
):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert door(analyze, *arguments(checkpoint, data, tmp_path)) == 0
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "table.json").is_file()
    assert "jaxpercept[plots]" in caplog.text


def test_a_model_without_noise_has_one_seed(data, tmp_path, runs, capsys):
    described = description("image")
    save_export(tmp_path / "blend", described, weights(described, np.random.default_rng()))
    out = tmp_path / "out"
    assert door(analyze, *arguments(tmp_path / "blend", data, out)) == 1
    assert "all seeds are one" in capsys.readouterr().err
    assert door(analyze, *arguments(tmp_path / "blend", data, out, seeds=None)) == 0
    assert runs == [0]
    table = json.loads((out / "table.json").read_text())
    assert table["low"] == table["high"] == [None] * 3
    assert (out / "quality.png").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 2}, "2 steps do not tell 3 bins"),
        ({"steps": 0}, "number of inference steps is 0"),
        ({"bins": 0}, "0 bins do not fit"),
        ({"starts": -1}, "starts is -1"),
        ({"images": -1}, "--images=-1"),
        ({"floor": 0.4}, "floor 0.4 of 3 bins"),
        ({"metric": "beauty"}, "'beauty' is not measured here: use abs_rel"),
        ({"seeds": "1,1"}, "each one once"),
        ({"seeds": "one"}, "--seeds=one are not whole numbers"),
        ({"seeds": str(2**32)}, "seed 4294967296 does not fit"),
        ({"dataset": "nothing"}, "Unknown dataset 'nothing'"),
        ({"options": "held_out=0.5"}, "--options does not take held_out"),
        ({"processing_resolution": 25}, "not a multiple of 2"),
    ],
)
def test_what_does_not_fit_gets_one_line(checkpoint, data, tmp_path, changes, words, capsys):
    assert door(analyze, *arguments(checkpoint, data, tmp_path, **changes)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["one_step", "beta_1"])
def test_one_step_models_are_refused(data, tmp_path, kind, capsys):
    rng = np.random.default_rng()
    if kind == "one_step":
        tiny_model.save(tmp_path / "model", rng)
    else:  # RGB blending whose image is all noise at every timestep
        betas = {"beta_start": 1.0, "beta_end": 1.0}
        described = description("image", betas, method={"num_steps": 1})
        save_export(tmp_path / "model", described, weights(described, rng))
    assert door(analyze, *arguments(tmp_path / "model", data, tmp_path / "out")) == 1
    assert "predicts in one step" in capsys.readouterr().err
