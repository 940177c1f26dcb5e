"""NYU Depth v2 as it is published: `nyu_depth_v2_labeled.mat` and the split in `splits.mat`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxpercept.data.listings import Layout, Request, open_layouts
from jaxpercept.data.readers import UnreadableFileError, read_hdf5
from jaxpercept.data.sources import Example, existing_folder
from jaxpercept.errors import UserError

LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
_NUMBERS = {"train": "trainNdxs", "test": "testNdxs"}


def open_nyuv2(
    request: Request,
    *,
    layouts: Sequence[Layout],
    list_file: str | None = None,
    normals_axes: str | None = None,
    first_class: int = 0,
    filled: bool = False,
):
    """The published file of the labelled images with their depth, or lists of files.

    Args:
      filled: of the published file: depth with its holes filled, as the authors colourise it,
        instead of what was measured.
      layouts, list_file, normals_axes, first_class: as of `open_layouts`.

    Raises:
      NoLayoutError: the folder has neither.
      UserError: a file is missing or damaged.
    """
    root = existing_folder(request.data_dir)
    if not (root / LABELLED).is_file() or list_file is not None:
        return open_layouts(
            request,
            layouts=layouts,
            list_file=list_file,
            normals_axes=normals_axes,
            first_class=first_class,
        )
    for target in request.targets:
        if target != "depth":
            raise UserError(
                f"{root / LABELLED} has depth only of what is read, not {target}; take a copy with "
                "files for it, see docs/data.md."
            )
    return MatSource(root, request.split, filled=filled, depth="depth" in request.targets)


class MatSource:
    """Examples of the published file: `rgb` and `depth` in millimetres, 0 where there is none."""

    def __init__(self, root: Path, split: str, *, filled: bool, depth: bool):
        self.path = str(root / LABELLED)
        self.field = ("depths" if filled else "rawDepths") if depth else None
        self.numbers = _numbers(root / SPLITS, split)
        self.names = [f"{number:04d}" for number in self.numbers]
        self.expected = {"train": 795, "test": 654}[split]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        place = self.numbers[index] - 1  # MATLAB counts from 1, and columns before rows
        rgb = read_hdf5(self.path, "images", place).transpose(2, 1, 0)
        if rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
            raise UnreadableFileError(f"The images of {self.path} are not 8-bit RGB.")
        example: Example = {"name": self.names[index], "rgb": np.ascontiguousarray(rgb)}
        if self.field:
            metres = read_hdf5(self.path, self.field, place).T[..., None]
            whole = np.rint(np.nan_to_num(metres, nan=0.0, posinf=0.0) * 1000)
            example["depth"] = np.ascontiguousarray(whole.astype(np.float32))
        return example

    def __repr__(self) -> str:
        return f"MatSource({self.path}, {self.field}, {len(self)} images)"


def _numbers(path: Path, split: str) -> list[int]:
    """Numbers of the images of a split, from 1 on.

    Raises:
      UserError: the file is missing or damaged.
    """
    from scipy.io import loadmat

    try:
        return [int(number) for number in loadmat(path)[_NUMBERS[split]].ravel()]
    except Exception as error:  # loadmat raises almost anything
        raise UserError(
            f"Cannot read {path} ({error}); put the official split of NYU Depth v2 beside "
            f"{LABELLED}."
        ) from error
