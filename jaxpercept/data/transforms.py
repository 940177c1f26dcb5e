"""Augmentation and resizing of records: pure NumPy/Pillow functions, randomness passed in.

Geometry (`geometry.py`) is shared by the image and all targets; photometric changes (`colour.py`)
touch the image only. The order of `prepare` is: flip, rotation, crop (at native resolution) ->
choice of a phrase of what remains, quantiles of the depth that remains -> resize -> photometric ->
haze. The quantiles are therefore those that the papers normalise with (native resolution, after
geometry), and the colour work, which is costly, is done on few pixels.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from jaxpercept.data.augment import NO_AUGMENT, Augment
from jaxpercept.data.colour import FOG, haze, photometric
from jaxpercept.data.degrade import degrade_depth
from jaxpercept.data.geometry import (
    RASTERS,
    crop,
    flip_horizontal,
    mirrored,
    resize,
    resize_nearest,
    resize_rgb,
    rotate,
)
from jaxpercept.data.referring import refer

__all__ = [
    "FOG",
    "NO_AUGMENT",
    "RASTERS",
    "Augment",
    "crop",
    "depth_range",
    "disparity_range",
    "flip_horizontal",
    "haze",
    "mirrored",
    "photometric",
    "prepare",
    "random_window",
    "resize",
    "resize_nearest",
    "resize_rgb",
    "rotate",
]

Record = dict[str, Any]


def prepare(
    record: Record,
    rng: np.random.Generator,
    augment: Augment,
    resolution: tuple[int, int],
) -> Record:
    """Augments a record and brings it to `resolution` (height, width).

    Returns the record with all rasters at `resolution` and positions in its pixels. Where it has
    depth, it also has `depth_range` and `disparity_range` (see the functions of these names).
    `valid` and `referred` may have become empty; the caller decides what to do then. A record with
    `referred` that still has its `phrases` comes out about any one of those that name something in
    the crop. `source` uint8 [h, w, 3] is the image before haze, the image itself where there is
    none.

    Raises:
      EmptyMaskError: no phrase of such a record names anything in the crop.
    """
    height, width = resolution
    # Every number is drawn whether it is used or not, so that changing one strength leaves the
    # other augmentations of the same example as they were.
    geometry, photometry, weather, truth, words = rng.spawn(5)
    if geometry.random() < augment.flip:
        record = flip_horizontal(record)
    angle = geometry.uniform(-augment.rotation, augment.rotation)
    if angle:
        record = rotate(record, angle)
    record = crop(record, *random_window(record["rgb"].shape[:2], geometry, augment, resolution))
    if "referred" in record and "phrases" in record:
        record = refer(record, words.random())
        record = {k: v for k, v in record.items() if k not in ("phrases", "instance")}
    if "depth" in record:
        record = dict(record)
        record |= _ranges(record, record.pop("unmasked_depth", record["depth"]))
    record = resize(
        record,
        (height, width),
        rgb_resize=augment.rgb_resize,
        alpha_resize=augment.alpha_resize,
    )
    if photometry.random() < augment.photometric:
        record = record | {"rgb": photometric(record["rgb"], photometry, augment)}
    record = record | {"source": record["rgb"]}
    if "depth" in record and weather.random() < augment.haze:
        record = haze(record)
    if "depth" in record and (augment.depth_blur or augment.depth_error):
        record = degrade_depth(record, truth, blur=augment.depth_blur, error=augment.depth_error)
        # Whoever has poor truth only has its quantiles only.
        record |= _ranges(record, record["depth"])
    return record


def random_window(
    size: tuple[int, int],
    rng: np.random.Generator,
    augment: Augment,
    resolution: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop as `augment` describes it."""
    rows, columns = size
    area = rng.uniform(*augment.scale)
    stretch = math.exp(rng.uniform(-1, 1) * math.log(augment.aspect))
    place = rng.random(2)
    if augment.fit == "center":
        place = np.array([0.5, 0.5])
    whole = augment.fit == "stretch"
    aspect = stretch * (columns / rows if whole else resolution[1] / resolution[0])
    # The largest window of this aspect, then shrunk to the area that was drawn.
    height = min(rows, columns / aspect) * math.sqrt(area)
    window = (_at_least_one(height, rows), _at_least_one(height * aspect, columns))
    top, left = (int(p * (n - w + 1)) for p, n, w in zip(place, size, window, strict=True))
    return top, left, *window


# ---- depth statistics ----------------------------------------------------------------------------


def depth_range(
    depth: Float32[np.ndarray, "h w 1"], valid: Bool[np.ndarray, "h w 1"]
) -> Float32[np.ndarray, "2"]:
    """The 2 % and 98 % quantiles (linear interpolation) of the valid depth, in metres.

    Taken on the host, so that the jitted step needs no sort. A constant map gets a range of one
    ten-thousandth of its depth instead of zero, and an empty mask gets (0, 1), so that
    normalisation never divides by zero. (GenPercept, Marigold: `depth_transform.py`.)
    """
    values = depth if valid.all() else depth[valid]
    if values.size == 0:
        return np.array([0.0, 1.0], np.float32)
    low, high = np.quantile(values, (0.02, 0.98)).astype(np.float32)
    return np.array([low, max(high, low * np.float32(1 + 1e-4))], np.float32)


def disparity_range(
    depth: Float32[np.ndarray, "h w 1"],
    valid: Bool[np.ndarray, "h w 1"],
    unmasked: Float32[np.ndarray, "h w 1"],
    quantiles: Float32[np.ndarray, "2"],
) -> Float32[np.ndarray, "4"]:
    """(1/q98, 1/q02, least 1/d, largest 1/d) in 1/metres.

    The last two are what GenPercept's disparity normaliser
    (`depth_transform.py`) comes down to, whose quantiles cancel out: the largest is taken over the
    valid pixels, the least over all that the file gives a positive depth, so that a sky beyond the
    valid range is what 0 means.

    Args:
      depth: metres.
      valid: where the depth counts; without any such pixel the result is (0, 1, 0, 1).
      unmasked: metres as the file has them, invalid pixels too.
      quantiles: (q02, q98) as `depth_range` gives them.
    """
    valid = valid & (depth > 0)
    if not valid.any():
        return np.array([0.0, 1.0, 0.0, 1.0], np.float32)
    nearest = depth.min(where=valid, initial=np.inf)
    # The comparison is false for nan.
    farthest = np.max(unmasked, where=unmasked > 0, initial=depth.max(where=valid, initial=0))
    near, far = quantiles
    return np.array([1 / far, 1 / near, 1 / farthest, 1 / nearest], np.float32)


def _ranges(record: Record, unmasked: Float32[np.ndarray, "h w 1"]) -> Record:
    depth, valid = record["depth"], record["valid"]
    quantiles = depth_range(depth, valid)
    limits = disparity_range(depth, valid, unmasked, quantiles)
    return {"depth_range": quantiles, "disparity_range": limits}


def _at_least_one(length: float, limit: int) -> int:
    return min(limit, max(1, round(length)))
