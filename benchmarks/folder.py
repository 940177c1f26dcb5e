"""A folder of images: `python -m jaxpercept.predict` beside a loop of diffusers' pipeline.

    python benchmarks/folder.py --images photos/                       # sd-tiny at 128 px
    python benchmarks/folder.py --images photos/ --processing-resolution 512
    python benchmarks/folder.py --images photos/ more/ --count 50 --checkpoint runs/depth
    python benchmarks/folder.py --images photos/ --checkpoint prs-eth/marigold-depth-v1-1
    python benchmarks/folder.py --images photos/ --count 3 --repeats 1                # a smoke test

Both open the same model, read every image, predict, and write the values, a coloured picture and a
16-bit picture of each; jaxpercept's part is `jaxpercept.predict.predict` whole, which writes a JSON
file, too. A one-step model is made ready for diffusers by `convert --layout=marigold`; the default
is `sd-tiny` taken for a depth model, which costs as much as a trained one. A Marigold folder is
opened by both as it is: each draws its own noise, and the predictions are not compared.

jaxpercept's "first run" compiles everything; a "next run" is a new start that finds the programs on
disk, as every start of the command does with JAX_COMPILATION_CACHE_DIR=DIR and
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 in the environment. Next runs and the loop take turns.
Imports are not timed. Of the programs counted, `network` and `crop` depend on the processing size,
`resize` on the image's own size, too. Wants the extra `torch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import common
import jax
import numpy as np
from PIL import Image

from jaxpercept.checkpoints.load import EMBEDDED, load_model
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.convert import convert
from jaxpercept.data.readers import RGB_SUFFIXES
from jaxpercept.inference.predictor import processing_size
from jaxpercept.predict import predict

LIMIT = 1e-4
"""Predictions that differ by more are not the same."""
RESOLUTION = (96, 128)
"""What sd-tiny's depth models are trained at: their default processing resolution is 128."""
GROUPS = {
    "encode": "network",
    "_predict_rows": "network",
    "_resize_and_pad": "resize",
    "_resize_back": "resize",
    "_crop": "crop",
}
"""The programs of `inference.predictor`, by the names that JAX compiles them under."""


# ---- what is compiled ----------------------------------------------------------------------------


@dataclasses.dataclass
class Programs:
    """What XLA compiled, or read from the disk instead, by group; seconds of both with lowering."""

    compiled: Counter[str] = dataclasses.field(default_factory=Counter)
    read: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def rows(self) -> list[dict[str, str]]:
        """A table with one line for each group."""
        names = sorted(self.compiled | self.read, key=lambda name: (name == "other", name))
        return [
            {
                "programs": name,
                "compiled": str(self.compiled[name]),
                "from disk": str(self.read[name]),
                "s": f"{self.seconds[name]:.2f}",
            }
            for name in names
        ]


@contextmanager
def programs() -> Iterator[Programs]:
    """Count the programs that become ready within the block."""
    found, hits = Programs(), []

    def on_event(event: str, **_: Any) -> None:
        # Told before the end of the compilation that it spared.
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    def on_duration(event: str, seconds: float, *, fun_name: str = "", **_: Any) -> None:
        name = fun_name.removeprefix("jit(").removesuffix(")")
        group = GROUPS.get(name, "other")
        if event == "/jax/core/compile/backend_compile_duration":
            (found.read if hits else found.compiled)[group] += 1
            hits.clear()
        elif event != "/jax/core/compile/jaxpr_to_mlir_module_duration":
            return
        found.seconds[group] += seconds

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)


# ---- images and models ---------------------------------------------------------------------------


def choose_images(folders: list[Path], count: int, target: Path) -> list[Path]:
    """Link `count` images, spread evenly over all there are, into a new folder."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"--images {folder} is no folder: name one or more folders of images.")
        found += sorted(p for p in folder.rglob("*") if p.suffix.lower() in RGB_SUFFIXES)
    if len(found) < count:
        sys.exit(f"--images holds {len(found)} images: name more folders, or a lower --count.")
    target.mkdir()
    for number in range(count):
        path = found[number * len(found) // count].resolve()
        (target / f"{number:04}{path.suffix.lower()}").symlink_to(path)
    return sorted(target.iterdir())


def one_step_export(folder: Path) -> str:
    """`sd-tiny` as a one-step depth model that was not trained; its predictions mean nothing."""
    description, params = load_model(EMBEDDED)
    networks = ("unet", "vae")
    description = dataclasses.replace(
        description,
        components={name: description.components[name] for name in networks},
        method={"name": "one_step", "inference_timestep": 999},
        task="depth",
        resolution=RESOLUTION,
        model_index={},
        base_checkpoint=EMBEDDED,
    )
    save_export(folder, description, {name: params[name] for name in (*networks, "prompt")})
    return str(folder)


def is_marigold(checkpoint: str) -> bool:
    """Whether diffusers opens it as it is: Marigold's own folder, or no folder but a hub id."""
    index = Path(checkpoint) / "model_index.json"
    if not Path(checkpoint).exists():
        return checkpoint != EMBEDDED
    return index.is_file() and "Marigold" in json.loads(index.read_text()).get("_class_name", "")


# ---- the two ways --------------------------------------------------------------------------------


class Loop:
    """What a user of diffusers writes."""

    def __init__(self, checkpoint: str, images: list[Path], output: Path, args: argparse.Namespace):
        import torch
        from diffusers import MarigoldDepthPipeline
        from diffusers.utils import load_image
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        common.use_torch_threads()
        self.open, self.read = MarigoldDepthPipeline.from_pretrained, load_image
        self.device = common.torch_device(args.device)
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.checkpoint, self.images, self.output = checkpoint, images, output
        self.resolution = args.processing_resolution
        self.predicting: list[float] = []
        """Seconds in the pipeline's calls alone, of each run."""
        output.mkdir()

    def __call__(self) -> None:
        """Open the model, and predict image by image."""
        pipe = self.open(self.checkpoint).to(self.device)
        pipe.unet.to(memory_format=self.layout)
        pipe.vae.to(memory_format=self.layout)
        pipe.set_progress_bar_config(disable=True)
        self.predicting.append(0.0)
        for path in self.images:
            image = self.read(str(path))
            began = time.perf_counter()
            depth = pipe(image, processing_resolution=self.resolution).prediction
            self.predicting[-1] += time.perf_counter() - began
            np.save(self.output / f"{path.stem}.npy", depth[0, ..., 0])
            shown = pipe.image_processor.visualize_depth(depth)[0]
            shown.save(self.output / f"{path.stem}.png")
            # diffusers' own export asks Pillow 13 for what it no longer does.
            precise = np.rint(depth[0, ..., 0] * 65535).astype(np.uint16)
            Image.fromarray(precise).save(self.output / f"{path.stem}_16bit.png")


def run_door(checkpoint: str, images: Path, output: Path, args: argparse.Namespace) -> None:
    """What `python -m jaxpercept.predict` does."""
    failures = predict(
        checkpoint,
        images,
        output,
        batch_size=args.batch,
        pad_multiple=args.pad_multiple,
        processing_resolution=args.processing_resolution,
    )
    if failures:
        sys.exit("\n".join(failures))


# ---- comparison ----------------------------------------------------------------------------------


def largest_difference(ours: Path, theirs: Path, images: list[Path]) -> float:
    """Of the predictions that both wrote."""
    pairs = ([np.load(folder / f"{path.stem}.npy") for folder in (ours, theirs)] for path in images)
    return max(float(np.abs(a.squeeze() - b).max()) for a, b in pairs)


def speed_row(label: str, seconds: list[float], torch: list[float], count: int) -> dict[str, str]:
    """A row of the table: least and median seconds, images a second, and the ratio to torch."""
    figures = [(f(seconds), f(torch)) for f in (min, median)]
    return {
        "": label,
        "s": " / ".join(f"{own:.4g}" for own, _ in figures),
        "images/s": " / ".join(f"{count / own:.3g}" for own, _ in figures),
        "ratio to torch": " / ".join(f"{own / other:.2f}" for own, other in figures),
    }


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run everything; prints the tables and returns the figures."""
    images = choose_images(args.images, args.count, scratch / "images")
    checkpoint = args.checkpoint
    if checkpoint == EMBEDDED:
        checkpoint = one_step_export(scratch / "export")
    same = not is_marigold(checkpoint)
    other = checkpoint
    if same:
        converted = scratch / "marigold"
        convert(checkpoint, converted, format="diffusers", layout="marigold", base=args.base)
        other = str(converted)
    loop = Loop(other, images, scratch / "torch", args)

    def door() -> None:
        run_door(checkpoint, scratch / "images", scratch / "jaxpercept", args)

    with programs() as first:
        began = time.perf_counter()
        door()
        cold = time.perf_counter() - began
    with programs() as second:
        door()
    times = common.interleave({"jaxpercept": door, "torch": loop}, args.repeats, warmup=0)

    written = [scratch / "jaxpercept" / f"{path.stem}.npy" for path in images]
    sizes = {np.load(path).shape[:2] for path in written}
    record = json.loads(written[0].with_suffix(".json").read_text())
    resolution = record["processing_resolution"]
    worked = {processing_size(size, resolution) for size in sizes}
    print(
        f"\n{len(images)} images of {len(sizes)} sizes, {len(worked)} at a processing resolution "
        f"of {resolution}; batch size {args.batch or 1}"
    )
    rows = [
        speed_row("jaxpercept, first run", [cold], times["torch"], len(images)),
        speed_row("jaxpercept, next run", times["jaxpercept"], times["torch"], len(images)),
        speed_row("torch, the loop", times["torch"], times["torch"], len(images)),
        speed_row("torch, its calls alone", loop.predicting, times["torch"], len(images)),
    ]
    common.print_table(rows)
    for label, counted in (("first run", first), ("next run", second)):
        print(f"Programs, {label}")
        common.print_table(counted.rows())
    difference = None
    if same:
        difference = largest_difference(scratch / "jaxpercept", scratch / "torch", images)
        remark = "" if difference < LIMIT else f": they DIFFER, by {LIMIT} or more"
        print(f"Largest difference of the predictions: {difference:.1e}{remark}\n")
    return {
        "seconds": {"first": cold, **times, "torch_calls": loop.predicting},
        "images": len(images),
        "image_sizes": len(sizes),
        "processing_sizes": len(worked),
        "programs": {"first": first.rows(), "next": second.rows()},
        "max_difference": difference,
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=Path, nargs="+", default=[Path("/nonexistent")], help="folders")
    p.add_argument("--count", type=int, default=50, help="images to take; default: 50")
    p.add_argument("--checkpoint", default=EMBEDDED, help="a depth model; default: sd-tiny")
    p.add_argument("--base", help="that has the text encoder, where the checkpoint has none")
    p.add_argument("--processing-resolution", type=int, help="long side; default: the model's")
    p.add_argument("--pad-multiple", type=int, default=0, help="jaxpercept's; default: diffusers'")
    p.add_argument("--batch", type=int, help="jaxpercept's images at a time; default: 1")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="for both frameworks")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each, in turns; default 3")
    p.add_argument("--channels-last", action="store_true", help="torch in its NHWC memory format")
    p.add_argument("--output", type=Path, help="write all figures here, as JSON")
    args = p.parse_args()
    if args.count < 1:
        p.error("--count is at least 1")
    common.use_device(args.device)
    results: dict[str, Any] = {"machine": common.machine(args.device), "options": vars(args)}
    with tempfile.TemporaryDirectory() as scratch:
        jax.config.update("jax_compilation_cache_dir", str(Path(scratch) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        results |= compare(args, Path(scratch))
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
