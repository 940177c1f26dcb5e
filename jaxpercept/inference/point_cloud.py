"""From a depth map to points in space, and to a PLY file.

Depth is planar: z along the optical axis, not the distance from the camera. Pixel (u, v), column u
and row v from 0, has its centre at these coordinates, as in OpenCV.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Real, UInt8

from jaxpercept.errors import UserError
from jaxpercept.inference.outputs import AXES, FLIP_YZ, atomic

# A common camera's; nothing in an affine-invariant prediction says what the true one is.
DEFAULT_FOV = 60.0
DEFAULT_EDGE = 0.1

_VERTEX = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z")]
    + [(name, "u1") for name in ("red", "green", "blue")]
)
_PLY_TYPES = {"f": "float", "u": "uchar"}


@dataclasses.dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels of the image it belongs to.

    Attributes:
        fx, fy: focal lengths.
        cx, cy: where the optical axis meets the image; may lie outside of it.

    Raises:
        UserError: a focal length is not positive, or a value is not finite.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self):
        for name in ("fx", "fy", "cx", "cy"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name in ("fx", "fy") and value <= 0):
                raise UserError(
                    f"the intrinsics have {name} = {value:g}: give finite numbers in pixels, and "
                    "focal lengths above 0."
                )

    @classmethod
    def from_fov(cls, degrees: float, size: tuple[int, int]) -> Intrinsics:
        """Square pixels, and the axis in the middle of an image of `size` (height, width).

        Args:
            degrees: horizontal field of view, from the left edge to the right one.
            size: of the image.

        Raises:
            UserError: the angle is not between 0 and 180.
        """
        if not 0 < degrees < 180:
            raise UserError(
                f"a field of view of {degrees:g} degrees is none: give the horizontal one, above 0 "
                "and below 180."
            )
        height, width = size
        focal = width / 2 / math.tan(math.radians(degrees) / 2)
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)

    def scaled(self, size: tuple[int, int], to: tuple[int, int]) -> Intrinsics:
        """Those of the same image resized from `size` to `to`, both (height, width)."""
        y, x = (new / old for new, old in zip(to, size, strict=True))
        # The image's corner is half a pixel before the first pixel's centre.
        return Intrinsics(
            self.fx * x, self.fy * y, (self.cx + 0.5) * x - 0.5, (self.cy + 0.5) * y - 0.5
        )


def affine_to_metric(
    values: Float[np.ndarray, "h w"], scale: float, shift: float, kind: str = "affine_depth"
) -> Float[np.ndarray, "h w"]:
    """Metres from an affine-invariant prediction.

    Args:
        values: the prediction.
        scale, shift: metres = scale * value + shift for depth, 1 / metres = scale * value + shift
            for disparity.
        kind: "affine_depth" or "affine_disparity".

    Returns:
        float32; NaN where the parameters put a pixel at infinity or behind the camera.

    Raises:
        UserError: the scale is not positive, a parameter is not finite, or the kind is another.
    """
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
        raise UserError(
            f"scale = {scale:g} and shift = {shift:g} give no metres: the scale must be above 0 "
            "and both finite."
        )
    if kind not in ("affine_depth", "affine_disparity"):
        raise UserError(f"{kind} has no scale and shift: give affine_depth or affine_disparity.")
    fitted = values.astype(np.float64) * scale + shift
    fitted = np.where(fitted > 0, fitted, np.nan)
    with np.errstate(over="ignore"):  # Beyond float32 is infinity.
        return (fitted if kind == "affine_depth" else 1 / fitted).astype(np.float32)


def edge_mask(
    depth: Float[np.ndarray, "h w"], threshold: float = DEFAULT_EDGE
) -> Bool[np.ndarray, "h w"]:
    """Where depth jumps: pixels there hang in the air between two surfaces.

    Args:
        depth: metres; pixels that are NaN or not positive count as no neighbours.
        threshold: it is a jump where one of two neighbours, of four, is farther than 1 + threshold
            times the other.

    Returns:
        True on both sides of each jump.

    Raises:
        UserError: the threshold is not positive.
    """
    if not threshold > 0:
        raise UserError(f"the edge threshold is {threshold:g}: give a relative jump above 0.")
    logarithm = np.log(np.where(depth > 0, depth, np.nan).astype(np.float64))
    edges = np.zeros(depth.shape, bool)
    limit = math.log1p(threshold)
    with np.errstate(invalid="ignore"):  # Between two pixels at infinity.
        rows = np.abs(np.diff(logarithm, axis=0)) > limit
        columns = np.abs(np.diff(logarithm, axis=1)) > limit
    edges[:-1] |= rows
    edges[1:] |= rows
    edges[:, :-1] |= columns
    edges[:, 1:] |= columns
    return edges


def unproject(
    depth: Float[np.ndarray, "h w"], intrinsics: Intrinsics, convention: str = "opencv"
) -> Float[np.ndarray, "h w 3"]:
    """The point that each pixel sees, in camera coordinates.

    Args:
        depth: planar depth in metres.
        intrinsics: in pixels of this map.
        convention: a key of `outputs.AXES`.

    Returns:
        float32 metres; NaN where the depth is not finite.

    Raises:
        UserError: the convention is unknown.
    """
    if convention not in AXES:
        raise UserError(f"the convention {convention!r} is unknown: use {' or '.join(AXES)}.")
    z = np.where(np.isfinite(depth), depth, np.nan).astype(np.float64)
    v, u = np.indices(depth.shape)
    x = (u - intrinsics.cx) / intrinsics.fx * z
    y = (v - intrinsics.cy) / intrinsics.fy * z
    points = np.stack([x, y, z], axis=-1).astype(np.float32)
    return points * FLIP_YZ if convention == "opengl" else points


def save_point_cloud(
    path: Path,
    kind: str,
    prediction: Float[np.ndarray, "h w 1"],
    rgb: UInt8[np.ndarray, "i j 3"],
    *,
    intrinsics: Intrinsics | None = None,
    scale: float | None = None,
    shift: float | None = None,
    convention: str = "opencv",
    edge_threshold: float | None = DEFAULT_EDGE,
) -> int:
    """Write what a prediction of depth looks like from all sides, in the image's colours.

    Args:
        path: of the PLY file.
        kind: "affine_depth", "affine_disparity" or "metric_depth".
        prediction: of that kind.
        rgb: the image, of the prediction's size.
        intrinsics: None takes a horizontal field of view of 60 degrees. A wrong focal length
            stretches the cloud along z.
        scale, shift: of an affine prediction, see `affine_to_metric`. A wrong shift bends planes.
        convention: a key of `outputs.AXES`.
        edge_threshold: pixels at larger relative jumps of depth are left out; None keeps them.

    Returns:
        The number of points.

    Raises:
        UserError: the prediction is no depth, an affine one lacks scale and shift, a value does not
            fit, or no point is left.
    """
    if kind == "metric_depth":
        if (scale, shift) != (None, None):
            raise UserError("metric_depth is in metres already: leave scale and shift out.")
        depth, fit = prediction[..., 0], "depth as predicted, in metres"
    elif kind not in ("affine_depth", "affine_disparity"):
        raise UserError(f"a point cloud needs depth, and {kind} is none.")
    elif scale is None or shift is None:
        raise UserError(
            f"{kind} has no metres of its own: give scale and shift, fitted to a few known "
            "distances."
        )
    else:
        depth = affine_to_metric(prediction[..., 0], scale, shift, kind)
        metres = "metres" if kind == "affine_depth" else "1 / metres"
        fit = f"{metres} = scale * value + shift of {kind}: scale {scale:.9g} shift {shift:.9g}"
    camera = intrinsics or Intrinsics.from_fov(DEFAULT_FOV, depth.shape)
    origin = "given" if intrinsics else f"assumed, {DEFAULT_FOV:g} degrees horizontal field of view"
    valid = depth > 0
    if edge_threshold is not None:
        valid &= ~edge_mask(depth, edge_threshold)
    comments = [
        "written by jaxpercept",
        f"intrinsics ({origin}): fx {camera.fx:.9g} fy {camera.fy:.9g} cx {camera.cx:.9g} "
        f"cy {camera.cy:.9g}, image {depth.shape[1]} x {depth.shape[0]}",
        fit,
        f"convention {convention}: {AXES.get(convention)}, metres",
    ]
    return write_ply(path, unproject(depth, camera, convention), rgb, valid, comments)


def write_ply(
    path: Path,
    points: Real[np.ndarray, "h w 3"],
    colors: UInt8[np.ndarray, "i j 3"],
    valid: Bool[np.ndarray, "h w"] | None = None,
    comments: Sequence[str] = (),
) -> int:
    """Write coloured points as binary little-endian PLY, replacing the file at once.

    Args:
        path: its folder is created if missing.
        points: in any coordinates; those that are not finite are left out.
        colors: of the points.
        valid: the points to write; None: all.
        comments: lines for the header.

    Returns:
        The number of points.

    Raises:
        UserError: colours and points differ in size, or no point is left.
    """
    if colors.shape != points.shape:
        raise UserError(
            f"the image is {colors.shape[1]} x {colors.shape[0]} and the depth {points.shape[1]} x "
            f"{points.shape[0]} pixels: bring them to one size."
        )
    kept = np.isfinite(points).all(axis=-1)
    if valid is not None:
        kept &= valid
    if not kept.any():
        raise UserError(
            f"no point is left for {path}: check the mask, the scale and shift, and the edge "
            "threshold."
        )
    vertices = np.empty(int(kept.sum()), _VERTEX)
    for channel, name in enumerate(_VERTEX.names):
        source = points if channel < 3 else colors
        vertices[name] = source[kept][:, channel % 3]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {' '.join(line.split())}" for line in comments),
        f"element vertex {len(vertices)}",
        *(f"property {_PLY_TYPES[_VERTEX[name].kind]} {name}" for name in _VERTEX.names),
        "end_header\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(header).encode("ascii", "replace"))
        file.write(vertices.tobytes())
    return len(vertices)
