"""Geometry of records: what moves in the picture moves in every target alike. Pure NumPy, Pillow.

Positions (keypoints, boxes, principal points) are in pixels with the middle of the first at 0.5.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

Record = dict[str, Any]

# Entries of a record that are images, i.e. follow the geometry.
RASTERS = (
    "rgb", "depth", "unmasked_depth", "valid", "mask", "normals", "alpha", "trimap", "instance",
    "classes", "referred",
)  # fmt: skip

_SIDES = ("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")
_OTHER_SIDE = {a: b for one, two in _SIDES for a, b in ((one, two), (two, one))}
# With what people write together with them: leftmost, left-hand, righthand, topleft, farright ...
_SIDE = re.compile(
    rf"\b((?i:top|bottom|upper|lower|far)?)({'|'.join(_OTHER_SIDE)})"
    r"((?i:most|hand|handed|side|wards?)?)\b"
)


def flip_horizontal(record: Record) -> Record:
    """Mirrors every raster left-right, and with them what depends on the side.

    The x component of `normals` changes sign, `keypoints`, `box` and the principal point in
    `intrinsics` move, keypoints of left and right (the index pairs in `flip_pairs`) change places,
    and the words left and right are exchanged in `caption`, `phrases` and `distractors`.
    """
    width = np.float32(record["rgb"].shape[1])
    flipped = _map_rasters(record, lambda _, x: x[:, ::-1])
    if "normals" in record:
        flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
    if "keypoints" in record or "box" in record:
        flipped = _move(flipped, lambda points: points * (-1, 1) + (width, 0))
    if "keypoints" in record:
        order = np.arange(len(record["keypoints"]))
        for left, right in record.get("flip_pairs") or ():
            order[[left, right]] = right, left
        flipped["keypoints"] = flipped["keypoints"][order]
    if "intrinsics" in record:
        fx, fy, cx, cy = record["intrinsics"]
        flipped["intrinsics"] = np.array([fx, fy, width - cx, cy], np.float32)
    if "caption" in record:
        flipped["caption"] = mirrored(record["caption"])
    if "phrases" in record:
        flipped["phrases"] = [(mirrored(phrase), target) for phrase, target in record["phrases"]]
    if "distractors" in record:
        flipped["distractors"] = [mirrored(phrase) for phrase in record["distractors"]]
    return flipped


def mirrored(text: str) -> str:
    """The text of a picture for its mirror image: left and right change places.

    So do the words made of them (leftmost, right-hand, "to the left of", topleft), in lower case,
    upper case and with a capital; others that contain them (leftover, bright, upright) stay. Done
    twice, it gives the text back. It knows nothing of grammar: "right behind" becomes "left
    behind".
    """
    return _SIDE.sub(lambda found: found[1] + _OTHER_SIDE[found[2]] + found[3], text)


def crop(record: Record, top: int, left: int, height: int, width: int) -> Record:
    """Cuts the same window out of every raster.

    Keypoints, the box and the principal point in `intrinsics` move with it; the box ends at the
    window, and keypoints outside of it become absent: zeros.
    """
    cropped = _map_rasters(record, lambda _, x: x[top : top + height, left : left + width])
    offset = np.array([left, top], np.float32)
    if "keypoints" in record or "box" in record:
        cropped = _move(cropped, lambda points: points - offset)
    if "keypoints" in record:
        points = cropped["keypoints"]
        inside = (points[:, :2] >= 0).all(-1) & (points[:, 0] < width) & (points[:, 1] < height)
        cropped["keypoints"] = np.where(inside[:, None], points, np.float32(0))
    if "box" in record:
        limits = np.array([width, height, width, height], np.float32)
        cropped["box"] = np.clip(cropped["box"], np.float32(0), limits)
    if "intrinsics" in record:
        cropped["intrinsics"] = record["intrinsics"] - np.array([0, 0, left, top], np.float32)
    return cropped


def rotate(record: Record, degrees: float) -> Record:
    """Rotates every raster about the image centre and crops what has no data.

    Positive angles turn the content counter-clockwise. The largest centred window of the image's
    aspect that lies inside the rotated image remains. The image and `alpha` are bilinear, the other
    rasters take the nearest pixel. Planar depth does not change; `normals` (x right, y up) and
    `keypoints` turn with the image, `box` becomes the upright box around the turned one, and the
    principal point in `intrinsics` turns too, whose focal lengths are taken to be equal.
    """
    rows, columns = record["rgb"].shape[:2]
    sine, cosine = abs(math.sin(math.radians(degrees))), abs(math.cos(math.radians(degrees)))
    aspect = columns / rows
    shrink = 1.0 / (cosine + sine * max(aspect, 1 / aspect))
    # Rounded down, since a corner pixel outside has no data.
    height, width = max(1, int(rows * shrink)), max(1, int(columns * shrink))

    def turn(name: str, raster: np.ndarray) -> np.ndarray:
        smooth = name in ("rgb", "alpha")
        filter_ = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
        if name == "rgb":
            return np.asarray(Image.fromarray(raster).rotate(degrees, filter_))
        channels = [
            np.asarray(Image.fromarray(_as_pillow(raster[..., c])).rotate(degrees, filter_))
            for c in range(raster.shape[-1])
        ]
        return np.stack(channels, axis=-1).astype(raster.dtype)

    turned = _map_rasters(record, turn)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre = np.array([columns / 2, rows / 2])
    turn_points = np.array([[c, -s], [s, c]])  # of row vectors (x, y), y points down
    if "normals" in record:  # y points up
        turned["normals"] = turned["normals"] @ np.array(
            [[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32
        )
    if "keypoints" in record or "box" in record:
        turned = _move(turned, lambda points: (points - centre) @ turn_points + centre)
    if "intrinsics" in record:
        fx, fy, *principal = record["intrinsics"].tolist()
        cx, cy = (np.array(principal) - centre) @ turn_points + centre
        turned["intrinsics"] = np.array([fx, fy, cx, cy], np.float32)
    return crop(turned, (rows - height) // 2, (columns - width) // 2, height, width)


def resize(
    record: Record,
    resolution: tuple[int, int],
    *,
    rgb_resize: str = "antialias",
    alpha_resize: str = "antialias",
) -> Record:
    """Brings every raster to `resolution` (height, width).

    The image and `alpha` are resampled with an antialiased linear filter, or take the nearest pixel
    where the option says "nearest". The other targets and masks take the nearest pixel, index
    floor((i + 0.5) * in / out), since averaging depth across an edge invents surfaces; normals keep
    their length.
    """

    def to_size(name: str, raster: np.ndarray) -> np.ndarray:
        if name == "rgb" and rgb_resize == "antialias":
            return resize_rgb(raster, resolution)
        if name == "alpha" and alpha_resize == "antialias":
            return _resize_alpha(raster, resolution)
        return resize_nearest(raster, resolution)

    resized = _map_rasters(record, to_size)
    y, x = np.array(resolution) / record["rgb"].shape[:2]
    if "keypoints" in record or "box" in record:
        resized = _move(resized, lambda points: points * (x, y))
    if "intrinsics" in record:
        resized["intrinsics"] = (record["intrinsics"] * (x, y, x, y)).astype(np.float32)
    return resized


def resize_rgb(
    image: UInt8[np.ndarray, "h w 3"], resolution: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Linear filter whose support grows with the reduction, so that nothing aliases."""
    if image.shape[:2] == tuple(resolution):
        return image
    height, width = resolution
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _resize_alpha(
    alpha: Float32[np.ndarray, "h w 1"], resolution: tuple[int, int]
) -> Float32[np.ndarray, "H W 1"]:
    if alpha.shape[:2] == tuple(resolution):
        return alpha
    height, width = resolution
    image = Image.fromarray(np.ascontiguousarray(alpha[..., 0]))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return np.clip(resized, np.float32(0), np.float32(1))[..., None]


def resize_nearest(
    raster: Shaped[np.ndarray, "h w c"], resolution: tuple[int, int]
) -> Shaped[np.ndarray, "H W c"]:
    """Pixel centres map to the nearest pixel (torch's "nearest-exact", jax.image's "nearest")."""
    if raster.shape[:2] == tuple(resolution):
        return raster
    # floor((i + 0.5) * size / out) in integers, where nothing rounds.
    rows, columns = (
        (2 * np.arange(out) + 1) * size // (2 * out)
        for size, out in zip(raster.shape[:2], resolution, strict=True)
    )
    return raster[rows[:, None], columns[None, :]]


def _map_rasters(record: Record, function: Callable[[str, np.ndarray], np.ndarray]) -> Record:
    return {k: function(k, v) if k in RASTERS else v for k, v in record.items()}


def _move(record: Record, function: Callable[[np.ndarray], np.ndarray]) -> Record:
    """Moves the keypoints that are there and the box: the upright box around its moved corners."""
    moved = dict(record)
    if "keypoints" in record:
        points = record["keypoints"]
        places = function(points[:, :2].astype(np.float64))
        there = points[:, 2:] > 0
        places = np.where(there, places, points[:, :2])
        moved["keypoints"] = np.concatenate([places, points[:, 2:]], -1).astype(np.float32)
    if "box" in record:
        left, top, right, bottom = record["box"].tolist()
        corners = function(np.array([[left, top], [right, top], [left, bottom], [right, bottom]]))
        moved["box"] = np.concatenate([corners.min(0), corners.max(0)]).astype(np.float32)
    return moved


def _as_pillow(channel: np.ndarray) -> np.ndarray:
    """Pillow rotates 8-bit, 32-bit integer and float images; nearest copies them exactly."""
    if channel.dtype == np.float32 or channel.dtype == np.uint8:
        return channel
    return channel.astype(np.uint8 if channel.dtype == bool else np.int32)
