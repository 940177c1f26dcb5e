"""Detection by drawn boxes: a map of where boxes are becomes boxes, and these are counted.

A predicted box is right if it has an IoU of 0.5 or more with a true one that no better box has
taken. Over all boxes of a dataset, with R right ones of P predicted and T true ones:

- `precision` R / P, `recall` R / T and `f1` 2 R / (P + T);
- `iou`: the mean IoU of the right ones.

Drawn boxes have no ranking by which an average precision could be taken; papers that report one of
drawn boxes (InstructCV) call it mAP at one threshold.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from jaxpercept.data.instructions import frame_width
from jaxpercept.metrics.protocol import MetricProtocol, Record, Row, count_images

RIGHT = 0.5
"""The IoU from which a box is right."""


def boxes_of(score: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "n 5"]:
    """The boxes (left, top, right, bottom, mean score) of a map of their insides, largest first.

    Each is around a connected part that is above 0.5, and as much larger as frames are wide; parts
    of fewer pixels than a frame's width squared are noise.

    Args:
      score: in [0, 1], as `generalist:detect` predicts it.
    """
    width, (height, across) = frame_width(score.shape[0]), score.shape
    labels, _ = ndimage.label(score > 0.5)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        if inside.sum() < width**2:
            continue
        framed = [w > 2 * width for w in (columns.stop - columns.start, rows.stop - rows.start)]
        wide, high = (width if has else 0 for has in framed)
        box = (
            max(columns.start - wide, 0),
            max(rows.start - high, 0),
            min(columns.stop + wide, across),
            min(rows.stop + high, height),
        )
        found.append((*box, float(score[rows, columns][inside].mean())))
    found.sort(key=lambda box: -(box[2] - box[0]) * (box[3] - box[1]))
    return np.array(found, np.float32).reshape(-1, 5)


def box_iou(
    first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """The IoU of every two boxes (left, top, right, bottom)."""
    start = np.maximum(first[:, None, :2], second[None, :, :2])
    stop = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(stop - start, 0, None), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def match(iou: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " k"]:
    """The IoUs of pairs from `RIGHT` on, the best first; no row and no column is used twice."""
    iou, found = iou.copy(), []
    while iou.size and (best := iou.max()) >= RIGHT:
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        found.append(best)
        iou[row], iou[:, column] = 0, 0
    return np.array(found, np.float64)


@dataclasses.dataclass(frozen=True)
class DetectionProtocol(MetricProtocol):
    """Evaluation of maps [h, w, 1] of the insides of boxes."""

    names = ("f1", "precision", "recall", "iou")
    fields = ("boxes",)

    def per_image(self, prediction: Float[np.ndarray, "h w 1"], record: Record) -> Row:
        predicted, true = boxes_of(np.asarray(prediction)[..., 0])[:, :4], record["boxes"]
        right = match(box_iou(predicted.astype(np.float64), np.asarray(true, np.float64)))
        counts = {"right": len(right), "predicted": len(predicted), "true": len(true)}
        counts["overlap"] = float(right.sum())
        return {**counts, **_scores(counts), "images": 1}

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 1"]:
        """One box of the mean size in the middle: it knows how large things are."""
        height, width = record["rgb"].shape[:2]
        sizes = (record["boxes"][:, 2:] - record["boxes"][:, :2]).mean(axis=0)
        rows, columns = (
            slice(round((n - size) / 2), max(round((n + size) / 2), round((n - size) / 2) + 1))
            for n, size in zip((height, width), sizes[::-1], strict=True)
        )
        drawn = np.zeros((height, width, 1), np.float32)
        drawn[rows, columns] = 1
        return drawn

    def summarise(self, total: Row) -> dict[str, float]:
        count_images(total)
        return _scores(total)


def _scores(counts: Row) -> dict[str, float]:
    right, predicted, true = (counts[name] for name in ("right", "predicted", "true"))
    return {
        "f1": float(2 * right / max(predicted + true, 1)),
        "precision": float(right / max(predicted, 1)),
        "recall": float(right / max(true, 1)),
        "iou": float(counts["overlap"] / max(right, 1)),
    }
