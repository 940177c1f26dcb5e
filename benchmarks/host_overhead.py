"""What the training loop adds to each step beyond the compiled step itself, in milliseconds.

    python benchmarks/host_overhead.py

A network so small that a step takes a few milliseconds is trained by `jaxpercept.training.loop`,
and its compiled step is called in a bare Python loop on batches that lie ready on the device. The
difference is the host's work: taking and placing the batch, reading the metrics, the progress bar,
the checks. Runs of the loop differ in two things:

  data     "ready": the same host arrays again and again, which cost nothing to make; or Grain's
           pipeline on a folder of small images, decoded in the background.
  logging  at every 50th step, or at every step.

All runs take turns, `--repeats` times; starts, ends and the first steps are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxpercept.config import base_config
from jaxpercept.training import clock, loop, sharding
from jaxpercept.training.setup import set_up

SIZE = (16, 24)
WINDOW = 50  # steps between two readings of the clock
UNET = {
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": 96,  # the width of sd-tiny's prompt
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}


class ReadyBatches:
    """Stands in for Grain's pipeline: an endless iterator over batches in memory."""

    def __init__(self, batches: list[dict[str, np.ndarray]]):
        self._batches = itertools.cycle(batches)
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> ReadyBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return dict(next(self._batches))

    def get_state(self) -> dict[str, int]:
        return {"next_example": 0}

    def close(self) -> None:
        """Nothing runs in the background."""


def make_folder(folder: Path, images: int = 16) -> Path:
    """A folder dataset of random images with depth in millimetres."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for i in range(images):
        rgb = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(rgb).save(folder / "rgb" / f"{i:02}.png")
        depth = rng.integers(500, 9000, SIZE).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{i:02}.png")
    return folder


def make_config(args: argparse.Namespace, folder: Path) -> ConfigDict:
    """One-step depth on the folder, nothing saved or evaluated before the end."""
    c = base_config()
    c.resolution, c.batch_size, c.steps = SIZE, args.batch, args.steps
    c.random_init = ("unet", "vae")
    c.trainable = ("unet/", "vae/quant_conv")  # what is random may not all be frozen
    c.architecture = {"unet": UNET, "vae": VAE}
    c.data.mixture = {"folder": 1.0}
    c.data.options = {"folder": {"data_dir": str(folder), "depth_scale": 1000.0}}
    c.data.num_workers = args.workers
    c.save_every = args.steps + 1
    c.log_every = WINDOW
    return c


def read_batches(config: ConfigDict, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Batches as the loop gets them from Grain."""
    iterator = iter(loop.open_data(config, set_up(config)))
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


class Runs:
    """Runs of the real loop, and of a bare one, that share one compiled step."""

    def __init__(self, batches: list[dict[str, np.ndarray]]):
        self.batches = batches
        self._compiled: tuple[Any, dict[str, Any]] | None = None

    def _compile_step(self, step_fn: Any, state: Any, frozen: Any, batch: Any, *rest: Any) -> Any:
        """In the place of the loop's: compiles in the first run, and keeps what it was given."""
        if self._compiled is None:
            self._compiled = clock.compile_step(step_fn, state, frozen, batch, *rest)
            self._state, self._frozen = jax.tree.map(jnp.copy, state), frozen
        return self._compiled

    def loop(self, config: ConfigDict, *, ready: bool) -> list[float]:
        """Milliseconds a step of each window of `train`, as its metrics.jsonl has them.

        ready: batches from memory instead of the config's dataset.
        """
        with tempfile.TemporaryDirectory() as workdir, contextlib.ExitStack() as stack:
            patch = functools.partial(mock.patch.object, loop)
            stack.enter_context(patch("compile_step", self._compile_step))
            if ready:
                stand_in = ReadyBatches(self.batches)
                stack.enter_context(patch("make_train_dataset", lambda *_, **__: stand_in))
            loop.train(config, Path(workdir))
            lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["step_seconds"] for line in lines]
        n = WINDOW // config.log_every
        windows = [sum(seconds[i : i + n]) / n for i in range(0, config.steps // WINDOW * n, n)]
        return [1e3 * s for s in windows[1:-1]]  # without the first steps and the last save

    def bare(self, windows: int) -> list[float]:
        """Milliseconds a step of the compiled step in a loop of its own, after a run of `loop`."""
        step, mesh = self._compiled[0], sharding.make_mesh()
        ready = itertools.cycle([sharding.put_batch(batch, mesh) for batch in self.batches])
        times = []
        for _ in range(windows):
            began = time.perf_counter()
            for _ in range(WINDOW):
                self._state, metrics = step(self._state, self._frozen, next(ready))
            jax.block_until_ready((self._state, metrics))
            times.append(1e3 * (time.perf_counter() - began) / WINDOW)
        return times[1:-1]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=500, help=f"of a run; a multiple of {WINDOW}")
    p.add_argument("--batch", type=int, default=8, help="images a step")
    p.add_argument("--workers", type=int, default=0, help="Grain's processes; 0: a thread")
    p.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turns")
    p.add_argument("--output", type=Path, help="write all figures here, as JSON")
    args = p.parse_args()
    if args.steps % WINDOW or args.steps < 4 * WINDOW:
        p.error(f"--steps must be a multiple of {WINDOW}, at least {4 * WINDOW}")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args, make_folder(Path(folder) / "data"))
        every = config.copy_and_resolve_references()
        every.log_every = 1
        batches = read_batches(config)
        kinds = Runs(batches)
        kinds.loop(config, ready=True)  # compiles
        runs = {
            "bare loop, ready batches": lambda: kinds.bare(args.steps // WINDOW),
            f"train, ready batches, logging every {WINDOW}": lambda: kinds.loop(config, ready=True),
            "train, ready batches, logging every step": lambda: kinds.loop(every, ready=True),
            f"train, Grain's pipeline, logging every {WINDOW}": (
                lambda: kinds.loop(config, ready=False)
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name] += run()

    base = times["bare loop, ready batches"]
    rows = []
    for name, values in times.items():
        least, middle = min(values), median(values)
        added = f"{least - min(base):+.2f} / {middle - median(base):+.2f}"
        row = {"": name, "ms a step": f"{least:.2f} / {middle:.2f}", "beyond the step": added}
        rows.append(row)
    print(f"\nLeast / median over windows of {WINDOW} steps")
    common.print_table(rows)
    results = {"machine": common.machine("cpu"), "options": vars(args), "milliseconds": times}
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
