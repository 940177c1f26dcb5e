"""Where a person's joints appear in the picture, and whether they can be seen."""

import numpy as np
from jaxtyping import Float, Int

from jaxpercept.data.scenes.raster import NEAR, View, multiply

OUTSIDE, HIDDEN, VISIBLE = 0, 1, 2


def project(
    joints: Float[np.ndarray, "17 4"], view: View, depth: Float[np.ndarray, "h w 1"]
) -> Float[np.ndarray, "17 3"]:
    """(x, y, visibility) of joints (x, y, z in the world, reach) as COCO has them.

    x and y are in pixels, the middle of the first one at 0.5. A joint is visible unless the surface
    seen at its pixel is nearer than its own skin can be; joints outside of the picture are zeros.
    """
    height, width = depth.shape[:2]
    at = multiply(joints[:, :3] - view.position, view.rotation)
    found = np.zeros((len(joints), 3), np.float32)
    for number, (x, y, z) in enumerate(at.tolist()):
        if z < NEAR:
            continue
        column = x / z * view.focal[0] + view.centre[0]
        row = view.centre[1] - y / z * view.focal[1]
        # In float32, as it is handed on: a joint at the edge must not round out of the picture.
        column, row = np.float32(column), np.float32(row)
        if 0 <= column < width and 0 <= row < height:
            hidden = float(depth[int(row), int(column), 0]) < z - joints[number, 3]
            found[number] = column, row, HIDDEN if hidden else VISIBLE
    return found


def bounding_box(instance: Int[np.ndarray, "h w"], number: int) -> Float[np.ndarray, " 4"]:
    """(left, top, right, bottom) of an instance's pixels, in pixels; zeros if it has none."""
    mask = instance == number
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
