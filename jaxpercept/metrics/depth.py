"""The affine-invariant depth protocol: align, clip, compare.

Follows GenPercept (`eval.py`, `src/util/{alignment,metric}.py`) and Marigold. Shapes are
[b, h, w, 1], depths in metres. Every function is jittable, treats each image alone and returns
values per image, [b]; averaging over images is the caller's. Computed in float32 on centred sums,
which agrees with float64 to about 1e-6.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxpercept.errors import UserError
from jaxpercept.losses import fit_line
from jaxpercept.metrics.protocol import DeviceProtocol, Record, Row
from jaxpercept.resize import nearest_index

ALIGNMENTS = ("least_square", "least_square_disparity", "median", "none")
METRICS = (
    *("abs_rel", "sq_rel", "rmse", "rmse_log", "log10"),
    *("delta1", "delta2", "delta3", "silog", "i_rmse"),
)
_MIN_PREDICTION = 1e-6
_MIN_DISPARITY = 1e-3


def evaluate_depth(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    valid: Bool[Array, "b h w 1"],
    *,
    alignment: str = "least_square",
    min_depth: float,
    max_depth: float,
    alignment_max_res: int | None = None,
) -> dict[str, Shaped[Array, "b"]]:
    """Aligns predictions to the truth, clips them to the dataset's range and measures them.

    Args:
      pred: prediction in [0, 1], near 0 (for `least_square_disparity`: a disparity, near 1; for
        `none`: metres; for `median`: depth up to scale).
      target: depth in metres; where it is not positive it is never used.
      valid: the dataset's mask, crop and depth range included.
      min_depth, max_depth: the aligned prediction is clipped to this range.
      alignment_max_res: solve the fit on images subsampled to at most this many rows and columns
        (1024 for ETH3D).

    Returns:
      `METRICS` and `valid_pixels`, as `depth_metrics`.

    Raises:
      UserError: unknown alignment.
    """
    mask = valid & (target > 0)
    depth = align(pred, target, mask, alignment, alignment_max_res)
    depth = jnp.maximum(jnp.clip(depth, min_depth, max_depth), _MIN_PREDICTION)
    return depth_metrics(depth, target, mask)


def align(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    alignment: str,
    max_resolution: int | None = None,
) -> Float[Array, "b h w 1"]:
    """The prediction in metres, neither clipped nor masked, by one of `ALIGNMENTS`.

    Raises:
      UserError: unknown alignment.
    """
    if alignment == "least_square":
        return align_least_squares(pred, target, mask, max_resolution)
    if alignment == "least_square_disparity":
        return align_disparity(pred, target, mask, max_resolution)
    if alignment == "median":
        return align_median(pred, target, mask)
    if alignment == "none":
        return pred
    raise UserError(f"Unknown alignment {alignment!r}; choose one of {', '.join(ALIGNMENTS)}.")


def constant_depth_metrics(
    target: Float[Array, "b h w 1"],
    valid: Bool[Array, "b h w 1"],
    *,
    min_depth: float,
    max_depth: float,
) -> dict[str, Shaped[Array, "b"]]:
    """Metrics of the best constant in the least-squares sense, each image's mean valid depth.

    The score of a predictor that has seen nothing, to print beside results.
    """
    nothing = jnp.zeros_like(target)
    return evaluate_depth(nothing, target, valid, min_depth=min_depth, max_depth=max_depth)


def depth_metrics(
    pred: Float[Array, "b h w 1"], target: Float[Array, "b h w 1"], mask: Bool[Array, "b h w 1"]
) -> dict[str, Shaped[Array, "b"]]:
    """Errors of positive depths p against d over the mask, per image.

    Returns:
      abs_rel, sq_rel (metres), rmse (metres), rmse_log, log10, delta1..3 (fraction with
      max(p/d, d/p) < 1.25^k), silog (100 × standard deviation of ln p − ln d), i_rmse (1/metres)
      and valid_pixels, int32. An image with an empty mask has valid_pixels 0 and every metric 0:
      leave it out of averages.
    """
    count = mask.sum(axis=(1, 2, 3))
    # Masked-out pixels compare 1 with 1, so that nothing invalid is divided or logged.
    p = jnp.where(mask, pred.astype(jnp.float32), 1)
    d = jnp.where(mask, target.astype(jnp.float32), 1)

    def mean(x):
        return jnp.where(mask, x, 0).sum(axis=(1, 2, 3)) / jnp.maximum(count, 1)

    error = p - d
    log_error = jnp.log1p(error / d)  # ln(p/d), keeping the digits of small errors.
    log_spread = log_error - mean(log_error)[:, None, None, None]
    ratio = jnp.maximum(p / d, d / p)
    return {
        "abs_rel": mean(jnp.abs(error) / d),
        "sq_rel": mean(error**2 / d),
        "rmse": jnp.sqrt(mean(error**2)),
        "rmse_log": jnp.sqrt(mean(log_error**2)),
        "log10": mean(jnp.abs(log_error)) / jnp.log(10.0),
        "delta1": mean(ratio < 1.25),
        "delta2": mean(ratio < 1.25**2),
        "delta3": mean(ratio < 1.25**3),
        "silog": 100 * jnp.sqrt(mean(log_spread**2)),
        "i_rmse": jnp.sqrt(mean((error / (p * d)) ** 2)),
        "valid_pixels": count,
    }


def align_least_squares(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    max_resolution: int | None = None,
) -> Float[Array, "b h w 1"]:
    """scale · pred + shift closest to the target over the mask, in the target's unit.

    A constant prediction becomes the mean target. With `max_resolution` R, the line is fitted on
    every 1/f-th pixel, f = min(R/h, R/w) if below 1, and applied to all.
    """
    line = fit_line(*(_subsample(x, max_resolution) for x in (pred, target, mask)))
    return line(pred)


def align_disparity(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    max_resolution: int | None = None,
) -> Float[Array, "b h w 1"]:
    """Depth from a predicted disparity, fitted to 1/target where both are positive.

    Aligned disparities are raised to 1e-3 before they are inverted.
    """
    usable = mask & (target > 0) & (pred > 0)
    disparity = jnp.where(usable, 1 / jnp.where(usable, target, 1), 0)
    aligned = align_least_squares(pred, disparity, usable, max_resolution)
    return 1 / jnp.maximum(aligned, _MIN_DISPARITY)


def align_median(
    pred: Float[Array, "b h w 1"], target: Float[Array, "b h w 1"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, "b h w 1"]:
    """pred · median(target) / median(pred) over the mask; unchanged where that is undefined."""

    def median(x):
        return jnp.nanmedian(jnp.where(mask, x, jnp.nan), axis=(1, 2, 3), keepdims=True)

    ratio = median(target) / median(pred)
    return jnp.where(jnp.isfinite(ratio), ratio, 1) * pred


def _subsample(
    x: Shaped[Array, "b h w 1"], max_resolution: int | None
) -> Shaped[Array, "b h2 w2 1"]:
    """torch's nearest resize by one scale factor, so that the longer side is `max_resolution`."""
    height, width = x.shape[1:3]
    if max_resolution is None or max_resolution >= max(height, width):
        return x
    factor = min(max_resolution / height, max_resolution / width)
    rows = nearest_index(height, int(height * factor), scale=1 / factor)
    columns = nearest_index(width, int(width * factor), scale=1 / factor)
    return x[:, rows][:, :, columns]


@dataclasses.dataclass(frozen=True)
class DepthProtocol(DeviceProtocol):
    """Evaluation of affine-invariant depth or disparity maps [h, w, 1].

    Attributes:
      min_depth, max_depth: metres, to which aligned predictions are clipped.
      alignment: of `ALIGNMENTS`.
      alignment_max_resolution: as in `evaluate_depth`.
    """

    min_depth: float
    max_depth: float
    alignment: str = "least_square"
    alignment_max_resolution: int | None = None

    names = METRICS
    fields = ("depth", "valid")

    def __post_init__(self):
        if self.alignment not in ALIGNMENTS:
            raise UserError(
                f"the alignment {self.alignment!r} is unknown: use {', '.join(ALIGNMENTS)}."
            )

    def batched(
        self, prediction: Shaped[Array, "b h w 1"], batch: Mapping[str, Shaped[Array, "b h w 1"]]
    ) -> dict[str, Shaped[Array, "b"]]:
        row = evaluate_depth(
            prediction,
            batch["depth"],
            batch["valid"],
            alignment=self.alignment,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
            alignment_max_res=self.alignment_max_resolution,
        )
        return row | {"images": (row["valid_pixels"] > 0).astype(jnp.int32)}

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 1"]:
        """The mean valid depth everywhere, in metres: the best constant in least squares."""
        depth, valid = np.asarray(record["depth"]), np.asarray(record["valid"])
        used = depth[valid & (depth > 0)]
        return np.full_like(depth, used.mean(dtype=np.float64) if used.size else 0, np.float32)

    def trivial_row(self, record: Record) -> Row:
        """Its row; it is metric and needs no alignment."""
        metric = dataclasses.replace(self, alignment="none", alignment_max_resolution=None)
        return metric.per_image(self.trivial(record), record)

    def aligned(
        self, prediction: Float[np.ndarray, "h w 1"], record: Record
    ) -> Float[np.ndarray, "h w 1"]:
        """One image's prediction in metres, not clipped, for pictures."""
        maps = (np.asarray(x)[None] for x in (prediction, *(record[f] for f in self.fields)))
        return np.asarray(_aligned(self, *maps))[0]


@functools.partial(jax.jit, static_argnums=0)
def _aligned(protocol: DepthProtocol, prediction, depth, valid):
    mask = valid & (depth > 0)
    return align(prediction, depth, mask, protocol.alignment, protocol.alignment_max_resolution)
