"""Masks out of COCO's annotations: polygons and run lengths, by COCO's own rasterizer."""

import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.errors import UserError

Segmentation = Any  # as JSON has it: polygons, or run lengths


def import_coco() -> ModuleType:
    """pycocotools.mask.

    Raises:
      UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "COCO's masks need the package pycocotools; install it with "
            "`pip install 'jaxpercept[coco]'`."
        ) from error
    return mask


def mask_of(
    segmentations: Sequence[Segmentation], size: tuple[int, int], name: str
) -> Bool[np.ndarray, "h w 1"]:
    """The union of annotations.

    Args:
      segmentations: of each annotation, as COCO has it: polygons [x0, y0, x1, y1, ...], or run
        lengths {"size", "counts"}, compressed to a string or plain numbers.
      size: (height, width) of the image.
      name: what an error calls them.

    Raises:
      UnreadableFileError: a segmentation is none of these, or of another size.
    """
    coco = import_coco()
    mask = np.zeros((*size, 1), bool)
    for segmentation in segmentations:
        try:
            runs = _run_lengths(coco, segmentation, size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 2.0.11 with NumPy 2
                mask |= coco.decode(runs).astype(bool)[..., None]
        except Exception as error:  # of the wrapped C code and of what it is given
            raise UnreadableFileError(
                f"The mask of {name} is no COCO segmentation of {size[0]} x {size[1]} pixels "
                f"({error}); correct the annotations."
            ) from error
    return mask


def _run_lengths(
    coco: ModuleType, segmentation: Segmentation, size: tuple[int, int]
) -> dict[str, Any]:
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its size is {segmentation['size']}")
        counts = segmentation["counts"]
        counts = counts if isinstance(counts, list) else _numbers(counts)
        if min(counts) < 0 or sum(counts) != size[0] * size[1]:  # decode would not look
            raise ValueError("its run lengths do not fill the image")
        return coco.frPyObjects({"size": list(size), "counts": counts}, *size)
    for polygon in segmentation:
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2:
            raise ValueError("a polygon needs three corners")
        if not (np.abs(corners) <= 4 * max(size)).all():  # false for nan
            raise ValueError("a polygon lies outside")  # and takes the rasterizer very long
    return coco.merge(coco.frPyObjects(segmentation, *size))


def _numbers(counts: str) -> list[int]:
    """The run lengths in COCO's string: five bits a character; from the fourth on, differences
    to the last but one."""
    numbers: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in counts):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last one; its highest bit is the sign
            value -= (code & 16) << (shift - 4)
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers
