"""Any file that a visitor drops on the page, as a picture, or one sentence why not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from jaxpercept.data.readers import UnreadableFileError, decode_rgb
from jaxpercept.errors import UserError

# Others that Pillow knows start programs (EPS), or are no pictures anybody takes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SHOWN = 60  # characters of a file's name


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is accepted.

    Attributes:
        megabytes: of a file.
        megapixels: of its picture; a file of a few kilobytes can hold gigabytes of one colour.
        edge: long side in pixels of what the page works with; larger pictures are reduced.
    """

    megabytes: float = 20.0
    megapixels: float = 40.0
    edge: int = 1024

    def __post_init__(self) -> None:
        for name, limit in (("mb", self.megabytes), ("mp", self.megapixels)):
            if not limit > 0:
                raise UserError(f"--max_upload_{name} is {limit}: give more than 0.")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image on the page.

    Attributes:
        rgb: upright.
        name: without folders.
        notes: what was done to the file's pixels.
    """

    rgb: UInt8[np.ndarray, "h w 3"]
    name: str
    notes: tuple[str, ...] = ()


def read_upload(path: str | Path, limits: Limits) -> Picture:
    """The picture in a file of any kind.

    It is turned upright as its EXIF data says; transparency is laid over white; of animations and
    many-page files the first picture is taken; sixteen bits become eight.

    Raises:
        UserError: too large, no picture, or a damaged one.
    """
    path = Path(path)
    name = path.name if len(path.name) <= _SHOWN else f"{path.name[:_SHOWN]}..."
    size = path.stat().st_size
    if size > limits.megabytes * 1e6:
        raise UserError(
            f"{name} has {size / 1e6:.0f} MB, and at most {limits.megabytes:g} are accepted: "
            "choose a smaller file."
        )
    data = path.read_bytes()
    _check_header(data, name, limits)
    try:
        rgb, notes = decode_rgb(data, name=name), _notes(data)
    except UnreadableFileError as error:
        raise UserError(
            f"{name} is damaged, or of an unusual kind ({_reason(error)}): choose another file."
        ) from None
    height, width = rgb.shape[:2]
    factor = limits.edge / max(height, width)
    if factor < 1:
        to = max(round(width * factor), 1), max(round(height * factor), 1)
        rgb = np.asarray(Image.fromarray(rgb).resize(to, Image.Resampling.LANCZOS))
        notes.append(f"reduced from {width} x {height}")
    return Picture(rgb, name, tuple(notes))


def _check_header(data: bytes, name: str, limits: Limits) -> None:
    """Raises a UserError, before a pixel is decoded, where a file is no picture, or a large one."""
    try:
        with _opened(data) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = None
    except Exception:  # damaged files make Pillow raise almost anything
        kinds = ", ".join(kind.replace("PPM", "PNM") for kind in _FORMATS)
        raise UserError(
            f"{name} is no image that can be read ({kinds}): choose another file."
        ) from None
    if width is None or width * height > limits.megapixels * 1e6:
        pixels = "too many pixels" if width is None else f"{width} x {height} pixels"
        raise UserError(
            f"{name} has {pixels}, and at most {limits.megapixels:g} million are accepted: "
            "choose a smaller picture."
        )


def _notes(data: bytes) -> list[str]:
    """What is done to the pixels of a file that has been decoded."""
    with _opened(data) as image:
        frames = getattr(image, "n_frames", 1)
        told = {
            "turned upright": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            f"the first of {frames} pictures": frames > 1,
            "transparency laid over white": image.has_transparency_data,
            "CMYK shown as RGB": image.mode == "CMYK",
            "16 bits reduced to 8": image.mode.startswith("I"),
        }
    return [note for note, is_so in told.items() if is_so]


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A file of the formats that are accepted, of which only the header has been read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on many pixels, and on damaged EXIF data
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image


def _reason(error: Exception) -> str:
    """What the decoder says of a damaged file."""
    cause = error.__cause__
    return (str(cause) or type(cause).__name__).strip(" .\n")[:200]
