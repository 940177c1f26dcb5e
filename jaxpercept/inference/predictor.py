"""From images of any size to predictions of that size: resize, pad, predict, resize back.

The steps follow diffusers' Marigold pipelines [`pipelines/marigold/marigold_image_processing.py`]:
the long side goes to the processing resolution with integer arithmetic, antialiased; the border is
replicated right and bottom up to the autoencoder's factor and cut off again after decoding; the
prediction goes back to the image's size without antialiasing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from jaxpercept.errors import UserError
from jaxpercept.resize import resize
from jaxpercept.training import sharding

Params = dict[str, dict[str, Any]]
Size = tuple[int, int]


@runtime_checkable
class PerceptionMethod(Protocol):
    """What predicting needs of a method, such as `methods.OneStep`."""

    model: Any
    """Has `downscale`, pixels per latent cell."""
    task: Any
    """Has `kind` and `to_prediction(decoded)`."""

    def predict(self, params: Params, rgb: Array) -> tuple[Array, Array]:
        """Decoded image [b, h, w, 3], not clamped, and latent, for float images in [-1, 1]."""


def processing_size(size: Size, resolution: int) -> Size:
    """(height, width) whose long side is `resolution`; 0 keeps the size."""
    if resolution == 0:
        return size
    long = max(size)
    return max(size[0] * resolution // long, 1), max(size[1] * resolution // long, 1)


def resolve_resolution(requested: int | None, trained: Size | None, factor: int) -> int:
    """The processing resolution to use: the requested one, or the long side of the training.

    Args:
        requested: None for the default, 0 for each image's own size.
        trained: (height, width) of the training images, if known.
        factor: pixels per latent cell.

    Raises:
        UserError: negative, or not a multiple of `factor`.
    """
    if requested is None:
        return max(trained) if trained is not None else 0
    if requested < 0 or requested % factor:
        nearest = max(round(requested / factor), 1) * factor
        raise UserError(
            f"processing_resolution {requested} is not a multiple of {factor}: use {nearest}, or 0 "
            "for each image's own size."
        )
    return requested


def to_signed_float(image: Shaped[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """uint8, uint16 or float [0, 1] to float32 [-1, 1]."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        image = image.astype(jnp.float32) / float(jnp.iinfo(image.dtype).max)
    return image.astype(jnp.float32) * 2.0 - 1.0


class Predictor:
    """A method's prediction for images of any size.

    Weights are arguments. The network is compiled once for each processing size, whatever the
    images' own sizes are; only the two resizes depend on those, and compile in a moment.

    Args:
        method: a method with `predict` and `task`.
        mesh: where batches are split.
    """

    def __init__(self, method: PerceptionMethod, mesh: Mesh):
        self.method, self.mesh = method, mesh
        self.factor = method.model.downscale
        self._prepare = jax.jit(self._resize_and_pad, static_argnames="size")
        self._network = jax.jit(method.predict)
        self._finish = jax.jit(self._crop_and_resize, static_argnames=("size", "output"))

    def __call__(
        self,
        params: Params,
        image: Shaped[Array, "b h w 3"],
        *,
        resolution: int,
        match_input: bool = True,
    ) -> tuple[Float[Array, "b i j c"], Float[Array, "b k l m"]]:
        """Predict a batch.

        Args:
            params: all components, on the mesh.
            image: on the mesh; uint8, uint16 or float [0, 1].
            resolution: long side at which the network works, 0 for the image's own.
            match_input: bring the prediction back to the image's size.

        Returns:
            The task's prediction, and the latent it was decoded from (padding included).
        """
        own = image.shape[1:3]
        size = processing_size(own, resolution)
        decoded, latent = self._network(params, self._prepare(image, size=size))
        return self._finish(decoded, size=size, output=own if match_input else size), latent

    def _resize_and_pad(self, image: Array, *, size: Size) -> Array:
        image = resize(to_signed_float(image), size, "bilinear", antialias=True)
        pad = [(0, -edge % self.factor) for edge in size]
        return jnp.pad(image, ((0, 0), *pad, (0, 0)), mode="edge")

    def _crop_and_resize(self, decoded: Array, *, size: Size, output: Size) -> Array:
        prediction = self.method.task.to_prediction(decoded[:, : size[0], : size[1]])
        return resize(prediction, output, "bilinear")


def local_mesh() -> Mesh:
    """A mesh over this process's devices: predicting needs no other process."""
    devices = np.asarray(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, ("data", "fsdp", "tensor"))


def plan_batches(
    keys: Sequence[Hashable], batch_size: int, multiple: int = 1
) -> list[tuple[list[int], int]]:
    """Sort items into batches of one key each.

    All batches of a key have the same number of rows, so that each key compiles once; the rows are
    as few as cover the items in the fewest batches.

    Args:
        keys: the key (the shape) of each item.
        batch_size: most rows of a batch, before rounding up to `multiple`.
        multiple: what the number of rows must be divisible by.

    Returns:
        (items, rows) of each batch, at most `rows` items each, in the order of their first items.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for item, key in enumerate(keys):
        groups[key].append(item)
    largest = math.ceil(batch_size / multiple) * multiple
    batches = []
    for items in groups.values():
        count = math.ceil(len(items) / largest)
        rows = math.ceil(math.ceil(len(items) / count) / multiple) * multiple
        batches += [(items[i : i + rows], rows) for i in range(0, len(items), rows)]
    return sorted(batches)


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Repeat the last row until there are `rows`."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


def put_rows(array: np.ndarray, rows: int, mesh: Mesh) -> Array:
    """Pad a batch and split it over the mesh."""
    return sharding.put_batch({"rows": pad_rows(array, rows)}, mesh)["rows"]
