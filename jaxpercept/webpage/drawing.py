"""Predictions as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxpercept.inference.outputs import KINDS, picture

_TINT = np.array([235, 60, 25], np.float32)
_STRENGTH = 0.65  # of the tint where the map is 1
_FADED = 0.35  # of white where it is 0
_WIDEST = 1080  # pixels on the page
_OVERLAID = ("mask", "alpha")


def draw(
    kind: str,
    prediction: Float[np.ndarray, "h w c"],
    rgb: UInt8[np.ndarray, "h w 3"],
    legend: Mapping[str, Any],
) -> UInt8[np.ndarray, "h _ 3"]:
    """A prediction: masks as red over the faded picture, everything else as `predict` draws it.

    Args:
        kind: a key of `KINDS`.
        prediction: of the picture.
        rgb: the picture.
        legend: options of `outputs.picture`.
    """
    if kind in _OVERLAID:
        return overlay(rgb, prediction)
    return picture(kind, prediction, image=rgb, **legend)


def overlay(
    rgb: UInt8[np.ndarray, "h w 3"], mask: Float[np.ndarray, "h w 1"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, red where the mask is 1 and pale where it is 0."""
    mask = np.clip(mask, 0, 1)
    # Of the picture, and of what is laid over it: white, and the tint.
    kept = (1 - _FADED) * (1 - mask) + (1 - _STRENGTH) * mask
    laid = 255 * _FADED * (1 - mask) + _STRENGTH * mask * _TINT
    return np.rint(rgb * kept + laid).astype(np.uint8)


def marked(drawn: UInt8[np.ndarray, "h w 3"], x: int, y: int) -> UInt8[np.ndarray, "h w 3"]:
    """A ring around a pixel, of a size that is seen on the page."""
    image = Image.fromarray(drawn)
    pen, radius = ImageDraw.Draw(image), max(round(max(drawn.shape) / 40), 3)
    for colour, width in (("white", max(radius // 2, 3)), ("black", max(radius // 4, 1))):
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, outline=colour, width=width)
    return np.asarray(image)


def scale_of(rgb: UInt8[np.ndarray, "h w 3"]) -> float:
    """By what a prediction is enlarged to be shown.

    Gradio reckons where a picture was clicked as if it were never shown larger than it is.
    """
    return max(_WIDEST / max(rgb.shape[:2]), 1.0)


def enlarged(drawn: UInt8[np.ndarray, "h w 3"], scale: float) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture larger by this factor."""
    height, width = (round(edge * scale) for edge in drawn.shape[:2])
    image = Image.fromarray(drawn)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def value_at(
    kind: str, prediction: Float[np.ndarray, "h w c"], x: int, y: int, legend: Mapping[str, Any]
) -> str:
    """What a map says of a pixel, in words."""
    values = prediction[y, x]
    if KINDS[kind].categories:
        from jaxpercept.data.palettes import PALETTES

        names = PALETTES[legend["palette"]].names
        number = int(values[0])
        return names[number] if 0 <= number < len(names) else "no class"
    if kind == "keypoints":
        return f"{values.max():.2f} of the most likely joint"
    return ", ".join(f"{value:.3f}" for value in values)
