"""The two protocols for surface normals: errors averaged per image, or pooled over all pixels.

They give different numbers, the median above all, and are never mixed. `per_image`: Marigold
(`src/util/metric.py`). `pooled`: DSINE (`utils/utils.py`), also E2E-FT and Lotus. Shapes are
[b, h, w, 3] in any one coordinate convention and of any length; computed in float32.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, Shaped

from jaxpercept.errors import UserError
from jaxpercept.metrics.protocol import DeviceProtocol, Record, Row, count_images

THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)
_BELOW = tuple(f"a{threshold:g}" for threshold in THRESHOLDS)
METRICS = ("mean", "median", "rmse", *_BELOW)

# Shorter vectors have no direction.
_MIN_LENGTH = 1e-8
BIN = 1e-3
"""Width in degrees of the bins of `angular_sums`' histogram."""
_BINS = round(180 / BIN)


def angular_error(
    pred: Float[Array, "b h w 3"], target: Float[Array, "b h w 3"]
) -> Float[Array, "b h w 1"]:
    """Angle between the vectors in degrees, atan2(|p × t|, p · t); 90 where one has no direction.

    Mathematically the arccos(clamp(cos)) of the published code, which in float32 is off by up to
    0.03 degrees for small angles; this is exact to 1e-5 degrees.
    """
    p, t = pred.astype(jnp.float32), target.astype(jnp.float32)
    cross = jnp.linalg.norm(jnp.cross(p, t), axis=-1, keepdims=True)
    dot = (p * t).sum(axis=-1, keepdims=True)
    angle = jnp.degrees(jnp.arctan2(cross, dot))
    length = jnp.minimum(*(jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (p, t)))
    return jnp.where(length < _MIN_LENGTH, 90.0, angle)


def normals_mask(
    target: Float[Array, "b h w 3"], valid: Bool[Array, "b h w 1"]
) -> Bool[Array, "b h w 1"]:
    """Where the truth is valid and not the zero vector, by which files mark missing normals."""
    return valid & (target != 0).any(axis=-1, keepdims=True)


def normals_metrics(
    error: Float[Array, "b h w 1"], mask: Bool[Array, "b h w 1"]
) -> dict[str, Num[Array, " b"]]:
    """Each image's `METRICS` from its errors in degrees over the mask.

    Returns:
      mean, median (the mean of the middle two of an even number) and rmse in degrees, a5 ... a30
      (per cent of pixels with an error < 5 ... 30 degrees, strictly), and `valid_pixels`. An empty
      mask gives 0 everywhere.
    """
    count = mask.sum(axis=(1, 2, 3))
    some = jnp.maximum(count, 1)

    def mean(x):
        return jnp.where(mask, x, 0).sum(axis=(1, 2, 3)) / some

    ordered = jnp.sort(jnp.where(mask, error, jnp.inf).reshape(len(error), -1), axis=1)
    middle = jnp.stack([(some - 1) // 2, some // 2], axis=1)
    median = jnp.take_along_axis(ordered, middle, axis=1).mean(axis=1)
    return {
        "mean": mean(error),
        "median": jnp.where(count > 0, median, 0),
        "rmse": jnp.sqrt(mean(error**2)),
        **{
            name: 100 * mean(error < threshold)
            for name, threshold in zip(_BELOW, THRESHOLDS, strict=True)
        },
        "valid_pixels": count,
    }


def angular_sums(
    error: Float[Array, "b h w 1"], mask: Bool[Array, "b h w 1"]
) -> dict[str, Num[Array, "b ..."]]:
    """What adds up to the statistics of all pixels of a dataset, as `pooled_metrics` reads it.

    Returns:
      Per image: `valid_pixels`, `degrees` (the sum of the errors), `squares` (of their squares),
      `below` [b, 5] (how many are below each of `THRESHOLDS`) and `histogram` [b, 180000] of the
      errors in bins of `BIN` degrees.
    """
    b = len(error)

    def total(x):
        return jnp.where(mask, x, 0).sum(axis=(1, 2, 3))

    bins = jnp.clip(error / BIN, 0, _BINS - 1).astype(jnp.int32).reshape(b, -1)
    counts = mask.astype(jnp.int32).reshape(b, -1)
    return {
        "valid_pixels": mask.sum(axis=(1, 2, 3)),
        "degrees": total(error),
        "squares": total(error**2),
        "below": jnp.stack([total(error < t).astype(jnp.int32) for t in THRESHOLDS], axis=1),
        "histogram": jnp.zeros((b, _BINS), jnp.int32).at[jnp.arange(b)[:, None], bins].add(counts),
    }


def pooled_metrics(total: Row) -> dict[str, float]:
    """`METRICS` over all pixels, from a sum of `angular_sums` over images.

    All are exact up to rounding except the median, which is right to within `BIN` / 2 degrees.
    """
    pixels = int(total["valid_pixels"])
    reached = np.cumsum(total["histogram"])
    middle = np.searchsorted(reached, [(pixels - 1) // 2, pixels // 2], side="right")
    return {
        "mean": float(total["degrees"] / pixels),
        "median": float((middle.mean() + 0.5) * BIN),
        "rmse": float(np.sqrt(total["squares"] / pixels)),
        **{
            name: float(100 * count / pixels)
            for name, count in zip(_BELOW, total["below"], strict=True)
        },
    }


def mean_normal(
    target: Float[Array, "b h w 3"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, "b 1 1 3"]:
    """Each image's constant normal with the greatest mean cosine to the truth: Σt / |Σt|.

    The score of a predictor that has seen nothing, to print beside results. (0, 0, 1) where the
    sum vanishes.
    """
    total = jnp.where(mask, target.astype(jnp.float32), 0).sum(axis=(1, 2), keepdims=True)
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    forward = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0]), total.shape)
    return jnp.where(length > 0, total / jnp.where(length > 0, length, 1), forward)


@dataclasses.dataclass(frozen=True)
class NormalsProtocol(DeviceProtocol):
    """Evaluation of normals.

    Attributes:
      average: "per_image" (Marigold: the mean over images of each image's metrics) or "pooled"
        (DSINE: statistics of all pixels of the dataset).
      compat: round each image's metrics to 4 decimals before they are averaged, as Marigold's code
        does; "per_image" only.
      field: the record's true normals [h, w, 3], zero where missing.
    """

    average: str = "per_image"
    compat: bool = False
    field: str = "normals"

    names = METRICS

    def __post_init__(self):
        if self.average not in ("per_image", "pooled"):
            raise UserError(
                f"the normals protocol {self.average!r} is unknown: use per_image or pooled."
            )
        if self.compat and self.average == "pooled":
            raise UserError("compat rounds the metrics of images: leave it off for pooled ones.")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field, "valid")

    def batched(
        self, prediction: Shaped[Array, "b h w 3"], batch: Mapping[str, Shaped[Array, "b h w _"]]
    ) -> dict[str, Shaped[Array, "b ..."]]:
        mask = normals_mask(batch[self.field], batch["valid"])
        error = angular_error(prediction, batch[self.field])
        row = normals_metrics(error, mask)
        if self.average == "pooled":
            row |= angular_sums(error, mask)
        return row | {"images": (row["valid_pixels"] > 0).astype(jnp.int32)}

    def rows(self, batched: Mapping[str, Shaped[Array | np.ndarray, "b ..."]]) -> list[Row]:
        rows = super().rows(batched)
        if self.compat:
            rows = [row | {name: round(row[name], 4) for name in METRICS} for row in rows]
        return rows

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 3"]:
        """The image's `mean_normal` everywhere."""
        target, valid = (jnp.asarray(record[field])[None] for field in self.fields)
        constant = mean_normal(target, normals_mask(target, valid))
        return np.array(jnp.broadcast_to(constant, target.shape)[0])

    def summarise(self, total: Row) -> dict[str, float]:
        if self.average == "per_image":
            return super().summarise(total)
        count_images(total)
        return pooled_metrics(total)
