"""Protocols at work: the rows of images, on the devices and in threads, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxpercept.data.datasets import Record
from jaxpercept.inference.measures import Measure, Protocols, entry
from jaxpercept.inference.predictor import Prediction
from jaxpercept.metrics.protocol import DeviceProtocol, Row, add, over_hosts
from jaxpercept.training import sharding

Rows = Mapping[str, Row]
"""One image's row by each protocol, by the protocols' titles."""


class Started(NamedTuple):
    """What the devices are at work on.

    Attributes:
        prediction: of a batch.
        finite: whether each image's is, on every process.
        scores: what the device protocols' `batched` gave, by title.
        raw: see `Prediction.raw`; None where no protocol measures it.
    """

    prediction: Array
    finite: Array
    scores: dict[str, dict[str, Array]]
    raw: Array | None


class Scorer:
    """Measures predictions by all protocols of a measure.

    Args:
        measure: the kind's.
        protocols: by title; those for devices run jitted on whole batches, the others image by
            image on the host.
        mesh: where batches live.
    """

    def __init__(self, measure: Measure, protocols: Protocols, mesh: Mesh):
        self._measure, self._protocols = measure, protocols
        self._device = {t: p for t, p in protocols.items() if isinstance(p, DeviceProtocol)}
        self._host = {t: p for t, p in protocols.items() if t not in self._device}
        self._raw = any(p.raw for p in self._host.values())
        self.fields = sorted({field for p in self._device.values() for field in p.fields})
        self._sharding = NamedSharding(mesh, sharding.BATCH)
        # Every process learns of an image that is not finite; scores stay with who has the image.
        self._score = jax.jit(
            self._compare, out_shardings=(sharding.replicated(mesh), self._sharding)
        )

    def start(self, predicted: Prediction, arrays: Mapping[str, Array]) -> Started:
        """Begin with a batch; returns at once.

        Args:
            predicted: of the batch; merged from ensembles, on the host.
            arrays: `fields` of the batch, on the mesh.
        """
        prediction = self._placed(predicted.prediction)
        finite, scores = self._score(prediction, {field: arrays[field] for field in self.fields})
        raw = self._placed(predicted.raw) if self._raw else None
        return Started(prediction, finite, scores, raw)

    def _placed(self, rows: Array | np.ndarray) -> Array:
        return sharding.put_tree(rows, self._sharding) if isinstance(rows, np.ndarray) else rows

    def _compare(self, prediction: Array, batch: Mapping[str, Array]) -> tuple[Array, Any]:
        finite = jnp.isfinite(prediction).all(axis=(1, 2, 3))
        measured = self._measure.measured(prediction)
        return finite, {t: p.batched(measured, batch) for t, p in self._device.items()}

    def finish(
        self, started: Started, records: Mapping[int, Record], threads: Executor
    ) -> dict[int, Future | Rows]:
        """The rows of a batch's images: waits for the devices.

        Args:
            started: from `start`.
            records: of this process's images, by their row in the batch; others are left out.
            threads: where the host's protocols run.

        Returns:
            By the row in the batch; with protocols of the host, futures.
        """
        scores = {
            title: self._device[title].rows({k: _stacked(x, records) for k, x in scores.items()})
            for title, scores in started.scores.items()
            if records
        }
        on_devices = {
            row: {title: rows[i] for title, rows in scores.items()}
            for i, row in enumerate(sorted(records))
        }
        if not self._host:
            return on_devices
        predictions = own_rows(started.prediction)
        raw = own_rows(started.raw) if self._raw else predictions
        return {
            row: threads.submit(self._on_host, found, predictions[row], raw[row], records[row])
            for row, found in on_devices.items()
        }

    def _on_host(
        self, found: Rows, prediction: np.ndarray, raw: np.ndarray, record: Record
    ) -> Rows:
        measured = {
            t: p.per_image(raw if p.raw else prediction, record) for t, p in self._host.items()
        }
        return {title: {**found, **measured}[title] for title in self._protocols}

    def trivial(self, record: Record) -> Rows:
        """The rows of the trivial predictions for an image."""
        return {title: protocol.trivial_row(record) for title, protocol in self._protocols.items()}

    def values(self, rows: Rows) -> dict[str, Any]:
        """One image's own metrics, as a report lists them."""
        found: dict[str, Any] = {}
        for title, row in rows.items():
            if "valid_pixels" in row:
                found["valid_pixels"] = row["valid_pixels"]
            if title not in self._measure.quiet:
                names = [name for name in self._protocols[title].names if name in row]
                found |= {entry(title, name): row[name] for name in names}
        return found

    def summarise(self, totals: Rows) -> dict[str, float]:
        """A dataset's metrics from the sums of its rows."""
        return {
            entry(title, name): value
            for title, protocol in self._protocols.items()
            for name, value in protocol.summarise(totals[title]).items()
        }


class Tally:
    """What the rows of all images add up to, over all processes.

    Args:
        scorer: whose rows they are.
        count: how many images there are.
    """

    def __init__(self, scorer: Scorer, count: int):
        self._scorer, self._count = scorer, count
        self._rows: dict[int, dict[str, Any]] = {}
        self._totals: dict[str, Row] = {}

    def add(self, item: int, rows: Rows) -> None:
        """Take down an image's rows; items in the same order give the same sums."""
        self._rows[item] = self._scorer.values(rows)
        for title, row in rows.items():
            before = [self._totals[title]] if title in self._totals else []
            self._totals[title] = add([*before, row])

    def result(
        self, example: Callable[[], Record]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Every image's own metrics, and the dataset's; all processes must call this together.

        Args:
            example: gives any record, from which a process without images learns what there is to
                add.
        """
        if jax.process_count() > 1:
            self._share(example)
        return [self._rows[item] for item in range(self._count)], self._scorer.summarise(
            self._totals
        )

    def _share(self, example: Callable[[], Record]) -> None:
        if not self._rows:
            nothing = self._scorer.trivial(example())
            self._totals = {
                title: {name: 0 * np.asarray(x) for name, x in add([row]).items()}
                for title, row in nothing.items()
            }
            names = self._scorer.values(nothing)
        else:
            names = next(iter(self._rows.values()))
        self._totals = {title: over_hosts(total) for title, total in sorted(self._totals.items())}
        columns = {}
        for name, value in names.items():
            kind = np.int64 if isinstance(value, int) else np.float64
            columns[name] = np.zeros(self._count, kind)
            for item, row in self._rows.items():
                columns[name][item] = row[name]
        columns = over_hosts(columns)
        self._rows = {
            item: {name: column[item].item() for name, column in columns.items()}
            for item in range(self._count)
        }


def own_rows(array: Array) -> dict[int, Any]:
    """The rows of a batch that lie on this process's devices, by their numbers, in order.

    Each row is of one process only: axes of the mesh that do not split the batch lie within one.
    """
    rows: dict[int, Any] = {}
    for shard in array.addressable_shards:
        first = shard.index[0].indices(array.shape[0])[0]
        if first not in rows:
            rows |= {first + i: row for i, row in enumerate(np.asarray(shard.data))}
    return dict(sorted(rows.items()))


def _stacked(array: Array, wanted: Iterable[int]) -> np.ndarray:
    rows = own_rows(array)
    return np.stack([rows[number] for number in sorted(wanted)])


def settled(found: Mapping[int, Future | Rows]) -> dict[int, Rows]:
    """The rows, once they are there."""
    return {k: x.result() if isinstance(x, Future) else x for k, x in found.items()}
