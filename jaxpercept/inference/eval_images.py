"""The images of an evaluation: looked at once, then read batch by batch onto the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array
from tqdm import tqdm

from jaxpercept.data.datasets import Record
from jaxpercept.inference.batches import plan_batches
from jaxpercept.training import sharding

# Decoded images are kept between runs up to this many bytes.
_CACHE_BYTES = 512 * 2**20

Batch = tuple[list[int], dict[int, Record], dict[str, Array]]


class EvalImages:
    """Some of a dataset's records, of any sizes.

    Construction reads each once; small datasets then stay in memory.

    Args:
        records: the dataset, opened.
        indices: which of its records; item i below is record indices[i].
        prepare: what is done to each after it is read.
        look: called with each prepared record, in order; it raises where one does not fit.
        fields: what is put onto the mesh.
        kept: what else of a record is wanted on the host.
        mesh: where batches live.
        batch_size: images at a time, rounded up to the number of devices.
        progress: show a progress bar.

    Attributes:
        names, sizes: of the items; sizes are (height, width).
        batches: (items, rows) of each batch, see `batches.plan_batches`.
        own: items whose rows lie on this process's devices.

    Raises:
        UserError: an image is damaged or has nothing valid, or `look` says so.
    """

    def __init__(
        self,
        records: Any,
        indices: Sequence[int],
        *,
        prepare: Callable[[Record], Record],
        look: Callable[[Record], None],
        fields: Sequence[str],
        kept: Sequence[str],
        mesh: Mesh,
        batch_size: int,
        progress: bool,
    ):
        self._records, self._indices, self._prepare = records, indices, prepare
        self._fields, self._wanted = tuple(fields), {*fields, *kept}
        self._sharding = NamedSharding(mesh, sharding.BATCH)
        self._cache: dict[int, Record] = {}
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self._survey(look, progress)
        self.batches = plan_batches(self.sizes, batch_size, sharding.batch_devices(mesh))
        self.own = sorted(
            items[row]
            for items, rows in self.batches
            for row in self._own_rows(rows)
            if row < len(items)
        )

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, item: int) -> Record:
        """The wanted entries of an item's record, and its name."""
        return self._cache.get(item) or self._wanted_of(item, self._read(item))

    def loaded(self, threads: ThreadPoolExecutor) -> Iterator[Batch]:
        """(items, this process's records by row, arrays on the mesh), read one batch ahead.

        Rows beyond the last item repeat it and fill up the devices; they have no record.
        """

        def start(number: int) -> dict[int, Future]:
            if number == len(self.batches):
                return {}
            items, rows = self.batches[number]
            return {
                row: threads.submit(self.load, items[min(row, len(items) - 1)])
                for row in self._own_rows(rows)
            }

        ahead = start(0)
        for number, (items, rows) in enumerate(self.batches):
            records = {row: future.result() for row, future in ahead.items()}
            ahead = start(number + 1)
            arrays = {field: self._put(records, field, rows) for field in self._fields}
            yield items, {row: x for row, x in records.items() if row < len(items)}, arrays

    def _survey(self, look: Callable[[Record], None], progress: bool) -> None:
        size = 0
        with ThreadPoolExecutor() as threads:
            records = threads.map(self._read, range(len(self)))
            for item, record in enumerate(
                tqdm(
                    records,
                    total=len(self),
                    desc="checking images",
                    unit="image",
                    leave=False,
                    disable=None if progress else True,
                )
            ):
                look(record)
                wanted = self._wanted_of(item, record)
                self.names.append(wanted["name"])
                self.sizes.append(wanted["rgb"].shape[:2])
                size += sum(x.nbytes for x in wanted.values() if isinstance(x, np.ndarray))
                if size <= _CACHE_BYTES:
                    self._cache[item] = wanted

    def _read(self, item: int) -> Record:
        return self._prepare(self._records[self._indices[item]])

    def _wanted_of(self, item: int, record: Record) -> Record:
        name = record.get("name", str(self._indices[item]))
        return {field: record[field] for field in self._wanted if field in record} | {"name": name}

    def _own_rows(self, rows: int) -> list[int]:
        """The rows of a batch that this process's devices hold."""
        places = self._sharding.addressable_devices_indices_map((rows,)).values()
        return sorted({row for (place,) in places for row in range(*place.indices(rows))})

    def _put(self, records: Mapping[int, Record], field: str, rows: int) -> Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([records[row][field] for row in range(*index[0].indices(rows))])

        shape = (rows, *next(iter(records.values()))[field].shape)
        return jax.make_array_from_callback(shape, self._sharding, shard)


def spread(count: int, limit: int) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spread; all of them if `limit` is 0."""
    if not 0 < limit < count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
