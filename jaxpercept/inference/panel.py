"""Side-by-side pictures of input, truth and prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxpercept.inference.outputs import spectral

_HEADER = ("input", "truth", "prediction")
_HEADER_HEIGHT = 22
_GAP = 4
_WIDTHS = (256, 640)


@dataclasses.dataclass(frozen=True)
class PanelRow:
    """One line of a panel.

    Attributes:
        rgb: the input image.
        truth: depth, in any unit.
        valid: where `truth` is measured.
        prediction: depth in the unit of `truth`, that is, aligned to it.
    """

    rgb: UInt8[np.ndarray, "h w 3"]
    truth: Float[np.ndarray, "h w 1"]
    valid: Bool[np.ndarray, "h w 1"]
    prediction: Float[np.ndarray, "h w 1"]


def panel(rows: Sequence[PanelRow]) -> UInt8[np.ndarray, "h w 3"]:
    """Input, truth and prediction of each row beside each other, under a header.

    Truth and prediction share one colour range, the 2 % to 98 % quantiles of the valid truth, so
    that equal colours are equal depths; what is not measured is grey. All images are brought to the
    width of the widest, at least 256 and at most 640 pixels.
    """
    width = int(np.clip(max(row.rgb.shape[1] for row in rows), *_WIDTHS))
    lines = [_header(width)]
    for row in rows:
        lines += [_line([_to_width(image, width) for image in _coloured(row)])]
    gap = np.full((_GAP, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, gap)][:-1])


def _coloured(row: PanelRow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    near, far = np.quantile(row.truth[row.valid], (0.02, 0.98)) if row.valid.any() else (0.0, 1.0)
    span = max(far - near, 1e-6)
    truth = np.where(row.valid, (row.truth - near) / span, np.nan)
    return row.rgb, spectral(truth[..., 0]), spectral((row.prediction[..., 0] - near) / span)


def _to_width(image: np.ndarray, width: int) -> np.ndarray:
    height = max(round(image.shape[0] * width / image.shape[1]), 1)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _line(images: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def _header(width: int) -> np.ndarray:
    image = Image.new("RGB", (len(_HEADER) * width + (len(_HEADER) - 1) * _GAP, _HEADER_HEIGHT))
    image.paste((255, 255, 255), (0, 0, *image.size))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for column, title in enumerate(_HEADER):
        left = column * (width + _GAP) + width / 2
        draw.text((left, _HEADER_HEIGHT / 2), title, fill=(40, 40, 40), font=font, anchor="mm")
    return np.asarray(image)
