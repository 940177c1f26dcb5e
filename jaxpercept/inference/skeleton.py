"""People's joints as pictures: dots and the limbs between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxpercept.data.joints import KEYPOINTS

_LEAST_SCORE = 0.3
"""Joints whose heat map has no higher peak are not drawn."""

# Chains of joints; words that no joint has break nothing, the limb is left out.
_CHAINS = (
    ("left_ankle", "left_knee", "left_hip", "right_hip", "right_knee", "right_ankle"),
    ("left_hip", "left_shoulder", "right_shoulder", "right_hip"),
    ("left_wrist", "left_elbow", "left_shoulder"),
    ("right_wrist", "right_elbow", "right_shoulder"),
    ("left_ear", "left_eye", "nose", "right_eye", "right_ear"),
    ("left_ear", "left_shoulder"),
    ("right_ear", "right_shoulder"),
)
# Left is warm, right is cold, what belongs to both is green.
_COLOURS = {"left": (255, 150, 40), "right": (60, 150, 255), "": (120, 220, 120)}


def draw_skeleton(
    joints: Float[np.ndarray, "k 3"],
    picture: UInt8[np.ndarray, "h w 3"],
    names: Sequence[str] = KEYPOINTS,
    least: float = _LEAST_SCORE,
) -> UInt8[np.ndarray, "h w 3"]:
    """Joints (x, y, score) over a picture, in its pixels, the middle of the first at 0.5.

    Args:
        joints: those with a score below `least` are left out.
        names: of the joints; limbs are drawn between those of COCO's names.
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    at = {
        name: (math.floor(x), math.floor(y))  # the pixel a place lies in
        for name, (x, y, score) in zip(names, joints, strict=True)
        if score >= least
    }
    thick = max(round(min(picture.shape[:2]) / 80), 1)
    for chain in _CHAINS:
        for first, second in itertools.pairwise(chain):
            if first in at and second in at:
                sides = {name.partition("_")[0] for name in (first, second)}
                colour = _COLOURS.get(sides.pop() if len(sides) == 1 else "", _COLOURS[""])
                draw.line([at[first], at[second]], fill=colour, width=thick)
    for name, (x, y) in at.items():
        colour = _COLOURS.get(name.partition("_")[0], _COLOURS[""])
        draw.ellipse([x - thick, y - thick, x + thick, y + thick], fill=colour)
    return np.asarray(image)
