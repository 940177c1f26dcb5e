"""Hierarchical depth normalisation with random contexts.

Hierarchical depth normalisation (Zhang et al., NeurIPS 2022, arXiv 2210.09670) compares depth up to
scale and shift within contexts, parts of an image, so that small differences of depth in one part
are not lost beside the range of the whole. The paper's contexts are fixed: bins of depth (HDN-DR)
or cells of grids (HDN-S). The random variants, as in Metric3D v2 (arXiv 2404.15506) and
GenPercept, draw them anew for every example and step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpercept.losses.alignment import normalised
from jaxpercept.losses.masked import absolute, masked


def hdn_random(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    keys: Key[Array, " b"],
    *,
    random_num: int = 10,
) -> Float[Array, ""]:
    """Mean |n_u(pred) − n_u(target)| over all pixels of all contexts u, random ranges of depth.

    n_u(x) = (x − median_u) / mean_u |x − median_u| over the context's valid pixels; a constant
    context is divided by 1. A context is the pixels whose target lies between the fractions l and
    r of its image's valid range, with l uniform in [0, 0.75) and r in [l + 0.1, 1). (The released
    code adds the 0.1 to the depth instead of the fraction.) Any values, any units.

    One mean over (context, pixel) pairs of the batch, as released; the paper averages a pixel's
    contexts first. As released, no gradient flows through the prediction's median, where it would
    all fall on one pixel; it does through the divisor. GenPercept's weight is 0.5.

    Contexts are computed one after the other (the released `batch_limit` bounds memory and is not
    needed).

    Args:
      keys: one per example.
      random_num: contexts per image.
    """
    valid, depth = _flat(mask), _flat(masked(target, mask))

    def context(ends: tuple[Array, Array]) -> Array:
        low, high = ends
        return (depth >= low[:, None]) & (depth <= high[:, None])

    ends = _depth_ranges(depth, valid, keys, random_num)
    return _mean_over_contexts(pred, target, mask, context, ends)


def hdsn_random(
    pred: Float[Array, "b h w 1"],
    target: Float[Array, "b h w 1"],
    mask: Bool[Array, "b h w 1"],
    keys: Key[Array, " b"],
    *,
    random_num: int = 20,
) -> Float[Array, ""]:
    """`hdn_random` with random windows for contexts, and the whole image as one more.

    A window has 1/8 to 1/2 of the image's height and, drawn apart, of its width; its top left
    corner lies anywhere in the upper left 7/8 of either side, and what reaches over the border is
    cut off. (The released code divides |x − median| summed over the whole image by the window's
    pixels; here both belong to the window. It also shares the windows within a batch.)
    """
    _, h, w, _ = target.shape
    row, column = (i.reshape(1, -1) for i in jnp.indices((h, w)))

    def context(window: Array) -> Array:
        top, left, bottom, right = window.T[:, :, None]
        return (row >= top) & (row < bottom) & (column >= left) & (column < right)

    windows = _windows(h, w, keys, random_num)
    return _mean_over_contexts(pred, target, mask, context, windows)


def _depth_ranges(
    depth: Float[Array, "b n"], valid: Bool[Array, "b n"], keys: Key[Array, " b"], number: int
) -> tuple[Float[Array, "k b"], Float[Array, "k b"]]:
    """The lowest and the highest depth of every context."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (2, number)), out_axes=2)
    first, second = draw(keys)  # [k, b]
    low = 0.75 * first
    high = low + 0.1 + (0.9 - low) * second
    any_valid = valid.any(axis=1)
    nearest = jnp.where(any_valid, jnp.where(valid, depth, jnp.inf).min(axis=1), 0)
    farthest = jnp.where(any_valid, jnp.where(valid, depth, -jnp.inf).max(axis=1), 0)
    nearest, span = nearest[None], (farthest - nearest)[None]
    return nearest + low * span, nearest + high * span


def _windows(h: int, w: int, keys: Key[Array, " b"], number: int) -> Int[Array, "k b 4"]:
    """(top, left, bottom, right), the latter two outside the window; the last is the image."""

    def draw(key: Array) -> Array:
        sizes, corners = jax.random.split(key)
        shortest = jnp.array([max(h // 8, 1), max(w // 8, 1)])
        longest = jnp.maximum(jnp.array([h // 2, w // 2]), shortest)
        size = jax.random.randint(sizes, (number, 2), shortest[None], longest[None] + 1)
        limit = jnp.array([[h - h // 8, w - w // 8]])
        corner = jax.random.randint(corners, (number, 2), 0, limit)
        windows = jnp.concatenate([corner, corner + size], axis=1)
        return jnp.concatenate([windows, jnp.array([[0, 0, h, w]])])

    return jax.vmap(draw, out_axes=1)(keys)


def _mean_over_contexts(
    pred: Array,
    target: Array,
    mask: Array,
    context: Callable[..., Array],
    contexts: Array | tuple[Array, ...],
) -> Array:
    """The loss, where `context` turns each of `contexts` (leading axis) into a mask [b, n]."""
    valid = _flat(mask)
    pair = [_flat(masked(x, mask)) for x in (pred, target)]
    # Sorted once: a context's median is then found by counting.
    orders = [
        jnp.argsort(jnp.where(valid, jax.lax.stop_gradient(x), jnp.inf), axis=1) for x in pair
    ]

    @jax.checkpoint  # The backward pass computes a context again rather than keep its pixels.
    def compare(one: Array | tuple[Array, ...]) -> tuple[Array, Array]:
        inside = context(one) & valid
        n_pred, n_target = (
            normalised(x, jax.lax.stop_gradient(_median(x, order, inside)), inside)
            for x, order in zip(pair, orders, strict=True)
        )
        return absolute(n_pred - n_target).sum(), inside.sum().astype(jnp.float32)

    totals, counts = jax.lax.map(compare, contexts)
    return totals.sum() / jnp.maximum(counts.sum(), 1)


def _median(x: Array, order: Array, inside: Array) -> Array:
    """Lower median of x over `inside`, [b, 1], given the order that sorts x; any if it is empty."""
    rank = jnp.cumsum(jnp.take_along_axis(inside, order, axis=1), axis=1, dtype=jnp.int32)
    middle = (rank[:, -1:] + 1) // 2
    place = jnp.argmax(rank >= middle, axis=1, keepdims=True)
    return jnp.take_along_axis(x, jnp.take_along_axis(order, place, axis=1), axis=1)


def _flat(x: Array) -> Array:
    """[b, h, w, 1] -> [b, h·w]."""
    return x.reshape(x.shape[0], -1)
