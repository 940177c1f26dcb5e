"""Rooms whose camera looks at one subject in the foreground, and the subjects they can show."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpercept.data.scenes import figure, props
from jaxpercept.data.scenes.builder import Builder, Place, footprint
from jaxpercept.data.scenes.layout import FurnishedRoom
from jaxpercept.data.scenes.objects import SHAPES
from jaxpercept.data.scenes.palette import Draws, Number, rotation
from jaxpercept.data.scenes.plain import PlainRoom
from jaxpercept.data.scenes.plan import Layout, Subject
from jaxpercept.data.scenes.soft import SOFT, Recorder

NOMINAL_FOCAL = 0.811  # of the picture's width
NOMINAL_ASPECT = 0.75
MAX_OTHERS = 34  # solids besides the subject's


class Act(NamedTuple):
    """A subject before it is built."""

    height: Number
    half: Number  # of its width
    part: tuple[Number, Number]  # share of the picture that it fills in height or width
    turn: Number  # away from facing the camera
    # Builds it at a place; what that gives completes it when the room is furnished.
    build: Callable[[Builder, Place], Callable[[], Subject]]


def _from_table(draws: Draws, table: dict[str, Any]) -> tuple[Any, Number, Number, Number]:
    """A row of a table of things, its height, half its width, how far it is turned."""
    row = table[draws.weighted({name: entry.weight for name, entry in table.items()})]
    height = draws.between(row.low, row.high)
    return row, height, row.half * height, draws.between(-row.turn, row.turn)


def _object(draws: Draws) -> Act:
    row, height, half, turn = _from_table(draws, SHAPES)

    def build(b: Builder, place: Place) -> Callable[[], Subject]:
        row.build(b, draws, place, height)
        subject = Subject(len(b.things))
        return lambda: subject

    return Act(height, half, (0.7, 1.0), turn, build)


def _matte(draws: Draws) -> Act:
    # A matte has its edges between the pixels, so opaque things are worth their while too.
    opaque = draws.chance(0.25)
    row, height, half, turn = _from_table(draws, SHAPES if opaque else SOFT)

    def build(b: Builder, place: Place) -> Callable[[], Subject]:
        recorder = Recorder(b)
        row.build(b if opaque else recorder, draws, place, height)
        recorder.end()
        instance = len(b.things)
        return lambda: Subject(instance, matter=recorder.finish())

    return Act(height, half, (0.7, 1.0), turn, build)


def _person(draws: Draws) -> Act:
    pose = figure.draw_pose(draws)
    facing = draws.weighted({"camera": 6, "aside": 2.5, "away": 2})
    turn = draws.middle(-0.9, 0.9)
    if facing == "aside":
        turn = draws.pick((-1, 1)) * draws.between(0.8, 2.2)
    elif facing == "away":
        turn += 3.14159

    def build(b: Builder, place: Place) -> Callable[[], Subject]:
        figure.build(b, draws, place, pose)
        subject = Subject(len(b.things), joints=figure.world_joints(pose, place))
        if pose.seat:
            figure.seat(b, draws, place, pose)
        return lambda: subject

    return Act(pose.height, 0.35, (0.65, 1.3), turn, build)


SUBJECTS: dict[str, Callable[[Draws], Act]] = {
    "object": _object,
    "matte": _matte,
    "person": _person,
}


class Staged:
    """What a room with a subject does otherwise; mixed into the rooms."""

    def __init__(self, draws: Draws, subject: str):
        self.act, self.is_person = SUBJECTS[subject](draws), subject == "person"
        super().__init__(draws)

    def _size(self) -> tuple[Number, Number, Number]:
        wide, high, deep = super()._size()
        return max(wide, 3.0), max(high, self.act.height + 0.3), max(deep, 4.2)

    def _aim(self) -> None:
        """Choose the subject's spot and a camera that sees it as large as drawn."""
        draws, act, (wide, high, deep) = self.draws, self.act, self.size
        part = draws.between(*act.part)
        tall = NOMINAL_FOCAL * act.height / (NOMINAL_ASPECT * part)
        broad = NOMINAL_FOCAL * 2.0 * act.half / part
        margin = act.half + 0.15
        away = min(max(tall, broad, 0.7) + 0.25 * act.half, deep - 0.3 - margin)
        share = draws.between(0.3, 0.7)
        yaw = (0.5 - share) * 0.9 + draws.middle(-0.3, 0.3)
        back = draws.between(0.15, max(0.2, deep - away - margin))
        eye = min(draws.middle(0.45, 1.15) * act.height + draws.between(0.0, 0.5), high - 0.3)
        slope = (0.5 * act.height - eye) / away
        # The arc tangent's series: near enough to aim by, and the same on every machine.
        pitch = slope * (1.0 - slope * slope * (1.0 / 3.0 - 0.2 * slope * slope))
        self._look(share, back, eye, yaw, pitch + draws.middle(-0.12, 0.12),
                   draws.middle(-0.08, 0.08))  # fmt: skip
        (cos, sin), (x, _, z) = self.yaw, self.camera.position
        side = draws.middle(-0.6, 0.6) * away * 0.5 / NOMINAL_FOCAL
        x, z = x + sin * away + cos * side, z + cos * away - sin * side
        x, z = min(max(x, margin), wide - margin), min(max(z, margin), deep - margin)
        self.spot = Place(x, 0.0, z, -cos, -sin).turned(*rotation(act.turn))
        self.away, _ = self.ahead(x, z)

    def _reserve(self) -> None:
        """Keep the floor under the subject and between it and the camera."""
        (x, _, z), half = self.camera.position, self.act.half
        for step in (1.0, 0.8, 0.6, 0.4, 0.2):
            spot = Place(x + step * (self.spot.x - x), 0, z + step * (self.spot.z - z), 1, 0)
            self.taken.append(footprint(spot, step * half + 0.05, step * half + 0.05))

    def furnish(self) -> None:
        self._reserve()
        start = len(self.b.rows)
        self.finish = self.act.build(self.b, self.spot)
        self.own = len(self.b.rows) - start
        if self.is_person and self.draws.chance(0.3):
            self._hide_a_part()
        super().furnish()

    def _hide_a_part(self) -> None:
        """A thing on the floor between the camera and the person."""
        draws, (x, _, z) = self.draws, self.camera.position
        step = draws.between(0.55, 0.75)
        side = draws.pick((-1, 1)) * draws.between(0.05, 0.45)
        cos, sin = self.yaw
        spot = Place(x + step * (self.spot.x - x) + side * cos, 0.0,
                     z + step * (self.spot.z - z) - side * sin, 1.0, 0.0)  # fmt: skip
        kind = draws.pick(("box", "bag", "bin", "stool", "plant", "ball"))
        props.prop(self.b, draws, kind, spot, draws.between(0.35, 0.65), "floor")

    def foreground(self) -> None:
        """Nothing cuts into the picture before the subject."""

    def floor_prop(self, spot: Place, sizes=(0.2, 0.55), kinds=props.ON_FLOOR) -> None:
        """Things behind the subject only, and smaller than it."""
        forward, _ = self.ahead(spot.x, spot.z)
        if forward > self.away + 0.7 * self.act.half + 0.1:
            super().floor_prop(spot, (sizes[0], min(sizes[1], 0.75)), kinds)

    @property
    def full(self) -> bool:
        return len(self.b.rows) - getattr(self, "own", 0) > MAX_OTHERS

    def compose(self) -> Layout:
        layout = super().compose()
        return layout._replace(subject=self.finish())


class StagedPlainRoom(Staged, PlainRoom):
    """A plain room with a subject."""


class StagedFurnishedRoom(Staged, FurnishedRoom):
    """A furnished room with a subject."""
