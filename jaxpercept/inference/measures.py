"""How predictions of each kind are evaluated: one row of a table says all the evaluator asks for.

docs/evaluation.md has the definitions and where they come from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxpercept.data.datasets import DATASETS, Dataset, Record
from jaxpercept.data.instructions import choose_class, choose_kind, draw_boxes, tasks_of
from jaxpercept.data.palettes import PALETTES
from jaxpercept.data.sources import place_of
from jaxpercept.errors import UserError
from jaxpercept.inference.comparison import Comparison
from jaxpercept.inference.outputs import legend
from jaxpercept.inference.predictor import PerceptionModel
from jaxpercept.metrics.depth import DepthProtocol
from jaxpercept.metrics.detection import DetectionProtocol
from jaxpercept.metrics.dichotomous import DichotomousProtocol
from jaxpercept.metrics.keypoints import KeypointsProtocol
from jaxpercept.metrics.matting import MattingProtocol
from jaxpercept.metrics.normals import NormalsProtocol
from jaxpercept.metrics.protocol import MetricProtocol
from jaxpercept.metrics.referring import LIMITS, ReferringProtocol, ReleasedProtocol
from jaxpercept.metrics.segmentation import SegmentationProtocol
from jaxpercept.tasks import Task

Protocols = Mapping[str, MetricProtocol]

ALIGNMENTS = ("least_square", "least_square_disparity")
# Median depths in metres outside of which the unit must be wrong.
_PLAUSIBLE = (0.01, 1000.0)
# Details have a slash in their names: single classes, single joints.
_DETAIL = "/"


@dataclasses.dataclass(frozen=True)
class Measure:
    """The evaluation of one kind of predictions, or of one task's.

    Attributes:
        target: what the dataset must have, of `data.row.TARGETS`.
        protocols: `(task, row, record, **options) -> {title: protocol}`, where record is any of the
            dataset's; the metrics of a protocol with a title are called TITLE_NAME.
        baseline: what the protocols' trivial predictions are, in two words.
        average: how images become a dataset's figure.
        columns: title -> metric (without the protocol's title): the columns of the papers' tables.
        quiet: titles of protocols whose values of single images are those of another one.
        prepare: record -> the entries that the protocols read.
        measured: predictions [b, h, w, c] -> what the protocols take. Jittable.
        compared: `(protocol, prediction, record) -> (truth, prediction)` as a `Comparison` has
            them, for the first protocol.
        facts: `(protocol, row) -> entries` of a report, for the first protocol.
        median_of: record -> a number; see `judge`.
        judge: raises a UserError for a dataset with such a median of `median_of`.
    """

    target: str
    protocols: Callable[..., Protocols]
    baseline: str
    average: str
    columns: Mapping[str, str]
    quiet: frozenset[str] = frozenset()
    prepare: Callable[[Record], Record] = dict
    measured: Callable[[Array], Array] = lambda prediction: prediction
    compared: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    facts: Callable[[Any, Dataset], dict[str, Any]] = lambda protocol, row: {}
    median_of: Callable[[Record], float] | None = None
    judge: Callable[[float, Dataset], None] | None = None

    def compare(
        self,
        task: Task,
        protocols: Protocols,
        prediction: Shaped[np.ndarray, "h w c"],
        record: Record,
    ) -> Comparison:
        """One image's picture."""
        if self.compared is None:
            truth = record[self.target]
        else:
            truth, prediction = self.compared(next(iter(protocols.values())), prediction, record)
        valid = record.get("valid", np.ones((*record["rgb"].shape[:2], 1), bool))
        return Comparison(task.kind, record["rgb"], truth, valid, prediction, legend(task))


def measure_name(task: Task) -> str:
    """The key in `MEASURES` of a task: its own name, or else its kind."""
    return task.name if task.name in MEASURES else task.kind


def measure_of(task: Task) -> Measure:
    """The measure of a task's predictions; UserError if there is none.

    There is none, either, for a task of a known kind with a truth of its own.
    """
    name = measure_name(task)
    if name not in MEASURES:
        raise UserError(
            f"a model of {task.kind} cannot be evaluated, only one of {', '.join(MEASURES)}."
        )
    measure = MEASURES[name]
    if measure.target not in task.fields:
        raise UserError(
            f"the task {task.name!r} cannot be evaluated: no metric compares its {task.kind} with "
            f"{', '.join(task.fields)}."
        )
    return measure


def measured_parts(perception: PerceptionModel, dataset: str) -> dict[str, PerceptionModel]:
    """What can be evaluated on a dataset: a generalist's parts by name, or {"": the model}.

    Raises:
        UserError: a generalist, and a dataset that has the truth of none of its tasks.
    """
    if not perception.task.parts:
        return {"": perception}
    names = [*perception.task.parts]
    if dataset in DATASETS:  # unknown ones are refused where they are opened
        names = tasks_of(DATASETS[dataset], names)
    parts = {
        name: dataclasses.replace(perception, task=perception.task.parts[name]) for name in names
    }
    if not parts:
        raise UserError(
            f"the dataset {dataset!r} has the truth of none of {', '.join(perception.task.parts)}."
        )
    return parts


def check_dataset(measure: Measure, task: Task, name: str, row: Dataset | None) -> None:
    """Raises UserError where a dataset has no truth for the task; unknown ones pass."""
    if row is None:
        return
    if measure.target not in row.provides:
        raise UserError(f"the dataset {name!r} has no {measure.target} to evaluate against.")
    if task.kind == "classes" and row.labels not in (None, task.palette):
        raise UserError(
            f"the dataset {name!r} has the classes of {row.labels!r} and the model predicts those "
            f"of {task.palette!r}: evaluate it on a dataset with the model's classes."
        )
    if task.kind == "keypoints" and len(row.keypoint_names) not in (0, task.channels):
        raise UserError(
            f"the dataset {name!r} has {len(row.keypoint_names)} keypoints and the model predicts "
            f"{task.channels}: evaluate it on a dataset with the model's."
        )


def make_protocols(
    measure: Measure, task: Task, row: Dataset, record: Record, options: Mapping[str, Any]
) -> Protocols:
    """The protocols for a dataset.

    Raises:
        UserError: an option that the kind does not have, or a value that does not fit.
    """
    known = list(inspect.signature(measure.protocols).parameters)[3:]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"the evaluation of {task.kind} has no option {unknown[0]!r}"
            f"{': it has ' + ', '.join(known) if known else ''}."
        )
    return measure.protocols(task, row, record, **options)


def entry(title: str, name: str) -> str:
    """What a metric is called in results."""
    return f"{title}_{name}" if title else name


def is_detail(name: str) -> bool:
    """Whether a metric is of a single class or joint."""
    return _DETAIL in name


# ---- depth and disparity -------------------------------------------------------------------------


def _depth(
    task: Task, row: Dataset, record: Record, *, alignment: str | None = None
) -> dict[str, DepthProtocol]:
    """alignment: how predictions are fitted to the truth; None takes the model's or dataset's."""
    disparity = task.kind == "affine_disparity"
    chosen = alignment or ("least_square_disparity" if disparity else row.alignment)
    if chosen not in ALIGNMENTS:
        raise UserError(f"the alignment {chosen!r} is unknown: use {' or '.join(ALIGNMENTS)}.")
    low, high = row.clip_range
    return {"": DepthProtocol(low, high, chosen, row.alignment_max_resolution)}


def _depth_facts(protocol: DepthProtocol, row: Dataset) -> dict[str, Any]:
    return {
        "alignment": protocol.alignment,
        "alignment_max_resolution": protocol.alignment_max_resolution,
        "min_depth": protocol.min_depth,
        "max_depth": protocol.max_depth if np.isfinite(protocol.max_depth) else None,
        "evaluation_crop": row.eval_crop,
        "depth_scale": row.depth_scale,
    }


def _judge_depth(median: float, row: Dataset) -> None:
    if not _PLAUSIBLE[0] < median < _PLAUSIBLE[1]:
        raise UserError(
            f"the median depth is {median:g} m with depth_scale {row.depth_scale:g}: set "
            "depth_scale to the units of the depth files per metre (1000 for millimetres)."
        )


_DEPTH = Measure(
    target="depth",
    protocols=_depth,
    baseline="best constant",
    average="mean over images of per-image metrics",
    columns={
        "AbsRel": "abs_rel",
        "SqRel": "sq_rel",
        "RMSE": "rmse",
        "RMSElog": "rmse_log",
        "log10": "log10",
        "delta1": "delta1",
        "delta2": "delta2",
        "delta3": "delta3",
        "SILog": "silog",
        "iRMSE": "i_rmse",
    },
    compared=lambda protocol, prediction, record: (
        record["depth"],
        protocol.aligned(prediction, record),
    ),
    facts=_depth_facts,
    median_of=lambda record: float(np.median(record["depth"][record["valid"]][::16])),
    judge=_judge_depth,
)


# ---- masks and mattes ----------------------------------------------------------------------------


def _masks(
    task: Task, row: Dataset, record: Record, *, hce: bool = False
) -> dict[str, DichotomousProtocol]:
    """hce: count the human correction effort, too, which is slow."""
    return {
        "": DichotomousProtocol(hce=hce, field="alpha"),
        "isnet": DichotomousProtocol("isnet", field="alpha"),
    }


def _mattes(task: Task, row: Dataset, record: Record) -> dict[str, MattingProtocol]:
    """The variants with a trimap only where the dataset has one."""
    variants = {"": "whole"}
    if "trimap" in record:
        variants |= {"filled": "filled", "unknown": "unknown"}
    return {title: MattingProtocol(variant) for title, variant in variants.items()}


def _asked(choose: Callable[[Record, float], Record], record: Record) -> Record:
    """Made to be about one of the things in it, always the same."""
    return choose(record, place_of(record["name"]))


def _referring(task: Task, row: Dataset, record: Record) -> dict[str, MetricProtocol]:
    """At the truth's size; what is painted also as ADDP measures it."""
    return {"": ReferringProtocol()} | ({"addp": ReleasedProtocol()} if task.paint else {})


# ---- classes -------------------------------------------------------------------------------------


def _classes(task: Task, row: Dataset, record: Record) -> dict[str, SegmentationProtocol]:
    names = tuple(PALETTES[task.palette].names)
    return {"": SegmentationProtocol(len(names), names)}


# ---- keypoints -----------------------------------------------------------------------------------


def _keypoints(task: Task, row: Dataset, record: Record) -> dict[str, KeypointsProtocol]:
    names = tuple(row.keypoint_names) or tuple(legend(task)["keypoint_names"])
    return {"": KeypointsProtocol(keypoint_names=names)}


def _place_keypoints(record: Record) -> Record:
    """Annotated joints count, hidden ones too; the protocol has the first pixel's middle at 0."""
    joints = np.asarray(record["keypoints"], np.float32)
    return record | {"keypoints": joints[:, :2] - np.float32(0.5), "visible": joints[:, 2] > 0}


def _joints(
    protocol: KeypointsProtocol, heat: np.ndarray, record: Record
) -> tuple[np.ndarray, np.ndarray]:
    places = record["keypoints"] + np.float32(0.5)
    return np.concatenate([places, record["visible"][:, None].astype(np.float32)], axis=1), heat


# ---- the table -----------------------------------------------------------------------------------

MEASURES: dict[str, Measure] = {
    "affine_depth": _DEPTH,
    "affine_disparity": _DEPTH,
    "normals": Measure(
        target="normals",
        protocols=lambda task, row, record: {
            average: NormalsProtocol(average) for average in ("per_image", "pooled")
        },
        baseline="mean normal",
        average="pooled: over all pixels of the dataset; per_image: mean over images",
        columns={
            "mean": "mean",
            "median": "median",
            "RMSE": "rmse",
            "<5": "a5",
            "<7.5": "a7.5",
            "<11.25": "a11.25",
            "<22.5": "a22.5",
            "<30": "a30",
        },
        quiet=frozenset({"pooled"}),
    ),
    "mask": Measure(
        target="alpha",
        protocols=_masks,
        baseline="centred ellipse",
        average="curves are averaged over images before their maxima, the rest as it is",
        columns={
            "maxF": "max_f",
            "wF": "weighted_f",
            "MAE": "mae",
            "S": "s",
            "mE": "mean_e",
            "maxE": "max_e",
            "meanF": "mean_f",
            "HCE": "hce",
        },
        facts=lambda protocol, row: {"definition": "pysod; isnet_...: IS-Net", "hce": protocol.hce},
    ),
    "referring": Measure(
        target="referred",
        protocols=_referring,
        baseline="centred ellipse",
        average="oIoU over all pixels of the dataset, the rest over images",
        columns={
            "oIoU": "oiou",
            "mIoU": "miou",
            **{f"P@{limit}": f"p@{limit}" for limit in LIMITS},
        },
        facts=lambda protocol, row: {"definition": "above 0.5; addp_...: 512 x 512, by colour"},
    ),
    "boxes": Measure(
        target="instances",
        protocols=lambda task, row, record: {"": DetectionProtocol()},
        baseline="box in the middle",
        average="over all boxes of the dataset; iou: of those that are right",
        columns={"F1": "f1", "precision": "precision", "recall": "recall", "IoU": "iou"},
        prepare=functools.partial(_asked, choose_kind),
        compared=lambda protocol, prediction, record: (
            (draw_boxes(record["boxes"], record["rgb"].shape[:2]) > 0).astype(np.float32),
            prediction,
        ),
        facts=lambda protocol, row: {"definition": "right: IoU of 0.5 or more"},
    ),
    "alpha": Measure(
        target="alpha",
        protocols=_mattes,
        baseline="mean opacity",
        average="mean over images of per-image metrics",
        columns={"SAD": "sad", "MSE": "mse", "MAD": "mad", "Grad": "grad", "Conn": "conn"},
    ),
    "classes": Measure(
        target="classes",
        protocols=_classes,
        baseline="main class",
        average="over all pixels of the dataset",
        columns={"mIoU": "miou", "pixAcc": "pixel_accuracy", "meanAcc": "mean_accuracy"},
        measured=lambda prediction: jnp.rint(prediction).astype(jnp.int32),
        facts=lambda protocol, row: {
            "labels": row.labels,
            "classes": protocol.classes,
            "ignore_label": protocol.ignore_label,
        },
    ),
    "keypoints": Measure(
        target="keypoints",
        protocols=_keypoints,
        baseline="mean place",
        average="over all annotated joints of the dataset, in per cent",
        columns={"PCK@0.05": "pck@0.05", "PCK@0.1": "pck@0.1", "PCK@0.2": "pck@0.2"},
        prepare=_place_keypoints,
        compared=_joints,
        facts=lambda protocol, row: {"size": protocol.size, "refinement": protocol.refinement},
    ),
}
MEASURES["generalist:referring"] = MEASURES["referring"]
MEASURES["generalist:segment"] = dataclasses.replace(
    MEASURES["referring"],
    target="classes",
    prepare=functools.partial(_asked, choose_class),
    compared=lambda protocol, prediction, record: (record["referred"], prediction),
)
"""By the kind of the task, or by its name where other tasks of its kind have another truth."""
