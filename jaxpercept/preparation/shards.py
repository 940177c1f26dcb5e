"""One shard: reads its examples, validates them, writes their records and what there is to say.

Workers of any Beam runner call `write_shard`; all they share is the `Plan` and a file system. A
shard is written beside its place and moved there when it is complete, and only then its summary;
what has a summary is finished, so a preparation that was stopped goes on with the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from jaxpercept.data.datasets import EmptyMaskError, Record, Records
from jaxpercept.data.prepared import PROGRESS, tfds_split
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.data.sources import Example
from jaxpercept.data.storage import STORAGES, features_of
from jaxpercept.errors import UserError

REJECTED = "report/rejected"
# A group is what is read at once: one record, for access at random.
_WRITER_OPTIONS = "group_size:1"
_PICTURES_PER_SHARD = 16
_PICTURE_SIDE = 240
_ORIENTATION = 0x0112  # EXIF


class NoRecordError(UserError):
    """An example that is not to be trained on."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every worker knows of the split that is prepared.

    Attributes:
      records: the raw data, opened for all targets.
      storages: field -> name of its storage.
      folder: of the version that is written.
      name: of the dataset in TFDS.
      length: how many examples, from the first on.
      shard_size: examples of a shard.
      fingerprint: of everything that decides what is written; shards of another one are not taken
        for finished.
    """

    records: Records
    storages: Mapping[str, str]
    folder: str
    name: str
    length: int
    shard_size: int
    fingerprint: str

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.length // self.shard_size)

    def shard_file(self, shard: int) -> str:
        """The name that TFDS gives a shard."""
        number = f"{shard:05d}-of-{self.shards:05d}"
        return f"{self.name}-{tfds_split(self.records.split)}.array_record-{number}"

    def summary_file(self, shard: int) -> Path:
        """What is known of a finished shard."""
        return self._note(shard, "json")

    def error_file(self, shard: int) -> Path:
        """Why a shard could not be written."""
        return self._note(shard, "error")

    def _note(self, shard: int, suffix: str) -> Path:
        return Path(self.folder, PROGRESS, f"{self.records.split}-{shard:05d}.{suffix}")

    def summary(self, shard: int) -> dict[str, Any] | None:
        """The summary, if the shard is finished and was made in this way."""
        try:
            summary = json.loads(self.summary_file(shard).read_text())
            size = os.path.getsize(os.path.join(self.folder, self.shard_file(shard)))
        except (OSError, ValueError):
            return None
        fits = summary["fingerprint"] == self.fingerprint and summary["file_size"] == size
        return summary if fits else None


def write_shard(plan: Plan, shard: int) -> None:
    """Writes a shard and its summary; what went wrong is left in `Plan.error_file`."""
    plan.error_file(shard).unlink(missing_ok=True)
    try:
        summary = _write_records(plan, shard)
        _replace(plan.summary_file(shard), json.dumps(summary).encode())
    except (UserError, OSError) as error:
        # A runner would bury the sentence under its own traceback, and try again.
        plan.error_file(shard).write_text(str(error))


def _write_records(plan: Plan, shard: int) -> dict[str, Any]:
    target = Path(plan.folder, plan.shard_file(shard))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.writing")
    accepted, rejected, size = [], [], 0
    first = shard * plan.shard_size
    try:
        writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            for index in range(first, min(first + plan.shard_size, plan.length)):
                example = None
                try:
                    example = plan.records.source[index]
                    facts = check(plan.records.record_of(example))
                    data = serialize(plan, example, index)
                except (UnreadableFileError, EmptyMaskError, NoRecordError) as error:
                    picture = example if len(rejected) < _PICTURES_PER_SHARD else None
                    rejected.append(_rejection(plan, index, str(error), picture))
                    continue
                writer.write(data)
                size += len(data)
                files = files_of(plan.records.source, index)
                origin = _hash_of_files(files) if files else hashlib.sha256(data).hexdigest()
                accepted.append(facts | {"name": example["name"], "source_sha256": origin})
        finally:
            writer.close()
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        file_size = temporary.stat().st_size
        os.replace(temporary, target)
    except RuntimeError as error:  # of the C++ writer: disk full, no permission
        raise UserError(
            f"{target} cannot be written ({error}); make room and run the command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "fingerprint": plan.fingerprint,
        "file_size": file_size,
        "sha256": digest,
        "bytes": size,
        "accepted": accepted,
        "rejected": rejected,
    }


def serialize(plan: Plan, example: Example, index: int) -> bytes:
    """The bytes of a record.

    Raises:
      UserError: a field does not fit the way in which it is to be stored.
    """
    stored = {}
    for field, name in plan.storages.items():
        value, storage = example.get(field), STORAGES[name]
        if not storage.fits(value):
            raise UserError(
                f"{field} of {example['name']} does not fit the storage {name} that others have; "
                f"choose another one with --store={field}=NAME."
            )
        original = _jpeg_of(plan.records.source, index) if field == "rgb" else None
        stored[field] = storage.encode(value if original is None else original)
    from tensorflow_datasets.proto import tf_example_pb2

    written = _features(tuple(plan.storages.items())).serialize_example(stored)
    # Left to itself a process writes the fields in an order of its own.
    return tf_example_pb2.Example.FromString(written).SerializeToString(deterministic=True)


@functools.cache
def _features(storages: tuple[tuple[str, str], ...]) -> Any:
    return features_of(dict(storages), decoded=True)


def check(record: Record) -> dict[str, float]:
    """What the report says of a record that is worth training on.

    Returns:
      `valid`, the share of its pixels that are, and the range of its depth in metres.

    Raises:
      NoRecordError: its picture shows nothing.
    """
    rgb, valid = record["rgb"], record["valid"]
    if (rgb == rgb[:1, :1]).all():
        raise NoRecordError(f"The image of {record['name']} has one colour only.")
    facts = {"valid": float(valid.mean())}
    if "depth" in record:
        depth = record["depth"][valid]
        facts |= {"nearest": float(depth.min()), "farthest": float(depth.max())}
    return facts


def files_of(source: Any, index: int) -> list[str]:
    """The files that an example is read from, the image first; none where it has no files."""
    files = getattr(source, "files_of", None)
    return files(index) if files else []


def _jpeg_of(source: Any, index: int) -> bytes | None:
    """The file of the image, if it is a JPEG whose pixels are the example's: upright, in RGB."""
    files = files_of(source, index)
    if not files or not files[0].lower().endswith((".jpg", ".jpeg")):
        return None
    data = Path(files[0]).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode == "RGB"
        return data if plain and image.getexif().get(_ORIENTATION, 1) == 1 else None


def _hash_of_files(files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _rejection(
    plan: Plan, index: int, reason: str, example: Example | None
) -> dict[str, str | int]:
    names = getattr(plan.records.source, "names", None)
    name = names[index] if names else f"{plan.records.dataset.name}[{index}]"
    found: dict[str, str | int] = {"index": index, "name": name, "reason": reason}
    if example is not None:
        picture = f"{REJECTED}/{plan.records.split}-{index:07d}.jpg"
        thumbnail = Image.fromarray(np.asarray(example["rgb"]))
        thumbnail.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        thumbnail.save(Path(plan.folder, picture), quality=85)
        found["picture"] = picture
    return found


def _replace(path: Path, data: bytes) -> None:
    """Writes a file such that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
