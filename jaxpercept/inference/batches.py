"""Images of many sizes in few batches, on the devices of this process."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpercept.training import sharding


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
