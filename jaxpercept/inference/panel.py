"""Colours, and pictures beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# The eleven colours of ColorBrewer's diverging scheme "Spectral", red to violet.
_SPECTRAL = np.asarray(
    [
        (158, 1, 66),
        (213, 62, 79),
        (244, 109, 67),
        (253, 174, 97),
        (254, 224, 139),
        (255, 255, 191),
        (230, 245, 152),
        (171, 221, 164),
        (102, 194, 165),
        (50, 136, 189),
        (94, 79, 162),
    ],
    np.float32,
)
_HEADER_HEIGHT = 22
_GAP = 4
_WIDTHS = (256, 640)
# What sticks out decides no colours.
_QUANTILES = (0.02, 0.98)
# Linear colours are shown as Marigold shows them.
_GAMMA = 2.2
_SATURATION_PERCENTILE = 95


def spectral(
    values: Float[np.ndarray, "h w"], limits: tuple[float, float] = (0.0, 1.0)
) -> UInt8[np.ndarray, "h w 3"]:
    """Colours for values between two limits: near is red, far is violet, as Marigold draws depth.

    Values outside are clipped; NaN becomes dark grey.
    """
    low, high = limits
    finite = np.isfinite(values)
    position = np.where(finite, (values - low) / max(high - low, 1e-6), 0)
    position = np.clip(position, 0, 1) * (len(_SPECTRAL) - 1)
    stops = np.arange(len(_SPECTRAL))
    colours = np.stack([np.interp(position, stops, column) for column in _SPECTRAL.T], axis=-1)
    return np.where(finite[..., None], np.rint(colours), 40).astype(np.uint8)


def colour_limits(
    values: Float[np.ndarray, "*shape"], valid: Bool[np.ndarray, "*shape"]
) -> tuple[float, float]:
    """The 2 % and 98 % quantiles of the valid values, between which `spectral` may draw them."""
    if not valid.any():
        return 0.0, 1.0
    low, high = np.quantile(values[valid], _QUANTILES)
    return float(low), float(high)


def to_uint8(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[0, 1] to 0..255, rounded; values outside are clipped, NaN becomes 0."""
    finite = np.where(np.isfinite(values), values, 0)
    return np.rint(np.clip(finite, 0, 1) * 255).astype(np.uint8)


def grey(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Black for 0, white for 1."""
    return np.repeat(to_uint8(values)[..., None], 3, axis=-1)


def draw_targets(
    targets: Float[np.ndarray, "t h w 3"], properties: Mapping[str, Any]
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """A picture of each target of an intrinsic decomposition, by its name.

    As diffusers' `visualize_intrinsics`: linear colours are brightened, those known up to scale
    divided by their maximum; each channel of a stack is drawn by itself, white at 0 and black at 1.

    Args:
        targets: in [0, 1].
        properties: see `outputs.Options`.
    """
    drawn = {}
    for name, values in zip(properties["target_names"], targets, strict=True):
        own = properties.get(name, {})
        if own.get("prediction_space") == "stack":
            for channel, sub_name in enumerate(own["sub_target_names"]):
                if sub_name is not None:
                    shown = _displayed(values[..., channel], properties.get(sub_name, {}))
                    drawn[sub_name] = grey(1 - shown)
            drawn[name] = to_uint8(values)
        else:
            drawn[name] = to_uint8(_displayed(values, own))
    return drawn


def _displayed(values: np.ndarray, properties: Mapping[str, Any]) -> np.ndarray:
    if properties.get("prediction_space", "srgb") != "linear":
        return values
    if properties.get("up_to_scale", False):
        values = values / max(values.max(), 1e-6)
    return np.maximum(values, 0) ** (1 / _GAMMA)


def uncertainty_picture(uncertainty: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h wide 3"]:
    """Black for certain, white for the 95th percentile and above, as diffusers draws it.

    One channel is drawn grey, three in colour, several targets of three beside each other.

    Raises:
        ValueError: a value is negative.
    """
    if uncertainty.min() < 0:
        raise ValueError(f"uncertainty {uncertainty.min()} is negative")
    height, width, channels = uncertainty.shape
    maps = uncertainty.reshape(height, width, -1, min(channels, 3)).transpose(2, 0, 1, 3)
    drawn = []
    for values in maps:
        # Where nearly all pixels are certain, the percentile is 0 and no scale.
        scale = np.percentile(values, _SATURATION_PERCENTILE) or values.max() or 1.0
        drawn.append(np.broadcast_to(to_uint8(values / scale), (height, width, 3)))
    return beside(drawn)


def beside(images: Iterable[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    """Images of one height, without a gap."""
    return np.concatenate(list(images), axis=1)


def panel(
    rows: Sequence[Mapping[str, UInt8[np.ndarray, "_ _ 3"]]],
) -> UInt8[np.ndarray, "h w 3"]:
    """The pictures of each row beside each other, under a header with their titles.

    Args:
        rows: pictures of any kind and size by their titles; all rows have the same titles.

    Returns:
        One image. All pictures are brought to the width of the widest in the first column, at least
        256 and at most 640 pixels; below the shorter ones of a row is white.

    Raises:
        ValueError: the rows' titles differ.
    """
    titles = list(rows[0])
    if any(list(row) != titles for row in rows):
        raise ValueError(f"panel: the rows' titles differ: {[list(row) for row in rows]}")
    widest = max(row[titles[0]].shape[1] for row in rows)
    width = int(np.clip(widest, *_WIDTHS))
    lines = [_header(titles, width)]
    lines += [_line([_to_width(image, width) for image in row.values()]) for row in rows]
    gap = np.full((_GAP, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, gap)][:-1])


def _to_width(image: np.ndarray, width: int) -> np.ndarray:
    height = max(round(image.shape[0] * width / image.shape[1]), 1)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _line(images: Sequence[np.ndarray]) -> np.ndarray:
    height, width = max(image.shape[0] for image in images), images[0].shape[1]
    line = np.full((height, len(images) * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for column, image in enumerate(images):
        left = column * (width + _GAP)
        line[: image.shape[0], left : left + width] = image
    return line


def _header(titles: Sequence[str], width: int) -> np.ndarray:
    image = Image.new("RGB", (len(titles) * (width + _GAP) - _GAP, _HEADER_HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        left = column * (width + _GAP) + width / 2
        draw.text((left, _HEADER_HEIGHT / 2), title, fill=(40, 40, 40), font=font, anchor="mm")
    return np.asarray(image)
