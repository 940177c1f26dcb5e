"""Grain pipelines: a mixture of datasets in, deterministic batches out.

A training batch is a pure function of (seed, position in the global example stream):

    per dataset: indices -> shuffle (seed) -> repeat
    mix by weight -> position in the stream -> slice [process_index::process_count]
    -> decode, augment with a generator seeded by (seed, position) -> batch -> worker processes

Files are decoded after the slice, so a process reads only its share. The shuffle comes before it,
so the union of all processes is the stream of a single one. Batches are formed by position, before
the work is dealt to worker processes, so that 0 and N workers, 1 and N hosts, and a run that was
interrupted all see the same examples with the same augmentation. The iterator's state is one
number, the position of the next example; it can be restored with other numbers of workers and
hosts.

A record that cannot be used (damaged file, empty mask) is replaced by the next usable record of its
dataset, which keeps batches full and their order fixed on every host.
"""

import collections
import logging
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxpercept.data.datasets import DATASETS, TARGETS, Record, Records, open_dataset
from jaxpercept.data.instructions import TRUTHS, tasks_of
from jaxpercept.data.stages import (
    Collate,
    LoadExample,
    Tokenize,
    mixed_stream,
    prefetched,
)
from jaxpercept.data.transforms import Augment
from jaxpercept.data.watchdog import Watchdog, WorkersFailed
from jaxpercept.errors import UserError

Batch = dict[str, np.ndarray]

DEPTH_FIELDS = ("rgb", "depth", "valid", "depth_range", "index")
TEXT_FIELDS = ("rgb", "input_ids", "index")

# How often worker processes are replaced before the data are given up.
_RESTARTS = 2

_log = logging.getLogger(__name__)


def make_train_dataset(
    mixture: Sequence[Sequence[Any]],
    *,
    resolution: Sequence[int],
    batch_size: int,
    seed: int,
    augment: Augment | Mapping[str, Any] | None = None,
    fields: Sequence[str] = DEPTH_FIELDS,
    tokenize: Tokenize | None = None,
    instructions: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    timeout: float = 0.0,
) -> "TrainDataset":
    """Builds the endless training dataset of this process.

    Args:
      mixture: (dataset name, weight, options of `open_dataset`) per dataset; weights are relative.
      resolution: (height, width) of every example.
      batch_size: examples per step over all processes; each process yields its share.
      seed: determines order, mixture and augmentation.
      augment: an `Augment` or its fields; None for the papers' recipe (a flip).
      fields: what a batch holds: any of `rgb` uint8 [b, H, W, 3], `source` (`rgb` before haze),
        `depth` float32 [b, H, W, 1] in metres, `depth_range` float32 [b, 2], `disparity_range`
        float32 [b, 4] (see `transforms`), `normals` float32 [b, H, W, 3], `alpha` float32
        [b, H, W, 1], `classes` int32 [b, H, W, 1], `keypoints` float32 [b, k, 3], `box` float32
        [b, 4], `referred` float32 [b, H, W, 1] (0 or 1), `valid` bool [b, H, W, 1] (where all of
        these targets are), `index` int32 [b] (position in the global stream), `input_ids` int32
        [b, l], of the caption, which beside `referred` is the phrase. The targets mean what they
        mean in a record (`datasets.Records`); the datasets are opened for exactly those. With
        `instructions` also `truth` float32 [b, H, W, 3] and `subtask` int32 [b], see
        `instructions.instruct`.
      tokenize: captions -> int32 [n, l]; picklable; runs in the workers.
      instructions: tasks of `instructions.TRUTHS`: every dataset gives as many examples of each of
        these as of any other that it has the truth of, with the instruction as caption.
      process_index, process_count: the share of this process.
      num_workers: processes that decode; 0 decodes in a thread of this process.
      timeout: seconds after which worker processes that deliver nothing are ended and replaced; 0
        waits for ever. Those that die are replaced in any case.

    Returns:
      A Grain IterDataset; its iterator has `get_state`, `set_state` and `skipped`.

    Raises:
      UserError: an unknown dataset, option or field, missing files, a dataset that lacks what
        `fields` ask for or starts with too many records that cannot be used, or sizes that are not
        positive or do not divide.
    """
    resolution = _positive_pair(resolution)
    if not mixture:
        raise UserError("The mixture names no dataset; give at least one.")
    if batch_size <= 0 or batch_size % process_count:
        raise UserError(
            f"batch_size must be a positive multiple of the {process_count} processes, "
            f"got {batch_size}."
        )
    if not isinstance(augment, Augment):
        augment = Augment.from_dict(augment or {})
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}.")
    needs = _needs(fields)
    if "caption" in needs and tokenize is None:
        raise UserError("The field input_ids needs a tokenizer; give `tokenize`.")
    parts, records = [], []
    for name, weight, options in mixture:
        if not weight > 0:
            raise UserError(f"The weight of dataset {name} must be positive, got {weight}.")
        asked = _asked_of(name, instructions)
        parts += [_Part(name, weight / len(asked), dict(options), task) for task in asked]
    for part in parts:
        provides = DATASETS[part.name].provides if part.name in DATASETS else part.needs(needs)
        for need in sorted(part.needs(needs) - provides):
            raise UserError(f"Dataset {part.name} has no {need}; leave it out of this mixture.")
        targets = part.needs(needs) & set(TARGETS)
        if augment.haze:  # fog needs to know how far things are
            targets |= {"depth"} & provides
        options = {"resolution": resolution, "targets": targets} | part.options
        records.append(open_dataset(part.name, **options))
        if len(records[-1]) == 0:
            raise UserError(f"Dataset {part.name} is empty; leave it out or make it larger.")
    stream = mixed_stream([len(r) for r in records], [part.weight for part in parts], seed)
    load = LoadExample(
        tuple(records),
        augment,
        resolution,
        seed,
        needs=tuple(frozenset(part.needs(needs)) for part in parts),
        asked=tuple(part.task for part in parts),
    )
    # Wrong files or a wrong depth_scale show before anything is built.
    first = [load((0, number, 0)) for number in range(len(records))]
    _check_compatible(records, first, needs)
    batches = (
        stream[process_index::process_count]
        .map(load)
        .batch(
            batch_size // process_count,
            drop_remainder=True,
            batch_fn=Collate(tuple(fields), tokenize),
        )
    )
    return TrainDataset(
        batches,
        batch_size=batch_size,
        num_workers=num_workers,
        timeout=timeout,
        provenance=[r.provenance() for r in {r.dataset.name: r for r in records}.values()],
    )


class TrainDataset(grain.IterDataset):
    """Endless batches of this process's share; see `make_train_dataset`."""

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        batch_size: int,
        num_workers: int,
        timeout: float = 0.0,
        provenance: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__()
        self.batches, self.batch_size = batches, batch_size
        self.num_workers, self.timeout = num_workers, timeout
        self.provenance = list(provenance)

    def __iter__(self) -> "TrainIterator":
        return TrainIterator(self)

    def __str__(self) -> str:
        return f"TrainDataset(batch_size={self.batch_size}, num_workers={self.num_workers})"


class TrainIterator(grain.DatasetIterator):
    """Iterator whose state is the position of the next example in the global stream.

    Attributes:
      skipped: name -> how often a record was replaced because it cannot be used; each is named
        once in the log.
      provenance: of each dataset, see `Records.provenance`.
    """

    def __init__(self, dataset: TrainDataset):
        super().__init__()
        self._dataset = dataset
        self.provenance = dataset.provenance
        self._next_batch = 0
        self._batches: grain.DatasetIterator | None = None
        self._watchdog: Watchdog | None = None
        self.skipped: collections.Counter[str] = collections.Counter()

    def __next__(self) -> Batch:
        self._assert_not_closed()
        batch = self._take()
        self._next_batch += 1
        for name, reason in zip(*batch.pop("skipped"), strict=True):
            if name not in self.skipped:
                _log.warning("Skipping %s in training: %s", name, reason)
            self.skipped[name] += 1
        return batch

    def _take(self) -> Batch:
        """The next batch, of other worker processes where those there were have failed.

        Raises:
          UserError: so did the others.
        """
        for attempt in range(1 + _RESTARTS):
            self.start_prefetch()
            try:
                with self._watchdog.waiting():
                    return next(self._batches)
            except WorkersFailed as error:
                failure = error
                self._release()
            if attempt < _RESTARTS:
                _log.warning("The data workers failed (%s): starting others.", failure)
        raise UserError(
            f"The data workers failed {1 + _RESTARTS} times in a row ({failure}); give them more "
            "memory, set config.data.num_workers=0 to see what is wrong, or raise "
            "config.data.timeout."
        ) from failure

    def start_prefetch(self) -> None:
        """Starts decoding (and the worker processes) before the first batch is asked for."""
        if self._batches is None:
            self._watchdog = Watchdog(self._dataset.timeout if self._dataset.num_workers else 0.0)
            self._batches = iter(
                prefetched(self._dataset.batches[self._next_batch :], self._dataset.num_workers)
            )
            self._batches.start_prefetch()

    def worker_memory(self) -> int:
        """Bytes that the worker processes have in memory: their libraries, and some batches each,
        however long they run. 0 without workers, or where the system does not say."""
        return self._watchdog.memory() if self._batches is not None else 0

    def get_state(self) -> dict[str, int]:
        """{"next_example": position in the global stream}; the same on every process."""
        return {"next_example": self._next_batch * self._dataset.batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a saved position, whatever number of workers and processes saved it.

        Raises:
          UserError: the position does not lie between two batches of this batch size.
        """
        batch, remainder = divmod(state["next_example"], self._dataset.batch_size)
        if remainder:
            raise UserError(
                f"The data stopped at example {state['next_example']}, which batch_size "
                f"{self._dataset.batch_size} does not divide; resume with the old batch_size."
            )
        self._release()
        self._next_batch = batch

    def close(self) -> None:
        """Stops threads and worker processes."""
        self._release()
        super().close()

    def _release(self) -> None:
        if self._batches is not None:
            self._watchdog.close()
            self._batches.close()
            self._batches = None

    def __str__(self) -> str:
        return f"TrainIterator(next_example={self.get_state()['next_example']})"


# ---- checks --------------------------------------------------------------------------------------

# What a dataset must provide for a field of the batch.
_NEEDS = {
    "rgb": None,
    "source": None,
    "index": None,
    "valid": None,
    "depth": "depth",
    "depth_range": "depth",
    "disparity_range": "depth",
    "normals": "normals",
    "alpha": "alpha",
    "classes": "classes",
    "keypoints": "keypoints",
    "box": "keypoints",
    "referred": "referred",
    "input_ids": "caption",
    "truth": None,
    "subtask": None,
}


class _Part(NamedTuple):
    """A dataset of a mixture, for one task where it has several."""

    name: str
    weight: float
    options: dict[str, Any]
    task: str

    def needs(self, fields: Collection[str]) -> set[str]:
        """Targets, and "caption": its task's, or those of a batch's fields."""
        return {TRUTHS[self.task]} if self.task else set(fields)


def _asked_of(name: str, instructions: Sequence[str]) -> list[str]:
    """The tasks that a dataset has the truth of; [""] where no tasks are given.

    Raises:
      UserError: there is none of those given.
    """
    if not instructions or name not in DATASETS:  # unknown ones are refused where they are opened
        return [""]
    asked = tasks_of(DATASETS[name], instructions)
    if not asked:
        raise UserError(
            f"Dataset {name} has the truth of none of {', '.join(instructions)}; leave it out of "
            "this mixture."
        )
    return asked


def _needs(fields: Sequence[str]) -> set[str]:
    for field in fields:
        if field not in _NEEDS:
            raise UserError(f"Unknown batch field {field!r}; known are {', '.join(_NEEDS)}.")
    return {need for field in fields if (need := _NEEDS[field]) is not None}


def _check_compatible(
    records: Sequence[Records], examples: Sequence[Record], needs: Collection[str]
) -> None:
    """Refuses mixtures whose class numbers or keypoints mean different things."""
    rows = [r.dataset for r in records]
    if "classes" in needs:
        known = {row.labels: row for row in rows if row.labels}
        if len(known) > 1:
            first, second, *_ = known.values()
            raise UserError(
                f"The classes of dataset {first.name} are not those of {second.name}; leave one "
                "out of the mixture."
            )
    if "keypoints" in needs:
        for row, example in zip(rows, examples, strict=True):
            counts = len(examples[0]["keypoints"]), len(example["keypoints"])
            if counts[0] != counts[1]:
                raise UserError(
                    f"Dataset {rows[0].name} has {counts[0]} keypoints and {row.name} {counts[1]};"
                    " leave one out of the mixture."
                )


def _positive_pair(resolution: Any) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in resolution)
    except (TypeError, ValueError) as error:
        raise UserError(f"resolution must be (height, width), got {resolution!r}.") from error
    if height <= 0 or width <= 0:
        raise UserError(f"resolution must be positive, got {height} x {width}.")
    return height, width


__all__ = [
    "DATASETS",
    "DEPTH_FIELDS",
    "TEXT_FIELDS",
    "TrainDataset",
    "TrainIterator",
    "make_train_dataset",
]
