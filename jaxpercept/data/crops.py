"""The crops that depth benchmarks prescribe: (height, width) -> the rows and columns that remain.

`CROPS` are cut out of image and depth, in training and evaluation; `EVAL_CROPS` only restrict the
pixels that evaluation counts. (Marigold, GenPercept: `src/dataset/{kitti,nyu}_dataset.py`.)
"""

import functools
from collections.abc import Callable

from jaxpercept.data.readers import UnreadableFileError

Window = tuple[slice, slice]


def kitti_benchmark_crop(height: int, width: int) -> Window:
    """The bottom centre 352 x 1216 pixels, applied to image and depth alike."""
    if height < 352 or width < 1216:
        raise UnreadableFileError(
            f"A {height} x {width} image is smaller than the KITTI benchmark crop 352 x 1216; "
            "use the images at their original size."
        )
    top, left = height - 352, (width - 1216) // 2
    return slice(top, top + 352), slice(left, left + 1216)


def _fractions(
    top: float, bottom: float, left: float, right: float, height: int, width: int
) -> Window:
    rows = slice(int(top * height), int(bottom * height))
    return rows, slice(int(left * width), int(right * width))


def nyu_crop(height: int, width: int) -> Window:
    """Rows 45:471, columns 41:601 of 480 x 640, scaled to other sizes (22:235, 20:300 at half)."""
    rows = slice(45 * height // 480, 471 * height // 480)
    return rows, slice(41 * width // 640, 601 * width // 640)


CROPS: dict[str, Callable[[int, int], Window]] = {"kitti_benchmark": kitti_benchmark_crop}
EVAL_CROPS: dict[str, Callable[[int, int], Window]] = {
    "nyu": nyu_crop,
    "eigen": functools.partial(_fractions, 0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": functools.partial(_fractions, 0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
