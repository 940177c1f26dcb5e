"""NYU Depth v2 as it is published: `nyu_depth_v2_labeled.mat` and the split in `splits.mat`.

Its 894 labels become the 40 classes of Gupta et al. (CVPR 2013) by their `classMapping40.mat`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Int32, UInt

from jaxpercept.data.layouts import Files, Layout, Meaning, Request
from jaxpercept.data.readers import VOID, UnreadableFileError, read_hdf5, read_hdf5_texts
from jaxpercept.data.sources import Example
from jaxpercept.errors import UserError

LABELLED, SPLITS, MAPPING = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Layout):
    """The published file of the labelled images.

    Attributes:
      filled: depth with its holes filled, as the authors colourise it, instead of what was
        measured.
      classes: the row's class of each of the 40.
    """

    OPTIONS: ClassVar = ("filled",)

    splits: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"train": "trainNdxs", "test": "testNdxs"}
    )
    expected: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 795, "test": 654}
    )
    filled: bool = False
    classes: tuple[int, ...] = tuple(range(40))

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"depth", "classes", "instances"})

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        needed = (LABELLED, MAPPING) if "classes" in fields else (LABELLED,)
        return all((files.root / name).is_file() for name in needed)

    def open(self, files: Files, request: Request, meaning: Meaning) -> MatSource:
        meaning.refuse(f"The files of {files.root / LABELLED}")
        root, split = files.root, request.split
        return MatSource(
            root / LABELLED,
            _numbers(root / SPLITS, self.splits[split]),
            request.targets,
            depth="depths" if self.filled else "rawDepths",
            table=_table(root / MAPPING, self.classes) if "classes" in request.targets else None,
            expected=self.expected[split],
        )


class MatSource:
    """Examples of the published file: `rgb`, `depth` in millimetres, 0 where there is none,
    `classes`, and `instance` with `kinds`.

    Args:
      numbers: of the images, from 1 on.
      fields: which of depth, classes and instances are read.
      depth: the array with the depth.
      table: the class of every label, 0 first.
      expected: how many images the split has as published.

    Raises:
      UserError: the names of the labels cannot be read.
    """

    def __init__(
        self,
        path: Path,
        numbers: Sequence[int],
        fields: Sequence[str],
        *,
        depth: str,
        table: Int32[np.ndarray, " n"] | None,
        expected: int,
    ):
        self.path, self.numbers = str(path), list(numbers)
        self.fields, self.depth, self.table, self.expected = tuple(fields), depth, table, expected
        self.names = [f"{number:04d}" for number in self.numbers]
        self.kinds = read_hdf5_texts(path, "names") if "instances" in self.fields else ()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        rgb = self._read("images", index, 3)
        if rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
            raise UnreadableFileError(f"The images of {self.path} are not 8-bit RGB.")
        example: Example = {"name": self.names[index], "rgb": rgb}
        if "depth" in self.fields:
            metres = self._read(self.depth, index)[..., None]
            whole = np.rint(np.nan_to_num(metres, nan=0.0, posinf=0.0) * 1000)
            example["depth"] = whole.astype(np.float32)
        if {"classes", "instances"} & {*self.fields}:
            labels = self._read("labels", index)
        if self.table is not None:
            example["classes"] = self.table[labels.clip(max=len(self.table) - 1)][..., None]
        if "instances" in self.fields:
            example |= self._things(labels, self._read("instances", index))
        return example

    def _read(self, array: str, index: int, rank: int = 2) -> np.ndarray:
        """One image of an array; MATLAB counts from 1, and columns before rows."""
        found = read_hdf5(self.path, array, self.numbers[index] - 1)
        if found.ndim != rank:
            raise UnreadableFileError(f"{array} of {self.path} has {found.ndim + 1} dimensions.")
        return np.ascontiguousarray(found.T)

    def _things(
        self, labels: UInt[np.ndarray, "h w"], counts: UInt[np.ndarray, "h w"]
    ) -> dict[str, Any]:
        """The things of an image: those of a label are counted from 1 on, 0 is none."""
        code = np.where((labels > 0) & (counts > 0), labels.astype(np.int32) * 256 + counts, 0)
        codes, place = np.unique(np.append(code, 0), return_inverse=True)
        instance = place[:-1].reshape(code.shape).astype(np.int32)
        kinds = tuple(self.kinds[label - 1] for label in (codes[1:] // 256).tolist())
        return {"instance": instance[..., None], "kinds": kinds}

    def __repr__(self) -> str:
        read = " ".join(self.depth if field == "depth" else field for field in self.fields)
        return f"MatSource({self.path}, {read or 'images'}, {len(self)} images)"


def _numbers(path: Path, name: str) -> list[int]:
    """Numbers of the images of a split, from 1 on."""
    advice = f"put the official split of NYU Depth v2 beside {LABELLED}"
    return _from_mat(path, name, advice).tolist()


def _table(path: Path, classes: Sequence[int]) -> Int32[np.ndarray, " n"]:
    """The class of every label; 0 and labels that are in no class are void."""
    found = _from_mat(path, "mapClass", "put the published mapping there")
    known = (found >= 1) & (found <= len(classes))
    table = np.array(classes, np.int32)[np.where(known, found - 1, 0)]
    return np.array([VOID, *np.where(known, table, VOID), VOID], np.int32)


def _from_mat(path: Path, name: str, advice: str) -> Int[np.ndarray, " n"]:
    """The whole numbers of an array in a file of MATLAB up to version 7.

    Raises:
      UserError: the file is missing or damaged.
    """
    from scipy.io import loadmat

    try:
        return loadmat(path)[name].ravel().astype(np.int64)
    except Exception as error:  # loadmat raises almost anything
        raise UserError(f"Cannot read {path} ({error}); {advice}.") from error
