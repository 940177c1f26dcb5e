"""Things for the foreground that are partly transparent or made of hair.

Hair is drawn as strands, thinner than a pixel; a shell, a solid that is itself not drawn, gives
them colour. Glass, smoke and gauze are solids that let light through.
"""

import math

import numpy as np

from jaxpercept.data.scenes.builder import CYLINDER, ELLIPSOID, Builder, Place, cone
from jaxpercept.data.scenes.objects import Shape, frame
from jaxpercept.data.scenes.palette import (
    Draws,
    Material,
    Number,
    clutter,
    colour,
    fabric,
    paint,
    picture,
    scaled,
    wood,
)
from jaxpercept.data.scenes.plan import Matter, Strands
from jaxpercept.data.scenes.strokes import Point, bar, limb
from jaxpercept.data.scenes.textures import TILE

SHELL, OPAQUE = "shell", "opaque"


class Recorder:
    """Notes which of the solids built since its start are not opaque, and the strands."""

    def __init__(self, b: Builder):
        self.b, self.first = b, len(b.rows)
        self.roles: dict[int, tuple[str, Number]] = {}
        self.hairs: list[tuple[Number, ...]] = []
        self.last = self.first

    def mark(self, role: str, opacity: Number = 1.0) -> None:
        """The solid built last is a shell, or lets light through."""
        self.roles[len(self.b.rows) - 1] = (role, opacity)

    def hair(self, root: Point, bend: Point, tip: Point, radius: Number) -> None:
        """A strand between points in the builder's pose."""
        ends = [self.b.place.at(*point)[:3] for point in (root, bend, tip)]
        self.hairs.append((*ends[0], *ends[1], *ends[2], radius))

    def end(self) -> None:
        """Nothing built from now on is part of the subject."""
        self.last = len(self.b.rows)

    def finish(self) -> Matter:
        """Put the subject's solids behind all others of the scene: shells, soft, opaque ones."""
        rows, own = self.b.rows, range(self.first, self.last)
        shells = [n for n in own if self.roles.get(n, (OPAQUE,))[0] == SHELL]
        soft = [n for n in own if n in self.roles and n not in shells]
        opaque = [n for n in own if n not in self.roles]
        mine = [rows[n] for n in (*shells, *soft, *opaque)]
        self.b.rows = rows[: self.first] + rows[self.last :] + mine
        hairs = np.array(self.hairs).reshape(-1, 10)
        strands = Strands(hairs[:, 0:3], hairs[:, 3:6], hairs[:, 6:9], hairs[:, 9])
        first = len(self.b.rows) - len(mine)
        return Matter(first, len(shells), [self.roles[n] for n in soft], strands)


def hair_cloth(draws: Draws) -> Material:
    """Streaky or mottled: what strands look like from afar."""
    word, base = colour(draws)
    size = draws.between(0.1, 0.4)
    tile, shade = (
        TILE[draws.pick(("grain", "cloud", "wood"))],
        scaled(base, draws.between(0.4, 0.8)),
    )
    return Material(word, tile, base, shade, scaled(base, 1.3), size, size)


def _direction(draws: Draws) -> Point:
    """A random unit vector."""
    while True:
        x, y, z = (draws.between(-1.0, 1.0) for _ in range(3))
        square = x * x + y * y + z * z
        if 0.01 < square < 1.0:
            length = math.sqrt(square)
            return x / length, y / length, z / length


def _fur(m: Recorder, draws: Draws, centre: Point, radius: Number, long: Number) -> None:
    """Hair all around a ball that stands for itself."""
    x, y, z = centre
    droop, thick = draws.between(0.0, 0.9) * long, draws.between(0.002, 0.004)
    for _ in range(int(220 + 80 * draws.next())):
        (ux, uy, uz), (wx, wy, wz) = _direction(draws), _direction(draws)
        mine = long * draws.between(0.5, 1.0)
        a, c, curl = 0.93 * radius, radius + mine, 0.35 * mine
        d = radius + 0.6 * mine
        m.hair((x + a * ux, y + a * uy, z + a * uz), (x + d * ux, y + d * uy, z + d * uz),
               (x + c * ux + curl * wx, y + c * uy + curl * wy - droop, z + c * uz + curl * wz),
               thick)  # fmt: skip


def furry(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """A fur ball, or a body of fur with a head of fur."""
    b, coat = m.b, hair_cloth(draws)
    b.begin("ball", "furry", h, place)
    balls = [(0.36 * h, 0.5 * h)]
    if draws.chance(0.6):
        balls = [(0.27 * h, 0.34 * h), (0.19 * h, 0.74 * h)]
    for radius, y in balls:
        long = draws.between(0.15, 0.38) * radius
        b.cylinder(0, y - radius, 0, radius, 2 * radius, coat, ELLIPSOID)
        reach = radius + 1.9 * long
        b.cylinder(0, y - reach, 0, reach, 2 * reach, coat, ELLIPSOID)
        m.mark(SHELL)
        _fur(m, draws, (0, y, 0), radius, long)
    radius, y = balls[-1]
    if len(balls) > 1:
        dark = paint(draws, "black", gloss=0.5)
        for side in (-1, 1):
            b.box((side * 0.4 * radius, y + 0.2 * radius, 0.88 * radius), (0.13 * radius,) * 3,
                  dark, quadric=ELLIPSOID)  # fmt: skip
            b.box((side * 0.75 * radius, y + 0.8 * radius, 0), (0.3 * radius, 0.3 * radius,
                  0.15 * radius), coat, quadric=ELLIPSOID)  # fmt: skip


def grass(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """A tuft of long blades in a pot."""
    b, blade = m.b, fabric(draws, "green")
    blade = blade._replace(third=scaled(blade.first, 1.4), size_u=0.2, size_v=0.5)
    b.begin("plant", "green", h, place)
    top, radius = draws.between(0.2, 0.3) * h, draws.between(0.12, 0.18) * h
    b.cylinder(0, 0, 0, radius, top, paint(draws, vivid=True), cone(1.3))
    long, spread = h - top, draws.between(0.4, 1.0)
    b.cylinder(0, 0.6 * top, 0, 1.1 * long, 2.0 * long, blade, ELLIPSOID)
    m.mark(SHELL)
    thick = draws.between(0.003, 0.006)
    for _ in range(draws.whole(40, 110)):
        ux, _, uz = _direction(draws)
        mine = long * draws.between(0.6, 1.0)
        out = spread * mine * draws.between(0.3, 1.0)
        fall = draws.between(-0.1, 0.8) * out
        m.hair((0.8 * radius * ux, 0.97 * top, 0.8 * radius * uz),
               (0.45 * out * ux, top + 1.1 * mine, 0.45 * out * uz),
               (out * ux, top + max(mine - fall, -0.5 * top), out * uz), thick)  # fmt: skip


def broom(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """A broom or duster, its hair on top."""
    b, stick, coat = m.b, wood(draws), hair_cloth(draws)
    b.begin("broom", coat.word, h, place)
    low, long = 0.62 * h, 0.36 * h
    limb(b, (0, 0.02 * h, 0), (0, low, 0), 0.016 * h, 0.013 * h, stick)
    b.cylinder(0, 0, 0, 0.13 * h, 0.03 * h, stick)
    half = draws.between(0.02, 0.14) * h
    b.box((0, low, 0), (half + 0.02 * h, 0.03 * h, 0.03 * h), stick)
    flare, thick = draws.between(0.1, 0.9), draws.between(0.0025, 0.005)
    reach = half + (0.3 + flare) * long
    b.cylinder(0, low - 0.6 * long, 0, reach, 2.3 * long, coat, ELLIPSOID)
    m.mark(SHELL)
    for _ in range(draws.whole(60, 160)):
        ux, _, uz = _direction(draws)
        mine = long * draws.between(0.6, 1.0)
        x, out = half * draws.between(-1.0, 1.0), flare * mine * draws.next()
        fall = 0.8 * out * draws.next()
        m.hair((x, low, 0.02 * h * uz), (x + 0.4 * out * ux, low + 0.7 * mine, 0.4 * out * uz),
               (x + out * ux, low + mine - fall, out * uz), thick)  # fmt: skip


def vase(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """Flowers in a vase of glass."""
    b = m.b
    word, base = colour(draws, draws.pick(("blue", "green", "white", "grey", "purple", "orange")))
    glass = Material(word, TILE["flat"], base, scaled(base, 0.8), base, gloss=0.9)
    opacity = draws.between(0.2, 0.5)
    b.begin("vase", "glass", h, place)
    top, radius = draws.between(0.38, 0.5) * h, draws.between(0.12, 0.2) * h
    shape = draws.pick((ELLIPSOID, CYLINDER, cone(1.6), cone(0.6)))
    b.cylinder(0, 0, 0, radius, top, glass, shape)
    m.mark("glass", opacity)
    if shape == ELLIPSOID:
        b.cylinder(0, 0.85 * top, 0, 0.4 * radius, 0.25 * top, glass, cone(1.3))
        m.mark("glass", opacity)
    stem = fabric(draws, "green")
    for _ in range(draws.whole(3, 6)):
        ux, _, uz = _direction(draws)
        y, out = draws.between(0.7, 0.92) * h, draws.between(0.08, 0.3) * h
        bar(b, (-0.3 * radius * ux, 0.15 * top, -0.3 * radius * uz), (out * ux, y, out * uz),
            0.009 * h, stem)  # fmt: skip
        petal = paint(draws, draws.pick(("red", "yellow", "pink", "white", "purple", "orange")))
        size = draws.between(0.04, 0.08) * h
        b.box((out * ux, y, out * uz), (size, 0.7 * size, size), petal, quadric=ELLIPSOID)


def bottle(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    b = m.b
    word, base = colour(draws, draws.pick(("green", "blue", "brown", "white", "red")))
    glass = Material(word, TILE["flat"], base, scaled(base, 0.8), base, gloss=0.9)
    opacity, radius = draws.between(0.25, 0.6), draws.between(0.16, 0.24) * h
    b.begin("bottle", "glass", h, place)
    for y, tall, wide, shape in ((0.0, 0.55, radius, CYLINDER), (0.55, 0.2, radius, cone(0.3)),
                                 (0.75, 0.18, 0.3 * radius, CYLINDER)):  # fmt: skip
        b.cylinder(0, y * h, 0, wide, tall * h, glass, shape)
        m.mark("glass", opacity)
    b.cylinder(0, 0.92 * h, 0, 0.36 * radius, 0.08 * h, wood(draws))
    if draws.chance(0.6):
        b.box((0, 0.3 * h, 0.98 * radius), (0.5 * radius, 0.12 * h, 0.03 * radius), picture(draws))


def smoke(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """A ball of smoke over a bowl."""
    b = m.b
    word, base = colour(draws, draws.pick(("white", "grey", "blue", "pink", "black", "purple")))
    puff = Material(word, TILE["cloud"], base, scaled(base, 0.85), base, 0.5, 0.5)
    b.begin("ball", "smoky", h, place)
    foot = paint(draws, vivid=True)
    low, half = draws.between(0.15, 0.3) * h, draws.between(0.28, 0.4) * h
    b.cylinder(0, 0, 0, 0.09 * h, low, foot, cone(draws.between(0.5, 1.0)))
    b.cylinder(0, low, 0, 0.12 * h, 0.08 * h, foot, cone(1.7))
    b.cylinder(0, low + 0.02 * h, 0, half, 0.97 * h - low, puff, ELLIPSOID)
    m.mark("cloud", draws.between(0.75, 1.0))


def gauze(m: Recorder, draws: Draws, place: Place, h: Number) -> None:
    """A curtain of gauze in a frame."""
    b, posts = m.b, frame(draws)
    word, base = colour(draws)
    cloth = clutter(draws, "curtain")._replace(
        word=word, first=base, second=scaled(base, 0.6), third=base, size_u=0.5, size_v=2.0
    )
    b.begin("curtain", "sheer", h, place)
    half, thick = draws.between(0.3, 0.45) * h, 0.013 * h
    for x in (-half, half):
        b.box((x, 0.5 * h, 0), (thick, 0.5 * h, thick), posts)
        b.box((x, thick, 0), (thick, thick, 0.15 * h), posts)
    b.box((0, h - thick, 0), (half, thick, thick), posts)
    low, wide = draws.between(0.08, 0.3) * h, draws.between(0.5, 1.0) * half
    b.box((draws.pick((-1, 1)) * (half - wide), 0.5 * (low + h) - thick, 0),
          (wide, 0.5 * (h - low) - thick, 0.01 * h), cloth)  # fmt: skip
    m.mark("veil", draws.between(0.3, 0.75))


# As in `objects.SHAPES`; their builders take a recorder.
SOFT = {
    "furry": Shape(2.2, 0.6, 1.0, 0.42, 0.9, furry),
    "grass": Shape(2.0, 0.8, 1.3, 0.6, 3.2, grass),
    "broom": Shape(1.2, 1.0, 1.5, 0.3, 0.8, broom),
    "vase": Shape(1.5, 0.8, 1.2, 0.34, 3.2, vase),
    "bottle": Shape(0.8, 0.7, 1.0, 0.26, 0.8, bottle),
    "smoke": Shape(1.2, 0.8, 1.3, 0.4, 3.2, smoke),
    "gauze": Shape(1.0, 1.0, 1.5, 0.47, 0.7, gauze),
}
