"""Random draws, colours with names, and the materials made from them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpercept.data.scenes.textures import TILE, Number, linear

# Display colours (8 bit) behind each colour word that captions use.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "white": ((238, 236, 231), (246, 246, 243), (226, 227, 225), (232, 228, 216)),
    "beige": ((216, 199, 168), (224, 208, 180), (203, 185, 154), (190, 170, 138)),
    "grey": ((128, 128, 130), (160, 160, 160), (96, 98, 102), (186, 186, 184)),
    "black": ((24, 24, 26), (38, 36, 36), (48, 48, 52)),
    "brown": ((104, 68, 42), (126, 86, 56), (84, 56, 38), (146, 100, 66)),
    "red": ((176, 32, 34), (150, 44, 38), (206, 48, 44), (120, 28, 34)),
    "orange": ((222, 120, 44), (202, 104, 50), (232, 148, 76)),
    "yellow": ((228, 196, 72), (214, 178, 60), (238, 216, 128)),
    "green": ((60, 118, 62), (96, 140, 80), (44, 88, 66), (128, 154, 96)),
    "blue": ((44, 80, 152), (70, 112, 176), (36, 52, 104), (110, 150, 196)),
    "purple": ((104, 62, 128), (128, 92, 150), (84, 48, 92)),
    "pink": ((218, 132, 150), (232, 168, 176), (200, 100, 130)),
}
WALLS = (
    ("white", (236, 234, 228)), ("white", (226, 224, 216)), ("white", (242, 240, 236)),
    ("beige", (224, 212, 188)), ("beige", (206, 190, 160)), ("beige", (216, 196, 158)),
    ("grey", (186, 186, 184)), ("grey", (158, 162, 166)), ("yellow", (226, 208, 148)),
    ("green", (172, 184, 152)), ("green", (128, 146, 112)), ("blue", (164, 182, 200)),
    ("blue", (120, 142, 168)), ("pink", (220, 186, 178)), ("brown", (150, 118, 90)),
    ("red", (142, 66, 54)), ("orange", (210, 156, 104)), ("purple", (150, 138, 164)),
)  # fmt: skip
WOODS = (
    (150, 104, 66), (176, 128, 84), (112, 72, 44), (196, 156, 110), (86, 54, 36), (132, 80, 48),
    (208, 176, 134), (70, 44, 32), (160, 92, 52),
)  # fmt: skip
WINDOW_LIGHT = ((214, 232, 250), (250, 250, 246), (250, 238, 214))

_WORDS = tuple(COLOURS)

Colour = tuple[Number, Number, Number]


class Draws:
    """A stream of random numbers in [0, 1) that depends on (seed, index) only."""

    def __init__(self, seed: int, index: int):
        self._bits = np.random.Generator(np.random.Philox(key=[seed, index]))
        self.next = itertools.chain.from_iterable(self._blocks()).__next__

    def _blocks(self) -> Iterator[list[Number]]:
        while True:
            yield self._bits.random(512).tolist()

    def between(self, low: Number, high: Number) -> Number:
        return low + (high - low) * self.next()

    def middle(self, low: Number, high: Number) -> Number:
        """Between low and high, with the middle likelier (the mean of two draws)."""
        return low + (high - low) * 0.5 * (self.next() + self.next())

    def whole(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return low + int((high - low + 1) * self.next())

    def chance(self, probability: Number) -> bool:
        return self.next() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(len(options) * self.next())]

    def weighted(self, options: dict[str, Number]) -> str:
        left = sum(options.values()) * self.next()
        for name, weight in options.items():
            left -= weight
            if left < 0:
                return name
        return name


def rotation(angle: Number) -> tuple[Number, Number]:
    """(cos, sin) of an angle in radians, by exact arithmetic only.

    The half-angle tangent's series is cut at the fifth power within a quarter turn: the angle is
    off by less than 1e-4, but cos^2 + sin^2 = 1 to rounding, and every machine agrees.
    """
    turns = math.floor(angle / (0.5 * math.pi) + 0.5)
    half = 0.5 * (angle - turns * 0.5 * math.pi)
    tangent = half + half * half * half * (1.0 / 3.0 + half * half * (2.0 / 15.0))
    scale = 1.0 / (1.0 + tangent * tangent)
    cos, sin = (1.0 - tangent * tangent) * scale, 2.0 * tangent * scale
    for _ in range(turns % 4):
        cos, sin = -sin, cos
    return cos, sin


class Material(NamedTuple):
    """What a surface looks like: a tile of the atlas between three linear colours."""

    word: str  # how a caption calls the colour
    tile: int
    first: tuple[Number, Number, Number]
    second: tuple[Number, Number, Number]
    third: tuple[Number, Number, Number]
    size_u: Number = 1.0  # metres per tile, or tiles per face if `fit`
    size_v: Number = 1.0
    fit: bool = False
    turn: bool = False  # swap u and v
    gloss: Number = 0.0
    glow: Number = 0.0  # emitted light, as a multiple of the colour


def scaled(colour: Colour, factor: Number) -> Colour:
    red, green, blue = colour
    return min(1.0, factor * red), min(1.0, factor * green), min(1.0, factor * blue)


def tint(draws: Draws, rgb: tuple[int, int, int], spread: Number = 0.12) -> Colour:
    """The colour in linear light with a random brightness and a slight cast."""
    level, low, next_draw = draws.between(1 - 2 * spread, 1 + spread), 1 - spread, draws.next
    red, green, blue = linear(rgb)
    return (
        min(0.95, red * level * (low + 2 * spread * next_draw())),
        min(0.95, green * level * (low + 2 * spread * next_draw())),
        min(0.95, blue * level * (low + 2 * spread * next_draw())),
    )


def colour(draws: Draws, word: str | None = None) -> tuple[str, Colour]:
    word = word or draws.pick(_WORDS)
    return word, tint(draws, draws.pick(COLOURS[word]))


_NEUTRAL = {"white": 5, "beige": 4, "grey": 3, "black": 3, "brown": 4, "blue": 1.5, "red": 1.5,
            "green": 1.5, "yellow": 0.6, "orange": 0.5, "purple": 0.5, "pink": 0.5}  # fmt: skip
_VIVID = {"white": 3, "red": 3, "blue": 3, "green": 2.5, "yellow": 2, "orange": 1.5, "purple": 1.2,
          "pink": 1.2, "black": 2, "brown": 2, "grey": 1, "beige": 1}  # fmt: skip


def paint(draws: Draws, word: str | None = None, *, vivid: bool = False, gloss=None) -> Material:
    """Plain lacquer, plastic or plaster."""
    word, base = colour(draws, word or draws.weighted(_VIVID if vivid else _NEUTRAL))
    gloss = draws.between(0.0, 0.3) if gloss is None else gloss
    shade = scaled(base, draws.between(0.7, 0.95))
    return Material(word, TILE["flat"], base, shade, base, 0.6, 0.6, gloss=gloss)


def wood(draws: Draws, rgb: tuple[int, int, int] | None = None) -> Material:
    base = tint(draws, rgb or draws.pick(WOODS), 0.15)
    size = draws.between(0.5, 1.2)
    return Material("wooden", TILE["wood"], base, scaled(base, draws.between(0.35, 0.8)), base,
                    size, size, turn=draws.chance(0.5), gloss=draws.between(0.0, 0.35))  # fmt: skip


def front(draws: Draws, body: Material, tile: str, across: Number = 1.0, up: Number = 1.0):
    """A cabinet's front in the colour of its body: panels, drawers, doors."""
    dark = scaled(body.first, draws.between(0.2, 0.5))
    knob = dark if draws.chance(0.6) else scaled(body.first, 1.6)
    return body._replace(tile=TILE[tile], second=dark, third=knob, size_u=across, size_v=up,
                         fit=True, turn=False)  # fmt: skip


def fabric(draws: Draws, word: str | None = None, *, vivid: bool = True) -> Material:
    """Cloth: plain, or a pattern of two or three colours."""
    word, base = colour(draws, word or draws.weighted(_VIVID if vivid else _NEUTRAL))
    if draws.chance(0.45):
        tile, second, third = "folds", scaled(base, 0.45), scaled(base, 0.75)
        size = draws.between(0.6, 1.6)
    else:
        tile = draws.pick(("stripes", "bands", "dots", "plaid", "blobs", "checker", "cloud",
                           "grain", "weave"))  # fmt: skip
        close = draws.chance(0.4)
        second = scaled(base, 0.5) if close else colour(draws, draws.weighted(_NEUTRAL))[1]
        third = scaled(base, 1.5) if close else colour(draws, draws.weighted(_VIVID))[1]
        size = draws.between(0.15, 1.2)
    turn = draws.chance(0.5)
    return Material(word, TILE[tile], base, second, third, size, size, turn=turn)


def stone(draws: Draws) -> Material:
    word, base = colour(draws, draws.pick(("white", "beige", "grey", "black", "brown")))
    size = draws.between(0.3, 0.8)
    return Material(word, TILE[draws.pick(("speckle", "cloud"))], base, scaled(base, 0.6),
                    scaled(base, 1.5), size, size, gloss=draws.between(0.1, 0.5))  # fmt: skip


def metal(draws: Draws) -> Material:
    word = draws.pick(("grey", "grey", "black", "white"))
    return paint(draws, word, gloss=draws.between(0.4, 0.9))


def wall(draws: Draws) -> Material:
    word, rgb = draws.pick(WALLS)
    base = tint(draws, rgb, 0.06)
    plain = Material(word, TILE["flat"], base, scaled(base, draws.between(0.8, 1.0)),
                     base, 1.5, 1.5)  # fmt: skip
    kind = draws.weighted({"flat": 8, "paper": 1, "wood": 0.6, "bricks": 0.5, "tiles": 0.8})
    if kind == "paper":
        tile = draws.pick(("stripes", "blobs", "cloud", "dots", "plaid"))
        size = draws.between(0.4, 1.2)
        return plain._replace(tile=TILE[tile], second=scaled(base, draws.between(0.75, 0.95)),
                              third=scaled(base, draws.between(0.8, 1.1)),
                              size_u=size, size_v=size)  # fmt: skip
    if kind == "wood":
        rgb = tint(draws, draws.pick(WOODS))
        return plain._replace(word="wooden", tile=TILE["planks"], first=rgb,
                              second=scaled(rgb, 0.6), third=scaled(rgb, 0.25),
                              size_v=2.5)  # fmt: skip
    if kind == "bricks":
        word, rgb = colour(draws, draws.pick(("red", "brown", "white")))
        return plain._replace(word=word, tile=TILE["bricks"], first=rgb, second=scaled(rgb, 0.55),
                              third=colour(draws, "grey")[1], size_u=0.9, size_v=0.9)  # fmt: skip
    if kind == "tiles":
        size = draws.between(0.5, 1.2)
        return plain._replace(tile=TILE["tiles"], second=scaled(base, 0.85),
                              third=scaled(base, draws.pick((0.5, 1.3))), size_u=size, size_v=size,
                              gloss=draws.between(0.1, 0.5))  # fmt: skip
    return plain


def floor(draws: Draws) -> Material:
    kind = draws.weighted({"planks": 4, "carpet": 5, "tiles": 3, "parquet": 1, "plain": 1})
    if kind in ("planks", "parquet"):
        base = tint(draws, draws.pick(WOODS), 0.15)
        size = draws.between(0.8, 1.4)
        return Material("wooden", TILE[kind], base, scaled(base, draws.between(0.5, 0.8)),
                        scaled(base, 0.25), size, 2 * size if kind == "planks" else size,
                        turn=draws.chance(0.5), gloss=draws.between(0.05, 0.5))  # fmt: skip
    word = draws.weighted({"beige": 4, "grey": 4, "brown": 2, "white": 2, "blue": 0.7, "red": 0.5,
                           "green": 0.5, "black": 0.4})  # fmt: skip
    word, base = colour(draws, word)
    if kind == "tiles":
        size = draws.between(1.0, 2.2)
        tile = "checker" if draws.chance(0.15) else "tiles"
        return Material(word, TILE[tile], base, scaled(base, draws.between(0.6, 0.95)),
                        scaled(base, draws.pick((0.4, 0.6, 1.3))), size, size,
                        gloss=draws.between(0.1, 0.6))  # fmt: skip
    tile = draws.pick(("grain", "cloud", "grain", "weave")) if kind == "carpet" else "flat"
    size = draws.between(0.5, 1.5)
    return Material(word, TILE[tile], base, scaled(base, draws.between(0.55, 0.85)),
                    scaled(base, draws.between(0.8, 1.2)), size, size)  # fmt: skip


def light_panel(draws: Draws, tile: str, glow: Number) -> Material:
    """A window, lamp shade or ceiling light: it emits light of its own."""
    base = tint(draws, draws.pick(WINDOW_LIGHT), 0.05)
    view = colour(draws, draws.pick(("green", "grey", "blue", "brown")))[1]
    bars = colour(draws, draws.pick(("white", "white", "brown", "grey")))[1]
    if tile == "blinds":
        view = scaled(base, 0.35)
    return Material("white", TILE[tile], base, view, bars, fit=True, glow=glow)


def picture(draws: Draws, tile: str | None = None) -> Material:
    """A poster, painting or book cover: three unrelated colours."""
    words = [colour(draws, draws.weighted(_VIVID)) for _ in range(3)]
    tile = tile or draws.pick(("landscape", "poster", "clutter", "blobs", "landscape"))
    part = 0.5 if tile == "clutter" else 1.0
    return Material(words[0][0], TILE[tile], words[0][1], words[1][1], words[2][1],
                    size_u=part, size_v=part, fit=True, gloss=draws.between(0, 0.3))  # fmt: skip


def clutter(draws: Draws, tile: str) -> Material:
    """Rows of books or heaps of things, in metres."""
    words = [colour(draws, draws.weighted(_VIVID)) for _ in range(2)]
    dark = colour(draws, "black")[1] if tile == "books" else colour(draws)[1]
    size = draws.between(0.5, 1.0)
    return Material(words[0][0], TILE[tile], words[0][1], words[1][1], dark, size, size)
