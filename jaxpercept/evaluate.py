r"""Evaluate a model on a dataset with ground truth, or on all datasets of the papers' tables.

    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=scenes --limit=64
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=nyuv2 --data_dir=DIR
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=folder --data_dir=DIR
    python -m jaxpercept.evaluate --checkpoint=runs/dis-masks --dataset=masks --data_dir=DIR \
        --held_out=0.1
    python -m jaxpercept.evaluate --checkpoint=runs/seg-camvid --dataset=camvid --data_dir=DIR \
        --split=val
    python -m jaxpercept.evaluate --checkpoint=runs/depth --suite=depth --data_root=DATASETS

--checkpoint takes a training workdir, an Orbax export, or a diffusers folder or hub id. --dataset
names a row of jaxpercept/data/rows/; "folder" takes any DIR with rgb/NAME.* and for every NAME
depth/NAME.png (16-bit, 0 = no measurement, --depth_scale units per metre), normals/NAME.*,
alpha/NAME.* or classes/NAME.png.

What is measured is decided by what the model predicts (docs/evaluation.md): depth, aligned to each
image's truth; normals, per image and over all pixels; masks, mattes, classes, joints. The same for
a trivial prediction, such as the best constant depth, is printed below. --output gets metrics.json,
per_image.csv and predictions.png.

--suite evaluates on every dataset of depth, normals, dis, matting or seg that has a folder of its
name below --data_root, at the papers' resolutions; where the training held out a share of the
files, on that share. --output gets suite.md, suite.csv and suite.png, and for each dataset a
folder; what is absent is listed as absent. The same command again goes on where it was stopped:
what was evaluated with the same weights and options is not evaluated again.

A generalist is evaluated task by task, those that the dataset has the truth of, or only --task.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxpercept import cli
from jaxpercept.data.datasets import open_dataset
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluation import open_model, run_evaluation
from jaxpercept.inference.evaluator import EvalResult
from jaxpercept.inference.measures import ALIGNMENTS
from jaxpercept.inference.opening import DTYPES
from jaxpercept.inference.suite import SUITES, TABLE, Entry, Line, run_suite

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to evaluate.", flag_values=FLAGS)
flags.DEFINE_string("dataset", None, "Name of the dataset.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of the dataset.", flag_values=FLAGS)
flags.DEFINE_enum(
    "suite", None, tuple(SUITES), "All datasets of a table, instead of --dataset.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "data_root",
    None,
    "With --suite: the folder with a folder for each dataset; default: --data_dir.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "depth_scale",
    None,
    "Units of the depth files per metre; default: the dataset's, 1000 for PNG files in a folder.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "output",
    None,
    "Folder to write to; default: evaluation/DATASET (of a suite: evaluation), in the checkpoint's "
    "folder if it is local.",
    flag_values=FLAGS,
)
flags.DEFINE_string("split", None, "Default: the dataset's test split.", flag_values=FLAGS)
flags.DEFINE_float(
    "held_out",
    None,
    "The share that a training kept apart of files that nobody has split: evaluate only those.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("batch_size", 8, "Images at a time.", flag_values=FLAGS)
flags.DEFINE_integer(
    "limit", 0, "Evaluate this many images, spread evenly; 0: all.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "processing_resolution",
    None,
    "Long side in pixels the network works at; 0: the images' own; default: that of the training, "
    "of a suite the papers'.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "alignment",
    None,
    ALIGNMENTS,
    "Fit in depth or, for models of disparity, in disparity; default: the dataset's.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "hce",
    False,
    "Of masks: count the human correction effort, too; slow, needs the extra hce.",
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
flags.DEFINE_list(
    "options",
    None,
    "KEY=VALUE,... of the dataset, such as crop, list_file, columns, normals_axes, first_class.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "corrections",
    0,
    "Of referring segmentation: tell the model of so many other things of each image, such as "
    "another ball, that they are not what its phrase names.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "resume",
    0.5,
    "With --corrections: the share of the steps that are taken before.",
    flag_values=FLAGS,
)
cli.define_model_flags(FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint",)
# What says something about one dataset.
_OF_ONE = (
    *("dataset", "data_dir", "split", "held_out", "options"),
    *("depth_scale", "min_depth", "max_depth", "eval_crop"),
    *("corrections", "resume"),
)


def evaluate(
    checkpoint: str,
    dataset: str,
    *,
    data_dir: str | None = None,
    depth_scale: float | None = None,
    output: str | Path | None = None,
    split: str | None = None,
    held_out: float | None = None,
    batch_size: int = 8,
    limit: int = 0,
    processing_resolution: int | None = None,
    alignment: str | None = None,
    hce: bool = False,
    min_depth: float | None = None,
    max_depth: float | None = None,
    eval_crop: str | None = None,
    options: Mapping[str, Any] | None = None,
    corrections: int = 0,
    resume: float = 0.5,
    **opening: Any,
) -> EvalResult | dict[str, EvalResult]:
    """Evaluate, print the table and write the files, as the module's text says.

    Args:
        checkpoint, dataset, ...: the flags of these names; those of the model as in `open_model`.
        options: of the dataset's row, by name.

    Returns:
        What was found; of a generalist without `task`, for each task.

    Raises:
        UserError: the checkpoint, the dataset or an option does not fit.
    """
    own = {"depth_scale": depth_scale, "min_depth": min_depth, "max_depth": max_depth}
    overrides = dataset_overrides(options, **own, eval_crop=eval_crop, held_out=held_out)
    folder = Path(output) if output else default_output(checkpoint, dataset)
    evaluation = functools.partial(
        run_evaluation,
        dataset=dataset,
        data_dir=data_dir,
        split=split,
        batch_size=batch_size,
        processing_resolution=processing_resolution,
        limit=limit,
        overrides=overrides,
        corrections=corrections,
        resume=resume,
        **_protocol_options(alignment, hce),
    )
    results = {}
    for task, model in open_model(checkpoint, **opening).parts(dataset).items():
        if task and jax.process_index() == 0:
            print(f"{task}:")
        results[task] = evaluation(model, folder / task)
    return results.get("", results)


def evaluate_suite(
    checkpoint: str,
    suite: str,
    data_root: str | Path,
    *,
    output: str | Path | None = None,
    batch_size: int = 8,
    limit: int = 0,
    processing_resolution: int | None = None,
    alignment: str | None = None,
    hce: bool = False,
    **opening: Any,
) -> list[Line]:
    """Evaluate on every dataset of a suite that is there and write the tables.

    Args:
        checkpoint, suite, ...: the flags of these names; those of the model as in `open_model`.

    Returns:
        What became of each dataset.

    Raises:
        UserError: the checkpoint, the suite or an option does not fit.
    """
    model = open_model(checkpoint, identify=True, **opening)
    folder = Path(output) if output else default_output(checkpoint)
    protocol_options = _protocol_options(alignment, hce)
    request = {
        **model.identity,
        "limit": limit,
        "processing_resolution": processing_resolution,
        **protocol_options,
    }

    def one(entry: Entry, data_dir: Path, held_out: float, facts: Mapping[str, Any]) -> EvalResult:
        resolution = entry.resolution if processing_resolution is None else processing_resolution
        return run_evaluation(
            model,
            folder / entry.name,
            facts=facts,
            dataset=entry.dataset,
            data_dir=data_dir,
            split=entry.split,
            batch_size=batch_size,
            processing_resolution=resolution,
            limit=limit,
            pictures=2,
            overrides={"held_out": held_out},
            **protocol_options,
        )

    lines = run_suite(
        suite,
        model.perception.task,
        trained=model.description.config,
        data_root=Path(data_root),
        folder=folder,
        request=request,
        evaluate=one,
    )
    if jax.process_index() == 0:
        print((folder / TABLE).read_text())
        print(folder / TABLE)
    return lines


def _protocol_options(alignment: str | None, hce: bool) -> dict[str, Any]:
    return ({"alignment": alignment} if alignment else {}) | ({"hce": True} if hce else {})


def dataset_overrides(options: Mapping[str, Any] | None, **own: Any) -> dict[str, Any]:
    """What replaces a dataset's row: the flags of their own that are given, and --options.

    Raises:
        UserError: an option has a flag of its own.
    """
    given = {name: value for name, value in own.items() if value is not None}
    for name in options or {}:
        if name in given or name in inspect.signature(open_dataset).parameters:
            raise UserError(f"--options does not take {name}: leave it out, or use its own flag.")
    return {**given, **(options or {})}


def default_output(checkpoint: str, dataset: str = "", kind: str = "evaluation") -> Path:
    """`CHECKPOINT/evaluation/DATASET` for a local checkpoint, else `evaluation/DATASET`."""
    base = Path(checkpoint) if Path(checkpoint).is_dir() else Path()
    return base / kind / dataset


def main() -> int:
    """Read the flags and evaluate; 1 if an evaluation of a suite failed."""
    cli.initialize_distributed()
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    suite, data_root = values.pop("suite"), values.pop("data_root")
    if suite is None:
        if data_root is not None:
            raise UserError("--data_root is of a suite: give --suite, or --data_dir instead.")
        if not values["dataset"]:
            raise UserError("--dataset is required, or --suite: see --help.")
        values["options"] = cli.key_values("options", values["options"] or ())
        evaluate(**values)
        return 0
    if data_root is None:
        data_root, values["data_dir"] = values["data_dir"], None
    if data_root is None:
        raise UserError(
            "--suite needs --data_root or --data_dir, the folder with a folder for each dataset."
        )
    for name in _OF_ONE:
        if values.pop(name) != FLAGS[name].default:
            raise UserError(f"--{name} is of one dataset: leave it out with --suite.")
    lines = evaluate_suite(suite=suite, data_root=data_root, **values)
    failed = [line for line in lines if line.status == "failed"]
    for line in failed:
        print(f"failed: {line.entry.title}: {line.note}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
