"""What a prediction is, and the files it is written to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

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


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to read the numbers of a kind of prediction.

    Attributes:
        range: least and largest value.
        convention: what the values mean.
        write: `(folder, name, prediction [h, w, c]) -> paths` of the array and its pictures.
    """

    range: tuple[float, float]
    convention: str
    write: Callable[[Path, str, np.ndarray], list[Path]]


def spectral(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Colours for values in [0, 1]: near is red, far is violet, as Marigold draws depth.

    Values outside are clipped; NaN becomes dark grey.
    """
    finite = np.isfinite(values)
    position = np.where(finite, np.clip(values, 0, 1), 0) * (len(_SPECTRAL) - 1)
    stops = np.arange(len(_SPECTRAL))
    colours = np.stack([np.interp(position, stops, column) for column in _SPECTRAL.T], axis=-1)
    return np.where(finite[..., None], np.rint(colours), 40).astype(np.uint8)


def write_depth(folder: Path, name: str, prediction: Float[np.ndarray, "h w 1"]) -> list[Path]:
    """`NAME.npy` (float32 [h, w]), `NAME.png` (coloured) and `NAME_16bit.png` (value x 65535)."""
    depth = prediction[..., 0].astype(np.float32)
    sixteen_bits = np.rint(np.clip(depth, 0, 1) * 65535).astype(np.uint16)
    paths = [folder / f"{name}{ending}" for ending in (".npy", ".png", "_16bit.png")]
    with atomic(paths[0]) as temporary, temporary.open("wb") as file:
        np.save(file, depth)
    save_png(paths[1], spectral(depth))
    save_png(paths[2], sixteen_bits)
    return paths


KINDS = {
    "affine_depth": Kind(
        range=(0.0, 1.0),
        convention="0 = near, 1 = far; affine-invariant: metres = scale * value + shift, with "
        "scale > 0 and shift unknown for each image",
        write=write_depth,
    ),
}
"""Every kind of prediction the package makes."""

# Every ending any kind writes: two images whose output names differ by one would collide.
ENDINGS = (".npy", ".png", "_16bit.png", "_mask.png", ".json")


def save_prediction(
    folder: Path,
    name: str,
    kind: str,
    prediction: Float[np.ndarray, "h w c"],
    record: Mapping[str, Any],
) -> list[Path]:
    """Write one image's prediction and the `NAME.json` that says what it is.

    Args:
        folder: where; created if missing.
        name: file name without ending, sub-folders allowed.
        kind: a key of `KINDS`.
        prediction: one image's prediction.
        record: further facts for the JSON file.

    Returns:
        The paths written. Each file appears complete or not at all.
    """
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    meaning = KINDS[kind]
    paths = meaning.write(folder, name, prediction)
    facts = {
        "kind": kind,
        "range": list(meaning.range),
        "convention": meaning.convention,
        "height": prediction.shape[0],
        "width": prediction.shape[1],
        "files": [path.name for path in paths],
        **record,
    }
    path = folder / f"{name}.json"
    save_json(path, facts)
    return [*paths, path]


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, replacing the file at once."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [h, w, 3] or uint16 [h, w] as PNG, replacing the file at once."""
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it if the block succeeds and removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
