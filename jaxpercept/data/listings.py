"""Where the files of a dataset lie: lists and the layouts of published datasets.

A layout says how the examples of a split are found below a folder and which file holds which field.
A dataset has several where it is published in several ways; the first that is there, and that has
the wanted targets, is taken.
"""

import abc
import dataclasses
import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpercept.data.readers import RGB_SUFFIXES, VOID, ClassesReader, NormalsReader
from jaxpercept.data.sources import MASKS, FileSource, Reader, existing_folder
from jaxpercept.errors import UserError

Columns = dict[str, list[str]]  # field -> one path per example, relative to the data folder

# Files that belong to a target, read with it where the layout has them.
COMPANIONS = {"depth": MASKS, "alpha": ("trimap",)}


class NoLayoutError(UserError):
    """A folder that holds nothing of what was asked for: no layout of the dataset matches."""


class Request(NamedTuple):
    """What of a dataset is to be opened.

    Attributes:
      name: the dataset's.
      split: one of its splits.
      data_dir: folder of the files.
      resolution: (height, width) of datasets that have none of their own.
      targets: which files are read beside the image.
      wished: further fields, read where they are at hand.
      layout: in words, what the folder must hold.
      evaluation: whether every example is to be evaluated once, rather than trained on.
    """

    name: str
    split: str
    data_dir: str | Path | None
    resolution: tuple[int, int]
    targets: tuple[str, ...]
    wished: tuple[str, ...] = ()
    layout: str = ""
    evaluation: bool = False


class Files:
    """Which files lie below a folder. Every sub-folder is listed once.

    Lists have tens of thousands of lines: a listing per folder is cheaper than a look per file.
    """

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, path: str) -> str | None:
        """The path if there is such a file; `folder/name.*` finds the first with any suffix."""
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        stem, suffix = os.path.splitext(name)
        names = self._listings[folder].get(stem, ())
        if suffix == ".*":
            return os.path.join(folder, names[0]) if names else None
        return path if name in names else None

    def _list(self, folder: str) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        if (self.root / folder).is_dir():
            for name in sorted(os.listdir(self.root / folder)):
                names.setdefault(os.path.splitext(name)[0], []).append(name)
        return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(abc.ABC):
    """How the examples of a dataset's splits are found.

    Attributes:
      splits: split -> the list file, the patterns or the folder that makes it up.
      partners: field -> (regular expression, replacement): the path of the image with the first
        replaced by the second is that of the field's file; a replacement that ends in ".*" takes
        whatever suffix is there.
      readers: decoders of fields whose files have an unusual format.
      expected: split -> how many examples it has as published.
    """

    splits: Mapping[str, Any]
    partners: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    readers: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        """What its files hold."""
        return frozenset(self.partners)

    @abc.abstractmethod
    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        """Whether the split lies in the folder in this layout, with these fields."""

    def has(self, files: Files, split: str, field: str) -> bool:
        """Whether the split, which lies in the folder in this layout, has one more field."""
        return self.is_there(files, split, [field])

    @abc.abstractmethod
    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        """The paths of `rgb` and of `fields`.

        Raises:
          UserError: a file is missing; it names which.
        """

    def _partner(self, field: str, image: str) -> str:
        return re.sub(*self.partners[field], image)

    def _has_partners(self, files: Files, image: str, fields: Sequence[str]) -> bool:
        """Whether the files of the other fields are there, judged by the first image.

        Where these lie in a folder of their own, the folder is enough: then a missing file is the
        fault of that file.
        """
        for field in set(fields) & self.partners.keys():
            path = self._partner(field, image)
            folder = os.path.dirname(path)
            own = folder != os.path.dirname(image) and (files.root / folder).is_dir()
            if not own and files.find(path) is None:
                return False
        return True

    def _add_partners(self, files: Files, columns: Columns, fields: Sequence[str]) -> Columns:
        for field in fields:
            if field in columns:
                continue
            columns[field] = []
            for image in columns["rgb"]:
                path = self._partner(field, image)
                found = None if path == image else files.find(path)
                if found is None:
                    raise UserError(
                        f"{files.root / image} has no {field}: {path} is not in {files.root}; add "
                        "it or remove the image."
                    )
                columns[field].append(found)
        return columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(Layout):
    """A text file per split with lines like `rgb depth [...]`.

    Attributes:
      names: what the words of a line are; words that are no field are not read.
      rooted: paths may begin with a slash that means the data folder.
    """

    names: tuple[str, ...] = ("rgb", "depth")
    rooted: bool = False

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
            field: [row[self.names.index(field)] for row in rows]
            for field in ("rgb", *fields)
            if field in self.names
        }
        for paths in columns.values():
            _require_files(files, paths, path)
        return self._add_partners(files, columns, fields)

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
class Tree(Layout):
    """Every image that a pattern matches; `splits` holds the patterns of each split."""

    splits: Mapping[str, tuple[str, ...]]

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        for pattern in self.splits[split]:
            for image in glob.iglob(pattern, root_dir=files.root):
                if _is_image(image):
                    return self._has_partners(files, image, fields)
        return False

    def columns(self, files: Files, split: str, fields: Sequence[str]) -> Columns:
        images = {
            image
            for pattern in self.splits[split]
            for image in glob.iglob(pattern, root_dir=files.root)
            if _is_image(image)
        }
        return self._add_partners(files, {"rgb": sorted(images)}, fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Layout):
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


def open_layouts(
    request: Request,
    *,
    layouts: Sequence[Layout],
    list_file: str | None = None,
    normals_axes: str | None = None,
    first_class: int = 0,
) -> FileSource:
    """The files of a request, in the first layout that is there and has its targets.

    Args:
      list_file: a list of one's own instead of the published one: absolute or relative to the data
        folder.
      normals_axes: key of `readers.AXES`, where the files do not follow the layout's.
      first_class: the number of the first class, where the files count from another one than the
        layout's; lower numbers are void.

    Raises:
      NoLayoutError: the folder does not match any layout.
      UserError: it does, and a file is missing; it names which.
    """
    files = Files(existing_folder(request.data_dir))
    split = request.split
    usable = [x for x in layouts if set(request.targets) <= x.fields]
    if list_file is not None:
        # What the published lists count says nothing about other lists.
        usable = [
            dataclasses.replace(x, splits={split: list_file})
            for x in usable
            if not isinstance(x, Tree)
        ]
        if not usable:
            raise UserError(
                f"Dataset {request.name} is not read from lists with "
                f"{', '.join(request.targets)}; leave list_file out."
            )
    else:
        usable = [
            x for x in usable if split in x.splits and x.is_there(files, split, request.targets)
        ]
    if not usable:
        raise no_layout(request)
    layout = usable[0]
    fields = [*request.targets, *_extras(layout, files, request)]
    columns = layout.columns(files, split, fields)
    readers = adapted(layout.readers, normals_axes, first_class)
    expected = None if list_file else layout.expected.get(split)
    return FileSource(files.root, columns["rgb"], columns, readers, expected)


def adapted(
    readers: Mapping[str, Reader], normals_axes: str | None, first_class: int
) -> dict[str, Reader]:
    """The readers, for files whose normals or class numbers mean something else.

    Raises:
      UserError: there are no such axes, or no such number.
    """
    readers = dict(readers)
    if normals_axes is not None:
        readers["normals"] = NormalsReader(normals_axes)
    if not 0 <= first_class < VOID:
        raise UserError(f"first_class must be a number from 0 to {VOID - 1}, got {first_class}.")
    if first_class:
        classes = readers.get("classes", ClassesReader())
        table = classes.table or tuple(range(VOID - first_class))
        readers["classes"] = dataclasses.replace(classes, table=(VOID,) * first_class + table)
    return readers


def _extras(layout: Layout, files: Files, request: Request) -> list[str]:
    """The wished fields and the targets' companions that are there."""
    wished = [
        f for f in request.wished if f in layout.fields and layout.has(files, request.split, f)
    ]
    companions = [
        companion
        for target in (*request.targets, *wished)
        for companion in COMPANIONS.get(target, ())
        if companion in layout.fields
    ]
    # A list must name them, whereas a folder may come without.
    if isinstance(layout, Tree):
        companions = [f for f in companions if layout.has(files, request.split, f)]
    return [*wished, *companions]


def no_layout(request: Request) -> NoLayoutError:
    """What to raise where the folder of a request does not hold it."""
    return NoLayoutError(
        f"{request.data_dir} holds no split {request.split!r} of {request.name} with "
        f"{', '.join(request.targets) or 'images'}; expected {request.layout}."
    )


# ---- helpers -------------------------------------------------------------------------------------


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in RGB_SUFFIXES


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
