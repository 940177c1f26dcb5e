"""Losses of depth and disparity that are known up to scale and shift.

Formulas: GenPercept, `genpercept/losses/{geometry_losses,gradient_loss}.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpercept.losses.alignment import fit_line, lower_median, median_ratio, normalised
from jaxpercept.losses.masked import absolute, difference, image_sum, l1, masked, per_image


def ssi(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Scale-and-shift-invariant L1: mean |s·pred + b − target| after the least-squares fit.

    Gradients flow through s and b. An image whose best s is not positive would be rewarded for
    being upside down; there GenPercept aligns by pred · median(target) / median(pred) instead
    (over masked elements with a positive target), so it expects positive values: the depth task
    shifts both by +2. Images with a constant prediction keep s = 1, b = 0.
    """
    pred, target = masked(pred, mask), masked(target, mask)
    line = fit_line(pred, target, mask)
    inverted = (line.scale <= 0) & ~line.degenerate
    # Sorting every image is costly and, once training has begun, rarely needed.
    ratio = jax.lax.cond(
        inverted.any(), median_ratio, lambda p, *_: jnp.ones(p.shape[0]), pred, target, mask
    )
    proportional = per_image(jnp.where(inverted, ratio, 1)) * pred
    aligned = jnp.where(per_image(inverted | line.degenerate), proportional, line(pred))
    return l1(aligned, target, mask)


def ssi_median(
    pred: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w #c"],
    compat: bool = False,
) -> Float[Array, ""]:
    """Scale-and-shift-invariant L1 by medians: mean |n(pred) − n(target)|.

    n(x) = (x − median) / mean |x − median|, both over an image's masked elements; the median is the
    lower of two middle values (MiDaS, arXiv 1907.01341, eq. 5). Any values; unlike `ssi` it does
    not need positive ones, and an inverted prediction is a large error. Gradients flow through
    median and divisor. A constant image is divided by 1.

    `compat`: GenPercept's "medium" alignment as released. The median and Σ |x − median| are taken
    over all elements, the mask ignored, and the sum divided by ΣM + 1e-6, plus 1e-6. What the mask
    leaves out then counts where it is finite.
    """
    if not compat:
        inside = jnp.broadcast_to(mask, pred.shape)
        n_pred, n_target = _median_normalised(pred, inside), _median_normalised(target, inside)
    else:
        n_pred, n_target = _released_normalised(pred, mask), _released_normalised(target, mask)
    return l1(n_pred, n_target, mask)


def gradient(
    pred: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w #c"],
    vertical_only: bool = False,
    scales: int = 1,
) -> Float[Array, ""]:
    """Σ_k Σ (|∂_x d| + |∂_y d|) over pairs of valid neighbours / ΣM, with d = pred − target.

    Scale k = 0 … scales − 1 takes every 2^k-th row and column, without smoothing, and its own ΣM
    (MiDaS, arXiv 1907.01341, eq. 11, has 4 scales; GenPercept 1).

    `vertical_only` drops ∂_x: GenPercept's released code, written for [b,h,w] but called with
    [b,1,h,w], compares rows only, and its checkpoints were trained so. Its coarser scales would
    thin rows only, and so they do here.
    """
    mask = jnp.broadcast_to(mask, pred.shape)
    error = difference(pred, target, mask)
    total = jnp.float32(0)
    for step in (2**k for k in range(scales)):
        across = 1 if vertical_only else step
        total += _gradient(error[:, ::step, ::across], mask[:, ::step, ::across], vertical_only)
    return total


def _gradient(error: Array, mask: Array, vertical_only: bool) -> Array:
    total = (absolute(error[:, 1:] - error[:, :-1]) * (mask[:, 1:] & mask[:, :-1])).sum()
    if not vertical_only:
        pairs = mask[:, :, 1:] & mask[:, :, :-1]
        total += (absolute(error[:, :, 1:] - error[:, :, :-1]) * pairs).sum()
    return total / jnp.maximum(mask.sum(), 1)


def _median_normalised(x: Array, inside: Array) -> Array:
    flat, inside = masked(x, inside).reshape(x.shape[0], -1), inside.reshape(x.shape[0], -1)
    return normalised(flat, lower_median(flat, inside)[:, None], inside).reshape(x.shape)


def _released_normalised(x: Array, mask: Array) -> Array:
    x = masked(x, mask | jnp.isfinite(x))
    count = image_sum(jnp.broadcast_to(mask, x.shape))
    deviation = x - per_image(lower_median(x, jnp.ones_like(x, bool)))
    spread = image_sum(absolute(deviation)) / (count + 1e-6)
    return deviation / per_image(spread + 1e-6)
