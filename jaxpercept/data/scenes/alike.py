"""Draws a plain room with several things of the same kinds and colours, small ones and large ones.

What tells one from the others is its size and where it is; `relations.py` says so.
"""

from jaxpercept.data.scenes.builder import ELLIPSOID, Place, cone, footprint
from jaxpercept.data.scenes.palette import COLOURS, Material, Number, rotation, scaled, tint
from jaxpercept.data.scenes.plain import PlainRoom
from jaxpercept.data.scenes.textures import TILE

# Colours and forms that a picture of 96 x 128 pixels shows plainly: few, so that each of the words
# is in many of the phrases from which a model is to learn it.
WORDS = ("red", "green", "blue", "yellow")
KINDS = ("box", "ball", "cone")


class AlikeRoom(PlainRoom):
    """A room with three to five boxes, balls and cones of few kinds and colours."""

    def _size(self) -> tuple[Number, Number, Number]:
        draws = self.draws
        return draws.between(3.2, 5.0), draws.between(2.3, 3.0), draws.between(4.0, 6.0)

    def furnish(self) -> None:
        draws = self.draws
        self.kinds = self._some(list(KINDS), draws.whole(2, 3))
        # On a wall or a floor of its own colour a thing would hardly be seen.
        words = [word for word in WORDS if word not in (self.wall.word, self.ground.word)]
        self.words = self._some(words, draws.whole(2, min(3, len(words))))
        wanted = draws.whole(3, 5)
        for _ in range(5 * wanted):
            if len(self.b.things) >= wanted:
                break
            self._stand(self.spot_in_view(1.6, 3.0))
        self.lights = self.ceiling_lights()

    def _some(self, options: list[str], count: int) -> list[str]:
        chosen: list[str] = []
        for _ in range(count):
            chosen.append(self.draws.pick([o for o in options if o not in chosen]))
        return chosen

    def _one_of(self, options: list[str]) -> str:
        """The first is the likeliest."""
        last = len(options) - 1
        return options[min(self.draws.whole(0, last), self.draws.whole(0, last))]

    def _stand(self, spot: Place) -> None:
        """One thing on the floor, where there is room for it, and perhaps a small one on it."""
        draws, kind = self.draws, self._one_of(self.kinds)
        width = draws.between(0.4, 0.5) if draws.chance(0.4) else draws.between(0.7, 0.95)
        shape = draws.weighted({"even": 5, "tall": 2, "flat": 1.5})
        height = width
        if kind != "ball" and shape == "tall":
            width, height = 0.8 * width, width * draws.between(1.4, 1.8)
        elif kind != "ball" and shape == "flat":
            height = width * draws.between(0.45, 0.65)
        area = footprint(spot, 0.55 * width, 0.55 * width)
        if not self.free(area, height, 0.1):
            return
        self.taken.append(area)
        self._build(kind, spot, width, height)
        if kind == "box" and shape != "tall" and width > 0.5 and draws.chance(0.7):
            below, size = len(self.b.things), draws.between(0.32, 0.42)
            top = spot.at(0, height, 0)
            self._build(draws.pick(self.kinds), top, size, size, on="box", below=below)

    def _paint(self, word: str) -> Material:
        """Lacquer in one of the first two shades of a colour, which are the plainest."""
        draws = self.draws
        base = tint(draws, draws.pick(COLOURS[word][:2]))
        gloss = draws.between(0.0, 0.3)
        return Material(word, TILE["flat"], base, scaled(base, 0.8), base, 0.6, 0.6, gloss=gloss)

    def _build(
        self, kind: str, place: Place, width: Number, height: Number, on: str = "floor",
        below: int = 0,
    ) -> None:  # fmt: skip
        word = self._one_of(self.words)
        b, material, half = self.b, self._paint(word), 0.5 * width
        b.begin(kind, word, height, place, on)
        b.things[-1] = b.things[-1]._replace(width=width, below=below)
        if kind == "box":
            turn = rotation(self.draws.between(-0.7, 0.7))
            b.box((0, 0.5 * height, 0), (half, 0.5 * height, half), material, turn=turn)
        elif kind == "ball":
            b.cylinder(0, 0, 0, half, height, material, ELLIPSOID)
        else:
            b.cylinder(0, 0, 0, half, height, material, cone(0.0))
