"""Files in folders: lists of them, patterns that find them, and their partners.

These are the layouts (`layouts.py`) of datasets that are published as one file per field.
"""

import abc
import dataclasses
import glob
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpercept.data.layouts import Files, Layout, Meaning, Request
from jaxpercept.data.readers import RGB_SUFFIXES, VOID, ClassesReader, NormalsReader
from jaxpercept.data.sources import MASKS, FileSource, Reader
from jaxpercept.errors import UserError

Columns = dict[str, list[str]]  # field -> one path per example, relative to the data folder

# Files that belong to a target, read with it where the layout has them.
COMPANIONS = {
    "depth": (*MASKS, "intrinsics"),
    "normals": ("intrinsics",),
    "alpha": ("trimap",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileLayout(Layout):
    """Examples of one file per field.

    Attributes:
      partners: field -> (regular expression, replacement): the path of the image (in a `Tree`, of
        the file that its patterns match) with the first replaced by the second is that of the
        field's file; a replacement that ends in ".*" takes whatever suffix is there.
      readers: decoders of fields whose files have an unusual format.
      needs: field -> further fields without which it cannot be read.
    """

    partners: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    readers: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(self.partners) - {"rgb"}

    def has(self, files: Files, split: str, field: str) -> bool:
        """Whether the split, which lies in the folder in this layout, has one more field."""
        return self.is_there(files, split, [field])

    @abc.abstractmethod
    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        """The paths of `rgb` and of `fields`.

        Raises:
          UserError: a file is missing; it names which.
        """

    def listed(self, files: Files, split: str, list_file: str) -> Layout | None:
        # What the published lists count says nothing about other lists.
        return dataclasses.replace(self, splits={split: list_file}, expected={})

    def open(self, files: Files, request: Request, meaning: Meaning) -> FileSource:
        fields = dict.fromkeys((*request.targets, *self._extras(files, request)))
        columns = self.columns(files, request.split, tuple(fields))
        return FileSource(
            files.root,
            columns["rgb"],
            columns,
            adapted(self.readers, meaning),
            self.expected.get(request.split),
            self.facts,
        )

    def _extras(self, files: Files, request: Request) -> list[str]:
        """The wished fields and the targets' companions that are there, and what these need."""
        wished = [
            f for f in request.wished if f in self.fields and self.has(files, request.split, f)
        ]
        read = (*request.targets, *wished)
        companions = [
            companion
            for target in read
            for companion in COMPANIONS.get(target, ())
            if companion in self.fields and self._comes_with(files, request.split, companion)
        ]
        needed = (need for field in read for need in self.needs.get(field, ()))
        return [*wished, *companions, *needed]

    def _comes_with(self, files: Files, split: str, companion: str) -> bool:
        """Whether a companion is to be read: a folder may come without."""
        return self.has(files, split, companion)

    def _partner(self, field: str, path: str) -> str:
        return re.sub(*self.partners[field], path)

    def _has_partners(self, files: Files, path: str, fields: Collection[str]) -> bool:
        """Whether the files of the other fields are there, judged by the first example.

        Where these lie in a folder of their own, the folder is enough: then a missing file is the
        fault of that file.
        """
        for field in set(fields) & self.partners.keys():
            partner = self._partner(field, path)
            folder = os.path.dirname(partner)
            # Calibrations may lie among other files; they are not missed.
            own = folder != os.path.dirname(path) and field != "intrinsics"
            own = own and (files.root / folder).is_dir()
            if partner == path or (not own and files.find(partner) is None):
                return False
        return True

    def _add_partners(
        self, files: Files, columns: Columns, fields: Sequence[str], of: str = "rgb"
    ) -> Columns:
        """The columns with those of `fields`, whose paths follow from those of `of`."""
        for field in fields:
            if field in columns:
                continue
            columns[field] = []
            for path in columns[of]:
                partner = self._partner(field, path)
                found = None if partner == path else files.find(partner)
                if found is None:
                    what = "image" if of == "rgb" else "file"
                    raise UserError(
                        f"{files.root / path} has no {field}: {partner} is not in {files.root}; "
                        f"add it or remove the {what}."
                    )
                columns[field].append(found)
        return columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(FileLayout):
    """A text file per split with lines like `rgb depth [...]`.

    Attributes:
      names: what the words of a line are; words that are no field are not read.
      rooted: paths may begin with a slash that means the data folder.
      homes: field -> the folders that its paths may be relative to; the first with the file counts.
    """

    names: tuple[str, ...] = ("rgb", "depth")
    rooted: bool = False
    homes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        return super().fields | frozenset(self.names) - {"rgb"}

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        path = files.root / self.splits[split]
        if not path.is_file():
            return False
        if not set(fields) & self.partners.keys():
            return True
        rows = self._rows(path, ())
        return bool(rows) and self._has_partners(files, rows[0][self.names.index("rgb")], fields)

    def has(self, files: Files, split: str, field: str) -> bool:
        if field not in self.names:
            return super().has(files, split, field)
        rows = self._rows(files.root / self.splits[split], ())
        return all(len(row) > self.names.index(field) for row in rows)

    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        path = files.root / self.splits[split]
        rows = self._rows(path, fields)
        if not rows:
            raise UserError(f"The list {path} names no files; check that it is the right one.")
        columns = {
            field: [self._at_home(files, field, row[self.names.index(field)]) for row in rows]
            for field in ("rgb", *fields)
            if field in self.names
        }
        for paths in columns.values():
            _require_files(files, paths, path)
        return self._add_partners(files, columns, fields)

    def _comes_with(self, files: Files, split: str, companion: str) -> bool:
        # What the lines should name they must name.
        return companion in self.names or super()._comes_with(files, split, companion)

    def _at_home(self, files: Files, field: str, path: str) -> str:
        places = (home + path for home in self.homes.get(field, ()))
        return next((place for place in places if files.find(place) is not None), path)

    def _rows(self, path: Path, fields: Sequence[str]) -> list[list[str]]:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read the list {path}; put the split file there or name another one."
            ) from error
        needed = 1 + max(self.names.index(f) for f in ("rgb", *fields) if f in self.names)
        rows = []
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or (len(words) > 1 and words[1] == "None"):  # KITTI: no depth
                continue
            if len(words) < needed:
                raise UserError(
                    f"Line {number} of {path} has {len(words)} words; it must name "
                    f"{', '.join(self.names[:needed])}."
                )
            rows.append([word.lstrip("/") for word in words] if self.rooted else words)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree(FileLayout):
    """Every file that a pattern matches; `splits` holds the patterns of each split.

    Attributes:
      by: the field whose files the patterns match: the image, or what only some images have.
    """

    splits: Mapping[str, tuple[str, ...]]
    by: str = "rgb"

    @property
    def fields(self) -> frozenset[str]:
        return super().fields | {self.by} - {"rgb"}

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        path = next(self._matches(files, split), None)
        return path is not None and self._has_partners(files, path, {*fields, "rgb"} - {self.by})

    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        found = {self.by: sorted(set(self._matches(files, split)))}
        columns = self._add_partners(files, found, ("rgb", *fields), self.by)
        return {field: columns[field] for field in ("rgb", *fields)}

    def listed(self, files: Files, split: str, list_file: str) -> Layout | None:
        return None

    def _matches(self, files: Files, split: str) -> Iterator[str]:
        for pattern in self.splits[split]:
            for path in glob.iglob(pattern, root_dir=files.root):
                if os.path.splitext(path)[1].lower() in RGB_SUFFIXES:
                    yield path


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(FileLayout):
    """A folder of *.jsonl files whose lines are objects with one path per field.

    Attributes:
      keys: field -> the keys that may hold it, the image among them.
    """

    keys: Mapping[str, tuple[str, ...]]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(self.keys) - {"rgb"}

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        return bool(self._lists(files, split))

    def has(self, files: Files, split: str, field: str) -> bool:
        rows = (row for path in self._lists(files, split) for row in _json_rows(path))
        return all(self._name(row, field) for row in rows)

    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        columns: Columns = {field: [] for field in ("rgb", *fields)}
        for path in self._lists(files, split):
            for number, row in enumerate(_json_rows(path), start=1):
                for field, paths in columns.items():
                    name = self._name(row, field)
                    if not isinstance(name, str):
                        raise UserError(
                            f"Object {number} of {path} has no {' or '.join(self.keys[field])}; "
                            f"add it, or leave {field} out of the targets."
                        )
                    paths.append(name)
                _require_files(files, [paths[-1] for paths in columns.values()], path)
        if not columns["rgb"]:
            raise UserError(f"The lists in {files.root / self.splits[split]} name no files.")
        return columns

    def _name(self, row: Mapping[str, Any], field: str) -> Any:
        return next((row[key] for key in self.keys[field] if row.get(key)), None)

    def _lists(self, files: Files, split: str) -> list[Path]:
        path = files.root / self.splits[split]
        return [path] if path.is_file() else sorted(path.glob("*.jsonl"))


def adapted(readers: Mapping[str, Reader], meaning: Meaning) -> dict[str, Reader]:
    """The readers, for files whose normals or class numbers mean something else.

    Raises:
      UserError: there are no such axes, or no such number.
    """
    readers = dict(readers)
    first = meaning.first_class
    if meaning.normals_axes is not None:
        readers["normals"] = NormalsReader(meaning.normals_axes)
    if not 0 <= first < VOID:
        raise UserError(f"first_class must be a number from 0 to {VOID - 1}, got {first}.")
    if first:
        classes = readers.get("classes", ClassesReader())
        table = classes.table or tuple(range(VOID - first))
        readers["classes"] = dataclasses.replace(classes, table=(VOID,) * first + table)
    return readers


# ---- helpers -------------------------------------------------------------------------------------


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable list of JSON objects, one a line ({error}); check the file."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has a line that is no JSON object; check the file.")
    return rows


def _require_files(files: Files, paths: Sequence[str], list_path: Path) -> None:
    for path in paths:
        if files.find(path) is None:
            raise UserError(
                f"{list_path} names {path}, which is not in {files.root}; check data_dir or the "
                "list."
            )
