"""Intricate things for the foreground: their silhouettes have thin parts and holes.

Every thing stands on the floor around the middle of its pose and is `h` metres high. The thinnest
parts are about a hundredth of its height, so that small pictures still show them.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxpercept.data.scenes import furniture
from jaxpercept.data.scenes.builder import CYLINDER, ELLIPSOID, Builder, Place, cone
from jaxpercept.data.scenes.palette import (
    Draws,
    Material,
    Number,
    fabric,
    metal,
    paint,
    picture,
    rotation,
    wood,
)
from jaxpercept.data.scenes.strokes import Point, bar, limb, ring, spokes


class Shape(NamedTuple):
    """A row of the table: how likely, how high, half its width as a share of the height, how far
    it may be turned from facing the camera, and what builds it."""

    weight: Number
    low: Number
    high: Number
    half: Number
    turn: Number
    build: Callable[..., None]  # (builder, draws, place, height)


def frame(draws: Draws) -> Material:
    return wood(draws) if draws.chance(0.4) else paint(draws, vivid=True)


def chair(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    w, d = draws.between(0.42, 0.52) * h, draws.between(0.42, 0.52) * h
    furniture.chair(b, draws, place.at(0, 0, -0.5 * d), w, h, d)


def lamp(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    w = draws.between(0.25, 0.36) * h
    furniture.lamp(b, draws, place.at(0, 0, -0.5 * w), w, h, w)


def stool(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    material = frame(draws)
    b.begin("stool", material.word, h, place)
    top, foot, level = 0.16 * h, draws.between(0.2, 0.28) * h, draws.between(0.2, 0.5) * h
    b.cylinder(0, 0.94 * h, 0, 0.24 * h, 0.06 * h, fabric(draws) if draws.chance(0.4) else material)
    for x, z in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        bar(b, (x * foot, 0, z * foot), (x * top, 0.95 * h, z * top), 0.018 * h, material)
    part = foot + (top - foot) * level / (0.95 * h)
    for side in (-1, 1):
        bar(b, (-part, level, side * part), (part, level, side * part), 0.012 * h, material)
        bar(b, (side * part, level, -part), (side * part, level, part), 0.012 * h, material)


def wheel(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    tyre = paint(draws, "black" if draws.chance(0.4) else None, vivid=True)
    b.begin("wheel", tyre.word, h, place)
    thick = draws.between(0.02, 0.04) * h
    _wheel(b, draws, tyre, 0.5 * h, thick, draws.whole(3, 6))


def _wheel(
    b: Builder, draws: Draws, tyre: Material, radius: Number, thick: Number, count: int,
    x: Number = 0.0,
) -> None:  # fmt: skip
    rim = metal(draws)
    centre = (x, radius, 0.0)
    ring(b, centre, radius - thick, thick, tyre, count=16)
    spokes(b, centre, radius - thick, 0.02 * radius, rim, count)
    b.box(centre, (0.1 * radius, 0.1 * radius, 0.12 * radius), rim)


def bicycle(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    body, black = paint(draws, vivid=True, gloss=0.4), paint(draws, "black")
    b.begin("bicycle", body.word, h, place)
    radius, thick = draws.between(0.32, 0.36) * h, 0.017 * h
    rear, front = -0.5 * h, 0.52 * h
    for x in (rear, front):
        _wheel(b, draws, black, radius, draws.between(0.016, 0.024) * h, 3, x)
    pedal, seat = (-0.08 * h, 0.3 * h, 0.0), (-0.22 * h, 0.78 * h, 0.0)
    head, neck = (0.36 * h, 0.86 * h, 0.0), (0.39 * h, 0.72 * h, 0.0)
    low = draws.between(0.0, 0.3)  # how far the upper tube sinks
    below = (seat[0] + low * (pedal[0] - seat[0]), seat[1] + low * (pedal[1] - seat[1]), 0.0)
    for start, end in (
        ((rear, radius, 0), pedal), ((rear, radius, 0), below), (pedal, seat), (pedal, neck),
        (below, (0.37 * h, 0.8 * h, 0)), ((front, radius, 0), head),
    ):  # fmt: skip
        bar(b, start, end, thick, body)
    wide = draws.between(0.2, 0.3) * h
    bar(b, (0.34 * h, 0.95 * h, -wide), (0.34 * h, 0.95 * h, wide), 0.014 * h, black)
    bar(b, head, (0.34 * h, 0.96 * h, 0), 0.014 * h, black)
    b.box((seat[0], 0.82 * h, 0), (0.13 * h, 0.03 * h, 0.06 * h), black, quadric=ELLIPSOID)
    b.box(pedal, (0.02 * h, 0.1 * h, 0.07 * h), metal(draws), tilt=rotation(0.4))


def ladder(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    material = frame(draws)
    b.begin("ladder", material.word, h, place)
    foot, top = draws.between(0.18, 0.28) * h, draws.between(0.1, 0.17) * h
    depth, thick = draws.between(0.15, 0.3) * h, draws.between(0.012, 0.02) * h
    count = draws.whole(3, 6)
    for z in (-depth, depth):
        for side in (-1, 1):
            bar(b, (side * foot, 0, z), (side * top, h, 0.03 * h * z / depth), thick, material,
                wide=1.4 * thick)  # fmt: skip
    for number in range(1, count + 1):
        part = number / (count + 1)
        x, z = foot + (top - foot) * part, depth * (1 - part)
        b.box((0, part * h, z), (x, thick, 1.8 * thick), material)
        if number == 1:
            b.box((0, part * h, -z), (x, 0.8 * thick, 0.8 * thick), material)
    b.box((0, h, 0), (1.1 * top, thick, 0.08 * h), material)


def fence(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    material = frame(draws)
    b.begin("fence", material.word, h, place)
    half, thick = draws.between(0.45, 0.65) * h, draws.between(0.011, 0.017) * h
    for x in (-half, half):
        b.box((x, 0.5 * h, 0), (2 * thick, 0.5 * h, 2 * thick), material)
        b.box((x, 0.015 * h, 0), (2.5 * thick, 0.015 * h, 0.14 * h), material)
    low, high = 0.14 * h, 0.9 * h
    for y in (low, high):
        b.box((0, y, 0), (half, 1.4 * thick, thick), material)
    if draws.chance(0.5):  # pickets
        count, over = draws.whole(5, 9), draws.pick((0.0, 0.08)) * h
        for number in range(count):
            x = (2 * (number + 1) / (count + 1) - 1) * half
            b.box((x, 0.5 * (low + high), thick), (draws.pick((1.0, 2.0)) * thick,
                  0.5 * (high - low) + over, 0.7 * thick), material)  # fmt: skip
        return
    count, wide, tall = draws.whole(4, 6), 2 * half, high - low
    for number in range(1, count):  # a lattice of two families of slanting bars
        away = number * (wide + tall) / count
        start = (max(0.0, away - tall), min(away, tall))
        end = (min(away, wide), max(0.0, away - wide))
        for side in (-1, 1):
            bar(b, (side * (start[0] - half), low + start[1], 0),
                (side * (end[0] - half), low + end[1], 0), 0.8 * thick, material)  # fmt: skip


def cage(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    wire, thick = paint(draws, vivid=True, gloss=0.4), 0.009 * h
    b.begin("cage", wire.word, h, place)
    radius, count = draws.between(0.24, 0.32) * h, draws.whole(9, 12)
    shoulder, top = draws.between(0.5, 0.65) * h, draws.between(0.82, 0.9) * h
    b.cylinder(0, 0, 0, 1.06 * radius, 0.06 * h, wood(draws) if draws.chance(0.5) else wire)
    for number in range(count):
        cos, sin = rotation((number + 0.5) * 6.2831853 / count)
        x, z = radius * cos, radius * sin
        bar(b, (x, 0.05 * h, z), (x, shoulder, z), thick, wire)
        bar(b, (x, shoulder, z), (0, top, 0), thick, wire)
    ring(b, (0, shoulder, 0), radius, thick, wire, count=count, lying=True)
    ring(b, (0, 0.5 * (top + h), 0), 0.45 * (h - top), thick, wire, count=6)
    if draws.chance(0.6):
        bird = paint(draws, vivid=True)
        y, size = draws.between(0.25, 0.45) * h, 0.07 * h
        bar(b, (-radius, y - size, 0), (radius, y - size, 0), thick, wire)
        b.box((0, y, 0), (1.5 * size, size, size), bird, quadric=ELLIPSOID)
        b.box((1.2 * size, y + size, 0), (0.6 * size,) * 3, bird, quadric=ELLIPSOID)


def plant(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    pot, bark = paint(draws, vivid=True), wood(draws)
    b.begin("plant", "green", h, place)
    leaves = [fabric(draws, "green") for _ in range(2)]
    pot_top, crown = draws.between(0.18, 0.28) * h, draws.between(0.5, 0.7) * h
    b.cylinder(0, 0, 0, draws.between(0.1, 0.14) * h, pot_top, pot, cone(1.35))
    bar(b, (0, 0.9 * pot_top, 0), (draws.between(-0.05, 0.05) * h, crown, 0), 0.016 * h, bark)
    count = draws.whole(5, 8)
    for number in range(count):
        cos, sin = rotation((number + 0.7 * draws.next()) * 6.2831853 / count)
        low = pot_top + (crown - pot_top) * draws.between(0.35, 1.0)
        out, up = draws.between(0.12, 0.3) * h, draws.between(0.05, 0.3) * h
        tip: Point = (out * cos, min(low + up, 0.93 * h), out * sin)
        bar(b, (0, low, 0), tip, 0.01 * h, bark)
        size = draws.between(0.06, 0.11) * h
        b.box(tip, (0.55 * size, 1.0 * size, 0.2 * size), draws.pick(leaves), quadric=ELLIPSOID,
              turn=(cos, sin), tilt=rotation(draws.between(-1.0, 1.0)))  # fmt: skip
        if draws.chance(0.6):
            part = draws.between(0.4, 0.7)
            b.box((part * tip[0], low + part * (tip[1] - low) + 0.5 * size, part * tip[2]),
                  (0.4 * size, 0.8 * size, 0.2 * size), draws.pick(leaves), quadric=ELLIPSOID,
                  turn=(sin, cos), tilt=rotation(draws.between(-1.0, 1.0)))  # fmt: skip


def rack(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    material = metal(draws) if draws.chance(0.5) else frame(draws)
    b.begin("rack", material.word, h, place)
    half, thick, top = draws.between(0.32, 0.45) * h, 0.012 * h, 0.985 * h
    for x in (-half, half):
        b.box((x, 0.5 * h, 0), (thick, 0.5 * h, thick), material)
        b.box((x, thick, 0), (thick, thick, 0.2 * h), material)
    for y in (top, draws.between(0.1, 0.25) * h):
        b.box((0, y, 0), (half, thick, thick), material)
    count = draws.whole(2, 4)
    for number in range(count):
        x = (2 * (number + draws.between(0.3, 0.7)) / count - 1) * half
        cos, sin = rotation(draws.between(0.5, 1.4))
        reach, drop = draws.between(0.13, 0.18) * h, 0.1 * h
        left, right = ((x + side * reach * cos, top - drop, side * reach * sin) for side in (-1, 1))
        for start, end in ((left, (x, top - 0.03 * h, 0)), (right, (x, top - 0.03 * h, 0)),
                           (left, right)):  # fmt: skip
            bar(b, start, end, 0.009 * h, material)
        bar(b, (x, top - 0.04 * h, 0), (x, top, 0), 0.009 * h, material)
        if draws.chance(0.4):
            long = draws.between(0.15, 0.3) * h
            b.box((x, top - drop - long, 0), (0.8 * reach, long, 0.012 * h), fabric(draws),
                  turn=(cos, -sin))  # fmt: skip


def easel(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    legs, thick = wood(draws), draws.between(0.012, 0.018) * h
    b.begin("easel", legs.word, h, place)
    foot = draws.between(0.22, 0.3) * h
    for side in (-1, 1):
        bar(b, (side * foot, 0, 0.1 * h), (side * 0.05 * h, h, -0.05 * h), thick, legs)
    bar(b, (0, 0, -0.3 * h), (0, 0.95 * h, -0.07 * h), thick, legs)
    tray = draws.between(0.35, 0.5) * h
    b.box((0, tray, 0.07 * h), (0.26 * h, thick, 0.04 * h), legs)
    if draws.chance(0.7):
        half = (draws.between(0.17, 0.25) * h, draws.between(0.15, 0.22) * h)
        art = picture(draws)
        b.box((0, tray + half[1] + thick, 0.05 * h), (*half, 0.012 * h), paint(draws, "white"),
              front=art, tilt=rotation(-0.12))  # fmt: skip


def fan(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    body, blade = paint(draws, vivid=True), paint(draws, vivid=True)
    b.begin("fan", body.word, h, place)
    radius, thick = draws.between(0.2, 0.28) * h, 0.01 * h
    centre = (0.0, h - radius - thick, 0.06 * h)
    b.cylinder(0, 0, 0, draws.between(0.14, 0.2) * h, 0.03 * h, body)
    b.cylinder(0, 0.02 * h, 0, 0.018 * h, centre[1] - 0.02 * h, body)
    b.box(centre, (0.045 * h, 0.045 * h, 0.08 * h), body)
    ring(b, centre, radius, 1.4 * thick, body, count=16)
    if draws.chance(0.5):
        spokes(b, (0.0, centre[1], 0.12 * h), radius, 0.7 * thick, body, draws.whole(2, 4))
    count = draws.whole(3, 5)
    for number in range(count):
        cos, sin = rotation(number * 6.2831853 / count + 0.2)
        inner, outer = 0.1 * radius, 0.9 * radius
        bar(b, (inner * cos, centre[1] + inner * sin, centre[2]),
            (outer * cos, centre[1] + outer * sin, centre[2]), 0.26 * radius, blade,
            wide=0.02 * h, quadric=ELLIPSOID)  # fmt: skip


def stand(b: Builder, draws: Draws, place: Place, h: Number) -> None:
    """A coat stand."""
    material = frame(draws)
    b.begin("stand", material.word, h, place)
    thick = draws.between(0.013, 0.02) * h
    limb(b, (0, 0.08 * h, 0), (0, h, 0), thick, 0.8 * thick, material)
    feet, hooks = draws.whole(3, 4), draws.whole(4, 6)
    for number in range(feet):
        cos, sin = rotation((number + 0.2) * 6.2831853 / feet)
        bar(b, (0.2 * h * cos, 0.01 * h, 0.2 * h * sin), (0, 0.16 * h, 0), 0.013 * h, material)
    for number in range(hooks):
        cos, sin = rotation((number + 0.4) * 6.2831853 / hooks)
        y = draws.between(0.78, 0.92) * h
        out = draws.between(0.1, 0.15) * h
        tip: Point = (out * cos, y + 0.06 * h, out * sin)
        bar(b, (0, y, 0), tip, 0.01 * h, material)
        b.box(tip, (0.018 * h,) * 3, material, quadric=ELLIPSOID)
    if draws.chance(0.5):
        cloth = fabric(draws)
        b.box((0.13 * h, 0.68 * h, 0.02 * h), (0.08 * h, 0.17 * h, 0.03 * h), cloth,
              quadric=(1.3, 1.0, 1.0, 0.0, -1.0))  # fmt: skip
    if draws.chance(0.4):
        b.cylinder(-0.1 * h, 0.86 * h, 0, 0.09 * h, 0.015 * h, paint(draws), CYLINDER)


SHAPES = {
    "chair": Shape(1.5, 0.82, 1.1, 0.33, 3.2, chair),
    "lamp": Shape(0.8, 1.0, 1.7, 0.18, 3.2, lamp),
    "stool": Shape(1.0, 0.6, 0.9, 0.3, 3.2, stool),
    "wheel": Shape(1.2, 0.6, 1.0, 0.5, 0.9, wheel),
    "bicycle": Shape(1.3, 0.85, 1.1, 0.9, 0.7, bicycle),
    "ladder": Shape(1.0, 0.9, 1.7, 0.28, 3.2, ladder),
    "fence": Shape(1.0, 0.8, 1.3, 0.65, 0.7, fence),
    "cage": Shape(1.0, 0.7, 1.2, 0.33, 3.2, cage),
    "plant": Shape(1.5, 0.8, 1.5, 0.36, 3.2, plant),
    "rack": Shape(1.0, 1.1, 1.6, 0.46, 0.8, rack),
    "easel": Shape(1.0, 1.0, 1.6, 0.3, 0.8, easel),
    "fan": Shape(1.0, 0.8, 1.3, 0.28, 0.7, fan),
    "stand": Shape(1.0, 1.3, 1.8, 0.22, 3.2, stand),
}
