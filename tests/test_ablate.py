"""The table of ablations: made, continued, and refused."""

import csv
import json
import types

import pytest
import tiny_model
import tiny_run
from commands import door, restore_logging  # noqa: F401

from jaxpercept import ablate
from jaxpercept.checkpoints.description import Description
from jaxpercept.errors import UserError
from jaxpercept.training.setup import plain

pytestmark = pytest.mark.usefixtures("restore_logging")

FILE = """
import tiny_run
from jaxpercept import presets

def get_config(preset=""):
    config = tiny_run.config({base!r}, steps=2, batch_size=8)
    config.evaluation.update({{"dataset": "scenes", "limit": 2, "batch_size": 2,
                               "pad_multiple": 16}})
    choices = {{**PRESETS, "large": _large, "elsewhere": _elsewhere,
               "referring": _referring}}
    return presets.choose("config.py", preset, choices, config)

def _slow(config):
    config.optimizer.learning_rate = 1e-5
    return config

def _large(config):
    config.batch_size = 16
    return config

def _elsewhere(config):
    return presets.trained_on(config, {{"scenes": 1.0}}, "objects")

def _noisy(config):
    config = presets.denoising(config, "gaussian")
    config.method.num_steps = 2
    return config

def _referring(config):
    config.task = "referring"
    return presets.painted(config)

PRESETS = {{"plain": lambda config: config, "slow": _slow, "noisy": _noisy}}
PAPER = {{"noisy": "worse"}}
"""


@pytest.fixture
def file(tmp_path):
    base = tiny_run.base(tmp_path / "base")
    (tmp_path / "config.py").write_text(FILE.format(base=str(base)))
    return tmp_path / "config.py"


def test_a_table_is_made_and_continued(file, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    options = (
        f"--config={file}",
        f"--workdir={runs}",
        "--set=log_every=2,evaluation.overrides={'scene_seed':5}",
        "--presets=noisy",
        "--ensembles=2",
    )
    assert door(ablate, *options, "--seeds=3") == 0
    shown = capsys.readouterr().out
    assert "| noisy | 1 | 2 |" in shown
    assert "best constant" in shown
    first = json.loads((runs / "noisy/3/evaluation/scenes/metrics.json").read_text())["metrics"]

    trained = []
    train = ablate.train
    monkeypatch.setattr(
        ablate,
        "train",
        lambda c, w, **k: (trained.append((w.parent.name, w.name)), train(c, w, **k)),
    )
    assert door(ablate, *options, "--seeds=3,4") == 0
    assert trained == [("noisy", "4")]
    table = (runs / "ablation.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert "| worse |" in table
    with (runs / "ablation.csv").open() as content:
        rows = {row["preset"]: row for row in csv.DictReader(content)}
    assert rows["noisy"]["seeds"] == "2"
    scores = [
        json.loads((runs / f"noisy/{seed}/evaluation/scenes/metrics.json").read_text())["metrics"]
        for seed in (3, 4)
    ]
    assert scores[0] == first
    mean = (scores[0]["abs_rel"] + scores[1]["abs_rel"]) / 2
    assert float(rows["noisy"]["abs_rel"]) == pytest.approx(mean)
    assert float(rows["noisy"]["abs_rel_std"]) > 0

    # Ensembles of a run are of the same images as its report.
    single, ensemble = (
        json.loads((runs / f"noisy/3/evaluation/{name}/metrics.json").read_text())
        for name in ("scenes", "scenes-ensemble2")
    )
    assert ensemble["evaluation"] == single["evaluation"]
    assert ensemble["evaluation"]["overrides"] == {"scene_seed": 5}
    assert single["protocol"]["pad_multiple"] == 16
    assert ensemble["protocol"] == {**single["protocol"], "ensemble_size": 2}
    assert float(rows["noisy, ensemble of 2"]["abs_rel"]) > 0


@pytest.fixture
def finished(file, tmp_path, monkeypatch):
    """`finished(preset)` makes a run of it, without training.

    Of what is trained and evaluated from then on, `finished.done` has a note.
    """
    done, folder = [], tmp_path / "runs"
    module = ablate._module(str(file))

    def write(output, step, **facts):
        output.mkdir(parents=True, exist_ok=True)
        scores = dict.fromkeys(ablate.METRICS, len(done) + 1.0)
        report = {"metrics": scores, "best_constant": scores, "step": step, **facts}
        (output / "metrics.json").write_text(json.dumps(report))

    def train(config, run, observer=None):
        config = plain(config)
        done.append(f"train to {config['steps']}")
        (run / f"checkpoints/{config['steps']}/params").mkdir(parents=True, exist_ok=True)
        tiny_model.description(config=config).save(run)
        evaluation = ablate.evaluation_options(config)
        write(run / "evaluation/scenes", config["steps"], evaluation=evaluation)

    def run_evaluation(model, output, facts, corrections=0, **options):
        assert corrections == 0 or output.name == f"scenes-corrections{corrections}"
        assert options["limit"] == facts["evaluation"]["limit"]
        done.append((output.name, model.size, options["limit"]))
        write(output, ablate.latest_step(output.parents[1]), **facts)

    def open_model(checkpoint, pad_multiple, ensemble_size=1):
        assert pad_multiple == 16
        assert checkpoint in (str(folder / "noisy/0"), str(folder / "referring/0"))
        return types.SimpleNamespace(size=ensemble_size)

    monkeypatch.setattr(ablate, "train", train)
    monkeypatch.setattr(ablate, "run_evaluation", run_evaluation)
    monkeypatch.setattr(ablate, "open_model", open_model)

    def make(preset):
        run = folder / preset / "0"
        run.mkdir(parents=True)
        train(ablate._config(module, preset, 0, {}), run)
        del done[:]
        return run

    make.done, make.folder, make.file = done, folder, file
    return make


def again(finished, *presets, ensembles=(), corrections=(), **changes):
    """What is done on another call, and its table."""
    del finished.done[:]
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    options = {"seeds": [0], "workdir": finished.folder, "ensembles": ensembles}
    options["corrections"] = corrections
    rows = ablate.ablate(str(finished.file), presets, changes=changes, **options)
    return finished.done, rows


def test_a_finished_run_of_another_config_is_not_shown(finished):
    finished("plain")
    assert again(finished, "plain")[0] == []
    with pytest.raises(UserError, match=r"another optimizer\.learning_rate \(0\.001, now 0\.1\)"):
        again(finished, "plain", optimizer__learning_rate=0.1)
    with pytest.raises(UserError, match="is trained for 2 steps already: give steps=2 or more"):
        again(finished, "plain", steps=1)
    assert again(finished, "plain", log_every=7)[0] == []
    assert again(finished, "plain", evaluation__limit=1)[0] == ["train to 2"]


def test_ensembles_are_those_of_the_run(finished):
    finished("noisy")
    two, four = "scenes-ensemble2", "scenes-ensemble4"
    done, rows = again(finished, "noisy", ensembles=[2, 4])
    assert done == [(two, 2, 2), (four, 4, 2)]
    assert list(rows) == ["noisy", "noisy, ensemble of 2", "noisy, ensemble of 4"]
    assert again(finished, "noisy", ensembles=[2, 4])[0] == []
    done, rows = again(finished, "noisy", ensembles=[2], steps=5)
    assert done == ["train to 5", (two, 2, 2)]
    assert [row[0].steps for row in rows.values()] == [5, 5]
    done, rows = again(finished, "noisy", ensembles=[2, 4], steps=5, evaluation__limit=1)
    assert done == ["train to 5", (two, 2, 1), (four, 4, 1)]


def test_what_looks_for_texts_is_corrected(finished):
    finished("referring")
    done, rows = again(finished, "referring", corrections=[1, 3])
    assert done == [("scenes-corrections1", 1, 2), ("scenes-corrections3", 1, 2)]
    assert list(rows) == ["referring", "referring, 1 corrected", "referring, 3 corrected"]
    assert again(finished, "referring", corrections=[3])[0] == []


def test_what_does_not_fit_is_named(file, tmp_path, capsys):
    with pytest.raises(UserError, match=r"preset 'evil': config\.py has the presets plain, slow"):
        ablate.ablate(str(file), ["evil"])
    with pytest.raises(UserError, match="are evaluated on objects and scenes: make a table for"):
        ablate.ablate(str(file), ["plain", "elsewhere"], workdir=tmp_path / "runs")
    with pytest.raises(UserError, match="no config file"):
        ablate.ablate(str(tmp_path / "gone.py"))
    with pytest.raises(UserError, match="--set does not fit"):
        ablate.ablate(str(file), ["plain"], changes={"evil.key": 1}, workdir=tmp_path / "runs")
    for flag, complaint in (("--set=steps", "no KEY=VALUE"), ("--seeds=a", "not whole numbers")):
        assert door(ablate, f"--config={file}", flag) == 1
        assert complaint in capsys.readouterr().err
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="no dict PRESETS"):
        ablate.ablate(str(tmp_path / "empty.py"))
    assert door(ablate, f"--config={file}", "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in listed[:3]] == [["plain"], ["slow"], ["noisy", "worse"]]
    assert listed[3] == "config.py has the presets plain, slow, noisy, large, elsewhere, referring"


def test_every_preset_that_a_file_makes_is_taken(finished):
    run = finished("large")
    assert again(finished, "large")[0] == []
    assert Description.load(run).config["batch_size"] == 16
