"""What a prediction is, how it is drawn, and the files it is written to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxpercept.errors import UserError
from jaxpercept.inference.panel import (
    beside,
    colour_limits,
    draw_targets,
    grey,
    panel,
    spectral,
    to_uint8,
    uncertainty_picture,
)

AXES = {
    "opengl": "+x right, +y up, +z towards the viewer",
    "opencv": "+x right, +y down, +z away from the viewer",
}
"""Conventions of camera coordinates by name; one becomes the other by negating y and z."""

FLIP_YZ = np.asarray((1, -1, -1), np.float32)
"""Between the two conventions of `AXES`, either way."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the kind alone does not say about files and pictures.

    Attributes:
        normals_convention: a key of `AXES`, in which normals are written and drawn.
        target_properties: of intrinsics, as in the `model_index.json` of a diffusers folder:
            `target_names`, in the order of the prediction's channels, and by target
            `prediction_space` ("srgb", the default, "linear", or "stack": each channel a map of its
            own, named by `sub_target_names`) and `up_to_scale`.
        limits: the nearest and farthest metres that metric depth is coloured between; None takes
            the 2 % and 98 % quantiles of each image. A video wants them fixed.
    """

    normals_convention: str = "opengl"
    target_properties: Mapping[str, Any] | None = None
    limits: tuple[float, float] | None = None

    def __post_init__(self):
        if self.normals_convention not in AXES:
            raise UserError(
                f"normals_convention {self.normals_convention!r} is unknown: use "
                f"{' or '.join(AXES)}."
            )
        if self.limits is not None and not -math.inf < self.limits[0] < self.limits[1] < math.inf:
            raise UserError(f"limits {self.limits} are no range: give the nearer one first.")


@dataclasses.dataclass(frozen=True)
class Integers:
    """A copy of a map as integers, for tools that read images only.

    Attributes:
        ending: of the file's name.
        dtype: np.uint8 or np.uint16.
        scale: what 1.0 becomes.
    """

    ending: str
    dtype: type
    scale: int

    def encode(self, values: Float[np.ndarray, "h w"]) -> np.ndarray:
        """Rounded; 0 for what is no number, and for what is too large to be written."""
        scaled = np.rint(np.where(np.isfinite(values), values, 0) * np.float64(self.scale))
        scaled = np.where(scaled > np.iinfo(self.dtype).max, 0, scaled)
        return np.maximum(scaled, 0).astype(self.dtype)


Draw = Callable[[np.ndarray, Options], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to read the numbers of a kind of prediction.

    Attributes:
        range: least and largest value.
        convention: what the values mean.
        channels: of the prediction; None: three for each target.
        draw: `(array, options) -> {title: uint8 [h, w, 3]}` for what `array` gives.
        integers: a further file of the same values.
        vectors: in camera coordinates, OpenGL as predicted.
    """

    range: tuple[float, float]
    convention: str
    channels: int | None
    draw: Draw
    integers: Integers | None = None
    vectors: bool = False

    def array(self, prediction: Float[np.ndarray, "h w c"], options: Options) -> np.ndarray:
        """What `NAME.npy` holds, float32: [h, w], [h, w, 3], or [t, h, w, 3] for t targets.

        Raises:
            ValueError: the channels are not the kind's.
            UserError: the channels are not those of the targets.
        """
        values = np.asarray(prediction, np.float32)
        if self.channels is None:
            return split_targets(values, options)
        if values.shape[-1] != self.channels:
            raise ValueError(f"a prediction {values.shape} has not {self.channels} channels")
        if self.vectors and options.normals_convention == "opencv":
            return values * FLIP_YZ
        return values[..., 0] if self.channels == 1 else values

    def describe(self, options: Options) -> str:
        """The convention under these options."""
        if self.vectors:
            return _normals_convention(options.normals_convention)
        return self.convention

    def write(
        self,
        folder: Path,
        name: str,
        prediction: Float[np.ndarray, "h w c"],
        options: Options | None = None,
    ) -> list[Path]:
        """Write `NAME.npy`, the picture `NAME.png` and what else belongs to the kind."""
        options = options or Options()
        values = self.array(prediction, options)
        drawn = self.draw(values, options)
        images = {".png": beside(drawn.values())}
        if self.integers is not None:
            images[self.integers.ending] = self.integers.encode(np.clip(values, *self.range))
        if self.channels is None:
            images |= {f"_{title}.png": image for title, image in drawn.items()}
        paths = [folder / f"{name}.npy"]
        save_array(paths[0], values)
        for ending, image in images.items():
            paths.append(folder / f"{name}{ending}")
            save_png(paths[-1], image)
        return paths


# ---- The kinds -----------------------------------------------------------------------------------


def _draw_metric(depth: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    measured = np.isfinite(depth) & (depth > 0)
    limits = options.limits or colour_limits(depth, measured)
    return {"depth": spectral(np.where(measured, depth, np.nan), limits)}


def _normals_convention(name: str) -> str:
    return f"unit normals of the surface in camera coordinates: {AXES[name]} ({name})"


_SIXTEEN_BITS = Integers("_16bit.png", np.uint16, 65535)
_MILLIMETRES = Integers("_16bit.png", np.uint16, 1000)
_EIGHT_BITS = Integers("_mask.png", np.uint8, 255)

KINDS = {
    "affine_depth": Kind(
        range=(0.0, 1.0),
        convention="0 = near, 1 = far; affine-invariant: metres = scale * value + shift, with "
        "scale > 0 and shift unknown for each image",
        channels=1,
        draw=lambda depth, _: {"depth": spectral(depth)},
        integers=_SIXTEEN_BITS,
    ),
    "affine_disparity": Kind(
        range=(0.0, 1.0),
        convention="0 = far, 1 = near; affine-invariant: 1 / metres = scale * value + shift, with "
        "scale > 0 and shift unknown for each image; drawn like depth, near is red",
        channels=1,
        draw=lambda disparity, _: {"disparity": spectral(1 - disparity)},
        integers=_SIXTEEN_BITS,
    ),
    "metric_depth": Kind(
        range=(0.0, math.inf),
        convention="metres along the optical axis (planar depth)",
        channels=1,
        draw=_draw_metric,
        integers=_MILLIMETRES,
    ),
    "normals": Kind(
        range=(-1.0, 1.0),
        convention=_normals_convention("opengl"),
        channels=3,
        draw=lambda normals, _: {"normals": to_uint8((normals + 1) / 2)},
        vectors=True,
    ),
    "mask": Kind(
        range=(0.0, 1.0),
        convention="probability of the foreground",
        channels=1,
        draw=lambda mask, _: {"mask": grey(mask)},
        integers=_EIGHT_BITS,
    ),
    "alpha": Kind(
        range=(0.0, 1.0),
        convention="opacity of the foreground: 0 = background, 1 = foreground",
        channels=1,
        draw=lambda alpha, _: {"alpha": grey(alpha)},
        integers=_EIGHT_BITS,
    ),
    "colors": Kind(
        range=(0.0, 1.0),
        convention="red, green and blue of a map whose colours the task defines",
        channels=3,
        draw=lambda colors, _: {"colors": to_uint8(colors)},
    ),
    "intrinsics": Kind(
        range=(0.0, 1.0),
        convention="three channels for each target, in the order and the spaces that "
        "target_properties names",
        channels=None,
        draw=lambda targets, options: draw_targets(targets, options.target_properties),
    ),
}
"""Every kind of prediction the package makes."""

# What the published intrinsics models predict.
_TARGETS = ("albedo", "material", "roughness", "metallicity", "shading", "residual")
_EXTRAS = ("_16bit.png", "_mask.png", "_uncertainty.npy", "_uncertainty.png", "_panel.png")

ENDINGS = (".npy", ".png", ".json", ".ply", *_EXTRAS, *(f"_{name}.png" for name in _TARGETS))
"""Every ending any kind writes, a point cloud's included: two images whose output names differ by
one would collide. Intrinsics of other targets add `_TARGET.png` for each of `target_names`."""


def target_names(target_properties: Mapping[str, Any] | None) -> list[str]:
    """Everything that is drawn of intrinsics: the targets, and the named channels of stacks.

    Raises:
        UserError: the properties are incomplete, or a name cannot be part of a file's.
    """
    if not target_properties or not target_properties.get("target_names"):
        raise UserError("intrinsics need target_properties with their target_names: give them.")
    names = []
    for target in target_properties["target_names"]:
        own = target_properties.get(target, {})
        if own.get("prediction_space") == "stack":
            channels = own.get("sub_target_names") or ()
            if len(channels) != 3:
                raise UserError(
                    f"the stack {target!r} needs three sub_target_names, null where a channel is "
                    "unused."
                )
            names += [channel for channel in channels if channel is not None]
        names.append(target)
    taken = {ending.split(".")[0].removeprefix("_") for ending in _EXTRAS}
    for name in names:
        if not re.fullmatch(r"\w+", str(name)) or name in taken or names.count(name) > 1:
            raise UserError(
                f"the target {name!r} cannot name a file: use letters, digits and underscores, "
                f"each name once, and none of {', '.join(sorted(taken))}."
            )
    return names


def split_targets(values: Float[np.ndarray, "h w c"], options: Options) -> np.ndarray:
    """[h, w, 3 t] to [t, h, w, 3].

    Raises:
        UserError: there are not three channels for each target of `options`.
    """
    target_names(options.target_properties)
    count = len(options.target_properties["target_names"])
    if values.shape[-1] != 3 * count:
        raise UserError(
            f"the prediction has {values.shape[-1]} channels, but target_properties names {count} "
            "targets of three: give those of this checkpoint."
        )
    return np.moveaxis(values.reshape(*values.shape[:2], count, 3), 2, 0)


# ---- Pictures ------------------------------------------------------------------------------------


def pictures(
    kind: str, prediction: Float[np.ndarray, "h w c"], **options: Any
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
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
) -> UInt8[np.ndarray, "h wide 3"]:
    """The picture in `NAME.png`: `pictures`, beside each other where there are several.

    Depth and disparity are in the colours of `spectral` and near is red; masks are grey; normals
    are (normal + 1) / 2.
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
    panel_of: UInt8[np.ndarray, "_ _ 3"] | None = None,
    **options: Any,
) -> list[Path]:
    """Write one image's prediction and the `NAME.json` that says what it is.

    `NAME.npy` holds the values and `NAME.png` shows them. Depth and disparity are also in
    `NAME_16bit.png`, masks and alpha in `NAME_mask.png`, each target of intrinsics in
    `NAME_TARGET.png`.

    Args:
        folder: where; created if missing.
        name: file name without ending, sub-folders allowed.
        kind: a key of `KINDS`.
        prediction: one image's prediction; normals are in the OpenGL convention.
        record: further facts for the JSON file.
        uncertainty: of the prediction, for `NAME_uncertainty.npy` and `NAME_uncertainty.png`.
        panel_of: the image, to be shown beside its prediction in `NAME_panel.png`.
        options: see `Options`.

    Returns:
        The paths written. Each file appears complete or not at all, the JSON file last.

    Raises:
        UserError: an option does not fit the prediction.
    """
    meaning, chosen = KINDS[kind], Options(**options)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    paths = meaning.write(folder, name, prediction, chosen)
    shown = dict(pictures(kind, prediction, **options)) if panel_of is not None else {}
    if uncertainty is not None:
        drawn = uncertainty_picture(uncertainty)
        array = uncertainty
        if uncertainty.shape[-1] == 1:
            array = uncertainty[..., 0]
        elif meaning.channels is None:
            array = split_targets(uncertainty, chosen)
        paths += [folder / f"{name}_uncertainty{ending}" for ending in (".npy", ".png")]
        save_array(paths[-2], array)
        save_png(paths[-1], drawn)
        shown["uncertainty"] = drawn
    if panel_of is not None:
        paths.append(folder / f"{name}_panel.png")
        save_png(paths[-1], panel([{"image": panel_of, **shown}]))
    facts = {
        "kind": kind,
        "range": [bound if math.isfinite(bound) else None for bound in meaning.range],
        "convention": meaning.describe(chosen),
        "height": prediction.shape[0],
        "width": prediction.shape[1],
        "files": [path.name for path in paths],
    }
    if meaning.integers is not None:
        file = f"{Path(name).name}{meaning.integers.ending}"
        facts["units_per_value"] = {file: meaning.integers.scale}
    if meaning.vectors:
        facts["normals_convention"] = chosen.normals_convention
    if meaning.channels is None:
        facts["target_properties"] = dict(chosen.target_properties)
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
