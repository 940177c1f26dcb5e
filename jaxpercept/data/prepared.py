"""Prepared datasets: what `jaxpercept.prepare` wrote, read at random from ArrayRecord.

A prepared dataset is a folder in the layout of TensorFlow Datasets (`NAME/VERSION/`, read by
`tfds.data_source` as well) whose `metadata.json` is a header that says what the numbers mean. Its
examples are those of the source it was made of, before crops and valid ranges, in the units of its
files: opened through the same row of the table they give the same records to the bit.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain

from jaxpercept.data.cameras import Camera
from jaxpercept.data.layouts import Request
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.data.sources import Example
from jaxpercept.data.storage import STORAGES, features_of
from jaxpercept.errors import UserError

HEADER = "metadata.json"  # TFDS's name for a dataset's own metadata
PROGRESS = "progress"
FORMAT = "jaxpercept 1"

_REQUIRED = {"dataset", "targets", "fields", "row", "splits"}

# What of an example belongs to a target.
_OF_TARGET = {
    "depth": ("depth", "mask", "intrinsics"),
    "normals": ("normals", "intrinsics"),
    "alpha": ("alpha", "trimap"),
    "classes": ("classes",),
    "keypoints": ("keypoints", "box"),
    "referred": ("instance", "phrases", "kinds", "mask"),
    "instances": ("instance", "kinds", "mask"),
}
_ALWAYS = ("name", "rgb", "caption")


def find(data_dir: str | Path | None, name: str) -> Path | None:
    """The folder of a prepared dataset: `data_dir` itself, or the newest version of it below.

    Raises:
      UserError: its preparation is not complete.
    """
    if data_dir is None:
        return None
    folder = Path(data_dir)
    versions = [folder]
    for parent in (folder, folder / tfds_name(name)):
        if parent.is_dir():
            numbered = parent.glob("[0-9]*.[0-9]*.[0-9]*")
            versions += sorted(numbered, key=_numbers, reverse=True)
    for version in versions:
        if (version / HEADER).is_file() and (version / "features.json").is_file():
            return version
        if (version / PROGRESS).is_dir():
            raise UserError(
                f"{version} is not prepared completely; run jaxpercept.prepare once more with the "
                "same flags, it goes on where it was stopped."
            )
    return None


def _numbers(version: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.name)]


def tfds_name(name: str) -> str:
    """The name of a dataset as TFDS allows it.

    Raises:
      UserError: it has characters that no name may have.
    """
    plain = name.replace("+", "_plus").replace("-", "_").lower()
    if not plain.isidentifier() or not plain.isascii():
        raise UserError(f"The name {name!r} must be made of letters, digits and underscores.")
    return plain


def tfds_split(split: str) -> str:
    """The name of a split as TFDS allows it: there "all" is what all splits are together."""
    return "train" if split == "all" else split


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a prepared dataset.

    Raises:
      UserError: it cannot be read, or is that of something else.
    """
    try:
        header = json.loads((folder / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEADER} cannot be read ({error}); prepare it again.") from error
    known = isinstance(header, dict) and header.get("format") == FORMAT
    if not known or not header.keys() >= _REQUIRED:
        raise UserError(
            f"{folder} was not written by this version of jaxpercept.prepare; prepare it again, or "
            "read it with the dataset tfds."
        )
    return header


def fields_of(header: Mapping[str, Any], targets: Collection[str]) -> list[str]:
    """The stored fields that examples opened for these targets have."""
    wanted = [*_ALWAYS, *(field for target in targets for field in _OF_TARGET[target])]
    return [field for field in dict.fromkeys(wanted) if field in header["fields"]]


class PreparedSource:
    """Examples of one split of a prepared dataset.

    Args:
      folder: of the version, see `find`.
      split: one of the header's.
      fields: which of the header's fields to read.

    Raises:
      UserError: a shard is missing, or has another number of records than the header says.
    """

    def __init__(self, folder: str | Path, split: str, fields: Sequence[str]):
        self.folder, self.split = str(folder), split
        header = read_header(Path(folder))
        self.storages = {field: header["fields"][field] for field in fields}
        facts = header["splits"][split]
        self.expected: int | None = facts["expected"]
        try:
            self._records = grain.sources.ArrayRecordDataSource(
                [str(Path(folder) / shard) for shard in facts["shards"]]
            )
            found = len(self._records)
        except Exception as error:  # of the C++ reader
            raise UserError(
                f"The shards of {folder} ({split}) cannot be opened ({error}); prepare it again."
            ) from error
        if found != facts["examples"]:
            raise UserError(
                f"The shards of {folder} hold {found} records of split {split}, not the "
                f"{facts['examples']} of its header; prepare it again."
            )
        self._kept: Sequence[int] = range(found)

    @property
    def names(self) -> list[str]:
        """Of all examples; they are read from a file of their own, when they are asked for."""
        names = json.loads((Path(self.folder) / names_file(self.split)).read_text())
        return [names[index] for index in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        what = f"record {self._kept[index]} of {self.folder} ({self.split})"
        try:
            stored = _features(tuple(self.storages.items())).deserialize_example_np(
                self._records[self._kept[index]]
            )
            return {
                field: STORAGES[storage].decode(stored[field], what)
                for field, storage in self.storages.items()
            }
        except UnreadableFileError:
            raise
        except Exception as error:  # damaged bytes make the parsers raise almost anything
            raise UnreadableFileError(f"Cannot read {what}: {error}; prepare it again.") from error

    def subset(self, keep: Callable[[str], bool]) -> PreparedSource:
        """The examples whose names are to be kept: no published number is expected of them."""
        chosen = copy.copy(self)
        pairs = zip(self._kept, self.names, strict=True)
        chosen._kept, chosen.expected = [index for index, name in pairs if keep(name)], None
        return chosen

    def __repr__(self) -> str:
        return f"PreparedSource({self.folder}, {self.split}, {len(self)} examples)"


def names_file(split: str) -> str:
    """Where the names of a split's examples are, in the folder of the version."""
    return f"names/{split}.json"


@functools.cache
def _features(storages: tuple[tuple[str, str], ...]) -> Any:
    return features_of(dict(storages), decoded=False)


def splits_of(folder: Path, known: Sequence[str]) -> tuple[str, ...]:
    """Of these splits, those that a prepared dataset has; if it has none of them, its own."""
    own = read_header(folder)["splits"]
    return tuple(split for split in known if split in own) or tuple(own)


def open_prepared(folder: Path, request: Request) -> tuple[PreparedSource, dict[str, Any]]:
    """The source of a prepared split, and the facts of the row that its header gives.

    Raises:
      UserError: it holds another dataset, or lacks the split or a target.
    """
    header = read_header(folder)
    if header["dataset"] != request.name:
        raise UserError(
            f"{folder} holds {header['dataset']}, prepared, not {request.name}; name that dataset."
        )
    if request.split not in header["splits"]:
        raise UserError(
            f"{folder} holds no split {request.split!r}, only {', '.join(header['splits'])}; "
            "prepare that, too."
        )
    for target in request.targets:
        if target not in header["targets"]:
            raise UserError(
                f"{folder} holds no {target}, only {', '.join(header['targets']) or 'images'}; "
                f"prepare it with --targets={','.join((*header['targets'], target))}."
            )
    for_evaluation = header["splits"][request.split]["evaluation"]
    if "referred" in request.targets and request.evaluation != for_evaluation:
        found, wanted = ("a phrase", "an object") if for_evaluation else ("an object", "a phrase")
        raise UserError(
            f"The examples of split {request.split!r} in {folder} are {found} each, not {wanted}; "
            "read the files that it was prepared from."
        )
    fields = fields_of(header, (*request.targets, *request.wished))
    facts = {key: math.inf if value == "inf" else value for key, value in header["row"].items()}
    if facts.get("camera") is not None:
        facts["camera"] = Camera(*facts["camera"])
    return PreparedSource(folder, request.split, fields), facts
