"""Colour changes of the image alone: brightness to noise, and fog that follows the depth."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter

from jaxpercept.data.augment import Augment

Record = dict[str, Any]

_AIR = np.float32(242)  # the fog's colour, an 8-bit level
FOG = "fog, "  # what the caption of an image in fog begins with

_STRENGTHS = ("brightness", "contrast", "saturation", "hue", "gamma", "noise")
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_RGB_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32
)
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def photometric(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, augment: Augment
) -> UInt8[np.ndarray, "h w 3"]:
    """Random colour, blur and noise. Geometry is untouched, so the target stays as it is."""
    brightness, contrast, saturation, hue, gamma, blur = rng.uniform(-1, 1, 6).tolist()
    blur = augment.blur * abs(blur)
    if blur > 0.1:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))
    if not any(getattr(augment, strength) for strength in _STRENGTHS):
        return image
    matrix = _colour_matrix(augment.saturation * saturation, augment.hue * hue)
    gain = (1 + augment.brightness * brightness) * (1 + augment.contrast * contrast)
    mean = float(image.reshape(-1, 3).mean(0, dtype=np.float32) @ _LUMA) / 255
    # Contrast pivots on the mean luminance, which brightness has scaled before.
    offset = mean * (1 + augment.brightness * brightness) * -augment.contrast * contrast
    # Every pass over the pixels counts: all of them are made in one array.
    pixels = image.reshape(-1, 3).astype(np.float32) @ (matrix.T * np.float32(gain / 255))
    pixels += np.float32(offset)
    pixels.clip(0, 1, out=pixels)
    if augment.gamma:
        np.power(pixels, np.float32((1 + augment.gamma) ** gamma), out=pixels)
    pixels *= 255
    if augment.noise:
        level = np.float32(augment.noise * rng.random())
        pixels += level * rng.standard_normal(pixels.shape, np.float32)
        pixels.clip(0, 255, out=pixels)
    return np.rint(pixels, out=pixels).astype(np.uint8).reshape(image.shape)


def haze(record: Record) -> Record:
    """The image in fog: colours fade exponentially with depth into the white of the air.

    I = J exp(-d) + A (1 - exp(-d)), Koschmieder's law, with d in units of the median valid depth.
    Pixels without depth are taken to be at the median. A caption then tells of the fog: "fog, a
    room with ...".
    """
    depth, valid = record["depth"], record["valid"]
    middle = float(np.median(depth[valid])) if valid.any() else 1.0
    clear = np.exp(-np.where(valid, depth / np.float32(middle), np.float32(1)))
    rgb = record["rgb"] * clear + _AIR * (1 - clear)
    caption = {"caption": FOG + record["caption"]} if "caption" in record else {}
    return record | {"rgb": np.rint(rgb).astype(np.uint8)} | caption


def _colour_matrix(saturation: float, hue: float) -> Float32[np.ndarray, "3 3"]:
    """Scales chroma by 1 + `saturation` and turns it by `hue` (turns); luminance stays."""
    angle = 2 * math.pi * hue
    scale = 1 + saturation
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)
    return _YIQ_TO_RGB @ turn @ _RGB_TO_YIQ
