"""The stages of a pipeline; all are picklable, most run in the worker processes."""

import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from jaxpercept.data.datasets import TARGETS, Record, Records
from jaxpercept.data.instructions import instruct
from jaxpercept.data.readers import EmptyMaskError, UnreadableFileError
from jaxpercept.data.transforms import Augment, prepare
from jaxpercept.errors import UserError

Tokenize = Callable[[Sequence[str]], Integer[np.ndarray, "n l"]]

# So many unusable records in a row mean that the dataset, not a file, is at fault.
_MAX_SKIPS = 100

# Batches decoded ahead, by a thread or by each worker process.
_BUFFER = 2

# What training keeps of a record; other targets, which rendered scenes have unasked, are not
# augmented for nothing.
_ALWAYS = frozenset({"name", "rgb", "valid", "unmasked_depth", "box", "flip_pairs"})
_HAZE = frozenset({"depth"})
# What further belongs to a target.
_WITH = {
    "referred": frozenset({"phrases", "instance", "kinds", "caption"}),
    "instances": frozenset({"instance", "kinds"}),
    "classes": frozenset({"labels"}),
}

# "Endless". Grain computes lengths in float64, which is exact up to 2**53 only.
_STREAM_LENGTH = 2**48


def mixed_stream(lengths: Sequence[int], weights: Sequence[Any], seed: int) -> grain.MapDataset:
    """Endless MapDataset of (position, dataset, index), shuffled anew in every epoch."""
    seeds = np.random.SeedSequence(seed).generate_state(len(lengths))
    parts = [
        grain.MapDataset.range(length)
        .shuffle(seed=int(shuffle_seed))
        .map(functools.partial(_tagged, number))
        .repeat()
        for number, (length, shuffle_seed) in enumerate(zip(lengths, seeds, strict=True))
    ]
    mixed = (
        grain.MapDataset.mix(parts, weights=[float(w) for w in weights])
        if len(parts) > 1
        else parts[0]
    )
    return mixed.map_with_index(_positioned)[:_STREAM_LENGTH]


def _tagged(dataset: int, index: int) -> tuple[int, int]:
    return dataset, index


def _positioned(position: int, tagged: tuple[int, int]) -> tuple[int, int, int]:
    return position, *tagged


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """(position, dataset, index) -> augmented example; runs in the workers."""

    records: tuple[Records, ...]
    augment: Augment
    resolution: tuple[int, int]
    seed: int
    needs: tuple[frozenset[str], ...]  # of each dataset: targets, and "caption"
    asked: tuple[str, ...]  # of each dataset: the task of its instructions; "" where it has none

    def __call__(self, element: tuple[int, int, int]) -> Record:
        position, dataset, index = element
        records = self.records[dataset]
        skipped: list[tuple[str, str]] = []
        for attempt in range(min(_MAX_SKIPS, len(records))):
            candidate = (index + attempt) % len(records)
            try:
                example = self._example(records[candidate], position, dataset)
            except (UnreadableFileError, EmptyMaskError) as error:
                skipped.append((_name(records, candidate), str(error)))
                continue
            # int32 is enough for two billion examples; beyond, only the noise would repeat.
            index32 = np.int32(position & 0x7FFFFFFF)
            return example | {"index": index32, "skipped": tuple(skipped)}
        raise UserError(
            f"None of {len(skipped)} records in a row of dataset {records.dataset.name} can be "
            f"used, the last because: {skipped[-1][1]}"
        )

    def _example(self, record: Record, position: int, dataset: int) -> Record:
        # Keyed by the position in the global stream, not by the one in this process's share (which
        # Grain's random_map would use), so that the number of processes does not matter.
        rng = np.random.default_rng([self.seed, position])
        needs, asked = self.needs[dataset], self.asked[dataset]
        kept = _ALWAYS | needs | (_HAZE if self.augment.haze else frozenset())
        kept = kept.union(*(_WITH.get(need, ()) for need in needs))
        record = {key: value for key, value in record.items() if key in kept}
        example = prepare(record, rng, self.augment, self.resolution)
        if needs & set(TARGETS) and not example["valid"].any():
            raise EmptyMaskError(f"No valid pixel of {record['name']} is left after cropping.")
        if "keypoints" in needs and not example["keypoints"][:, 2].any():
            raise EmptyMaskError(f"No keypoint of {record['name']} is left after cropping.")
        if "referred" in needs and not example["referred"].any():
            raise EmptyMaskError(
                f"{example['caption']!r} in {record['name']} is too small for {self.resolution}."
            )
        return instruct(example, asked, rng) if asked else example


@dataclasses.dataclass(frozen=True)
class Collate:
    """Examples -> batch of the wanted fields; `skipped` travels along to the iterator."""

    fields: tuple[str, ...]
    tokenize: Tokenize | None

    def __call__(self, examples: Sequence[Record]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            field: np.stack([example[field] for example in examples])
            for field in self.fields
            if field != "input_ids"
        }
        if "input_ids" in self.fields:
            captions = [example["caption"] for example in examples]
            batch["input_ids"] = np.asarray(self.tokenize(captions), np.int32)
        skipped = [pair for example in examples for pair in example["skipped"]]
        batch["skipped"] = [name for name, _ in skipped], [reason for _, reason in skipped]
        return batch


def prefetched(data: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """Decodes ahead: in one thread of this process, or in `num_workers` processes."""
    if num_workers == 0:
        return data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BUFFER))
    # Worker processes start only where absl has parsed its flags, which notebooks and plain
    # scripts never do; the flags keep their defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # The queue to this process already decouples the two: no threads inside a worker.
    in_worker = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=_BUFFER)
    return in_worker.mp_prefetch(options, _end_with_parent).map(_own_memory)


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """In a worker: exit when the process it works for is killed; it would wait for ever."""
    del worker_index, worker_count

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _own_memory(element: dict[str, Any]) -> dict[str, Any]:
    # Workers hand arrays over in shared memory, which lives until they are collected. A copy costs
    # little beside decoding, frees it at once and leaves none behind when the program ends.
    return {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in element.items()}


def _name(records: Records, index: int) -> str:
    names = getattr(records.source, "names", None)
    return names[index] if names else f"{records.dataset.name}[{index}]"
