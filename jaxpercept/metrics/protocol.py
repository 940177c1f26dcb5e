"""What an evaluator needs of a task's metrics.

A row says how well one image was predicted: numbers are the image's own metrics, arrays only sums.
Rows add up entry by entry, over images (`add`) and over processes (`over_hosts`), and a protocol
makes its result of the sum alone, so that the order and the place of the images do not matter. An
image without a valid pixel has a row of zeros, `images` included, and so weighs nothing.
"""

import abc
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped

from jaxpercept.errors import UserError

Row = dict[str, Any]
Record = Mapping[str, Any]


class MetricProtocol(abc.ABC):
    """How predictions of one kind are measured. Subclasses are frozen dataclasses of options.

    Attributes:
      names: the keys of `summarise`, in the order to print.
      fields: the entries of a record that `per_image` reads.
      raw: whether it measures the decoded map in [0, 1] at the size the network worked at, instead
        of what the task makes of it at the image's own. Not of a `DeviceProtocol`.
    """

    names: tuple[str, ...]
    fields: tuple[str, ...]
    raw: ClassVar[bool] = False

    def check(self, record: Record) -> None:  # noqa: B027 (most need no check)
        """Raises UserError if nothing can be measured against this record."""

    @abc.abstractmethod
    def per_image(self, prediction: Shaped[np.ndarray, "..."], record: Record) -> Row:
        """The row of one image, from its prediction [h, w, c] and its record."""

    @abc.abstractmethod
    def trivial(self, record: Record) -> Shaped[np.ndarray, "..."]:
        """The prediction to beat: one that knows the truth of this image as a whole only."""

    def trivial_row(self, record: Record) -> Row:
        """The row of `trivial`."""
        return self.per_image(self.trivial(record), record)

    def summarise(self, total: Row) -> dict[str, float]:
        """The result over a dataset, from the sum of its rows: here the mean over images.

        Raises:
          UserError: no image had anything to measure.
        """
        images = count_images(total)
        return {name: float(total[name] / images) for name in self.names}


class DeviceProtocol(MetricProtocol):
    """One whose rows come from the accelerator, a batch at a time."""

    @abc.abstractmethod
    def batched(
        self, prediction: Shaped[Array, "b ..."], batch: Mapping[str, Shaped[Array, "b ..."]]
    ) -> dict[str, Shaped[Array, "b ..."]]:
        """The rows of a batch, entries [b, ...]. Jittable; each image is treated alone."""

    def rows(self, batched: Mapping[str, Shaped[Array | np.ndarray, "b ..."]]) -> list[Row]:
        """What `batched` returned as rows on the host."""
        arrays = {name: np.asarray(values) for name, values in batched.items()}
        count = len(next(iter(arrays.values())))
        return [
            {name: x[i].item() if x.ndim == 1 else x[i] for name, x in arrays.items()}
            for i in range(count)
        ]

    def per_image(self, prediction: Shaped[np.ndarray, "..."], record: Record) -> Row:
        self.check(record)
        batch = {field: np.asarray(record[field])[None] for field in self.fields}
        return self.rows(_batched(self, prediction[None], batch))[0]


@functools.partial(jax.jit, static_argnums=0)
def _batched(protocol: DeviceProtocol, prediction, batch):
    return protocol.batched(prediction, batch)


def add(rows: Iterable[Row]) -> Row:
    """The sum of rows, counts in int64 and the rest in float64."""
    total: Row = {}
    for row in rows:
        for name, value in row.items():
            value = np.asarray(value)
            kind = np.int64 if value.dtype.kind in "biu" else np.float64
            total[name] = total.get(name, 0) + value.astype(kind)
    return total


def over_hosts(total: Row) -> Row:
    """The sum over all processes, each of which calls this with a sum of at least one row."""
    if jax.process_count() == 1:
        return total
    # As bytes: without 64-bit types JAX would round the numbers.
    packed = {name: np.frombuffer(np.asarray(x).tobytes(), np.uint8) for name, x in total.items()}
    gathered = multihost_utils.process_allgather(packed)
    return {
        name: np.asarray(gathered[name]).view(x.dtype).reshape(-1, *x.shape).sum(axis=0)
        for name, x in total.items()
    }


def count_images(total: Row) -> int:
    """How many images a sum of rows speaks of; UserError if none."""
    if not total.get("images"):
        raise UserError("no image has a valid pixel to measure: check the dataset's valid masks.")
    return int(total["images"])
