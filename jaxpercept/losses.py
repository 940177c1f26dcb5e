"""Masked losses between predictions and targets, in float32.

Shapes are [b, h, w, c]; a mask may have one channel for all. Each loss is one mean over the masked
elements of the whole batch, as in GenPercept (arXiv 2403.06090). An empty mask gives 0 with zero
gradients, and masked-out targets may hold anything, NaN included. Formulas: GenPercept,
`genpercept/losses/{geometry_losses,gradient_loss}.py` and `src/util/alignment.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Below this relative spread a prediction is constant to float32 rounding.
_CONSTANT = 4 * float(jnp.finfo(jnp.float32).eps)


def mse(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Mean squared error over the masked elements."""
    return _mean(_difference(pred, target, mask) ** 2, mask)


def l1(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Mean absolute error over the masked elements."""
    return _mean(jnp.abs(_difference(pred, target, mask)), mask)


def latent_mse(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, ""]:
    """Mean squared error over all channels of the valid latent cells (mask from `pool_mask`)."""
    return mse(pred, target, mask)


def pool_mask(valid: Bool[Array, "b H W 1"], factor: int) -> Bool[Array, "b h w 1"]:
    """Latent cells all of whose factor x factor pixels are valid.

    h = H // factor and w = W // factor, as the VAE encoder rounds; the pixels left over at the
    bottom and right belong to no cell.
    """
    b, height, width, _ = valid.shape
    h, w = height // factor, width // factor
    blocks = valid[:, : h * factor, : w * factor].reshape(b, h, factor, w, factor)
    return blocks.all(axis=(2, 4))[..., None]


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
        scale, centre, value = map(_per_image, self[:3])
        return scale * (pred.astype(jnp.float32) - centre) + value


def fit_line(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Line:
    """Minimises Σ M (scale·pred + shift − target)² per image, on centred sums.

    Centring leaves the minimiser unchanged and avoids the cancellation of a00·a11 − a01².
    """
    mask = jnp.broadcast_to(mask, pred.shape)
    pred, target = _masked(pred, mask), _masked(target, mask)
    centre, residual, pred_deviation = _centred(pred, mask)
    target_centre, target_residual, target_deviation = _centred(target, mask)
    variance = _sum(pred_deviation**2)
    degenerate = variance <= _CONSTANT**2 * _sum(pred**2)
    covariance = _sum(pred_deviation * target_deviation)
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


def ssi(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Scale-and-shift-invariant L1: mean |s·pred + b − target| after the least-squares fit.

    Gradients flow through s and b. An image whose best s is not positive would be rewarded for
    being upside down; there GenPercept aligns by pred · median(target) / median(pred) instead
    (over masked elements with a positive target), so it expects positive values: the depth task
    shifts both by +2. Images with a constant prediction keep s = 1, b = 0.
    """
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    line = fit_line(pred, target, mask)
    inverted = (line.scale <= 0) & ~line.degenerate
    # Sorting every image is costly and, once training has begun, rarely needed.
    ratio = jax.lax.cond(
        inverted.any(), _median_ratio, lambda p, *_: jnp.ones(p.shape[0]), pred, target, mask
    )
    proportional = _per_image(jnp.where(inverted, ratio, 1)) * pred
    aligned = jnp.where(_per_image(inverted | line.degenerate), proportional, line(pred))
    return l1(aligned, target, mask)


def gradient(
    pred: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w #c"],
    vertical_only: bool = False,
) -> Float[Array, ""]:
    """Σ (|∂_x d| + |∂_y d|) over pairs of valid neighbours / ΣM, with d = pred − target.

    `vertical_only` drops ∂_x: GenPercept's released code, written for [b,h,w] but called with
    [b,1,h,w], compares rows only, and its checkpoints were trained so.
    """
    mask = jnp.broadcast_to(mask, pred.shape)
    error = _difference(pred, target, mask)
    down = jnp.abs(error[:, 1:] - error[:, :-1]) * (mask[:, 1:] & mask[:, :-1])
    total = down.sum()
    if not vertical_only:
        right = jnp.abs(error[:, :, 1:] - error[:, :, :-1]) * (mask[:, :, 1:] & mask[:, :, :-1])
        total += right.sum()
    return total / jnp.maximum(mask.sum(), 1)


def _masked(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x.astype(jnp.float32), 0)


def _difference(pred: Array, target: Array, mask: Array) -> Array:
    # Both operands are masked: a NaN in either would otherwise reach the gradient as 0 · NaN.
    return _masked(pred, mask) - _masked(target, mask)


def _mean(values: Array, mask: Array) -> Array:
    """Mean of values (already 0 outside the mask) over the masked elements."""
    return values.sum() / jnp.maximum(jnp.broadcast_to(mask, values.shape).sum(), 1)


def _sum(x: Array) -> Array:
    """Per-image sum, [b]."""
    return x.sum(axis=(1, 2, 3))


def _per_image(values: Array) -> Array:
    """[b] -> [b, 1, 1, 1]."""
    return values[:, None, None, None]


def _centred(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The mean as a rounded part and a small residual, [b] each, and the deviations from it."""
    count = jnp.maximum(_sum(mask), 1)
    centre = _sum(x) / count
    deviation = _masked(x - _per_image(centre), mask)
    residual = _sum(deviation) / count
    return centre, residual, _masked(deviation - _per_image(residual), mask)


def _median_ratio(pred: Array, target: Array, mask: Array) -> Array:
    usable = jnp.broadcast_to(mask, pred.shape) & (target > 0)
    numerator, denominator = _lower_median(target, usable), _lower_median(pred, usable) + 1e-8
    defined = usable.any(axis=(1, 2, 3)) & (denominator != 0)
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1), 1)


def _lower_median(x: Array, mask: Array) -> Array:
    """torch's median over the mask, the lower of two middle values; 0 where it is empty: [b]."""
    count = mask.sum(axis=(1, 2, 3))
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf).reshape(x.shape[0], -1), axis=1)
    middle = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None] // 2, axis=1)[:, 0]
    return jnp.where(count > 0, middle, 0)
