"""A training run of seconds: the tiny model on procedural scenes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_model
from ml_collections import ConfigDict

from jaxpercept.config import base_config
from jaxpercept.training.loop import train
from jaxpercept.training.sharding import make_mesh


def config(checkpoint: Path | str, **changes: Any) -> ConfigDict:
    """8 images of 16 x 24 a step; `changes` by dotted key, with __ for the dot."""
    c = base_config()
    c.checkpoint = str(checkpoint)
    c.resolution = (16, 24)
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


def base(folder: Path) -> Path:
    """A checkpoint to start from, with fresh random weights."""
    return tiny_model.save(folder, np.random.default_rng())


def run(c: ConfigDict, workdir: Path, devices: int = 1, **mesh: int):
    """Train on the first `devices` devices; the final state and the logged lines."""
    state = train(c, workdir, mesh=make_mesh(devices=jax.devices()[:devices], **mesh))
    return state, metrics(workdir)


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl written so far; one still being written is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(lines: list[dict[str, float]], name: str = "loss") -> np.ndarray:
    """One metric, step by step."""
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line[name] for line in lines])


def leaves(state: Any) -> dict[str, np.ndarray]:
    """Every array of a state on the host, by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def assert_bit_equal(left: Any, right: Any) -> None:
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path, strict=True)


def command(
    config_file: Path, workdir: Path, *arguments: str, module: str = "jaxpercept.train", **env: str
) -> subprocess.Popen:
    """The train command in a process of its own, on two CPU devices unless `env` says otherwise."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            module,
            f"--config={config_file}",
            f"--workdir={workdir}",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} | env,
    )


def write_config(path: Path, c: ConfigDict) -> Path:
    """A config file of these values."""
    path.write_text(
        "import json\n"
        "from jaxpercept.config import base_config\n"
        f"VALUES = json.loads({c.to_json()!r})\n"
        "def get_config():\n"
        "    c = base_config()\n"
        "    c.update(VALUES)\n"
        "    return c\n"
    )
    return path
