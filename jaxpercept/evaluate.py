"""Evaluate a depth model on a dataset with ground truth.

    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=scenes --limit=64
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=nyuv2 --data_dir=DIR
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=folder --data_dir=DIR

--checkpoint takes a training workdir, an Orbax export, or a diffusers folder or hub id written by
this package. --dataset names a row of jaxpercept/data/datasets.py; "folder" takes any DIR with
rgb/NAME.* and depth/NAME.png (16-bit, 0 = no measurement, --depth_scale units per metre).

Predictions are affine-invariant: scale and shift are fitted to each image's truth by least squares,
then the usual depth metrics are averaged over images. The same for the best constant depth is
printed below. --output gets metrics.json, per_image.csv and predictions.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import flags

import jaxpercept
from jaxpercept import cli
from jaxpercept.checkpoints.load import latest_step
from jaxpercept.inference.evaluator import ALIGNMENTS, EvalResult, Evaluator
from jaxpercept.inference.opening import DTYPES, open_perception, perception_of
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.report import table, write_report
from jaxpercept.inference.weights import place_weights
from jaxpercept.training import sharding

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to evaluate.", flag_values=FLAGS)
flags.DEFINE_string("dataset", None, "Name of the dataset.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of the dataset.", flag_values=FLAGS)
flags.DEFINE_float(
    "depth_scale",
    None,
    "Units of the depth files per metre; default: the dataset's, 1000 for PNG files in a folder.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "output",
    None,
    "Folder to write to; default: evaluation/DATASET, in the checkpoint's folder if it is local.",
    flag_values=FLAGS,
)
flags.DEFINE_string("split", None, "Default: the dataset's test split.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "Images at a time.", flag_values=FLAGS)
flags.DEFINE_integer(
    "limit", 0, "Evaluate this many images, spread evenly; 0: all.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "processing_resolution",
    None,
    "Long side in pixels the network works at; 0: the images' own; default: that of the training.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "alignment",
    None,
    ALIGNMENTS,
    "Fit in depth or, for models of disparity, in disparity; default: the dataset's.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "min_depth", None, "Metres below which nothing counts; default: the dataset's.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "max_depth", None, "Metres above which nothing counts; default: the dataset's.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "eval_crop", None, "nyu, eigen, garg or none; default: the dataset's.", flag_values=FLAGS
)
cli.define_model_flags(FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint", "dataset")


def evaluate(
    checkpoint: str,
    dataset: str,
    *,
    data_dir: str | None = None,
    depth_scale: float | None = None,
    output: str | Path | None = None,
    split: str | None = None,
    batch_size: int = 8,
    limit: int = 0,
    processing_resolution: int | None = None,
    alignment: str | None = None,
    min_depth: float | None = None,
    max_depth: float | None = None,
    eval_crop: str | None = None,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
    vae: str | None = None,
    decoder: str | None = None,
    vae_tile: int = 0,
    num_inference_steps: int | None = None,
    ensemble_size: int = 1,
    flip: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> EvalResult:
    """Evaluate, print the table and write the files, as the module's text says.

    Raises:
        UserError: the checkpoint, the dataset or an option does not fit.
    """
    description, params = open_perception(
        checkpoint, task=task, family=family, base=base, vae=vae, decoder=decoder
    )
    perception = perception_of(description, dtype=dtype, vae_tile=vae_tile, checkpoint=checkpoint)
    options = Options(
        num_steps=num_inference_steps, ensemble_size=ensemble_size, flip=flip, seed=seed
    )
    check_options(perception, options)
    mesh = sharding.make_mesh()
    overrides = {"min_depth": min_depth, "max_depth": max_depth, "eval_crop": eval_crop}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if eval_crop == "none":
        overrides["eval_crop"] = None
    evaluator = Evaluator(
        perception,
        dataset,
        mesh=mesh,
        resolution=description.resolution or (480, 640),
        data_dir=data_dir,
        depth_scale=depth_scale,
        split=split,
        batch_size=batch_size,
        processing_resolution=processing_resolution,
        limit=limit,
        alignment=alignment,
        options=options,
        overrides=overrides,
    )
    result = evaluator.run(place_weights(params, dtype, mesh))
    if jax.process_index() == 0:
        print(table(result))
        folder = Path(output) if output else default_output(checkpoint, dataset)
        facts = {
            "checkpoint": checkpoint,
            "step": latest_step(Path(checkpoint)),
            "base_checkpoint": description.base_checkpoint,
            "kind": perception.task.kind,
            "dtype": dtype,
            "version": jaxpercept.__version__,
            "command": " ".join(sys.argv),
        }
        for path in write_report(folder, result, facts):
            print(path)
    return result


def default_output(checkpoint: str, dataset: str) -> Path:
    """`CHECKPOINT/evaluation/DATASET` for a local checkpoint, else `evaluation/DATASET`."""
    base = Path(checkpoint) if Path(checkpoint).is_dir() else Path()
    return base / "evaluation" / dataset


def main() -> None:
    """Read the flags and evaluate."""
    cli.initialize_distributed()
    evaluate(**{name: FLAGS[name].value for name in OWN_FLAGS})


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
