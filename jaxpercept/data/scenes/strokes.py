"""Thin straight and round pieces: what legs, spokes, railings, branches and limbs are made of.

Points are in the builder's current pose. Directions come from quotients and square roots alone,
which every machine rounds alike.
"""

import math

from jaxpercept.data.scenes.builder import NO_QUADRIC, Builder, cone
from jaxpercept.data.scenes.palette import Material, Number, rotation

Point = tuple[Number, Number, Number]


def bar(
    b: Builder,
    start: Point,
    end: Point,
    thick: Number,
    material: Material,
    *,
    wide: Number | None = None,
    quadric: tuple[Number, ...] = NO_QUADRIC,
) -> None:
    """A square bar, or what `quadric` leaves of it, from `start` (its lower end) to `end`.

    `thick` is half its thickness; `wide` is half its width along the horizontal across it.
    """
    dx, dy, dz = end[0] - start[0], end[1] - start[1], end[2] - start[2]
    flat = math.sqrt(dx * dx + dz * dz)
    length = math.sqrt(flat * flat + dy * dy)
    turn = (dz / flat, dx / flat) if flat > 1e-9 else (1.0, 0.0)
    centre = (start[0] + 0.5 * dx, start[1] + 0.5 * dy, start[2] + 0.5 * dz)
    b.box(centre, (thick if wide is None else wide, 0.5 * length, thick), material,
          turn=turn, tilt=(dy / length, flat / length), quadric=quadric)  # fmt: skip


def limb(
    b: Builder, start: Point, end: Point, first: Number, last: Number, material: Material
) -> None:
    """A round bar whose radius goes from `first` to `last`."""
    bar(b, start, end, max(first, last), material, quadric=cone(last / first))


def ring(
    b: Builder,
    centre: Point,
    radius: Number,
    thick: Number,
    material: Material,
    *,
    count: int = 14,
    lying: bool = False,
) -> None:
    """A ring of `count` bars in the plane of x and y, or of x and z if `lying`."""
    x, y, z = centre
    corners = []
    for number in range(count):
        cos, sin = rotation(number * 2 * math.pi / count)
        across, along = radius * cos, radius * sin
        corners.append((x + across, y, z + along) if lying else (x + across, y + along, z))
    over = 0.6 * thick / radius  # closes the corners
    for (ax, ay, az), (bx, by, bz) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy, dz = over * (bx - ax), over * (by - ay), over * (bz - az)
        bar(b, (ax - dx, ay - dy, az - dz), (bx + dx, by + dy, bz + dz), thick, material)


def spokes(
    b: Builder, centre: Point, radius: Number, thick: Number, material: Material, count: int
) -> None:
    """`count` bars right across a ring in the plane of x and y."""
    x, y, z = centre
    for number in range(count):
        cos, sin = rotation((number + 0.3) * math.pi / count)
        dx, dy = radius * cos, radius * sin
        bar(b, (x - dx, y - dy, z), (x + dx, y + dy, z), thick, material)
