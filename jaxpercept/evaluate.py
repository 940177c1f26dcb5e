"""Evaluate a model on a dataset with ground truth, or on all datasets of the papers' tables.

    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=scenes --limit=64
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=nyuv2 --data_dir=DIR
    python -m jaxpercept.evaluate --checkpoint=runs/depth --dataset=folder --data_dir=DIR
    python -m jaxpercept.evaluate --checkpoint=runs/a --dataset=masks --data_dir=D --held_out=0.1
    python -m jaxpercept.evaluate --checkpoint=runs/seg --dataset=camvid --data_dir=DIR --split=val
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
name below --data_root, at the papers' resolutions. --output gets suite.md, suite.csv and suite.png,
and for each dataset a folder; what is absent is listed as absent. The same command again goes on
where it was stopped: what was evaluated with the same weights and options is not evaluated again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

import jaxpercept
from jaxpercept import cli
from jaxpercept.checkpoints.card import weights_hash
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluator import EvalResult, Evaluator
from jaxpercept.inference.measures import ALIGNMENTS
from jaxpercept.inference.opening import DTYPES, open_perception, perception_of
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.predictor import Params, Predictor
from jaxpercept.inference.report import table, write_report
from jaxpercept.inference.suite import SUITES, TABLE, Entry, Line, run_suite
from jaxpercept.inference.weights import place_weights
from jaxpercept.methods import Perception
from jaxpercept.training import sharding

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to evaluate.", flag_values=FLAGS)
flags.DEFINE_string("dataset", None, "Name of the dataset.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of the dataset.", flag_values=FLAGS)
flags.DEFINE_enum(
    "suite", None, tuple(SUITES), "All datasets of a table, instead of --dataset.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "data_root", None, "With --suite: the folder with a folder for each dataset.", flag_values=FLAGS
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
cli.define_model_flags(FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint",)
# What says something about one dataset.
_OF_ONE = (
    *("dataset", "data_dir", "split", "held_out"),
    *("depth_scale", "min_depth", "max_depth", "eval_crop"),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to be evaluated.

    Attributes:
        checkpoint: its name.
        description, perception: what it is.
        weights: on `mesh`.
        predictor: its programs, shared by all evaluations.
        options: of predictions.
        facts: for reports.
        identity: what tells its predictions from another model's, for reports; plain JSON.
    """

    checkpoint: str
    description: Description
    perception: Perception
    weights: Params
    mesh: Mesh
    predictor: Predictor
    options: Options
    facts: dict[str, Any]
    identity: dict[str, Any]

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) it was trained at."""
        return self.description.resolution or (480, 640)


def open_model(
    checkpoint: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
    vae: str | None = None,
    decoder: str | None = None,
    lora: str | None = None,
    vae_tile: int = 0,
    pad_multiple: int = 0,
    num_inference_steps: int | None = None,
    ensemble_size: int = 1,
    flip: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    identify: bool = False,
) -> Model:
    """Open a checkpoint for evaluations.

    Args:
        identify: look at the weights of a checkpoint without steps, for `identity`.
        checkpoint, task, ...: the flags of these names.

    Raises:
        UserError: the checkpoint or an option does not fit.
    """
    described = {"task": task, "family": family, "base": base}
    described |= {"vae": vae, "decoder": decoder, "lora": lora}
    description, params = open_perception(checkpoint, **described)
    perception = perception_of(description, dtype=dtype, vae_tile=vae_tile, checkpoint=checkpoint)
    options = Options(
        num_steps=num_inference_steps, ensemble_size=ensemble_size, flip=flip, seed=seed
    )
    check_options(perception, options)
    mesh = sharding.make_mesh()
    step = latest_step(Path(checkpoint))
    facts = {
        "checkpoint": checkpoint,
        "step": step,
        "base_checkpoint": description.base_checkpoint,
        "kind": perception.task.kind,
        "dtype": dtype,
        "version": jaxpercept.__version__,
        "command": " ".join(sys.argv),
    }
    chosen = {**described, "vae_tile": vae_tile, "pad_multiple": pad_multiple, "dtype": dtype}
    chosen |= dataclasses.asdict(options)
    identity = {"checkpoint": checkpoint, "step": step, **chosen}
    if identify and step is None:
        hashes = "".join(weights_hash(weights) for _, weights in sorted(params.items()))
        identity["weights_sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
    return Model(
        checkpoint=checkpoint,
        description=description,
        perception=perception,
        weights=place_weights(params, dtype, mesh),
        mesh=mesh,
        predictor=Predictor(perception, mesh, pad_multiple=pad_multiple),
        options=options,
        facts=facts,
        identity=identity,
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
    **opening: Any,
) -> EvalResult:
    """Evaluate, print the table and write the files, as the module's text says.

    Args:
        checkpoint, dataset, ...: the flags of these names; those of the model as in `open_model`.

    Raises:
        UserError: the checkpoint, the dataset or an option does not fit.
    """
    model = open_model(checkpoint, **opening)
    overrides = {"depth_scale": depth_scale, "min_depth": min_depth, "max_depth": max_depth}
    overrides["held_out"] = held_out
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if eval_crop is not None:
        overrides["eval_crop"] = None if eval_crop == "none" else eval_crop
    evaluator = _evaluator(
        model,
        dataset,
        data_dir=data_dir,
        split=split,
        batch_size=batch_size,
        processing_resolution=processing_resolution,
        limit=limit,
        overrides=overrides,
        **_protocol_options(alignment, hce),
    )
    return _run(model, evaluator, Path(output) if output else default_output(checkpoint, dataset))


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

    def one(entry: Entry, data_dir: Path, facts: Mapping[str, Any]) -> EvalResult:
        resolution = entry.resolution if processing_resolution is None else processing_resolution
        evaluator = _evaluator(
            model,
            entry.dataset,
            data_dir=data_dir,
            split=entry.split,
            batch_size=batch_size,
            processing_resolution=resolution,
            limit=limit,
            pictures=2,
            **protocol_options,
        )
        return _run(model, evaluator, folder / entry.name, facts)

    lines = run_suite(
        suite,
        model.perception.task,
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


def _evaluator(model: Model, dataset: str, **options: Any) -> Evaluator:
    return Evaluator(
        model.perception,
        dataset,
        mesh=model.mesh,
        resolution=model.resolution,
        options=model.options,
        predictor=model.predictor,
        **options,
    )


def _run(
    model: Model, evaluator: Evaluator, folder: Path, facts: Mapping[str, Any] | None = None
) -> EvalResult:
    result = evaluator.run(model.weights)
    if jax.process_index() == 0:
        print(table(result))
        for path in write_report(folder, result, {**model.facts, **(facts or {})}):
            print(path)
    return result


def default_output(checkpoint: str, dataset: str = "") -> Path:
    """`CHECKPOINT/evaluation/DATASET` for a local checkpoint, else `evaluation/DATASET`."""
    base = Path(checkpoint) if Path(checkpoint).is_dir() else Path()
    return base / "evaluation" / dataset


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
        evaluate(**values)
        return 0
    if data_root is None:
        raise UserError("--suite needs --data_root, the folder with a folder for each dataset.")
    for name in _OF_ONE:
        if values.pop(name) is not None:
            raise UserError(f"--{name} is of one dataset: leave it out with --suite.")
    lines = evaluate_suite(suite=suite, data_root=data_root, **values)
    failed = [line for line in lines if line.status == "failed"]
    for line in failed:
        print(f"failed: {line.entry.title}: {line.note}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
