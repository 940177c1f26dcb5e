"""Cameras: their intrinsics, read from what data sets publish, and depth of a pair of them.

Intrinsics are (fx, fy, cx, cy) in pixels with the middle of the first at 0.5; the files' own
numbers mostly count from that middle, i.e. lie half a pixel lower.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxpercept.data.readers import read_depth, read_with

Intrinsics = Float32[np.ndarray, " 4"]


class Camera(NamedTuple):
    """A camera that all pictures of a data set share, in pixels of pictures of one size."""

    fx: float
    fy: float
    cx: float
    cy: float
    height: int
    width: int

    def at(self, size: tuple[int, ...]) -> Intrinsics | None:
        """The intrinsics for pictures of another (height, width); None if they are no copies of
        the whole picture, as other proportions show.
        """
        y, x = size[0] / self.height, size[1] / self.width
        if abs(x / y - 1) > 0.01:
            return None
        return np.array([self.fx * x, self.fy * y, self.cx * x, self.cy * y], np.float32)


def of_matrix(matrix: Float[np.ndarray, "r c"], first: float = 0.0) -> Intrinsics:
    """Of a projection matrix; `first` is where its author has the middle of the first pixel."""
    fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
    found = np.array([fx, fy, cx - first + 0.5, cy - first + 0.5], np.float32)
    if not (np.isfinite(found).all() and (found[:2] > 0).all()):
        raise ValueError(f"no focal lengths and centre, but {found.tolist()}")
    return found


def read_matrix(path: str | Path) -> Intrinsics:
    """The numbers of a 3 x 3 or 3 x 4 matrix in a text file, as of KITTI's selection.

    Raises:
      UnreadableFileError: the file is missing or holds something else.
    """
    return read_with(path, lambda data: of_matrix(_numbers(data.decode())))


def read_kitti(path: str | Path) -> Intrinsics:
    """KITTI's `calib_cam_to_cam.txt`: of the rectified colour images, left and right alike.

    Raises:
      UnreadableFileError: the file is missing or holds something else.
    """

    def decode(data: bytes) -> Intrinsics:
        found = re.search(r"^P_rect_02:(.*)$", data.decode(), re.MULTILINE)
        if found is None:
            raise ValueError("it has no P_rect_02")
        return of_matrix(_numbers(found[1]))

    return read_with(path, decode)


def read_taskonomy(path: str | Path) -> Intrinsics:
    """Taskonomy's `*_domain_fixatedpose.json`: the field of view of a square picture.

    Raises:
      UnreadableFileError: the file is missing or holds something else.
    """

    def decode(data: bytes) -> Intrinsics:
        facts = json.loads(data)
        middle = float(facts["resolution"]) / 2
        focal = middle / np.tan(float(facts["field_of_view_rads"]) / 2)
        return np.array([focal, focal, middle, middle], np.float32)

    return read_with(path, decode)


def read_cityscapes(path: str | Path) -> Intrinsics:
    """Cityscapes' `camera/*_camera.json`.

    Raises:
      UnreadableFileError: the file is missing or holds something else.
    """

    def decode(data: bytes) -> Intrinsics:
        found = json.loads(data)["intrinsic"]
        matrix = [[found["fx"], 0, found["u0"]], [0, found["fy"], found["v0"]]]
        return of_matrix(np.array(matrix, np.float64))

    return read_with(path, decode)


def read_cityscapes_depth(path: str | Path) -> Float32[np.ndarray, "h w 1"]:
    """Metres of `disparity/*_disparity.png` by the `camera/*_camera.json` that goes with it.

    A stored p means a disparity of d = (p - 1) / 256 pixels, and depth is baseline * fx / d; 0
    where p is 0, which is no measurement, or 1, which is infinitely far.

    Raises:
      UnreadableFileError: one of the files is missing or damaged.
    """
    stored = read_depth(path)

    def baseline_times_focal(data: bytes) -> Any:
        facts = json.loads(data)
        return np.float32(facts["extrinsic"]["baseline"] * facts["intrinsic"]["fx"])

    folder, name = re.sub(r"_disparity\.png$", "_camera.json", str(path)).rsplit("disparity/", 1)
    scale = read_with(f"{folder}camera/{name}", baseline_times_focal)
    seen = stored > 1
    disparity = np.where(seen, stored - 1, np.float32(1)) / np.float32(256)
    return np.where(seen, scale / disparity, np.float32(0))


def _numbers(text: str) -> Float[np.ndarray, "3 c"]:
    return np.array([float(word) for word in text.split()]).reshape(3, -1)
