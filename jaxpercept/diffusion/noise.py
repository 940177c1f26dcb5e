"""Noise that belongs to the example, wherever it is computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def per_example(
    key: Key[Array, ""], index: Int[Array, "b"], draw: Callable[[Key[Array, ""]], Array]
) -> Array:
    """One draw per example that depends on the key and the example's index alone.

    Rows may then come in any order, from any host, on any number of devices.
    """
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)


def multi_resolution(
    key: Key[Array, ""],
    shape: tuple[int, int, int],
    strength: Float[Array, ""],
) -> Float[Array, "h w c"]:
    """Marigold's multi-resolution noise of one example, of unit variance.

    n = Σ_i strength^i · up(n_i) over levels of ever coarser noise, divided by its standard
    deviation: level i has 1/r_i^i of the level before, r_i ~ U(2, 4), at least one cell, and the
    last is the first with a side of one cell. Level 0, with r^0 = 1, is a second noise of full size
    [`src/util/multi_res_noise.py`, strategy "original"].

    There r and the standard deviation are common to the batch; here they are each example's own, so
    that its noise depends on nothing else.

    Args:
      shape: height, width, channels.
      strength: 0 leaves the two noises of full size; annealed, it is 0.9 t / T.
    """
    h, w, c = shape
    noise = jax.random.normal(jax.random.fold_in(key, 0), shape)
    rows, columns, active = jnp.float32(h), jnp.float32(w), jnp.bool_(True)
    most = (h, w)
    for level in range(10):
        key_ratio, key_level = jax.random.split(jax.random.fold_in(key, level + 1))
        ratio = jax.random.uniform(key_ratio, minval=2.0, maxval=4.0) ** level
        rows, columns = (jnp.maximum(jnp.floor(side / ratio), 1.0) for side in (rows, columns))
        # Shapes must not depend on the draw: room for the most cells there can be.
        most = tuple(max(side // 2**level, 1) for side in most)
        grid = jax.random.normal(key_level, (*most, c))
        up = jnp.einsum(
            "hi,ijc,wj->hwc", _enlarging(h, most[0], rows), grid, _enlarging(w, most[1], columns)
        )
        noise += jnp.where(active, strength**level * up, 0.0)
        active &= (rows > 1) & (columns > 1)
        if min(most) == 1:
            break
    return noise / jnp.std(noise, ddof=1)


def _enlarging(size: int, most: int, cells: Float[Array, ""]) -> Float[Array, "s m"]:
    """The matrix that enlarges the first `cells` of `most` cells to `size`, bilinear as torch."""
    place = jnp.maximum((jnp.arange(size) + 0.5) * (cells / size) - 0.5, 0.0)
    place = jnp.minimum(place, cells - 1)
    return jnp.maximum(1.0 - jnp.abs(place[:, None] - jnp.arange(most)[None]), 0.0)
