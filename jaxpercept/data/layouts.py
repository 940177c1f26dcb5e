"""Layouts: the ways in which a dataset is published, and opening the one that is there.

A layout says how the examples of a split are found below a folder. A dataset has several where it
is published in several ways; the first that is there, and that has the wanted targets, is taken.
Files with lists or in folders are those of `listings.py`; containers have modules of their own.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxpercept.data.sources import existing_folder
from jaxpercept.errors import UserError


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


class Meaning(NamedTuple):
    """What the numbers in one's own files mean, where not what those of the layout do.

    Attributes:
      normals_axes: key of `readers.AXES`.
      first_class: the number of the first class, where the files count from another one; lower
        numbers are void.
    """

    normals_axes: str | None = None
    first_class: int = 0

    def refuse(self, what: str) -> None:
        """Raises a UserError if anything is changed, for files that leave nothing open."""
        for option, value, usual in zip(self._fields, self, Meaning(), strict=True):
            if value != usual:
                raise UserError(f"{what} say themselves what they hold; leave {option} away.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(abc.ABC):
    """How the examples of a dataset's splits are found.

    Attributes:
      splits: split -> the list file, the patterns or the folder that makes it up.
      expected: split -> how many examples it has as published.
      facts: attributes of the row that differ in this layout, such as `depth_scale`.
      OPTIONS: attributes that a config may set.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    splits: Mapping[str, Any]
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    @abc.abstractmethod
    def fields(self) -> frozenset[str]:
        """What its files hold."""

    @abc.abstractmethod
    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        """Whether the split lies in the folder in this layout, with these fields."""

    def listed(self, files: Files, split: str, list_file: str) -> Layout | None:
        """The layout with one's own list of the split's examples; None if there can be none."""
        return None

    @abc.abstractmethod
    def open(self, files: Files, request: Request, meaning: Meaning) -> Any:
        """The source of a request.

        Raises:
          UserError: a file is missing; it names which.
        """

    @property
    def options(self) -> dict[str, Any]:
        """What a config may set, and the defaults."""
        return {name: getattr(self, name) for name in self.OPTIONS}


def open_layouts(
    request: Request,
    *,
    layouts: Sequence[Layout],
    list_file: str | None = None,
    normals_axes: str | None = None,
    first_class: int = 0,
    **options: Any,
) -> Any:
    """The source of a request, in the first layout that is there and has its targets.

    Args:
      list_file: a list of one's own instead of the published one: absolute or relative to the data
        folder.
      normals_axes, first_class: see `Meaning`.
      options: of the layouts, see `Layout.OPTIONS`.

    Raises:
      NoLayoutError: the folder does not match any layout.
      UserError: it does, and a file is missing; it names which.
    """
    files = Files(existing_folder(request.data_dir))
    split = request.split
    layouts = [
        dataclasses.replace(x, **{k: options[k] for k in x.OPTIONS if k in options})
        for x in layouts
    ]
    usable = [x for x in layouts if set(request.targets) <= x.fields]
    if list_file is not None:
        usable = [y for x in usable if (y := x.listed(files, split, list_file)) is not None]
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
    return usable[0].open(files, request, Meaning(normals_axes, first_class))


def no_layout(request: Request) -> NoLayoutError:
    """What to raise where the folder of a request does not hold it."""
    return NoLayoutError(
        f"{request.data_dir} holds no split {request.split!r} of {request.name} with "
        f"{', '.join(request.targets) or 'images'}; expected {request.layout}."
    )
