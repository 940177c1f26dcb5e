"""Ground truth as poor as that of scanned or stereo data: for studies of data quality."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

Record = dict[str, Any]

_COARSE = 6  # cells a side of the map of errors


def degrade_depth(record: Record, rng: np.random.Generator, *, blur: float, error: float) -> Record:
    """Depth whose edges are smeared, as where meshes are rendered, and whose scale drifts.

    Args:
      record: `depth` float32 [h, w, 1], `valid` bool [h, w, 1].
      blur: standard deviation in pixels of a Gaussian blur among the valid pixels.
      error: standard deviation of the logarithm of smooth errors, six bumps a side.
    """
    depth, valid = record["depth"][..., 0], record["valid"][..., 0]
    if blur:
        depth = _blurred(depth, valid, blur)
    if error:
        bumps = rng.normal(size=(_COARSE, _COARSE)) * error
        depth = depth * np.exp(_enlarged(bumps, depth.shape)).astype(np.float32)
    return record | {"depth": np.where(valid, depth, np.float32(0))[..., None]}


def _blurred(
    depth: Float32[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], sigma: float
) -> Float32[np.ndarray, "h w"]:
    from scipy.ndimage import gaussian_filter  # only who degrades pays for the import

    weight = gaussian_filter(valid.astype(np.float32), sigma)
    mean = gaussian_filter(np.where(valid, depth, np.float32(0)), sigma)
    return np.where(valid, mean / np.maximum(weight, np.float32(1e-6)), depth)


def _enlarged(bumps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between the bumps, the outer ones on the border."""
    for axis, length in enumerate(size):
        place = np.linspace(0, bumps.shape[axis] - 1, length)
        low = np.minimum(place.astype(int), bumps.shape[axis] - 2)
        share = np.expand_dims(place - low, 1 - axis)
        bumps = np.take(bumps, low, axis) * (1 - share) + np.take(bumps, low + 1, axis) * share
    return bumps
