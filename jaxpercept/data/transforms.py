"""Augmentation and resizing of records: pure NumPy/Pillow functions, randomness passed in.

Geometry is shared by the image and every raster of the target; photometric changes touch the image
only. The order of `prepare` is: flip, rotation, crop (at native resolution) -> quantiles of the
depth that remains -> resize -> photometric -> haze. The quantiles are therefore those that the
papers normalise with (native resolution, after geometry), and the colour work, which is costly, is
done on few pixels.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8
from PIL import Image, ImageFilter

from jaxpercept.errors import UserError

Record = dict[str, Any]

# Entries of a record that are images, i.e. follow the geometry.
RASTERS = ("rgb", "depth", "valid", "mask", "normals", "instance", "classes")

_AIR = np.float32(242)  # the fog's colour, an 8-bit level
FOG = "fog, "  # what the caption of an image in fog begins with

_SWAP_SIDES = {"left": "right", "right": "left"}


def _is_range(scale: tuple) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a record. The defaults are the papers' recipe: a flip, nothing else.

    Attributes:
      flip: probability of a horizontal flip.
      scale: range of the crop's area, as a fraction of the largest crop of the target's aspect.
      aspect: largest factor by which the crop's width/height may deviate from the target's; the
        resize then stretches by it.
      fit: "crop" keeps proportions (the crop has the target's aspect, its position is random),
        "center" does so with the crop in the middle, "stretch" takes the image's own aspect.
      rotation: largest in-plane rotation in degrees; corners without data are cropped away.
      photometric: probability that the colour changes below are applied to an image.
      brightness, contrast, saturation: factors are drawn from 1 +- these.
      hue: largest rotation of the hue, in turns (0.5 is the opposite colour).
      gamma: exponents are drawn log-uniformly from [1/(1+gamma), 1+gamma].
      blur: largest standard deviation of a Gaussian blur, in pixels of the target resolution.
      noise: largest standard deviation of pixel noise, in 8-bit levels.
      haze: probability that an image with depth is put into fog, of which its caption then tells.
      rgb_resize: "antialias" (area-weighted linear filter) or "nearest" (what GenPercept and
        Marigold do in training, for exact comparisons).
    """

    flip: float = 0.5
    scale: tuple[float, float] = (1.0, 1.0)
    aspect: float = 1.0
    fit: str = "crop"
    rotation: float = 0.0
    photometric: float = 0.8
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    haze: float = 0.0
    rgb_resize: str = "antialias"

    def __post_init__(self):
        for field, ok, rule in (
            ("flip", 0 <= self.flip <= 1, "a probability"),
            ("photometric", 0 <= self.photometric <= 1, "a probability"),
            ("scale", _is_range(self.scale), "two numbers 0 < low <= high <= 1"),
            ("aspect", self.aspect >= 1, "at least 1"),
            ("fit", self.fit in ("crop", "center", "stretch"), "'crop', 'center' or 'stretch'"),
            ("rotation", 0 <= self.rotation <= 45, "between 0 and 45 degrees"),
            ("brightness", 0 <= self.brightness < 1, "between 0 and 1"),
            ("contrast", 0 <= self.contrast < 1, "between 0 and 1"),
            ("saturation", 0 <= self.saturation <= 1, "between 0 and 1"),
            ("hue", 0 <= self.hue <= 0.5, "between 0 and 0.5 turns"),
            ("gamma", self.gamma >= 0, "at least 0"),
            ("blur", self.blur >= 0, "at least 0"),
            ("noise", self.noise >= 0, "at least 0"),
            ("haze", 0 <= self.haze <= 1, "a probability"),
            ("rgb_resize", self.rgb_resize in ("antialias", "nearest"), "'antialias' or 'nearest'"),
        ):
            if not ok:
                raise UserError(f"augment.{field} must be {rule}, got {getattr(self, field)!r}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Augment":
        """Raises a UserError that names an unknown key or a value out of range."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in sorted(set(config) - known):
            raise UserError(f"Unknown key augment.{key}; known are {', '.join(sorted(known))}.")
        values = dict(config)
        for key, value in values.items():
            try:
                if key == "scale":
                    values[key] = tuple(float(bound) for bound in value)
                elif key not in ("fit", "rgb_resize"):
                    values[key] = float(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"augment.{key} must be a number, got {value!r}.") from error
        return cls(**values)


# No augmentation at all: the largest centred crop of the target's aspect, resized.
NO_AUGMENT = Augment(flip=0.0, photometric=0.0, fit="center")


def prepare(
    record: Record,
    rng: np.random.Generator,
    augment: Augment,
    resolution: tuple[int, int],
) -> Record:
    """Augments a record and brings it to `resolution` (height, width).

    Returns the record with all rasters at `resolution` and, where it has depth, `depth_range`
    float32 [2]: the 2 % and 98 % quantiles of the valid depth in metres. `valid` may have become
    empty; the caller decides what to do then. `source` uint8 [h, w, 3] is the image before haze,
    the image itself where there is none.
    """
    height, width = resolution
    # Every number is drawn whether it is used or not, so that changing one strength leaves the
    # other augmentations of the same example as they were.
    geometry, photometry, weather = rng.spawn(3)
    if geometry.random() < augment.flip:
        record = flip_horizontal(record)
    angle = geometry.uniform(-augment.rotation, augment.rotation)
    if angle:
        record = rotate(record, angle)
    record = crop(record, *random_window(record["rgb"].shape[:2], geometry, augment, resolution))
    if "depth" in record:
        record = record | {"depth_range": depth_range(record["depth"], record["valid"])}
    record = resize(record, (height, width), rgb_resize=augment.rgb_resize)
    if photometry.random() < augment.photometric:
        record = record | {"rgb": photometric(record["rgb"], photometry, augment)}
    record = record | {"source": record["rgb"]}
    if "depth" in record and weather.random() < augment.haze:
        record = haze(record)
    return record


# ---- geometry ------------------------------------------------------------------------------------


def flip_horizontal(record: Record) -> Record:
    """Mirrors every raster left-right, and with them what depends on the side.

    The x component of `normals` changes sign, the principal point in `intrinsics` moves, and the
    words left and right are exchanged in `caption` and `phrases`.
    """
    flipped = _map_rasters(record, lambda _, x: x[:, ::-1])
    if "normals" in record:
        flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
    if "intrinsics" in record:
        fx, fy, cx, cy = record["intrinsics"]
        flipped["intrinsics"] = np.array([fx, fy, record["rgb"].shape[1] - cx, cy], np.float32)
    if "caption" in record:
        flipped["caption"] = _mirrored(record["caption"])
    if "phrases" in record:
        flipped["phrases"] = [(_mirrored(phrase), target) for phrase, target in record["phrases"]]
    return flipped


def _mirrored(text: str) -> str:
    return re.sub(r"\b(left|right)\b", lambda match: _SWAP_SIDES[match[0]], text)


def crop(record: Record, top: int, left: int, height: int, width: int) -> Record:
    """Cuts the same window out of every raster; the principal point in `intrinsics` follows."""
    cropped = _map_rasters(record, lambda _, x: x[top : top + height, left : left + width])
    if "intrinsics" in record:
        cropped["intrinsics"] = record["intrinsics"] - np.array([0, 0, left, top], np.float32)
    return cropped


def random_window(
    size: tuple[int, int],
    rng: np.random.Generator,
    augment: Augment,
    resolution: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop as `augment` describes it."""
    rows, columns = size
    area = rng.uniform(*augment.scale)
    stretch = math.exp(rng.uniform(-1, 1) * math.log(augment.aspect))
    place = rng.random(2)
    if augment.fit == "center":
        place = np.array([0.5, 0.5])
    whole = augment.fit == "stretch"
    aspect = stretch * (columns / rows if whole else resolution[1] / resolution[0])
    # The largest window of this aspect, then shrunk to the area that was drawn.
    height = min(rows, columns / aspect) * math.sqrt(area)
    window = (_at_least_one(height, rows), _at_least_one(height * aspect, columns))
    top, left = (int(p * (n - w + 1)) for p, n, w in zip(place, size, window, strict=True))
    return top, left, *window


def rotate(record: Record, degrees: float) -> Record:
    """Rotates every raster about the image centre and crops what has no data.

    Positive angles turn the content counter-clockwise. The largest centred window of the image's
    aspect that lies inside the rotated image remains. Depth and masks take the nearest pixel, the
    image is bilinear. Planar depth does not change, `normals` (x right, y up) turn with the image,
    and so does the principal point in `intrinsics`, whose focal lengths are taken to be equal.
    """
    rows, columns = record["rgb"].shape[:2]
    sine, cosine = abs(math.sin(math.radians(degrees))), abs(math.cos(math.radians(degrees)))
    aspect = columns / rows
    shrink = 1.0 / (cosine + sine * max(aspect, 1 / aspect))
    # Rounded down, since a corner pixel outside has no data.
    height, width = max(1, int(rows * shrink)), max(1, int(columns * shrink))

    def turn(name: str, raster: np.ndarray) -> np.ndarray:
        filter_ = Image.Resampling.BILINEAR if name == "rgb" else Image.Resampling.NEAREST
        if name == "rgb":
            return np.asarray(Image.fromarray(raster).rotate(degrees, filter_))
        channels = [
            np.asarray(Image.fromarray(_as_pillow(raster[..., c])).rotate(degrees, filter_))
            for c in range(raster.shape[-1])
        ]
        return np.stack(channels, axis=-1).astype(raster.dtype)

    turned = _map_rasters(record, turn)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if "normals" in record:  # y points up
        turned["normals"] = turned["normals"] @ np.array(
            [[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32
        )
    if "intrinsics" in record:  # y points down, from the centre
        fx, fy, cx, cy = record["intrinsics"]
        x, y = cx - columns / 2, cy - rows / 2
        turned["intrinsics"] = np.array(
            [fx, fy, columns / 2 + c * x + s * y, rows / 2 - s * x + c * y], np.float32
        )
    return crop(turned, (rows - height) // 2, (columns - width) // 2, height, width)


def resize(record: Record, resolution: tuple[int, int], *, rgb_resize: str = "antialias") -> Record:
    """Brings every raster to `resolution` (height, width).

    The image is resampled with an antialiased linear filter (`rgb_resize="nearest"`: nearest, for
    comparisons with the papers' loaders). Targets and masks take the nearest pixel, index
    floor((i + 0.5) * in / out), since averaging depth across an edge invents surfaces.
    """

    def to_size(name: str, raster: np.ndarray) -> np.ndarray:
        if name == "rgb" and rgb_resize == "antialias":
            return resize_rgb(raster, resolution)
        return resize_nearest(raster, resolution)

    resized = _map_rasters(record, to_size)
    if "intrinsics" in record:
        y, x = np.array(resolution) / record["rgb"].shape[:2]
        resized["intrinsics"] = (record["intrinsics"] * (x, y, x, y)).astype(np.float32)
    return resized


def resize_rgb(
    image: UInt8[np.ndarray, "h w 3"], resolution: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Linear filter whose support grows with the reduction, so that nothing aliases."""
    if image.shape[:2] == tuple(resolution):
        return image
    height, width = resolution
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_nearest(
    raster: Shaped[np.ndarray, "h w c"], resolution: tuple[int, int]
) -> Shaped[np.ndarray, "H W c"]:
    """Pixel centres map to the nearest pixel (torch's "nearest-exact", jax.image's "nearest")."""
    # floor((i + 0.5) * size / out) in integers, where nothing rounds.
    rows, columns = (
        (2 * np.arange(out) + 1) * size // (2 * out)
        for size, out in zip(raster.shape[:2], resolution, strict=True)
    )
    return raster[rows[:, None], columns[None, :]]


# ---- depth statistics ----------------------------------------------------------------------------


def depth_range(
    depth: Float32[np.ndarray, "h w 1"], valid: Bool[np.ndarray, "h w 1"]
) -> Float32[np.ndarray, "2"]:
    """The 2 % and 98 % quantiles (linear interpolation) of the valid depth, in metres.

    Taken on the host, so that the jitted step needs no sort. A constant map gets a range of one
    ten-thousandth of its depth instead of zero, and an empty mask gets (0, 1), so that
    normalisation never divides by zero. (GenPercept, Marigold: `depth_transform.py`.)
    """
    values = depth[valid]
    if values.size == 0:
        return np.array([0.0, 1.0], np.float32)
    low, high = np.quantile(values, (0.02, 0.98)).astype(np.float32)
    return np.array([low, max(high, low * np.float32(1 + 1e-4))], np.float32)


# ---- photometric ---------------------------------------------------------------------------------

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
    matrix = _colour_matrix(augment.saturation * saturation, augment.hue * hue)
    gain = (1 + augment.brightness * brightness) * (1 + augment.contrast * contrast)
    mean = float(image.reshape(-1, 3).mean(0, dtype=np.float32) @ _LUMA) / 255
    # Contrast pivots on the mean luminance, which brightness has scaled before.
    offset = mean * (1 + augment.brightness * brightness) * -augment.contrast * contrast
    pixels = image.reshape(-1, 3).astype(np.float32) @ (matrix.T * np.float32(gain / 255))
    pixels = np.clip(pixels + np.float32(offset), 0, 1)
    if augment.gamma:
        pixels = pixels ** np.float32((1 + augment.gamma) ** gamma)
    pixels *= 255
    if augment.noise:
        level = np.float32(augment.noise * rng.random())
        pixels += level * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(image.shape)


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


# ---- helpers -------------------------------------------------------------------------------------


def _map_rasters(record: Record, function: Any) -> Record:
    return {k: function(k, v) if k in RASTERS else v for k, v in record.items()}


def _as_pillow(channel: np.ndarray) -> np.ndarray:
    """Pillow rotates 8-bit, 32-bit integer and float images; nearest copies them exactly."""
    if channel.dtype == np.float32 or channel.dtype == np.uint8:
        return channel
    return channel.astype(np.uint8 if channel.dtype == bool else np.int32)


def _at_least_one(length: float, limit: int) -> int:
    return min(limit, max(1, round(length)))
