"""Virtual normal loss: normals of planes through three random points far from one another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpercept.losses.masked import absolute, masked
from jaxpercept.losses.normals import unit

_COS_30 = 0.75**0.5


def vnl(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    keys: Key[Array, " b"],
    focal: Float[Array, " b"] | None = None,
    *,
    sample_ratio: float = 0.2,
    min_distance: float = 0.6,
    drop_easiest: float = 0.25,
) -> Float[Array, ""]:
    """Mean ‖normal(pred) − normal(target)‖₁ over random triangles (Yin et al., arXiv 1907.12209).

    Depth is lifted to points z·((x − x₀)/f, (y − y₀)/f, 1), with (x₀, y₀) the middle of the image.
    A triangle counts where the target's three depths are positive, its three angles are at least
    30° (hence at most 120°) and its three sides longer than `min_distance`. Both depths are to be
    positive, the shift right and the scale free: the depth task's [1, 3].

    Angles and distance (0.6 m) are the paper's. Sampling, and that each image's easiest quarter is
    left out, are GenPercept's `VNL.py`, which drops the quarter of the whole batch and, instead of
    by length, triangles whose sides are below 0.005 in all three coordinates.

    Args:
      keys: one per example.
      focal: focal lengths in pixels; if None, a field of view of 60° on the longer side. The paper
        has the camera's.
      sample_ratio: triangles per pixel. Each corner is drawn from the valid pixels without
        repetition, so that where these are fewer there are as many triangles as valid pixels.
      min_distance: in the target's units.
      drop_easiest: fraction of an image's triangles, those of the least loss, that is left out.

    Returns:
      One mean over the remaining triangles of the batch; 0 if there are none.
    """
    b, h, w, _ = target.shape
    if focal is None:
        focal = jnp.full(b, max(h, w) * _COS_30)
    corners = _triangles(mask, keys, max(int(h * w * sample_ratio), 1))
    true = _points(masked(target, mask), corners, focal)
    guess = _points(masked(pred, mask), corners, focal)
    loss = absolute(_normal(guess) - _normal(true)).sum(axis=-1)

    usable = _well_shaped(true, min_distance)
    count = usable.sum(axis=1, keepdims=True)
    ordered = jnp.sort(jnp.where(usable, loss, jnp.inf), axis=1)
    place = jnp.arange(loss.shape[1])[None]
    kept = (place >= jnp.floor(count * drop_easiest)) & (place < count)
    return jnp.where(kept, ordered, 0).sum() / jnp.maximum(kept.sum(), 1)


def _triangles(
    mask: Bool[Array, "b h w 1"], keys: Key[Array, " b"], number: int
) -> Int[Array, "3 b n"]:
    """Indices of the three corners among the pixels.

    Where the valid pixels run out the corners are invalid ones, whose masked depth of 0 makes no
    triangle.
    """
    valid = mask.reshape(mask.shape[0], -1)

    def corner(key: Array, valid: Array) -> Array:
        # In random order, the valid pixels first.
        return jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), 2))[:number]

    def draw(key: Array, valid: Array) -> Array:
        return jax.vmap(corner, in_axes=(0, None))(jax.random.split(key, 3), valid)

    return jax.vmap(draw, out_axes=1)(keys, valid)


def _points(
    depth: Float[Array, "b h w 1"], corners: Int[Array, "3 b n"], focal: Float[Array, " b"]
) -> Float[Array, "3 b n 3"]:
    """The corners in space."""
    b, h, w, _ = depth.shape
    flat = depth.reshape(b, -1)
    # Apart, since no pixel is twice the same corner: the gradient then adds up in one order only.
    z = jnp.stack([jnp.take_along_axis(flat, corner, axis=1) for corner in corners])
    focal = focal.astype(jnp.float32)[None, :, None]
    x = (corners % w - (w - 1) / 2) / focal
    y = (corners // w - (h - 1) / 2) / focal
    return z[..., None] * jnp.stack([x, y, jnp.ones_like(x)], axis=-1)


def _normal(points: Float[Array, "3 b n 3"]) -> Float[Array, "b n 3"]:
    a, b, c = points
    return unit(jnp.cross(b - a, c - a))


def _well_shaped(points: Float[Array, "3 b n 3"], min_distance: float) -> Bool[Array, "b n"]:
    a, b, c = points
    sides = jnp.stack([b - a, c - b, a - c])
    length = jnp.sqrt((sides**2).sum(axis=-1))
    direction = unit(sides)
    cosine = (direction * jnp.roll(direction, 1, axis=0)).sum(axis=-1)
    shaped = (length > min_distance) & (jnp.abs(cosine) <= _COS_30) & (points[..., 2] > 0)
    return shaped.all(axis=0)
