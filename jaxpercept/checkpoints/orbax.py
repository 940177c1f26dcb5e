"""Weights of a model in Orbax: written from any devices, read as NumPy arrays on any machine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError

Params = dict[str, dict[str, Any]]
WEIGHTS = "weights"


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    """A handler's method that fails only when all reads it began have ended.

    Orbax reads all arrays at once and gives up at the first that fails. The others would then
    report to an event loop that is closed, each with a traceback on stderr.
    """

    @functools.wraps(method)
    async def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = asyncio.all_tasks()
        try:
            return await method(self, *args, **kwargs)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
            raise

    return waiting


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    metadata = _waiting(ocp.type_handlers.ArrayHandler.metadata)
    deserialize = _waiting(ocp.type_handlers.ArrayHandler.deserialize)


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    metadata = _waiting(ocp.type_handlers.NumpyHandler.metadata)
    deserialize = _waiting(ocp.type_handlers.NumpyHandler.deserialize)


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """How trees of arrays are written and read.

    Copies of a large array are written by all devices that hold one, each a part. Orbax compiles
    a program for every shape it cuts so: for hundreds of small arrays one device writes it all.
    """
    arrays = _ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, _NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save_params(folder: Path, params: Params) -> None:
    """Write weights into `folder`, replacing what a former run left there.

    The folder appears when it is complete. With several processes, all must call this.
    """
    with ocp.Checkpointer(array_handler()) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(params), force=True)


def load_params(folder: Path, shapes: dict[str, Any] | None = None) -> Params:
    """Read weights, written by `save_params` or by a training run, as NumPy arrays.

    Args:
        folder: the weights' own.
        shapes: what `load_shapes` said, where it was asked before.

    Raises:
        UserError: the folder is no complete Orbax checkpoint, or a weight is not finite.
    """
    shapes = load_shapes(folder) if shapes is None else shapes
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
    """Shapes and dtypes of the arrays in a folder: `{component: {path: jax.ShapeDtypeStruct}}`.

    Raises:
        UserError: the folder is no complete Orbax checkpoint, or not one of weights.
    """
    with _complaint(folder):
        tree = array_handler().metadata(folder.resolve()).tree
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    for component, leaves in shapes.items():
        for path, leaf in leaves.items() if isinstance(leaves, dict) else [("", None)]:
            if not isinstance(leaf, jax.ShapeDtypeStruct) or not _is_float(leaf.dtype):
                raise UserError(
                    f"{folder} holds {in_short(f'{component}/{path}')}, which is no array of "
                    "floating-point numbers: it is not a model's weights."
                )
    return shapes


def save_export(folder: Path, description: Description, params: Params) -> None:
    """Write a whole model, description and weights, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_params(folder / WEIGHTS, params)
    description.save(folder)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


@contextmanager
def _complaint(folder: Path) -> Iterator[None]:
    """What Orbax raises on damaged files, which is almost anything, as one sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder} holds no complete Orbax checkpoint ({in_short(reason)}): copy it again, or "
            "remove it where a run has an earlier one."
        ) from error
