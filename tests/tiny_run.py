"""Training runs of seconds: configs, data and checkpoints for the tests of the loop."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_model
from ml_collections import ConfigDict
from PIL import Image

import jaxpercept
from jaxpercept.checkpoints import diffusers_write
from jaxpercept.checkpoints.diffusers import Checkpoint
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.config import base_config
from jaxpercept.models.functional import functional

SIZE = (16, 24)
UNET = dataclasses.replace(
    tiny_model.COMPONENTS["unet"],
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
)
"""Without attention, which there is little to compile of then."""
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [4],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
}


def config(checkpoint: Path | str, **changes: Any) -> ConfigDict:
    """One-step depth, 8 images a step; `changes` by dotted key, with __ for the dot."""
    c = base_config()
    c.checkpoint = str(checkpoint)
    c.resolution = SIZE
    c.steps = 4
    c.batch_size = 8
    c.seed = 7
    c.log_every = 1
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 2
    c.optimizer.decay_steps = c.get_ref("steps")
    c.evaluation.dataset = ""
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


def autoencoder_config(**changes: Any) -> ConfigDict:
    """A small autoencoder from scratch on procedural scenes: quicker to compile."""
    scratch = {"random_init": ("vae",), "trainable": ("vae/",), "task": ""}
    c = config("", **{**scratch, **changes})
    c.method = {"name": "autoencoder"}
    c.architecture = {"vae": AUTOENCODER}
    return c


def base(folder: Path) -> Path:
    """An Orbax export to start from, with fresh random weights and little to compile."""
    rng = np.random.default_rng()
    components = {**tiny_model.COMPONENTS, "unet": UNET}
    params = {k: functional(c).init(int(rng.integers(2**31))) for k, c in components.items()}
    prompt = rng.normal(size=(1, 2, tiny_model.WIDTH)).astype(np.float32)
    params["prompt"] = {"embedding": prompt}
    save_export(folder, tiny_model.description(components=components), params)
    return folder


def text_to_image(folder: Path) -> Path:
    """A diffusers folder to start from, with a text encoder and sd-tiny's tokenizer."""
    rng = np.random.default_rng()
    tokenizer = Path(jaxpercept.__file__).parent / "assets/sd-tiny/tokenizer"
    configs = {**tiny_model.COMPONENTS, "unet": UNET, "text_encoder": tiny_model.TEXT_ENCODER}
    params = {k: functional(c).init(int(rng.integers(2**31))) for k, c in configs.items()}
    checkpoint = Checkpoint(configs, params, tiny_model.SCHEDULER, tokenizer)
    diffusers_write.save(folder, checkpoint, dtype="float32")
    return folder


def dataset(folder: Path, images: int = 12) -> Path:
    """A folder dataset with holes in its depth: `rgb/`, and `depth/` in millimetres."""
    rng = np.random.default_rng()
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for i in range(images):
        rgb = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        depth = rng.integers(500, 9000, SIZE).astype(np.uint16)
        depth[rng.random(SIZE) < 0.01 * i] = 0
        Image.fromarray(rgb).save(folder / "rgb" / f"{i:02}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{i:02}.png")
    return folder


def on_folder(folder: Path) -> dict[str, Any]:
    """Changes to a config that train on a folder dataset."""
    return {
        "data__mixture": {"folder": 1.0},
        "data__options": {"folder": {"data_dir": str(folder), "depth_scale": 1000.0}},
    }


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl written so far; one still being written is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def facts(workdir: Path) -> dict[str, Any]:
    """What run.json holds."""
    return json.loads((workdir / "run.json").read_text())


def curve(workdir: Path, name: str = "loss") -> np.ndarray:
    """One metric, step by step from the first."""
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line[name] for line in lines])


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree on the host, by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_bit_equal(left: Any, right: Any) -> None:
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path, strict=True)


def write_config(path: Path, c: ConfigDict) -> Path:
    """A config file of these values."""
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    c = ConfigDict({c.to_dict()!r})\n"
        "    c.optimizer.decay_steps = c.get_ref('steps')\n"
        "    return c\n"
    )
    return path


def command(
    config_file: Path,
    workdir: Path,
    *arguments: str,
    program: tuple[str, ...] = ("-m", "jaxpercept.train"),
    **env: str,
) -> subprocess.Popen:
    """The train command in a process of its own, on two CPU devices unless `env` says otherwise.

    Compiled programs are kept beside the config file: the same run compiles once.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(config_file.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = [f"--config={config_file}", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        [sys.executable, *program, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings, **env},
    )


def train_door(preparation: str) -> tuple[str, ...]:
    """The program that runs some lines of Python, then the train command."""
    run = "cli.run(train.main, required=train.REQUIRED, flag_values=train.FLAGS)"
    return "-c", f"{preparation}\nfrom jaxpercept import cli, train\n{run}\n"


def finish(*processes: subprocess.Popen, timeout: float = 300) -> list[tuple[int, str]]:
    """Exit status and stderr of each; none is left running, also where one never ends."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module", name="base")
def base_of_module(tmp_path_factory):
    return base(tmp_path_factory.mktemp("base") / "export")


@pytest.fixture(scope="module", name="data")
def data_of_module(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data"))
