"""Files that visitors of a page bring: pictures of every kind, and what is none."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 80)
"""(height, width) of the good ones, before they are turned."""


def photo(rng: np.random.Generator, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """Smooth colours, uint8 [h, w, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3)).astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


# Each writes a picture of `photo` and returns what is to be seen of it, and a note on the page.
Write = Callable[[Path, np.ndarray], tuple[np.ndarray, str]]


def plain(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    Image.fromarray(rgb).save(path)
    return rgb, ""


def grey(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    Image.fromarray(rgb[..., 0]).save(path)
    return np.repeat(rgb[..., :1], 3, axis=-1), ""


def sixteen_bits(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(path)
    return np.repeat(rgb[..., :1], 3, axis=-1), "16 bits reduced to 8"


def cmyk(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    Image.fromarray(rgb).convert("CMYK").save(path, quality=95)
    return rgb, "CMYK shown as RGB"


def palette(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    image = Image.fromarray(rgb).quantize(16)
    image.save(path)
    return np.asarray(image.convert("RGB")), ""


def alpha(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    opacity = np.zeros(rgb.shape[:2], np.uint8)
    opacity[:, : rgb.shape[1] // 2] = 255
    Image.fromarray(np.dstack([rgb, opacity])).save(path)
    return np.where(opacity[..., None] == 255, rgb, 255), "transparency laid over white"


def turned(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(rgb).save(path, exif=exif)
    return np.rot90(rgb, -1), "turned upright"


def animated(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    frames = [Image.fromarray(x).quantize(16) for x in (rgb, 255 - rgb, rgb[::-1].copy())]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    return np.asarray(frames[0].convert("RGB")), "the first of 3 pictures"


def one_pixel(path: Path, rgb: np.ndarray) -> tuple[np.ndarray, str]:
    Image.fromarray(rgb[:1, :1]).save(path)
    return rgb[:1, :1], "1 x 1 pixels"


GOOD: dict[str, Write] = {
    "plain.png": plain,
    "plain.bmp": plain,
    "plain.tif": plain,
    "plain.ppm": plain,
    "grey.png": grey,
    "sixteen_bits.png": sixteen_bits,
    "cmyk.jpg": cmyk,
    "palette.png": palette,
    "alpha.png": alpha,
    "turned.png": turned,
    "animated.gif": animated,
    "one_pixel.png": one_pixel,
}


def png_of(height: int, width: int) -> bytes:
    """A PNG file of one colour that claims this size, of a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * min(height, 4000), 9)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cut(path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def floating(path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb[..., 0].astype(np.float32)).save(path)


def holding(content: bytes) -> Callable[[Path, np.ndarray], None]:
    return lambda path, rgb: path.write_bytes(content) and None


BAD: dict[str, tuple[Callable[[Path, np.ndarray], None], str]] = {
    "text.png": (holding(b"this is no picture\n"), "is no image that can be read"),
    "empty.jpg": (holding(b"\0"), "is no image that can be read"),
    "page.svg": (holding(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "is no image"),
    "drawing.eps": (holding(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is no image"),
    "cut.png": (cut, "is damaged"),
    "cut.jpg": (cut, "is damaged"),
    "floating.tif": (floating, "is damaged, or of an unusual kind"),
    "wide.png": (holding(png_of(6000, 9000)), "9000 x 6000 pixels, and at most 40 million"),
    "bomb.png": (holding(png_of(60000, 60000)), "too many pixels"),
}
"""By name: what writes the file, and what the page says of it."""
