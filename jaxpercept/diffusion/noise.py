"""Noise that belongs to the example, wherever it is computed."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Int, Key


def per_example(
    key: Key[Array, ""], index: Int[Array, "b"], draw: Callable[[Key[Array, ""]], Array]
) -> Array:
    """One draw per example that depends on the key and the example's index alone.

    Rows may then come in any order, from any host, on any number of devices.
    """
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)
