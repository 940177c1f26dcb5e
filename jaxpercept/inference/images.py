"""Any image a user may hand over, to one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

from jaxpercept.errors import UserError

Batch = (
    UInt8[np.ndarray, "n h w 3"] | UInt16[np.ndarray, "n h w 3"] | Float32[np.ndarray, "n h w 3"]
)
_CHANNELS = (1, 3, 4)


def to_batch(image: Any) -> Batch:
    """Bring an image, or several of one size, to NHWC with three channels.

    Args:
        image: a PIL image; an array [h, w], [h, w, c] or [n, h, w, c] with c = 1, 3 or 4, uint8,
            uint16, or float in [0, 1]; or a list of images of one size. Transparency is
            laid over white, as when files are read; one channel is repeated to three.

    Returns:
        uint8, uint16 or float32, the full range of the type (floats: [0, 1]) being black to white.

    Raises:
        UserError: another shape, type or range, or sizes that differ.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise UserError("the list of images is empty: give at least one.")
        batches = [to_batch(element) for element in image]
        shapes = {batch.shape[1:] for batch in batches}
        types = {batch.dtype for batch in batches}
        if len(shapes) > 1 or len(types) > 1:
            raise UserError(
                "the images of a list differ in size or type "
                f"({', '.join(sorted(f'{b.shape[1]}x{b.shape[2]} {b.dtype}' for b in batches))}): "
                "call the pipeline once for each kind."
            )
        return np.concatenate(batches)
    array = _checked_type(_from_pil(image) if isinstance(image, Image.Image) else np.asarray(image))
    array = _to_nhwc(array)
    if 0 in array.shape:
        raise UserError(f"an image of shape {array.shape[1:]} has no pixels.")
    if array.shape[-1] == 4:
        return _over_white(array)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):
        # Pillow's convert("RGB") would clip sixteen bits to eight.
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise UserError(f"an image of mode {image.mode!r} must hold values of 16 bits.")
        return array.astype(np.uint16)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _checked_type(array: np.ndarray) -> np.ndarray:
    if array.dtype in (np.uint8, np.uint16):
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"images of type {array.dtype} have no agreed range: give uint8, uint16, or float in "
            "[0, 1]."
        )
    array = array.astype(np.float32)
    # The comparison is False for NaN too.
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise UserError("a float image must lie in [0, 1] and be finite: divide it by its maximum.")
    return array


def _to_nhwc(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array[None, :, :, None]
    if array.ndim == 3 and array.shape[-1] in _CHANNELS:
        return array[None]
    if array.ndim == 4 and array.shape[-1] in _CHANNELS:
        return array
    raise UserError(
        f"an image array of shape {array.shape} is none of [h, w], [h, w, c], [n, h, w, c] with "
        "1, 3 or 4 channels: put the channels last."
    )


def _over_white(array: np.ndarray) -> np.ndarray:
    white = np.float32(1 if array.dtype == np.float32 else np.iinfo(array.dtype).max)
    alpha = array[..., 3:] / white
    colour = array[..., :3] * alpha + white * (1 - alpha)
    return (colour if array.dtype == np.float32 else np.rint(colour)).astype(array.dtype)
