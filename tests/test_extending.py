"""docs/extending.md works as it is written."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import tiny_run
from ml_collections import ConfigDict
from tiny_model import quick_compile  # noqa: F401

from jaxpercept import PerceptionPipeline, presets, tasks
from jaxpercept.errors import UserError
from jaxpercept.training.loop import train

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


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("decoder", ["vae", "dpt"])
def test_the_walk(edges, tmp_path, rng, decoder):
    config: ConfigDict = edges["get_config"]()
    config.checkpoint = str(tiny_run.base(tmp_path / "base"))
    config.resolution, config.steps, config.batch_size = (16, 24), 2, 4
    if decoder == "dpt":  # as the page says
        config.method.decoder = "dpt"
        config.random_init, config.trainable = ("head",), ("unet/", "head/")
        config.method.latent_weight = 0.0
    train(config, tmp_path / "run", mesh=tiny_model.one_device())
    pipe = PerceptionPipeline.from_pretrained(tmp_path / "run")
    out = pipe(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    assert out.kind == "mask"
    assert out.prediction.shape == (1, 20, 30, 1)
    assert out.prediction.min() >= 0
    assert out.prediction.max() <= 1


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
