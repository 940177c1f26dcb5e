"""Referring segmentation: how well the predicted mask covers the object that was meant.

With I pixels in both and U in either, an image's IoU is I / U; a dataset has

- `oiou`: ΣI / ΣU, in which large objects weigh most;
- `miou`: the mean IoU of the images;
- `p@X`: the share of images whose IoU is above X (CRIS, VLT; LAVT counts equality, too).

An image with U = 0 has the IoU 0, as in LAVT, CRIS and ADDP; where every sentence refers to
something, there is none. An example is a sentence: an image counts as often as it is spoken of.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8
from PIL import Image

from jaxpercept.metrics.dichotomous import centred_ellipse
from jaxpercept.metrics.protocol import (
    DeviceProtocol,
    MetricProtocol,
    Record,
    Row,
    count_images,
)

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9)
METRICS = ("oiou", "miou", *(f"p@{limit}" for limit in LIMITS))
SIZE = 512
"""Pixels along both sides at which ADDP measures."""

_RED, _NEAR = (255, 0, 0), 50


def overlap(
    pred: Bool[Array | np.ndarray, "b h w 1"],
    target: Bool[Array | np.ndarray, "b h w 1"],
    valid: Bool[Array | np.ndarray, "b h w 1"],
) -> dict[str, Int[Array | np.ndarray, " b"]]:
    """The pixels in both masks (`intersection`), in either (`union`), and all that count.

    Pixels that are not valid are in neither. Jittable.
    """
    return {
        "intersection": (pred & target & valid).sum(axis=(1, 2, 3)),
        "union": ((pred | target) & valid).sum(axis=(1, 2, 3)),
        "valid_pixels": valid.sum(axis=(1, 2, 3)),
    }


def image_scores(intersection: int, union: int) -> dict[str, float]:
    """An image's IoU as `miou`, and whether it is above each of `LIMITS`."""
    iou = intersection / union if union else 0.0
    return {"miou": iou, **{f"p@{limit}": float(iou > limit) for limit in LIMITS}}


def released_mask(
    painted: UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"],
) -> Bool[np.ndarray, "512 512"]:
    """Where a painted image is red, by ADDP's released rule [`generate.py`, `evaluate.py`].

    Brought to 512 x 512 by Pillow's Lanczos filter, then all that is less than 50 from (255, 0, 0).

    Args:
      painted: 8-bit, or in [0, 1], which is cut off to 8 bits, not rounded.
    """
    if painted.dtype != np.uint8:
        painted = (255 * np.clip(painted, 0, 1)).astype(np.uint8)
    image = Image.fromarray(painted).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    distance = np.linalg.norm(np.asarray(image, np.float64) - _RED, axis=-1)
    return distance < _NEAR


def released_truth(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "512 512"]:
    """A mask brought to 512 x 512 by nearest pixels, as ADDP does."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.NEAREST)) > 0


class _Overlaps(MetricProtocol):
    """What both protocols have in common."""

    names = METRICS
    fields = ("referred", "valid")

    def row(self, counts: Mapping[str, int]) -> Row:
        """An image's row, from what `overlap` counts."""
        scores = image_scores(counts["intersection"], counts["union"])
        return {**counts, **scores, "images": int(counts["valid_pixels"] > 0)}

    def summarise(self, total: Row) -> dict[str, float]:
        images = count_images(total)
        means = {name: float(total[name] / images) for name in METRICS[1:]}
        return {"oiou": float(total["intersection"] / max(total["union"], 1)), **means}


@dataclasses.dataclass(frozen=True)
class ReferringProtocol(_Overlaps, DeviceProtocol):
    """Evaluation of scores [h, w, 1] at the size of the truth: the object is above 0.5."""

    def batched(
        self, prediction: Shaped[Array, "b h w 1"], batch: Mapping[str, Shaped[Array, "b h w 1"]]
    ) -> dict[str, Shaped[Array, " b"]]:
        return overlap(prediction > 0.5, batch["referred"] > 0.5, batch["valid"])

    def rows(self, batched: Mapping[str, Shaped[Array | np.ndarray, "b ..."]]) -> list[Row]:
        return [self.row(counts) for counts in super().rows(batched)]

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 1"]:
        """An ellipse of the object's area in the middle: it has not read the sentence."""
        return centred_ellipse(np.asarray(record["referred"])[..., 0] > 0.5)


@dataclasses.dataclass(frozen=True)
class ReleasedProtocol(_Overlaps):
    """Evaluation of painted images [h, w, 3] as ADDP released it, whatever their sizes are."""

    raw: ClassVar[bool] = True

    def per_image(self, prediction: Shaped[np.ndarray, "h w 3"], record: Record) -> Row:
        truth, valid = (
            released_truth(np.asarray(record[field])[..., 0] > 0.5) for field in self.fields
        )
        masks = (released_mask(np.asarray(prediction)), truth, valid)
        counts = overlap(*(mask[None, ..., None] for mask in masks))
        return self.row({name: count.item() for name, count in counts.items()})

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 3"]:
        """As of `ReferringProtocol`, red on black."""
        mask = centred_ellipse(np.asarray(record["referred"])[..., 0] > 0.5)
        return np.concatenate([mask, np.zeros_like(mask), np.zeros_like(mask)], axis=-1)
