"""The table of ablations: made, continued, and refused."""

import csv
import json

import pytest
import tiny_run
from commands import door, restore_logging  # noqa: F401
from tiny_model import quick_compile  # noqa: F401

from jaxpercept import ablate
from jaxpercept.errors import UserError

pytestmark = pytest.mark.usefixtures("restore_logging")

FILE = """
import tiny_run
from jaxpercept import presets

def get_config(preset=""):
    config = tiny_run.config({base!r}, steps=2, batch_size=8)
    config.evaluation.update({{"dataset": "scenes", "limit": 2, "batch_size": 2}})
    return PRESETS[preset](config)

def _slow(config):
    config.optimizer.learning_rate = 1e-5
    return config

PRESETS = {{"plain": lambda config: config, "slow": _slow}}
PAPER = {{"plain": "worse"}}
"""


@pytest.fixture
def file(tmp_path):
    base = tiny_run.base(tmp_path / "base")
    (tmp_path / "config.py").write_text(FILE.format(base=str(base)))
    return tmp_path / "config.py"


@pytest.mark.usefixtures("quick_compile")
def test_a_table_is_made_and_continued(file, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    options = (f"--config={file}", f"--workdir={runs}", "--set=log_every=2", "--presets=plain")
    assert door(ablate, *options, "--seeds=3") == 0
    shown = capsys.readouterr().out
    assert "| plain | 1 | 2 |" in shown
    assert "best constant" in shown
    first = json.loads((runs / "plain/3/evaluation/scenes/metrics.json").read_text())["metrics"]

    trained = []
    train = ablate.train
    monkeypatch.setattr(
        ablate,
        "train",
        lambda c, w, **k: (trained.append((w.parent.name, w.name)), train(c, w, **k)),
    )
    assert door(ablate, *options, "--seeds=3,4") == 0
    assert trained == [("plain", "4")]
    table = (runs / "ablation.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert "| worse |" in table
    with (runs / "ablation.csv").open() as content:
        rows = {row["preset"]: row for row in csv.DictReader(content)}
    assert rows["plain"]["seeds"] == "2"
    scores = [
        json.loads((runs / f"plain/{seed}/evaluation/scenes/metrics.json").read_text())["metrics"]
        for seed in (3, 4)
    ]
    assert scores[0] == first
    mean = (scores[0]["abs_rel"] + scores[1]["abs_rel"]) / 2
    assert float(rows["plain"]["abs_rel"]) == pytest.approx(mean)
    assert float(rows["plain"]["abs_rel_std"]) > 0


def test_what_does_not_fit_is_named(file, tmp_path, capsys):
    with pytest.raises(UserError, match="no preset 'evil': use plain, slow"):
        ablate.ablate(str(file), ["evil"])
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
    assert capsys.readouterr().out.split() == ["plain", "worse", "slow"]
