"""Decoders: the bytes of one image, depth map or mask in, an array out.

Every failure is an `UnreadableFileError` that names the file, so that training can skip the record
and evaluation can refuse it.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8
from PIL import Image, ImageOps

from jaxpercept.errors import UserError

RGB_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
DEPTH_SUFFIXES = frozenset({".png", ".npy", ".exr"})


class UnreadableFileError(UserError):
    """A record that exists but cannot be decoded; training skips it, evaluation refuses it."""


def read_rgb(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to 8-bit RGB, upright.

    EXIF orientation is applied, palettes and CMYK are converted, transparency is composited over
    white, and 16-bit greyscale is scaled to 8 bits instead of being clipped.

    Raises:
      UnreadableFileError: the file is missing, truncated or not an image.
    """
    return decode_rgb(_read_bytes(path), name=str(path))


def decode_rgb(data: bytes, *, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """`read_rgb` for bytes that are already in memory; `name` is what an error calls them."""
    return _guard(lambda: np.array(_to_rgb(_open_image(data))), name)


def read_depth(path: str | Path) -> Float32[np.ndarray, "h w 1"]:
    """Decodes a depth map, in the units of the file.

    16-bit single-channel PNG, NPY of shape (H, W) or (H, W, 1), or the first channel of an OpenEXR
    file. Values that mean "no measurement" (0, inf, nan) are kept as they are.

    Raises:
      UnreadableFileError: the file is missing, damaged, or not a depth map in one of these formats.
      UserError: the file is EXR and the package OpenEXR is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".exr":
        exr = _import_openexr(path)
        return _guard(lambda: _as_map(_decode_exr(exr, str(path)), np.float32), str(path))
    data = _read_bytes(path)
    if suffix == ".npy":
        return _guard(lambda: _as_map(_decode_npy(data), np.float32), str(path))
    if suffix == ".png":
        return _guard(lambda: _as_map(_decode_png16(data), np.float32), str(path))
    raise UnreadableFileError(
        f"Cannot read {path} as depth: it must be a 16-bit PNG, an NPY or an EXR file."
    )


def read_mask(path: str | Path) -> Bool[np.ndarray, "h w 1"]:
    """Decodes a validity mask (PNG or NPY; anything above zero is valid).

    Raises:
      UnreadableFileError: the file is missing, damaged or has more than one channel.
    """
    data = _read_bytes(path)
    if Path(path).suffix.lower() == ".npy":
        return _guard(lambda: _as_map(_decode_npy(data), np.float32) > 0, str(path))
    return _guard(lambda: _as_map(np.array(_open_image(data)), np.float32) > 0, str(path))


class RawFloat32Reader:
    """Reads headerless little-endian float32 depth maps of one known size (ETH3D; inf: none).

    Raises (when called):
      UnreadableFileError: the file is missing or has another length.
    """

    def __init__(self, height: int, width: int):
        self.shape = (height, width)

    def __call__(self, path: str | Path) -> Float32[np.ndarray, "h w 1"]:
        data = _read_bytes(path)
        return _guard(
            lambda: _as_map(np.frombuffer(data, "<f4").reshape(self.shape), np.float32), str(path)
        )


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableFileError(_message(str(path), error)) from error


def _guard(decode: Callable[[], np.ndarray], name: str) -> np.ndarray:
    # Damaged files make the decoders raise almost anything (OSError, SyntaxError, struct.error,
    # zlib.error, ValueError ...), hence the broad net: whatever it is, the file is unreadable.
    try:
        return decode()
    except UserError:
        raise
    except Exception as error:
        raise UnreadableFileError(_message(name, error)) from error


def _message(name: str, error: Exception) -> str:
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "it is not an image in a known format"
    return f"Cannot read {name}: {reason}; replace the file or remove it from the dataset."


def _open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged EXIF block does not damage the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        pixels = np.asarray(image)
        shift = 8 if pixels.max() > 255 else 0
        image = Image.fromarray(np.clip(pixels >> shift, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("a floating-point image has no defined brightness range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_png16(data: bytes) -> np.ndarray:
    image = _open_image(data)
    if not image.mode.startswith("I"):
        raise ValueError(f"depth must be a single-channel 16-bit PNG, not mode {image.mode}")
    return np.array(image)


def _decode_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _import_openexr(path: str | Path):
    try:
        import OpenEXR
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs the package OpenEXR; install it with "
            "`pip install 'jaxpercept[exr]'`."
        ) from error
    return OpenEXR


def _decode_exr(exr, path: str) -> np.ndarray:
    channels = exr.File(path, separate_channels=True).channels()
    # "First" in the order a reader would name them: the file itself sorts them alphabetically,
    # which would put alpha (RGBA) or blue (RGB) in front.
    preferred = [name for name in ("Z", "Y", "R", "V") if name in channels]
    others = sorted(name for name in channels if name != "A")
    return channels[(preferred or others)[0]].pixels


def _as_map(array: np.ndarray, dtype: type) -> Shaped[np.ndarray, "h w 1"]:
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"expected one number per pixel, got {array.dtype} of shape {array.shape}")
    return array.astype(dtype)[..., None]
