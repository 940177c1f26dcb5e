"""Furniture from convex solids: local x along the wall, y up, z away from the wall (back at 0).

Each kind has a size drawn first (for the floor plan) and a function that builds it within
[-w/2, w/2] x [0, h] x [0, d] in the builder's current pose.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxpercept.data.scenes.builder import CYLINDER, ELLIPSOID, Builder, Place, cone, rounded
from jaxpercept.data.scenes.palette import (
    Draws,
    Material,
    Number,
    clutter,
    fabric,
    front,
    light_panel,
    metal,
    paint,
    picture,
    rotation,
    scaled,
    stone,
    wood,
)


class Kind(NamedTuple):
    """A row of the furniture table: class name, size range (w, h, d) and what builds it."""

    name: str
    low: tuple[Number, Number, Number]
    high: tuple[Number, Number, Number]
    build: Callable[..., None]


def body(draws: Draws) -> Material:
    return wood(draws) if draws.chance(0.6) else paint(draws)


def _legs(b: Builder, w: Number, h: Number, d: Number, thick: Number, material: Material) -> None:
    t, x, z = 0.5 * thick, 0.5 * (w - thick), d - 0.5 * thick
    for cx, cz in ((-x, t), (x, t), (-x, z), (x, z)):
        b.box((cx, 0.5 * h, cz), (t, 0.5 * h, t), material)


def bed(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    frame, cover, pillow = body(draws), fabric(draws), fabric(draws, vivid=draws.chance(0.4))
    b.begin("bed", cover.word, h, place)
    low = draws.between(0.12, 0.25)
    b.box((0, low, 0.5 * d), (0.5 * w, 0.6 * low, 0.5 * d), frame)
    soft = rounded(draws.between(1.38, 1.6))
    sheet = fabric(draws, "white") if draws.chance(0.5) else cover
    b.box((0, 0.5 * (h + low), 0.5 * d), (0.49 * w, 0.5 * (h - low), 0.49 * d), sheet, quadric=soft)
    top = draws.between(0.3, 0.7)
    reach = 0.5 * (1 - 0.3 * top) * d
    b.box((0, 0.5 * h + 0.08, d - reach + 0.03), (0.51 * w, 0.5 * h - 0.06, reach), cover,
          quadric=rounded(1.45))  # fmt: skip
    if draws.chance(0.75):
        tall = draws.between(0.2, 0.7)
        b.box((0, 0.5 * (h + tall), 0.03), (0.51 * w, 0.5 * (h + tall), 0.03), frame)
    count = 2 if w > 1.3 else 1
    for number in range(count):
        x = (number - 0.5 * (count - 1)) * 0.48 * w
        b.box((x, h + 0.1, 0.28), (0.2 * w if count > 1 else 0.32 * w, 0.09, 0.22), pillow,
              tilt=rotation(-draws.between(0, 0.6)), quadric=rounded(1.12))  # fmt: skip
        if draws.chance(0.3):
            b.box((x * 0.8, h + 0.16, 0.48), (0.2, 0.2, 0.07), fabric(draws),
                  tilt=rotation(-0.5), quadric=rounded(1.15))  # fmt: skip
    b.surface(0, h, 0.65 * d, 0.3 * w, 0.25 * d, "bed", 0.6)


def sofa(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    cloth = fabric(draws, vivid=draws.chance(0.6))
    if draws.chance(0.2):
        cloth = paint(draws, gloss=0.3)
    b.begin("sofa" if w > 1.2 else "armchair", cloth.word, h, place)
    arm, seat, soft = draws.between(0.12, 0.22), draws.between(0.36, 0.46), rounded(1.45)
    b.box((0, 0.5 * seat - 0.05, 0.5 * d), (0.5 * w, 0.5 * seat - 0.06, 0.48 * d), cloth)
    b.box(
        (0, 0.5 * h, 0.14),
        (0.5 * w, 0.5 * h, 0.13),
        cloth,
        tilt=rotation(-0.12),
        quadric=rounded(1.5),
    )
    high = seat + draws.between(0.1, 0.25)
    for x in (-0.5 * (w - arm), 0.5 * (w - arm)):
        b.box(
            (x, 0.5 * high, 0.52 * d),
            (0.5 * arm, 0.5 * high, 0.48 * d),
            cloth,
            quadric=rounded(1.5),
        )
    count = max(1, round((w - 2 * arm) / 0.65))
    wide = (w - 2 * arm) / count
    for number in range(count):
        x = (number - 0.5 * (count - 1)) * wide
        b.box((x, seat, 0.55 * d), (0.49 * wide, 0.09, 0.44 * d), cloth, quadric=soft)
        b.box((x, seat + 0.26, 0.33), (0.48 * wide, 0.24, 0.09), cloth,
              tilt=rotation(-0.25), quadric=rounded(1.4))  # fmt: skip
        if draws.chance(0.35):
            b.box((x, seat + 0.24, 0.48), (0.2, 0.19, 0.07), fabric(draws), tilt=rotation(-0.4),
                  turn=rotation(draws.between(-0.4, 0.4)), quadric=rounded(1.2))  # fmt: skip


def chair(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    frame = wood(draws) if draws.chance(0.65) else paint(draws, vivid=True)
    seat_material = fabric(draws) if draws.chance(0.4) else frame
    b.begin("chair", frame.word, h, place)
    seat, thick = draws.between(0.42, 0.5), draws.between(0.03, 0.05)
    if draws.chance(0.25):  # a swivel chair
        cloth = paint(draws, draws.pick(("black", "black", "blue", "grey", "red")), gloss=0.05)
        b.cylinder(0, 0.05, 0.5 * d, 0.03, seat - 0.05, cloth)
        for turn in (rotation(0.0), rotation(1.2566), rotation(2.5133)):
            b.box((0, 0.05, 0.5 * d), (0.28, 0.025, 0.03), cloth, turn=turn)
        b.box((0, seat, 0.55 * d), (0.5 * w, 0.05, 0.42 * d), cloth, quadric=rounded(1.3))
        b.box((0, 0.5 * (h + seat) + 0.08, 0.06), (0.46 * w, 0.5 * (h - seat), 0.04), cloth,
              tilt=rotation(-0.15), quadric=rounded(1.25))  # fmt: skip
        return
    _legs(b, w, seat, d, thick, frame)
    b.box((0, seat, 0.5 * d), (0.5 * w, 0.025, 0.5 * d), seat_material)
    t = 0.5 * thick
    lean = rotation(-draws.between(0.0, 0.18))
    middle, reach = 0.5 * (h + seat), 0.5 * (h - seat)
    if draws.chance(0.4):
        b.box((0, middle + 0.05, t), (0.46 * w, reach - 0.05, t), seat_material, tilt=lean)
        return
    for x in (-0.5 * w + t, 0.5 * w - t):
        b.box((x, middle, t), (t, reach, t), frame, tilt=lean)
    if draws.chance(0.5):
        for level in (0.45, 0.9):
            b.box((0, seat + 2 * reach * level, t), (0.5 * w, 0.06, 0.6 * t), frame, tilt=lean)
    else:
        b.box((0, h - 0.05, t), (0.5 * w, 0.05, 0.7 * t), frame, tilt=lean)
        for number in (-1, 0, 1):
            b.box((number * 0.22 * w, middle, t), (0.02, reach, 0.4 * t), frame, tilt=lean)


def table(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    top = wood(draws) if draws.chance(0.7) else paint(draws)
    frame = top if draws.chance(0.6) else metal(draws)
    b.begin("table", top.word, h, place)
    thick = draws.between(0.02, 0.06)
    if draws.chance(0.2):
        b.cylinder(0, h - thick, 0.5 * d, 0.5 * w, thick, top, radius_z=0.5 * d)
        b.cylinder(0, 0, 0.5 * d, 0.06, h - thick, frame)
        b.cylinder(0, 0, 0.5 * d, 0.3 * w, 0.04, frame, radius_z=0.3 * d)
    else:
        b.box((0, h - 0.5 * thick, 0.5 * d), (0.5 * w, 0.5 * thick, 0.5 * d), top)
        inset = draws.pick((0.0, 0.04))
        b.box((0, h - thick - 0.04, 0.5 * d), (0.46 * w, 0.04, 0.44 * d), frame)
        place = b.place
        b.place = place.at(0, 0, inset)
        _legs(b, w - 2 * inset, h - thick, d - 2 * inset, draws.between(0.04, 0.09), frame)
        b.place = place
    b.surface(0, h, 0.5 * d, 0.42 * w, 0.42 * d, "table")


def desk(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    top = body(draws)
    b.begin("desk", top.word, h, place)
    b.box((0, h - 0.02, 0.5 * d), (0.5 * w, 0.02, 0.5 * d), top)
    side = draws.between(0.3, 0.45) if draws.chance(0.6) else 0.03
    b.box((0.5 * (w - side), 0.5 * h - 0.02, 0.48 * d), (0.5 * side, 0.5 * h - 0.02, 0.47 * d), top,
          front=front(draws, top, "drawers"))  # fmt: skip
    b.box((-0.5 * w + 0.02, 0.5 * h - 0.02, 0.48 * d), (0.02, 0.5 * h - 0.02, 0.47 * d), top)
    if draws.chance(0.5):
        b.box((0, 0.6 * h, 0.05), (0.5 * w, 0.3 * h, 0.015), top)
    b.surface(0, h, 0.45 * d, 0.45 * w, 0.38 * d, "desk")


def cabinet(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    shell = body(draws)
    tile = draws.pick(("panel", "drawers", "drawers", "cupboards"))
    across = max(1.0, round(w / (0.9 if tile == "panel" else 1.4)))
    face = front(draws, shell, tile, across if tile != "drawers" else max(1.0, round(w / 0.7)),
                 1.0 if h < 1.3 else 2.0 if tile == "drawers" else 1.0)  # fmt: skip
    b.begin("cabinet", shell.word, h, place)
    foot = draws.pick((0.0, 0.06, 0.12))
    if foot:
        b.box((0, 0.5 * foot, 0.48 * d), (0.47 * w, 0.5 * foot, 0.46 * d), scaled_down(shell))
    b.box((0, 0.5 * (h + foot), 0.5 * d), (0.5 * w, 0.5 * (h - foot), 0.5 * d), shell, front=face)
    if draws.chance(0.5):
        lid = stone(draws) if draws.chance(0.2) else shell
        b.box((0, h, 0.5 * d), (0.5 * w + 0.02, 0.015, 0.5 * d + 0.02), lid)
    if h < 1.5:
        b.surface(0, h + 0.012, 0.5 * d, 0.45 * w, 0.4 * d, "cabinet")


def scaled_down(material: Material) -> Material:
    return material._replace(first=scaled(material.first, 0.4), second=scaled(material.second, 0.4))


def shelf(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    shell = body(draws)
    b.begin("shelf", shell.word, h, place)
    t, count = 0.015, max(2, round(h / draws.between(0.3, 0.45)))
    for x in (-0.5 * w + t, 0.5 * w - t):
        b.box((x, 0.5 * h, 0.5 * d), (t, 0.5 * h, 0.5 * d), shell)
    if draws.chance(0.8):
        b.box((0, 0.5 * h, 0.01), (0.5 * w, 0.5 * h, 0.01), scaled_down(shell))
    gap = h / count
    full = draws.between(0.3, 1.0)
    for number in range(count + 1):
        y = min(number * gap + t, h - t)
        b.box((0, y, 0.5 * d), (0.5 * w - 2 * t, t, 0.5 * d), shell)
        if number < count and draws.chance(full):
            left, right = -0.5 * w + 2 * t, 0.5 * w - 2 * t
            if draws.chance(0.4):
                left, right = (left, left + (right - left) * draws.between(0.3, 0.9))
            kind = "books" if draws.chance(0.7) else "clutter"
            tall, deep = gap * draws.between(0.55, 0.85), d * draws.between(0.3, 0.45)
            goods = clutter(draws, kind)
            b.box((0.5 * (left + right), y + t + 0.5 * tall, deep + 0.01),
                  (0.5 * (right - left), 0.5 * tall, deep), goods,
                  front=goods._replace(fit=True, size_u=max(1.0, round((right - left) / 0.7)),
                                       size_v=1.0))  # fmt: skip


def counter(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    shell = body(draws)
    top = stone(draws) if draws.chance(0.8) else wood(draws)
    b.begin("counter", top.word, h, place)
    face = front(draws, shell, draws.pick(("cupboards", "panel")), max(1.0, round(w / 1.2)))
    b.box((0, 0.05, 0.46 * d), (0.5 * w, 0.05, 0.44 * d), scaled_down(shell))
    b.box((0, 0.5 * h + 0.03, 0.48 * d), (0.5 * w, 0.5 * h - 0.05, 0.48 * d), shell, front=face)
    b.box((0, h, 0.5 * d), (0.5 * w + 0.01, 0.02, 0.5 * d + 0.01), top)
    if b.against_wall and draws.chance(0.5):
        b.box((0, h + 0.25, 0.006), (0.5 * w, 0.25, 0.006), stone(draws))
    if draws.chance(0.4):
        x = draws.between(-0.3, 0.3) * w
        b.box((x, 0.5 * h, d - 0.02), (0.29, 0.47 * h, 0.03), metal(draws),
              front=front(draws, metal(draws), "oven"))  # fmt: skip
    if b.against_wall and draws.chance(0.6):
        low, high, deep = h + draws.between(0.45, 0.6), h + draws.between(1.05, 1.35), 0.34
        b.box((0, 0.5 * (low + high), 0.5 * deep), (0.5 * w, 0.5 * (high - low), 0.5 * deep), shell,
              front=face)  # fmt: skip
        b.surface(0, h + 0.02, 0.55 * d, 0.46 * w, 0.35 * d, "counter", 0.45)
    else:
        b.surface(0, h + 0.02, 0.5 * d, 0.46 * w, 0.4 * d, "counter")


def fridge(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    shell = metal(draws) if draws.chance(0.4) else paint(draws, "white", gloss=0.3)
    b.begin("fridge", shell.word, h, place)
    b.box((0, 0.5 * h, 0.46 * d), (0.5 * w, 0.5 * h, 0.46 * d), shell)
    split = draws.between(0.35, 0.7) * h
    for low, high in ((0.04, split - 0.005), (split + 0.005, h)):
        b.box((0, 0.5 * (low + high), 0.95 * d), (0.5 * w, 0.5 * (high - low), 0.05 * d), shell)
        b.box((0.42 * w, 0.5 * (low + high), d + 0.02), (0.012, 0.15, 0.02), scaled_down(shell))


def oven(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    shell = paint(draws, draws.pick(("white", "black", "grey")), gloss=0.4)
    b.begin("oven", shell.word, h, place)
    b.box((0, 0.5 * h, 0.5 * d), (0.5 * w, 0.5 * h, 0.5 * d), shell,
          front=front(draws, shell, "oven"),
          top=paint(draws, draws.pick(("black", "white"))))  # fmt: skip
    if draws.chance(0.4):
        b.box((0, h + 0.08, 0.04), (0.5 * w, 0.08, 0.04), shell)
    b.surface(0, h, 0.5 * d, 0.4 * w, 0.35 * d, "oven", 0.5)


def lamp(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    pole = metal(draws)
    shade = light_panel(draws, "flat", draws.pick((0.0, 0.6, 1.2)))
    b.begin("lamp", shade.word, h, place)
    tall = draws.between(0.18, 0.35) * min(1.0, 0.6 + 0.4 * h)
    b.cylinder(0, 0, 0.5 * d, 0.4 * w, 0.03, pole)
    if h < 0.8 and draws.chance(0.5):
        foot = paint(draws, vivid=True)
        b.cylinder(0, 0.02, 0.5 * d, 0.28 * w, h - tall, foot, ELLIPSOID)
    else:
        b.cylinder(0, 0, 0.5 * d, 0.014 + 0.02 * (h < 0.8), h - 0.5 * tall, pole)
    b.cylinder(0, h - tall, 0.5 * d, 0.5 * w, tall, shade, cone(draws.between(0.4, 0.9)))


def television(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    stand, tall = body(draws), draws.between(0.35, 0.6)
    b.begin("cabinet", stand.word, tall, place)
    face = front(draws, stand, draws.pick(("panel", "cupboards", "drawers")), 2.0)
    b.box((0, 0.5 * tall, 0.5 * d), (0.5 * w, 0.5 * tall, 0.5 * d), stand, front=face)
    b.surface(0.36 * w, tall, 0.5 * d, 0.1 * w, 0.3 * d, "cabinet")
    wide = min(0.46 * w, 0.6) * draws.between(0.75, 1.0)
    b.begin("television", "black", 1.2 * wide, place.at(0, tall, 0.5 * d), "cabinet")
    screen(b, draws, wide)


def screen(b: Builder, draws: Draws, half: Number) -> None:
    """A television or monitor that stands at the origin, `half` its half width."""
    case = paint(draws, draws.pick(("black", "black", "grey")), gloss=0.5)
    glass = picture(draws, "screen")._replace(
        first=scaled(case.first, 0.6), second=case.first, third=(0.3, 0.34, 0.4), gloss=0.6,
        glow=draws.pick((0.0, 0.0, 0.3)),
    )  # fmt: skip
    if draws.chance(0.3):
        glass = picture(draws)._replace(glow=0.8)
    thick = draws.pick((0.02, 0.03, 0.7 * half))
    b.box((0, 0.02, 0), (0.35 * half, 0.02, 0.3 * half), case)
    b.box((0, 0.08, -0.01), (0.06, 0.08, 0.02), case)
    b.box((0, 0.1 + 0.6 * half, 0), (half, 0.6 * half, thick), case, front=glass)


def toilet(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    china = paint(draws, "white", gloss=0.5)
    b.begin("toilet", "white", h, place)
    b.box((0, 0.5 * (h + 0.38), 0.1), (0.5 * w, 0.5 * (h - 0.38), 0.1), china, quadric=rounded(1.6))
    b.cylinder(0, 0, 0.6 * d, 0.3 * w, 0.34, china, cone(1.3), radius_z=0.28 * d)
    b.cylinder(0, 0.34, 0.58 * d, 0.46 * w, 0.07, china, CYLINDER, radius_z=0.4 * d)


def bathtub(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    china = paint(draws, "white", gloss=0.5)
    b.begin("bathtub", "white", h, place)
    t = 0.05
    b.box((0, 0.5 * h - t, 0.5 * d), (0.5 * w, 0.5 * h - t, 0.5 * d), china)
    for z in (t, d - t):
        b.box((0, 0.5 * h, z), (0.5 * w, 0.5 * h, t), china)
    for x in (-0.5 * w + t, 0.5 * w - t):
        b.box((x, 0.5 * h, 0.5 * d), (t, 0.5 * h, 0.5 * d), china)


def sink(b: Builder, draws: Draws, place: Place, w: Number, h: Number, d: Number) -> None:
    china = paint(draws, "white", gloss=0.5)
    shell = body(draws)
    b.begin("sink", "white", h, place)
    b.box((0, 0.5 * h - 0.05, 0.45 * d), (0.48 * w, 0.5 * h - 0.05, 0.45 * d), shell,
          front=front(draws, shell, "panel"))  # fmt: skip
    b.box((0, h - 0.04, 0.5 * d), (0.5 * w, 0.04, 0.5 * d), china)
    b.cylinder(0, h - 0.04, 0.55 * d, 0.3 * w, 0.09, china, cone(1.2), radius_z=0.3 * d)
    b.box((0, h + 0.12, 0.08), (0.015, 0.1, 0.015), metal(draws))
    b.surface(0.36 * w, h, 0.5 * d, 0.1 * w, 0.3 * d, "sink", 0.4)


KINDS = {
    "bed": Kind("bed", (0.95, 0.42, 1.9), (2.0, 0.65, 2.2), bed),
    "sofa": Kind("sofa", (1.4, 0.75, 0.8), (2.4, 0.95, 1.0), sofa),
    "armchair": Kind("armchair", (0.7, 0.75, 0.75), (1.0, 1.0, 0.95), sofa),
    "chair": Kind("chair", (0.4, 0.82, 0.4), (0.52, 1.05, 0.52), chair),
    "table": Kind("table", (0.8, 0.7, 0.7), (1.9, 0.78, 1.1), table),
    "coffee": Kind("table", (0.6, 0.35, 0.5), (1.3, 0.5, 0.8), table),
    "desk": Kind("desk", (1.0, 0.7, 0.55), (1.8, 0.78, 0.8), desk),
    "cabinet": Kind("cabinet", (0.5, 0.6, 0.35), (1.6, 1.2, 0.6), cabinet),
    "nightstand": Kind("cabinet", (0.4, 0.45, 0.35), (0.6, 0.65, 0.5), cabinet),
    "wardrobe": Kind("cabinet", (0.8, 1.6, 0.45), (2.0, 2.3, 0.65), cabinet),
    "shelf": Kind("shelf", (0.6, 0.9, 0.25), (1.6, 2.2, 0.4), shelf),
    "counter": Kind("counter", (1.0, 0.85, 0.55), (2.8, 0.95, 0.7), counter),
    "fridge": Kind("fridge", (0.6, 1.5, 0.6), (0.95, 1.9, 0.8), fridge),
    "oven": Kind("oven", (0.55, 0.82, 0.55), (0.7, 0.95, 0.65), oven),
    "lamp": Kind("lamp", (0.3, 1.3, 0.3), (0.5, 1.8, 0.5), lamp),
    "television": Kind("cabinet", (1.0, 1.0, 0.4), (1.8, 1.2, 0.6), television),
    "toilet": Kind("toilet", (0.4, 0.75, 0.65), (0.48, 0.85, 0.75), toilet),
    "bathtub": Kind("bathtub", (1.4, 0.5, 0.7), (1.8, 0.6, 0.85), bathtub),
    "sink": Kind("sink", (0.5, 0.8, 0.45), (1.2, 0.88, 0.6), sink),
}
