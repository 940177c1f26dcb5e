"""Predictions as files and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxpercept.inference.kinds import (
    AXES,
    ENDINGS,
    FLIP_YZ,
    KINDS,
    Options,
    legend,
    target_names,
)
from jaxpercept.inference.panel import beside, panel, uncertainty_picture

__all__ = [
    "AXES",
    "ENDINGS",
    "FLIP_YZ",
    "KINDS",
    "Options",
    "atomic",
    "legend",
    "picture",
    "pictures",
    "save_array",
    "save_json",
    "save_png",
    "save_prediction",
    "target_names",
]


# ---- Pictures ------------------------------------------------------------------------------------


def pictures(
    kind: str, prediction: Float[np.ndarray, "h w c"], **options: Any
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """What to show of a prediction, by title: one picture, or one for each target of intrinsics.

    Args:
        kind: a key of `KINDS`.
        prediction: one image's prediction.
        options: see `Options`.
    """
    chosen = Options(**options)
    return KINDS[kind].draw(KINDS[kind].array(prediction, chosen), chosen)


def picture(
    kind: str, prediction: Float[np.ndarray, "h w c"], **options: Any
) -> UInt8[np.ndarray, "_ wide 3"]:
    """The picture in `NAME.png`: `pictures`, beside each other where there are several.

    Depth and disparity are in the colours of `spectral` and near is red; masks are grey; normals
    are (normal + 1) / 2; classes have their palette's colours; joints are drawn with limbs, over
    the option `image` or black.
    """
    return beside(pictures(kind, prediction, **options).values())


# ---- Files ---------------------------------------------------------------------------------------


def save_prediction(
    folder: Path,
    name: str,
    kind: str,
    prediction: Float[np.ndarray, "h w c"],
    record: Mapping[str, Any],
    *,
    uncertainty: Float[np.ndarray, "h w k"] | None = None,
    image: UInt8[np.ndarray, "_ _ 3"] | None = None,
    panelled: bool = False,
    **options: Any,
) -> list[Path]:
    """Write one image's prediction and the `NAME.json` that says what it is.

    `NAME.npy` holds the values and `NAME.png` shows them. Depth and disparity are also in
    `NAME_16bit.png`, masks, alpha and class numbers in `NAME_mask.png`, each target of intrinsics
    in `NAME_TARGET.png`. Of keypoints `NAME.npy` holds [k, 3]: x, y and score of each.

    Args:
        folder: where; created if missing.
        name: file name without ending, sub-folders allowed.
        kind: a key of `KINDS`.
        prediction: one image's prediction; normals are in the OpenGL convention.
        record: further facts for the JSON file.
        uncertainty: of the prediction, for `NAME_uncertainty.npy` and `NAME_uncertainty.png`.
        image: what was predicted from; joints and boxes are drawn over it.
        panelled: whether that image is shown beside its prediction in `NAME_panel.png`.
        options: see `Options`.

    Returns:
        The paths written. Each file appears complete or not at all, the JSON file last.

    Raises:
        UserError: an option does not fit the prediction.
    """
    meaning, chosen = KINDS[kind], Options(**options, image=image)
    values = meaning.array(prediction, chosen)
    facts = {
        "kind": kind,
        "range": [bound if math.isfinite(bound) else None for bound in meaning.range],
        "convention": meaning.describe(chosen),
        "height": prediction.shape[0],
        "width": prediction.shape[1],
    }
    facts |= meaning.facts(values, chosen) if meaning.facts else {}
    drawn = meaning.draw(values, chosen)
    arrays, images = {".npy": meaning.store(values, chosen)}, {".png": beside(drawn.values())}
    if meaning.integers is not None:
        ending = meaning.integers.ending
        images[ending] = meaning.integers.encode(np.clip(values, *meaning.range))
        facts["units_per_value"] = {f"{Path(name).name}{ending}": meaning.integers.scale}
    if meaning.channels is None:
        images |= {f"_{title}.png": shown for title, shown in drawn.items()}
    if uncertainty is not None:
        arrays["_uncertainty.npy"] = meaning.uncertainty(uncertainty, chosen)
        joint = uncertainty.max(axis=-1, keepdims=True) if meaning.joint else uncertainty
        images["_uncertainty.png"] = drawn["uncertainty"] = uncertainty_picture(joint)
    if panelled:
        images["_panel.png"] = panel([{"image": image, **drawn}])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for ending, array in arrays.items():
        save_array(folder / f"{name}{ending}", array)
    for ending, shown in images.items():
        save_png(folder / f"{name}{ending}", shown)
    paths = [folder / f"{name}{ending}" for ending in (*arrays, *images)]
    facts["files"] = [path.name for path in paths]
    path = folder / f"{name}.json"
    save_json(path, facts | dict(record))
    return [*paths, path]


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, replacing the file at once."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write float32 `.npy`, replacing the file at once."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.asarray(array, np.float32))


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [h, w, 3] or [h, w], or uint16 [h, w], as PNG, replacing the file at once."""
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
