"""Weights of a model in Orbax: the final, portable form, restorable on any number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpercept.checkpoints.description import Description
from jaxpercept.errors import UserError

Params = dict[str, dict[str, Any]]
WEIGHTS = "weights"


def save_params(folder: Path, params: Params) -> None:
    """Write weights into `folder`, replacing what a former run left there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), params, force=True)


def load_params(folder: Path, shardings: Any = None) -> Params:
    """Read weights written by `save_params` or by a training run.

    Args:
        folder: an Orbax folder.
        shardings: a tree of shardings like the weights'; None gives NumPy arrays.

    Raises:
        UserError: the folder is no complete Orbax checkpoint.
    """
    folder = folder.resolve()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder)
            tree = getattr(metadata, "item_metadata", metadata)
            tree = getattr(tree, "tree", tree)
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = shardings or jax.tree.map(lambda _: device, tree)
            target = jax.tree.map(
                lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s), tree, shardings
            )
            params = checkpointer.restore(folder, target)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no complete Orbax checkpoint ({str(error).splitlines()[0]}): "
            "copy it again or train anew."
        ) from error
    return params if shardings is None else _to_host_if_single(params, shardings)


def _to_host_if_single(params: Params, shardings: Any) -> Params:
    singles = all(
        isinstance(s, jax.sharding.SingleDeviceSharding) for s in jax.tree.leaves(shardings)
    )
    return jax.tree.map(np.asarray, params) if singles else params


def save_export(folder: Path, description: Description, params: Params) -> None:
    """Write a whole model, description and weights, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_params(folder / WEIGHTS, params)
    description.save(folder)
