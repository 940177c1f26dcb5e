"""Weights of a model in Orbax: written from any devices, read as NumPy arrays on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpercept.checkpoints.description import Description
from jaxpercept.errors import UserError

Params = dict[str, dict[str, Any]]
WEIGHTS = "weights"


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """How trees of arrays are written and read.

    Copies of a large array are written by all devices that hold one, each a part. Orbax compiles
    a program for every shape it cuts so: for hundreds of small arrays one device writes it all.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save_params(folder: Path, params: Params) -> None:
    """Write weights into `folder`, replacing what a former run left there.

    The folder appears when it is complete. With several processes, all must call this.
    """
    with ocp.Checkpointer(array_handler()) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(params), force=True)


def load_params(folder: Path) -> Params:
    """Read weights, written by `save_params` or by a training run, as NumPy arrays.

    Raises:
        UserError: the folder is no complete Orbax checkpoint, or a weight is not finite.
    """
    shapes = load_shapes(folder)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    with _complaint(folder):
        # The handler, not a Checkpointer: `params` is one item of a run's checkpoint, and only
        # the whole checkpoint has the metadata file a Checkpointer looks for.
        params = array_handler().restore(
            folder.resolve(), args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
    for component, weights in params.items():
        for path, array in weights.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"{folder} holds NaN or infinite values in {component}/{path}: copy it again, "
                    "or use another checkpoint."
                )
    return params


def load_sharded(folder: Path, place: Callable[[Any], Any]) -> Params:
    """Read weights straight to the devices of any mesh, each process and device its part.

    Args:
        folder: written by `save_params` or by a training run, on whatever devices.
        place: from the tree of shapes to one of shardings, such as
            `lambda shapes: sharding.tree_shardings(shapes, mesh)`.

    Raises:
        UserError: the folder is no complete Orbax checkpoint.
    """
    shapes = load_shapes(folder)
    arguments = jax.tree.map(
        lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding), place(shapes)
    )
    with _complaint(folder):
        return array_handler().restore(
            folder.resolve(), args=ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
        )


def load_shapes(folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of the arrays in a folder, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
        UserError: the folder is no complete Orbax checkpoint.
    """
    with _complaint(folder):
        tree = array_handler().metadata(folder.resolve()).tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_export(folder: Path, description: Description, params: Params) -> None:
    """Write a whole model, description and weights, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_params(folder / WEIGHTS, params)
    description.save(folder)


@contextmanager
def _complaint(folder: Path) -> Iterator[None]:
    """What Orbax raises on damaged files, as one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder} holds no complete Orbax checkpoint ({reason[:200]}): copy it again, or "
            "remove it where a run has an earlier one."
        ) from error
