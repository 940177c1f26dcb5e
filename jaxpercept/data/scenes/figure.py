"""A person: a skeleton in a plausible pose, and the body around it.

The person's own frame has x to their right, y up and z ahead. Angles are in radians; a limb that
hangs down has flexion 0 and abduction 0, flexion lifts it ahead, abduction to its own side.

Sleeve and trouser leg are of a warm colour on the person's left and of a cool one on their right,
so that a small picture tells the sides apart even where the face does not show. (Mirrored pictures
have it the other way round: who trains with flips learns the sides from the face alone.)
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.scenes.builder import ELLIPSOID, Builder, Place, rounded
from jaxpercept.data.scenes.palette import (
    Draws,
    Material,
    Number,
    fabric,
    paint,
    rotation,
    scaled,
    tint,
)
from jaxpercept.data.scenes.strokes import Point, bar, limb
from jaxpercept.data.scenes.textures import TILE

# Metres from a joint to the farthest skin or cloth before it; what is nearer hides the joint.
REACH = {"nose": 0.05, "eye": 0.035, "ear": 0.045, "shoulder": 0.15, "elbow": 0.08, "wrist": 0.08,
         "hip": 0.16, "knee": 0.1, "ankle": 0.1}  # fmt: skip
SIDES = {"left": -1, "right": 1}
WARM = {"left": ("red", "orange", "yellow", "pink"), "right": ("blue", "green", "purple", "blue")}
SKIN = ((224, 172, 140), (198, 134, 98), (141, 85, 56), (250, 214, 186), (92, 58, 40))
HAIR = ((30, 24, 20), (70, 46, 30), (120, 84, 50), (190, 160, 100), (150, 148, 146), (110, 40, 26))


class Pose(NamedTuple):
    """Where everything is, in the person's frame."""

    posture: str  # "standing", "walking" or "sitting"
    size: Number  # 1 for a person of about 1.75 m
    joints: dict[str, Point]  # all of KEYPOINTS, "pelvis" and "neck"
    head: tuple[Point, Point, Point, Point]  # centre; directions right, up and ahead
    turn: tuple[Number, Number]  # (cos, sin) of the chest's turn
    lean: tuple[Number, Number]
    seat: Number  # height of what the person sits on, 0 for others
    height: Number


def _direction(side: Number, flexion: Number, abduction: Number) -> Point:
    (ca, sa), (cb, sb) = rotation(flexion), rotation(abduction)
    return side * sb, -cb * ca, cb * sa


def _along(start: Point, direction: Point, length: Number) -> Point:
    return tuple(a + length * d for a, d in zip(start, direction, strict=True))


def _turned(direction: Point, turn: tuple[Number, Number]) -> Point:
    (x, y, z), (cos, sin) = direction, turn
    return cos * x + sin * z, y, cos * z - sin * x


def _legs(draws: Draws, posture: str) -> dict[str, tuple[Number, Number, Number]]:
    """Flexion, abduction and knee angle of each leg."""
    if posture == "sitting":
        return {side: (draws.between(1.3, 1.6), draws.between(0.02, 0.35), draws.between(1.2, 1.8))
                for side in SIDES}  # fmt: skip
    if posture == "walking":
        stride, lead = draws.between(0.3, 0.65), draws.pick(tuple(SIDES))
        return {
            side: (stride, draws.between(0.0, 0.08), draws.between(0.0, 0.3)) if side == lead
            else (-0.7 * stride, draws.between(0.0, 0.08), draws.between(0.15, 0.8))
            for side in SIDES
        }  # fmt: skip
    return {
        side: (draws.middle(-0.15, 0.25), draws.between(0.02, 0.25), draws.between(0.0, 0.25))
        for side in SIDES
    }


def _arms(
    draws: Draws, posture: str, legs: dict[str, tuple[Number, Number, Number]]
) -> dict[str, tuple[Number, Number, Number, Number]]:
    """Flexion, abduction and elbow angle of each arm, and the abduction of the forearm."""
    arms = {}
    for side in SIDES:
        rest = {"standing": 3.0, "walking": 5.0, "sitting": 4.0}[posture]
        kind = draws.weighted({"rest": rest, "ahead": 1.2, "up": 1.0, "aside": 1.0, "hip": 0.7})
        if kind == "ahead":
            arm = (draws.between(0.5, 1.6), draws.between(0.0, 0.4), draws.between(0.1, 1.6), 0.0)
        elif kind == "up":
            arm = (draws.between(2.0, 2.9), draws.between(0.1, 0.5), draws.between(0.0, 0.5),
                   draws.between(-0.3, 0.3))  # fmt: skip
        elif kind == "aside":
            raised = draws.between(0.6, 1.5)
            arm = (0.0, raised, draws.between(0.0, 0.4), raised + draws.between(-0.2, 1.3))
        elif kind == "hip":
            arm = (-0.25, draws.between(0.6, 0.9), 0.4, draws.between(-0.8, -0.5))
        elif posture == "sitting":
            arm = (draws.between(0.2, 0.7), draws.between(0.05, 0.3), draws.between(0.5, 1.1),
                   draws.between(-0.3, 0.1))  # fmt: skip
        else:
            swing = -0.9 * legs[side][0] if posture == "walking" else draws.between(-0.25, 0.25)
            arm = (swing, draws.between(0.08, 0.3), draws.between(0.05, 0.8),
                   draws.between(-0.1, 0.15))  # fmt: skip
        arms[side] = arm
    return arms


def draw_pose(draws: Draws) -> Pose:
    posture = draws.weighted({"standing": 4, "walking": 3, "sitting": 3})
    size = draws.between(0.88, 1.08)
    legs = _legs(draws, posture)
    arms = _arms(draws, posture, legs)
    joints: dict[str, Point] = {"pelvis": (0.0, 0.0, 0.0)}
    for side, sign in SIDES.items():
        flexion, abduction, bent = legs[side]
        hip = (sign * 0.098 * size, -0.02 * size, 0.0)
        knee = _along(hip, _direction(sign, flexion, abduction), 0.43 * size)
        shin = _direction(sign, flexion - bent, 0.4 * abduction)
        joints |= {f"{side}_hip": hip, f"{side}_knee": knee,
                   f"{side}_ankle": _along(knee, shin, 0.41 * size)}  # fmt: skip
    lowest = min(joints["left_ankle"][1], joints["right_ankle"][1])
    up = 0.085 * size - lowest  # the lower foot stands on the floor
    seat = up - 0.1 * size if posture == "sitting" else 0.0

    bow = {"standing": (-0.05, 0.25), "walking": (0.0, 0.25), "sitting": (-0.15, 0.4)}[posture]
    lean, turn = rotation(draws.between(*bow)), rotation(draws.middle(-0.5, 0.5))
    spine = (0.0, lean[0], lean[1])
    neck = _along((0.0, 0.0, 0.0), spine, 0.49 * size)
    joints["neck"] = neck
    for side, sign in SIDES.items():
        flexion, abduction, bent, inward = arms[side]
        shoulder = _along(neck, _turned((sign, 0.0, 0.0), turn), 0.185 * size)
        upper = _turned(_direction(sign, flexion, abduction), turn)
        fore = _turned(_direction(sign, flexion + bent, inward), turn)
        elbow = _along(shoulder, upper, 0.285 * size)
        joints |= {f"{side}_shoulder": shoulder, f"{side}_elbow": elbow,
                   f"{side}_wrist": _along(elbow, fore, 0.25 * size)}  # fmt: skip

    (cy, sy), (cp, sp) = turn, rotation(draws.middle(-0.35, 0.45))
    look = rotation(draws.middle(-0.9, 0.9))
    cy, sy = cy * look[0] - sy * look[1], sy * look[0] + cy * look[1]
    right, over, ahead = (cy, 0.0, -sy), (sp * sy, cp, sp * cy), (cp * sy, -sp, cp * cy)
    centre = _along(_along(_along(neck, spine, 0.13 * size), over, 0.1 * size), ahead, 0.02 * size)
    for name, x, y, z in (("nose", 0, -0.012, 0.108), ("eye", 0.036, 0.022, 0.084),
                          ("ear", 0.08, 0.0, -0.005)):  # fmt: skip
        for side, sign in SIDES.items() if x else (("", 0),):
            at = _along(_along(_along(centre, right, sign * x * size), over, y * size),
                        ahead, z * size)  # fmt: skip
            joints[f"{side}_{name}" if side else name] = at
    joints = {name: (x, y + up, z) for name, (x, y, z) in joints.items()}
    centre = (centre[0], centre[1] + up, centre[2])
    height = max(y for _, y, _ in joints.values()) + 0.12 * size
    return Pose(posture, size, joints, (centre, right, over, ahead), turn, lean, seat, height)


def reach_of(name: str) -> Number:
    return REACH[name.split("_")[-1]]


def world_joints(pose: Pose, place: Place) -> Float[np.ndarray, "17 4"]:
    """Places of the keypoints in the world, and how far the skin is from each."""
    return np.array([
        (*place.at(*pose.joints[name])[:3], reach_of(name) * pose.size) for name in KEYPOINTS
    ])  # fmt: skip


def _plain(draws: Draws, rgb: tuple[int, int, int]) -> Material:
    base = tint(draws, rgb, 0.08)
    return Material("", TILE["flat"], base, scaled(base, 0.85), base, 0.3, 0.3)


def build(b: Builder, draws: Draws, place: Place, pose: Pose) -> None:
    """The body, in about 30 solids."""
    b.begin("person", pose.posture, pose.height, place)
    skin, size, joints = _plain(draws, draws.pick(SKIN)), pose.size, pose.joints
    shirt = fabric(draws, draws.pick(("white", "grey", "black", "beige", "brown")))
    trousers = paint(draws, draws.pick(("grey", "black", "brown", "white")), gloss=0.0)
    _trunk(b, pose, shirt, trousers)
    _head(b, draws, pose, skin)
    bare = draws.chance(0.35)
    for side in SIDES:
        sleeve, leg = (paint(draws, draws.pick(WARM[side]), gloss=0.0) for _ in range(2))
        shoulder, elbow, wrist = (joints[f"{side}_{n}"] for n in ("shoulder", "elbow", "wrist"))
        _ball(b, shoulder, 0.062 * size, sleeve)
        limb(b, shoulder, elbow, 0.054 * size, 0.044 * size, sleeve)
        fore = skin if bare else sleeve
        _ball(b, elbow, 0.045 * size, fore)
        limb(b, elbow, wrist, 0.043 * size, 0.033 * size, fore)
        hand = tuple(w + 0.22 * (w - e) for w, e in zip(wrist, elbow, strict=True))
        _ball(b, hand, 0.05 * size, skin)
        hip, knee, ankle = (joints[f"{side}_{n}"] for n in ("hip", "knee", "ankle"))
        limb(b, hip, knee, 0.083 * size, 0.06 * size, leg)
        _ball(b, knee, 0.061 * size, leg)
        limb(b, knee, ankle, 0.057 * size, 0.043 * size, leg)
        shoe = paint(draws, draws.pick(("black", "brown", "white")), gloss=0.1)
        x, y, z = ankle
        b.box((x, y - 0.035 * size, z + 0.055 * size), (0.05 * size, 0.05 * size, 0.13 * size),
              shoe, quadric=rounded(1.25))  # fmt: skip


def _ball(b: Builder, centre: Point, radius: Number, material: Material) -> None:
    b.box(centre, (radius, radius, radius), material, quadric=ELLIPSOID)


def _trunk(b: Builder, pose: Pose, shirt: Material, trousers: Material) -> None:
    size, pelvis = pose.size, pose.joints["pelvis"]
    spine = (0.0, pose.lean[0], pose.lean[1])
    for up, half, soft, turn in (
        (0.36, (0.175, 0.17, 0.11), 1.22, pose.turn), (0.15, (0.145, 0.16, 0.1), 1.2, (1.0, 0.0)),
    ):  # fmt: skip
        b.box(_along(pelvis, spine, up * size), tuple(size * part for part in half), shirt,
              turn=turn, tilt=pose.lean, quadric=rounded(soft))  # fmt: skip
    b.box(pelvis, (0.165 * size, 0.12 * size, 0.12 * size), trousers, quadric=ELLIPSOID)


def _head(b: Builder, draws: Draws, pose: Pose, skin: Material) -> None:
    size, (centre, right, over, ahead) = pose.size, pose.head
    turn, tilt = (right[0], -right[2]), (over[1], -ahead[1])

    def at(x: Number, y: Number, z: Number) -> Point:
        point = _along(_along(centre, right, x * size), over, y * size)
        return _along(point, ahead, z * size)

    def part(place: Point, half: Point, material: Material) -> None:
        b.box(place, tuple(size * extent for extent in half), material, turn=turn, tilt=tilt,
              quadric=ELLIPSOID)  # fmt: skip

    bar(b, _along(pose.joints["neck"], over, -0.04 * size), at(0, -0.05, -0.01), 0.05 * size, skin,
        quadric=(1.0, 1.0, 0.0, 0.0, -1.0))  # fmt: skip
    part(centre, (0.08, 0.118, 0.1), skin)
    part(at(0, 0.03, -0.026), (0.088, 0.112, 0.1), _plain(draws, draws.pick(HAIR)))
    flush = skin._replace(first=(skin.first[0], 0.55 * skin.first[1], 0.55 * skin.first[2]))
    part(at(0, -0.012, 0.1), (0.018, 0.026, 0.022), flush)
    dark = _plain(draws, (28, 26, 30))
    for sign in SIDES.values():
        part(at(0.036 * sign, 0.022, 0.084), (0.018, 0.015, 0.012), dark)
        part(at(0.082 * sign, 0.0, -0.005), (0.016, 0.03, 0.02), skin)


def seat(b: Builder, draws: Draws, place: Place, pose: Pose) -> None:
    """What a sitting person sits on: a box, or a chair whose back is behind them."""
    top, half = pose.seat, 0.2 * pose.size
    material = fabric(draws) if draws.chance(0.3) else paint(draws)
    if draws.chance(0.35):
        b.begin("box", material.word, top, place)
        b.box((0, 0.5 * top, 0.02), (half, 0.5 * top, half), material)
        return
    b.begin("chair", material.word, top, place)
    b.box((0, top - 0.025, 0.02), (half, 0.025, half), material)
    for x in (-0.9 * half, 0.9 * half):
        b.box((x, 0.5 * top, 0.02 + 0.9 * half), (0.02, 0.5 * top - 0.02, 0.02), material)
        b.box((x, 0.9 * top, 0.02 - 0.95 * half), (0.02, 0.9 * top, 0.02), material)
    b.box((0, 1.65 * top, 0.02 - 0.95 * half), (half, 0.12 * top, 0.015), material)
