"""Draws a plain room: boxes, balls, cylinders and cones on the floor, pictures on the walls.

A few minutes of training on two CPU cores are enough to understand such rooms; furnished ones
take far longer.
"""

from jaxpercept.data.scenes.layout import FurnishedRoom
from jaxpercept.data.scenes.palette import Number

PRIMITIVES = {"box": 4, "ball": 2, "cylinder": 2, "cone": 1.5}


class PlainRoom(FurnishedRoom):
    """A room without furniture, seen from one of its ends."""

    openings = 0.0

    def _kind(self) -> str:
        return "room"

    def _size(self) -> tuple[Number, Number, Number]:
        draws = self.draws
        return draws.between(3.0, 6.0), draws.between(2.3, 3.0), draws.between(3.5, 9.0)

    def _aim(self) -> None:
        draws = self.draws
        share = draws.between(0.2, 0.8)
        yaw = (0.5 - share) * 1.1 + draws.middle(-0.75, 0.75)
        pitch, roll = draws.middle(-0.45, 0.08), draws.middle(-0.07, 0.07)
        self._look(share, draws.between(0.1, 0.5), draws.middle(1.0, 1.8), yaw, pitch, roll)

    def furnish(self) -> None:
        draws = self.draws
        for _ in range(draws.whole(2, 7)):
            self.floor_prop(self.spot_in_view(1.3, 6.0), (0.35, 1.1), PRIMITIVES)
        for face in self.facing():
            place, length = self.wall_place(face)
            if draws.chance(0.5):
                spot = place.at(draws.between(-0.4, 0.4) * length, draws.between(1.35, 1.75), 0)
                self._hang("picture", spot, self.size[1])
        self.lights = self.ceiling_lights()
