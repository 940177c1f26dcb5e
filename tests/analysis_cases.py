"""A small model of noise and three images, for the tests of analyses."""

import dataclasses

import numpy as np
import pytest
import tiny_model
from PIL import Image
from test_stepwise import TOKENS

from jaxpercept.checkpoints.orbax import save_export

SIZE, STEPS = (16, 24), 6
COURSE = {"steps": STEPS, "starts": 3, "bins": 3}


def description(noise: str, scheduler=None, **changes):
    unet = dataclasses.replace(
        tiny_model.COMPONENTS["unet"],
        in_channels=4 if noise == "image" else 8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    method = {"name": "denoising", "noise": noise, **changes.pop("method", {})}
    return tiny_model.description(
        components={**tiny_model.COMPONENTS, "unet": unet, **changes.pop("components", {})},
        scheduler={**tiny_model.SCHEDULER, "clip_sample": False, **(scheduler or {})},
        method=method,
        resolution=SIZE,
        **changes,
    )


def weights(described, rng):
    return tiny_model.params(rng, described.components, TOKENS)


@pytest.fixture(scope="module", name="params")
def params_of_module():
    return weights(description("gaussian"), np.random.default_rng())


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_of_module(tmp_path_factory, params):
    """A model of noise, its output the last estimate of x_0."""
    folder = tmp_path_factory.mktemp("model") / "noise"
    save_export(folder, description("gaussian"), params)
    return folder


@pytest.fixture(scope="module", name="data")
def data_of_module(tmp_path_factory):
    """Three images; where one has no depth is a hole."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng()
    for name in ("rgb", "depth"):
        (folder / name).mkdir()
    for i in range(3):
        rgb = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        depth = (1000 + np.add.outer(np.arange(16) * 90, np.arange(24) * 40)).astype(np.uint16)
        depth += rng.integers(0, 500, SIZE).astype(np.uint16)
        depth[2 * i : 3 * i, 1 : 5 * i] = 0
        Image.fromarray(rgb).save(folder / "rgb" / f"{i}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{i}.png")
    return folder
