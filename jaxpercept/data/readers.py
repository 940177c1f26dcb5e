"""Decoders: the bytes of one image, map or mask in, an array out.

Every failure is an `UnreadableFileError` that names the file, so that training can skip the record
and evaluation can refuse it.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped, UInt8
from PIL import Image, ImageOps

from jaxpercept.errors import UserError

RGB_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
DEPTH_SUFFIXES = frozenset({".png", ".npy", ".exr"})


class UnreadableFileError(UserError):
    """A record that exists but cannot be decoded; training skips it, evaluation refuses it."""


class EmptyMaskError(UserError):
    """A record without a single valid pixel; training skips it, evaluation refuses it."""


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
    return decode_mask(data, name=str(path))


def decode_mask(data: bytes, *, name: str) -> Bool[np.ndarray, "h w 1"]:
    """`read_mask` for an image that is already in memory; `name` is what an error calls it."""
    return _guard(lambda: _as_map(np.array(_open_image(data)), np.float32) > 0, name)


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


# ---- normals, mattes and classes -----------------------------------------------------------------

# Directions of the three components of a stored normal, by name, and the signs that turn them into
# x right, y up, z back towards the viewer.
AXES = {
    f"{x}_{y}_{z}": (sx, sy, sz)
    for x, sx in (("right", 1), ("left", -1))
    for y, sy in (("up", 1), ("down", -1))
    for z, sz in (("back", 1), ("front", -1))
}
# Shorter vectors mean that there is no surface (Marigold's rule for Sintel).
_MIN_NORMAL = 0.1


@dataclasses.dataclass(frozen=True)
class NormalsReader:
    """Decodes surface normals: unit vectors, x right, y up, z towards the viewer; 0 where invalid.

    NPY of shape (H, W, 3), an OpenEXR file with the channels R, G, B or X, Y, Z, or an 8- or 16-bit
    colour PNG that stores (n + 1) / 2, where black and middle grey mean that there is none.

    Attributes:
      axes: key of `AXES`: the directions of the components in the file. "left_up_back" is what
        DSINE's evaluation data has (its authors call it right, down, front of outward normals),
        "right_down_front" a camera frame of OpenCV.

    Raises (when called):
      UnreadableFileError: the file is missing, damaged, or no such map.
      UserError: the file is EXR and the package OpenEXR is not installed.
    """

    axes: str = "right_up_back"

    def __post_init__(self) -> None:
        if self.axes not in AXES:
            raise UserError(f"Unknown normals_axes {self.axes!r}; known are {', '.join(AXES)}.")

    def __call__(self, path: str | Path) -> Float32[np.ndarray, "h w 3"]:
        suffix = Path(path).suffix.lower()
        if suffix == ".exr":
            exr = _import_openexr(path)
            return _guard(lambda: self._unit(_decode_exr_vectors(exr, str(path))), str(path))
        data = _read_bytes(path)
        decode = _decode_npy if suffix == ".npy" else _decode_png_vectors
        return _guard(lambda: self._unit(decode(data)), str(path))

    def _unit(self, vectors: np.ndarray) -> Float32[np.ndarray, "h w 3"]:
        if vectors.ndim != 3 or vectors.shape[-1] != 3 or vectors.dtype.kind != "f":
            raise ValueError(f"expected three numbers per pixel, got {vectors.shape}")
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            present = length > _MIN_NORMAL  # false for nan
        present &= np.isfinite(length)
        signs = np.array(AXES[self.axes], np.float32)
        unit = np.divide(vectors, length, where=present, out=np.zeros_like(vectors))
        return unit.astype(np.float32) * signs + np.float32(0)  # no negative zeros


def read_alpha(path: str | Path) -> Float32[np.ndarray, "h w 1"]:
    """Decodes a mask or a matte, a grey picture of 1, 8 or 16 bits, to [0, 1].

    Raises:
      UnreadableFileError: the file is missing, damaged, transparent or coloured.
    """
    data = _read_bytes(path)
    return _guard(lambda: _decode_grey(data)[..., None], str(path))


def read_trimap(path: str | Path) -> UInt8[np.ndarray, "h w 1"]:
    """Decodes a trimap: 0 background, 255 foreground, 128 (any grey in the file) unknown.

    Raises:
      UnreadableFileError: the file is missing, damaged, transparent or coloured.
    """
    grey = read_alpha(path)
    return np.where(grey == 0, np.uint8(0), np.where(grey == 1, np.uint8(255), np.uint8(128)))


VOID = 255


@dataclasses.dataclass(frozen=True)
class ClassesReader:
    """Decodes a map of class numbers; 255 is void.

    Attributes:
      table: the class of every number in the file; numbers beyond it are void. Empty: as they are.
      colours: the colour of every class, for files that are pictures in these colours; any other
        colour is void.

    Raises (when called):
      UnreadableFileError: the file is missing, damaged, or not such a map.
    """

    table: tuple[int, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()

    def __call__(self, path: str | Path) -> Int32[np.ndarray, "h w 1"]:
        data = _read_bytes(path)
        return _guard(lambda: self._decode(_open_image(data))[..., None], str(path))

    def _decode(self, image: Image.Image) -> Int32[np.ndarray, "h w"]:
        if image.mode in ("RGB", "RGBA") and self.colours:
            return self._from_colours(np.asarray(image.convert("RGB"), np.int32))
        numbers = np.asarray(image)  # of a palette picture, the indices
        if numbers.ndim != 2 or numbers.dtype.kind not in "iub":
            raise ValueError(f"expected one class number per pixel, not mode {image.mode}")
        numbers = numbers.astype(np.int32)
        if not self.table:
            return np.where(numbers < VOID, numbers, VOID).astype(np.int32)
        table = np.array((*self.table, VOID), np.int32)
        return table[np.clip(numbers, 0, len(self.table))]

    def _from_colours(self, rgb: Int32[np.ndarray, "h w 3"]) -> Int32[np.ndarray, "h w"]:
        code = np.array([1 << 16, 1 << 8, 1], np.int32)
        known = np.array(self.colours, np.int32) @ code
        order = np.argsort(known)
        pixels = rgb @ code
        place = np.searchsorted(known[order], pixels).clip(max=len(known) - 1)
        classes = order[place].astype(np.int32)
        return np.where(known[classes] == pixels, classes, np.int32(VOID))


def _decode_grey(data: bytes) -> Float32[np.ndarray, "h w"]:
    image = _open_image(data)
    if image.has_transparency_data or image.mode in ("F", "CMYK"):
        raise ValueError(f"a mask must be a grey picture, not mode {image.mode}")
    if image.mode.startswith("I"):
        return np.asarray(image, np.float32) / np.float32(65535)
    if image.mode not in ("1", "L"):
        rgb = np.asarray(image.convert("RGB"))
        if (rgb != rgb[..., :1]).any():
            raise ValueError("a mask must be a grey picture, this one has colours")
        return rgb[..., 0].astype(np.float32) / np.float32(255)
    return np.asarray(image.convert("L"), np.float32) / np.float32(255)


def _decode_png_vectors(data: bytes) -> Float32[np.ndarray, "h w 3"]:
    image = Image.open(io.BytesIO(data))
    tiles = list(image.tile)
    if image.mode != "RGB" or image.format != "PNG":
        raise ValueError(f"normals must be a PNG in colours, not {image.format} of {image.mode}")
    pixels = np.array(image).astype(np.float32)
    largest = np.float32(255)
    if tiles[0].args == "RGB;16B":
        # Pillow keeps the high byte of 16-bit colours. Told that the file is little-endian, it
        # keeps the low one.
        image = Image.open(io.BytesIO(data))
        image.tile = [tile._replace(args="RGB;16L") for tile in tiles]
        pixels = pixels * 256 + np.array(image)
        largest = np.float32(65535)
    absent = (pixels == 0).all(axis=-1, keepdims=True)
    return np.where(absent, np.float32(0), pixels / largest * 2 - 1)


def _decode_exr_vectors(exr, path: str) -> Float32[np.ndarray, "h w 3"]:
    channels = exr.File(path, separate_channels=True).channels()
    for names in ("RGB", "XYZ"):
        if set(names) <= channels.keys():
            return np.stack([channels[name].pixels for name in names], -1).astype(np.float32)
    raise ValueError(f"expected the channels R, G, B or X, Y, Z, not {', '.join(channels)}")


def read_with(path: str | Path, decode: Callable[[bytes], Any]) -> Any:
    """What `decode` makes of the bytes of a file.

    Raises:
      UnreadableFileError: the file is missing, or `decode` fails.
    """
    data = _read_bytes(path)
    return _guard(lambda: decode(data), str(path))


def read_hdf5(path: str | Path, name: str = "dataset", index: int | None = None) -> np.ndarray:
    """Reads an array of an HDF5 file, or one element of it.

    Raises:
      UnreadableFileError: the file is missing or damaged, or has no such array.
      UserError: the package h5py is not installed.
    """
    h5py = _import_h5py(path)

    def read() -> np.ndarray:
        with h5py.File(path) as file:
            return file[name][() if index is None else index]

    return _guard(read, str(path))


def read_hdf5_texts(path: str | Path, name: str) -> tuple[str, ...]:
    """Reads a cell array of strings, as MATLAB writes it into HDF5.

    Raises:
      UnreadableFileError, UserError: as of `read_hdf5`.
    """
    h5py = _import_h5py(path)

    def read() -> tuple[str, ...]:
        with h5py.File(path) as file:
            cells = (file[cell][()] for cell in file[name][()].ravel())
            return tuple("".join(map(chr, letters.ravel().tolist())) for letters in cells)

    return _guard(read, str(path))


# ---- helpers -------------------------------------------------------------------------------------


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableFileError(_message(str(path), error)) from error


def _guard(decode: Callable[[], Any], name: str) -> Any:
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


def _import_h5py(path: str | Path):
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs the package h5py; install it with "
            "`pip install 'jaxpercept[prepare]'`."
        ) from error
    return h5py


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
