"""Losses of surface normals, by angle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpercept.losses.masked import masked, masked_mean

# The arc cosine's slope is infinite at ±1 and 71 at this distance from it.
_MARGIN = 1e-4
# A vector all of whose components are below this has no direction.
_SHORT = 1e-8


def angular(
    pred: Float[Array, "b h w 3"], target: Float[Array, "b h w 3"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, ""]:
    """Mean angle arccos(clip(cos(pred, target), −1 + 1e-4, 1 − 1e-4)), in radians.

    Vectors of any length; one without length is at a right angle to all, with zero gradient. The
    clip (GenPercept) keeps gradients finite; at equality the value is 0.0141 rad (0.8°), and below
    that angle the gradient is zero.
    """
    return masked_mean(_angle(masked(pred, mask), masked(target, mask)), mask)


def angular_kappa(
    pred: Float[Array, "b h w 4"], target: Float[Array, "b h w 3"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, ""]:
    """Mean κ·angle − log(κ² + 1) + log(1 + exp(−κπ)): `angular` with a learned certainty.

    The negative log-likelihood, less log 2π, of Bae et al., ICCV 2021 (arXiv 2109.09881), eq. 3,
    with κ = elu(pred[..., 3]) + 1.01 > 0. May be negative. The angle is `angular`'s.
    """
    pred = masked(pred, mask)
    kappa = jax.nn.elu(pred[..., 3:]) + 1.01
    angle = _angle(pred[..., :3], masked(target, mask))
    # log(κ² + 1) without squaring, which would overflow.
    spread = jax.nn.softplus(2 * jnp.log(kappa))
    return masked_mean(kappa * angle - spread + jnp.log1p(jnp.exp(-jnp.pi * kappa)), mask)


def unit(vectors: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Vectors divided by their length; 0, with zero gradient, where there is none."""
    # Dividing by the largest component first: squares would overflow or vanish. The result does
    # not depend on that divisor, so neither does its gradient.
    largest = jax.lax.stop_gradient(jnp.abs(vectors).max(axis=-1, keepdims=True))
    short = largest < _SHORT
    vectors = jnp.where(short, 0, vectors) / jnp.where(short, 1, largest)
    square = (vectors**2).sum(axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.where(short, 1, square))


def _angle(pred: Array, target: Array) -> Array:
    """[..., 3] and [..., 3] -> [..., 1]."""
    u, v = unit(pred), unit(target)
    # 1 − cos and 1 + cos from chords: subtracted from 1, a cosine near it loses half its digits.
    below, above = (
        jnp.clip((chord**2).sum(axis=-1, keepdims=True) / 2, _MARGIN, 2 - _MARGIN)
        for chord in (u - v, u + v)
    )
    return 2 * jnp.arctan2(jnp.sqrt(below), jnp.sqrt(above))
