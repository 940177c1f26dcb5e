"""The weights that predicting needs, in the types it needs, on the devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpercept.errors import UserError
from jaxpercept.inference.predictor import Params
from jaxpercept.training import sharding


def place_weights(params: Params, dtype: str, mesh: Mesh, *, text: bool = False) -> Params:
    """The weights that predicting needs, on the devices; see `used_weights`."""
    used = used_weights(params, dtype, text=text)
    return sharding.put_tree(used, sharding.tree_shardings(used, mesh))


def used_weights(params: Params, dtype: str, *, text: bool = False) -> Params:
    """The weights that predicting needs, as NumPy arrays.

    Kernels are kept in the compute dtype: the layers would convert them at every call. Norms,
    biases and the prompt's embedding are small, and statistics want them in float32.

    Args:
        params: of all components.
        dtype: of kernels.
        text: whether each image comes with a text, which the text encoder reads.

    Raises:
        UserError: a component is missing.
    """
    needed = ["unet", "vae", "prompt", *(("text_encoder",) if text else ())]
    if missing := [component for component in needed if component not in params]:
        raise UserError(
            f"the checkpoint lacks {' and '.join(missing)}: convert or train it again from a "
            "complete one, text encoder included."
        )
    needed += [component for component in ("decoder", "head") if component in params]

    def cast(path: tuple[Any, ...], weight: Any) -> Any:
        is_kernel = path[-1].key.endswith("kernel")
        return np.asarray(weight, jnp.dtype(dtype) if is_kernel else jnp.float32)

    used = {component: params[component] for component in needed}
    return jax.tree_util.tree_map_with_path(cast, used)
