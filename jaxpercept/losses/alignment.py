"""Per-image statistics by which predictions and targets are compared up to scale and shift."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpercept.losses.masked import absolute, image_sum, masked, per_image

# Below this relative spread values are constant to float32 rounding.
_CONSTANT = 4 * float(jnp.finfo(jnp.float32).eps)
# Below these a quotient's derivative would leave float32's range.
_LEAST_SPREAD = 1e-12
_LEAST_SQUARES = 1e-18


class Line(NamedTuple):
    """Per-image line through masked (pred, target) pairs; every field [b].

    Kept as scale · (pred − centre) + value: where the prediction's spread is small against its
    mean, float32 cannot hold the shift. `degenerate`: the mask is empty or the prediction constant
    to float32 rounding; the scale is then 0, so that the line is the best constant.
    """

    scale: Float[Array, "b"]
    centre: Float[Array, "b"]
    value: Float[Array, "b"]
    degenerate: Bool[Array, "b"]

    def __call__(self, pred: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The aligned prediction, float32."""
        scale, centre, value = map(per_image, self[:3])
        return scale * (pred.astype(jnp.float32) - centre) + value


def fit_line(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Line:
    """Minimises Σ M (scale·pred + shift − target)² per image, on centred sums.

    Centring leaves the minimiser unchanged and avoids the cancellation of a00·a11 − a01².
    """
    mask = jnp.broadcast_to(mask, pred.shape)
    pred, target = masked(pred, mask), masked(target, mask)
    centre, residual, pred_deviation = _centred(pred, mask)
    target_centre, target_residual, target_deviation = _centred(target, mask)
    variance = image_sum(pred_deviation**2)
    degenerate = variance <= jnp.maximum(_CONSTANT**2 * image_sum(pred**2), _LEAST_SQUARES)
    covariance = image_sum(pred_deviation * target_deviation)
    scale = jnp.where(degenerate, 0, covariance / jnp.where(degenerate, 1, variance))
    value = target_centre + target_residual - scale * residual
    return Line(scale, centre, value, degenerate)


def scale_and_shift(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(s, b) that minimise Σ M (s·pred + b − target)²; (1, 0) where the system is singular."""
    line = fit_line(pred, target, mask)
    shift = line.value - line.scale * line.centre
    return jnp.where(line.degenerate, 1, line.scale), jnp.where(line.degenerate, 0, shift)


def median_ratio(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, "b"]:
    """median(target) / median(pred) over masked elements with a positive target; 1 without any."""
    usable = jnp.broadcast_to(mask, pred.shape) & (target > 0)
    numerator, denominator = lower_median(target, usable), lower_median(pred, usable) + 1e-8
    defined = usable.any(axis=(1, 2, 3)) & (denominator != 0)
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1), 1)


def lower_median(x: Float[Array, "b ..."], mask: Bool[Array, "b ..."]) -> Float[Array, "b"]:
    """torch's median over the mask, the lower of two middle values; 0 where it is empty."""
    x, mask = x.reshape(x.shape[0], -1), mask.reshape(x.shape[0], -1)
    count = mask.sum(axis=1)
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf), axis=1)
    middle = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None] // 2, axis=1)[:, 0]
    return jnp.where(count > 0, middle, 0)


def normalised(
    x: Float[Array, "b n"], median: Float[Array, "b 1"], inside: Bool[Array, "b n"]
) -> Float[Array, "b n"]:
    """(x − median) / mean |x − median| over `inside`; 0 outside.

    Where x is constant to float32 rounding the divisor is 1: any other would magnify rounding.
    """
    deviation = jnp.where(inside, x - median, 0)
    count = jnp.maximum(inside.sum(axis=1, keepdims=True), 1)
    spread = absolute(deviation).sum(axis=1, keepdims=True) / count
    magnitude = jnp.abs(jnp.where(inside, x, 0)).sum(axis=1, keepdims=True) / count
    constant = spread <= jnp.maximum(_CONSTANT * magnitude, _LEAST_SPREAD)
    return deviation / jnp.where(constant, 1, spread)


def _centred(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The mean as a rounded part and a small residual, [b] each, and the deviations from it."""
    count = jnp.maximum(image_sum(mask), 1)
    centre = image_sum(x) / count
    deviation = masked(x - per_image(centre), mask)
    residual = image_sum(deviation) / count
    return centre, residual, masked(deviation - per_image(residual), mask)
