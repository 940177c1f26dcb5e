"""Semantic segmentation: a confusion matrix per image, and what is read off their sum.

The convention of PASCAL VOC, Cityscapes and ADE20K: pixels of all images are counted together, so
that an image weighs as many pixels as it has.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from jaxpercept.errors import UserError
from jaxpercept.metrics.protocol import DeviceProtocol, Record, Row, count_images

METRICS = ("miou", "pixel_accuracy", "mean_accuracy")


def confusion_matrix(
    pred: Integer[Array, "b h w 1"],
    target: Integer[Array, "b h w 1"],
    valid: Bool[Array, "b h w 1"],
    *,
    classes: int,
    ignore_label: int | None = 255,
) -> tuple[Int[Array, "b k k"], Int[Array, "b k"]]:
    """How many pixels of each true class were given each label. Jittable with `classes` static.

    Pixels that are not valid, have the ignore label or a true label outside 0..classes-1 are left
    out.

    Returns:
      counts: [image, true class, predicted class], int32.
      missed: [image, true class]: pixels predicted as none of the classes, which are wrong.
    """
    b = len(target)
    # Labels may be uint8, which the arithmetic below would overflow.
    pred, target = pred.astype(jnp.int32), target.astype(jnp.int32)
    used = valid & (target >= 0) & (target < classes)
    if ignore_label is not None:
        used &= target != ignore_label
    column = jnp.where((pred >= 0) & (pred < classes), pred, classes)
    cell = jnp.where(used, target * (classes + 1) + column, 0).reshape(b, -1)
    counts = jnp.zeros((b, classes * (classes + 1)), jnp.int32)
    counts = counts.at[jnp.arange(b)[:, None], cell].add(used.astype(jnp.int32).reshape(b, -1))
    counts = counts.reshape(b, classes, classes + 1)
    return counts[..., :classes], counts[..., classes]


def segmentation_scores(
    counts: Int[np.ndarray, "k k"], missed: Int[np.ndarray, " k"]
) -> dict[str, float | Float[np.ndarray, " k"]]:
    """Scores of a sum of confusion matrices.

    Returns:
      miou: the mean of `iou` over the classes that occur in the truth or the prediction.
      pixel_accuracy: right pixels / pixels.
      mean_accuracy: the mean of `accuracy` over the classes that occur in the truth.
      iou: of each class, TP / (TP + FP + FN); NaN for a class that does not occur.
      accuracy: of each class, TP / (TP + FN); NaN for a class that is not in the truth.
      All are NaN where nothing was counted.
    """
    right = np.diag(counts).astype(np.float64)
    true = counts.sum(axis=1) + missed
    union = true + counts.sum(axis=0) - np.diag(counts)
    iou, accuracy = _divide(right, union), _divide(right, true)
    return {
        "miou": _mean(iou),
        "pixel_accuracy": float(_divide(right.sum(), true.sum())),
        "mean_accuracy": _mean(accuracy),
        "iou": iou,
        "accuracy": accuracy,
    }


def _divide(part, whole) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _mean(values: Float[np.ndarray, " k"]) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else np.nan


@dataclasses.dataclass(frozen=True)
class SegmentationProtocol(DeviceProtocol):
    """Evaluation of label maps [h, w, 1].

    Rows have `pixel_accuracy` and `miou` of the image alone beside the counts.

    Attributes:
      classes: how many there are.
      class_names: if given, results have the IoU of each class as `iou/NAME`; otherwise as
        `iou/NUMBER`.
      ignore_label: true pixels with it are left out.
      field: the record's labels, integers [h, w, 1].
    """

    classes: int
    class_names: tuple[str, ...] | None = None
    ignore_label: int | None = 255
    field: str = "classes"

    def __post_init__(self):
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise UserError(
                f"{self.classes} classes need {self.classes} names, not {len(self.class_names)}."
            )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        titles = self.class_names or range(self.classes)
        return (*METRICS, *(f"iou/{title}" for title in titles))

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field, "valid")

    def check(self, record: Record) -> None:
        """Raises UserError if a valid label is neither a class nor the ignore label."""
        labels = np.asarray(record[self.field])[np.asarray(record["valid"])]
        strange = (labels < 0) | (labels >= self.classes)
        if self.ignore_label is not None:
            strange &= labels != self.ignore_label
        if strange.any():
            raise UserError(
                f"the label map of {record.get('name', 'an image')} has the label "
                f"{labels[strange][0]}, but classes go from 0 to {self.classes - 1} and the ignore "
                f"label is {self.ignore_label}: check the dataset's class list."
            )

    def batched(
        self, prediction: Shaped[Array, "b h w 1"], batch: Mapping[str, Shaped[Array, "b h w 1"]]
    ) -> dict[str, Shaped[Array, "b ..."]]:
        counts, missed = confusion_matrix(
            prediction,
            batch[self.field],
            batch["valid"],
            classes=self.classes,
            ignore_label=self.ignore_label,
        )
        return {"confusion": counts, "missed": missed}

    def rows(self, batched: Mapping[str, Shaped[Array | np.ndarray, "b ..."]]) -> list[Row]:
        rows = super().rows(batched)
        for row in rows:
            scores = segmentation_scores(row["confusion"], row["missed"])
            pixels = int(row["confusion"].sum() + row["missed"].sum())
            row |= {name: scores[name] if pixels else 0.0 for name in METRICS}
            row |= {"valid_pixels": pixels, "images": int(pixels > 0)}
        return rows

    def trivial(self, record: Record) -> Int[np.ndarray, "h w 1"]:
        """The image's most frequent class everywhere."""
        labels = np.asarray(record[self.field]).astype(np.int64)
        used = np.asarray(record["valid"]) & (labels >= 0) & (labels < self.classes)
        if self.ignore_label is not None:
            used &= labels != self.ignore_label
        return np.full(labels.shape, np.bincount(labels[used], minlength=1).argmax(), np.int32)

    def summarise(self, total: Row) -> dict[str, float]:
        count_images(total)
        scores = segmentation_scores(total["confusion"], total["missed"])
        values = [*(scores[name] for name in METRICS), *map(float, scores["iou"])]
        return dict(zip(self.names, values, strict=True))
