"""What a prediction is: its range, its meaning, its picture and what its files hold."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.inference.panel import (
    colour_limits,
    draw_targets,
    grey,
    spectral,
    to_uint8,
)
from jaxpercept.inference.skeleton import draw_skeleton
from jaxpercept.metrics.detection import boxes_of
from jaxpercept.metrics.keypoints import locate_keypoints

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
        palette: of classes, a key of `data.palettes.PALETTES`.
        keypoint_names: of the joints, in the order of the prediction's channels.
        image: what joints and boxes are drawn over; None for black.
    """

    normals_convention: str = "opengl"
    target_properties: Mapping[str, Any] | None = None
    limits: tuple[float, float] | None = None
    palette: str | None = None
    keypoint_names: Sequence[str] = KEYPOINTS
    image: UInt8[np.ndarray, "_ _ 3"] | None = None

    def __post_init__(self):
        if self.normals_convention not in AXES:
            raise UserError(
                f"normals_convention {self.normals_convention!r} is unknown: use "
                f"{' or '.join(AXES)}."
            )
        if self.limits is not None and not -math.inf < self.limits[0] < self.limits[1] < math.inf:
            raise UserError(f"limits {self.limits} are no range: give the nearer one first.")
        if self.palette is not None and self.palette not in PALETTES:
            raise UserError(
                f"the palette {self.palette!r} is unknown: use one of {', '.join(PALETTES)}."
            )


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
        categories: the values are names, between which nothing lies.
        joint: the channels belong together, and their uncertainties are one map, the largest.
        stored: `(array, options) -> array`: what `NAME.npy` holds instead of the map.
        facts: `(array, options) -> entries` of `NAME.json`.
    """

    range: tuple[float, float]
    convention: str
    channels: int | None
    draw: Draw
    integers: Integers | None = None
    vectors: bool = False
    categories: bool = False
    joint: bool = False
    stored: Callable[[np.ndarray, Options], np.ndarray] | None = None
    facts: Callable[[np.ndarray, Options], dict[str, Any]] | None = None

    def array(self, prediction: Float[np.ndarray, "h w c"], options: Options) -> np.ndarray:
        """The map, float32: [h, w], [h, w, c], or [t, h, w, 3] for t targets.

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

    def store(self, values: np.ndarray, options: Options) -> np.ndarray:
        """What `NAME.npy` holds of what `array` gave."""
        return values if self.stored is None else self.stored(values, options)

    def uncertainty(self, values: Float[np.ndarray, "h w c"], options: Options) -> np.ndarray:
        """What `NAME_uncertainty.npy` holds: as `array`, but classes and joints have one map."""
        if self.channels is None:
            return split_targets(values, options)
        values = values.max(axis=-1, keepdims=True) if self.joint else values
        return values[..., 0] if values.shape[-1] == 1 else values


# ---- The kinds -----------------------------------------------------------------------------------


def _draw_metric(depth: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    measured = np.isfinite(depth) & (depth > 0)
    limits = options.limits or colour_limits(depth, measured)
    return {"depth": spectral(np.where(measured, depth, np.nan), limits)}


def _normals_convention(name: str) -> str:
    return f"unit normals of the surface in camera coordinates: {AXES[name]} ({name})"


def _colours(options: Options) -> UInt8[np.ndarray, "k 3"]:
    if options.palette is None:
        raise UserError("classes need the name of their palette to be drawn and named: give it.")
    return np.asarray(PALETTES[options.palette].colours, np.uint8)


def _draw_classes(classes: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    """In the palette's colours; black for what is no class."""
    colours = _colours(options)
    known = np.isfinite(classes) & (classes >= 0) & (classes < len(colours))
    number = np.where(known, classes, len(colours)).astype(np.int64)
    return {"classes": np.concatenate([colours, np.zeros((1, 3), np.uint8)])[number]}


def _class_facts(classes: np.ndarray, options: Options) -> dict[str, Any]:
    """The names of all classes, and which occur in what part of the picture."""
    count = len(_colours(options))
    names = PALETTES[options.palette].names
    pixels = np.bincount(classes[(classes >= 0) & (classes < count)].astype(np.int64).ravel())
    found = [
        {"number": int(k), "name": names[k], "share": round(float(pixels[k] / classes.size), 6)}
        for k in np.argsort(-pixels, kind="stable")
        if pixels[k]
    ]
    return {"palette": options.palette, "class_names": list(names), "classes": found}


_locate = functools.partial(jax.jit, static_argnames="refinement")(locate_keypoints)


def joints_of(heat: Float[np.ndarray, "h w k"]) -> Float[np.ndarray, "k 3"]:
    """Of each heat map, the place (x, y) and the height of its peak.

    Places are in pixels from the corner of the picture, so that the middle of the first is at 0.5.
    """
    places, scores = _locate(np.asarray(heat, np.float32)[None])
    return np.concatenate([np.asarray(places[0]) + 0.5, np.asarray(scores[0])[:, None]], axis=-1)


def _draw_joints(heat: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    size = np.array(heat.shape[1::-1])
    picture = np.zeros((*heat.shape[:2], 3), np.uint8) if options.image is None else options.image
    joints = joints_of(heat)
    joints[:, :2] *= np.array(picture.shape[1::-1]) / size
    return {"keypoints": draw_skeleton(joints, picture, options.keypoint_names)}


def _joint_facts(heat: np.ndarray, options: Options) -> dict[str, Any]:
    joints = zip(options.keypoint_names, joints_of(heat).tolist(), strict=True)
    return {"keypoints": [{"name": n, "x": x, "y": y, "score": s} for n, (x, y, s) in joints]}


def _draw_boxes(score: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    """Frames over the image; without one over where boxes are."""
    picture = Image.fromarray(grey(score) if options.image is None else options.image)
    scale = picture.width / score.shape[1], picture.height / score.shape[0]
    draw = ImageDraw.Draw(picture)
    for box in boxes_of(score)[:, :4] * np.float32([*scale, *scale]):
        corners = box.tolist()
        draw.rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), None, (0, 80, 255), 2)
    return {"boxes": np.asarray(picture)}


def _box_facts(score: np.ndarray, options: Options) -> dict[str, Any]:
    names = ("left", "top", "right", "bottom", "score")
    return {"boxes": [dict(zip(names, box, strict=True)) for box in boxes_of(score).tolist()]}


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
        facts=lambda _, options: {"normals_convention": options.normals_convention},
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
    "classes": Kind(
        range=(0.0, 254.0),
        convention="number of the pixel's class, an index into class_names",
        channels=1,
        draw=_draw_classes,
        integers=Integers("_mask.png", np.uint8, 1),
        categories=True,
        joint=True,
        facts=_class_facts,
    ),
    "keypoints": Kind(
        range=(0.0, 1.0),
        convention="heat maps of one person's joints; stored as x and y of each peak, in pixels "
        "with the middle of the first at 0.5, and its height in [0, 1], low for an absent joint",
        channels=len(KEYPOINTS),
        draw=_draw_joints,
        joint=True,
        stored=lambda heat, _: joints_of(heat),
        facts=_joint_facts,
    ),
    "boxes": Kind(
        range=(0.0, 1.0),
        convention="where boxes are; stored as left, top, right and bottom of each box, in pixels "
        "from the picture's corner, and its score in [0, 1]",
        channels=1,
        draw=_draw_boxes,
        stored=lambda score, _: boxes_of(score),
        facts=_box_facts,
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
        facts=lambda _, options: {"target_properties": dict(options.target_properties)},
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


def legend(task: Any) -> dict[str, Any]:
    """The options that a task's files and pictures need: `Options(**legend(task))`.

    Args:
        task: a `tasks.base.Task`; one of classes has a `palette`, one of keypoints may have
            `keypoint_names`.
    """
    if task.kind == "classes":
        return {"palette": task.palette}
    if task.kind == "keypoints":
        return {"keypoint_names": getattr(task, "keypoint_names", KEYPOINTS)}
    return {}
