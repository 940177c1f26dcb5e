"""docs/extending.md works as it is written."""

import functools
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from commands import door, restore_logging  # noqa: F401
from PIL import Image
from tiny_model import one_device

from jaxpercept import predict, presets, tasks, train
from jaxpercept.checkpoints.description import Description
from jaxpercept.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks() -> list[str]:
    """The page's Python code."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def edges(monkeypatch):
    """The page's task, in the table; and its config."""
    task, config = blocks()
    names = {"__name__": "edges"}
    exec(compile(task, "docs/extending.md: task", "exec"), names)
    monkeypatch.setitem(tasks.TASKS, "edges", names["EdgesTask"])
    exec(compile(config, "docs/extending.md: config", "exec"), names)
    return names


@pytest.mark.usefixtures("restore_logging")
# How ml_collections reads a config file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("decoder", ["vae", "dpt"])
def test_the_walk(edges, tmp_path, monkeypatch, rng, decoder):
    """The page's commands, of a small model, leave the files that the page names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "photos"):
        Path(folder).mkdir()
    Path("configs/edges.py").write_text(blocks()[1])
    for photo in ("a.png", "b.jpg"):
        pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(Path("photos", photo))
    small = {"checkpoint": tiny_run.base(tmp_path / "base"), "resolution": (16, 24), "steps": 2}
    flags = [f"--config.{key}={value}" for key, value in {**small, "batch_size": 4}.items()]
    text = PAGE.read_text()
    if decoder == "dpt":
        said = re.findall(r"--config\.[^\s`]+", text)
        assert len(said) == 4
        flags += shlex.split(" ".join(said))
    (training, of_train), (prediction, of_predict) = re.findall(
        r"^python -m jaxpercept\.(\w+) (.*)$", text, re.MULTILINE
    )
    assert (training, prediction) == ("train", "predict")
    quick = functools.partial(train.train, mesh=one_device())
    monkeypatch.setattr(train, "train", quick)
    flags = [*of_train.split(), *flags]
    monkeypatch.setattr(sys, "argv", ["train", *flags])  # where ml_collections looks for overrides
    assert door(train, *flags) == 0
    components = Description.load(Path("runs/edges")).components
    assert ("head" in components) == (decoder == "dpt")
    assert door(predict, *of_predict.split()) == 0
    endings = re.findall(r"`NAME(\S+)`", text)
    assert endings == [".npy", ".png", "_mask.png"]
    for name in "ab":
        assert all(Path(f"out/{name}{ending}").is_file() for ending in endings)
        edge = np.load(f"out/{name}.npy")
        assert edge.size == 20 * 30
        assert 0 <= edge.min() <= edge.max() <= 1
        with Image.open(f"out/{name}_mask.png") as mask:
            assert mask.size == (30, 20)


def test_the_target_is_what_the_page_says(edges):
    depth = np.ones((1, 8, 8, 1), np.float32)
    depth[:, :, 4:] = 2.0
    valid = np.ones_like(depth, bool)
    target = tasks.get_task("edges", jump=0.05).encode_target({"depth": depth, "valid": valid})
    expected = np.full((8, 8), -1.0)
    expected[:, 3] = 1.0
    np.testing.assert_array_equal(np.asarray(target.image)[0, ..., 0], expected)
    with pytest.raises(UserError, match="has no option 'leap'"):
        tasks.get_task("edges", leap=1.0)
    with pytest.raises(UserError, match="edges has no loss 'angular'"):
        presets.losses(presets.one_step("edges"), angular=1.0)
