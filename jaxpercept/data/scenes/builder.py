"""Collects convex solids with materials while furniture is put together."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpercept.data.scenes.palette import Material, Number
from jaxpercept.data.scenes.raster import Solids

CLASSES = (
    "wall", "floor", "ceiling", "bed", "sofa", "armchair", "chair", "table", "desk", "cabinet",
    "shelf", "counter", "fridge", "oven", "lamp", "television", "monitor", "box", "ball",
    "cylinder", "cone", "vase", "plant", "book", "cup", "bottle", "bowl", "bag", "bin", "stool",
    "pillow", "rug", "picture", "mirror", "window", "door", "curtain", "clock", "toilet", "sink",
    "bathtub", "radiator", "doorway", "person", "wheel", "bicycle", "ladder", "fence", "cage",
    "rack", "easel", "fan", "stand", "broom",
)  # fmt: skip
CLASS = {name: number for number, name in enumerate(CLASSES)}

NO_QUADRIC = (1.0, 0.0, 0.0, 0.0, 0.0)  # (scale of the radii, used, k2, k1, k0)
CYLINDER = (1.0, 1.0, 0.0, 0.0, -1.0)
ELLIPSOID = (1.0, 1.0, 1.0, 0.0, -1.0)


def cone(top: Number) -> tuple[Number, ...]:
    """A frustum whose upper radius is `top` times the lower one (0 <= top), in its box."""
    wide = max(1.0, top)
    mean, slope = 0.5 * (1.0 + top) / wide, 0.5 * (top - 1.0) / wide
    return (1.0, 1.0, -slope * slope, -2.0 * mean * slope, -mean * mean)


def rounded(scale: Number) -> tuple[Number, ...]:
    """A box cut by the ellipsoid of `scale` times its half extents: 1 ellipsoid ... 1.7 box."""
    return (scale, 1.0, 1.0, 0.0, -1.0)


class Place(NamedTuple):
    """A pose on the floor plan: local x and z directions are (cos, -sin) and (sin, cos)."""

    x: Number
    y: Number
    z: Number
    cos: Number
    sin: Number

    def at(self, x: Number, y: Number, z: Number) -> "Place":
        return Place(self.x + self.cos * x + self.sin * z, self.y + y,
                     self.z - self.sin * x + self.cos * z, self.cos, self.sin)  # fmt: skip

    def turned(self, cos: Number, sin: Number) -> "Place":
        return self._replace(
            cos=self.cos * cos - self.sin * sin, sin=self.sin * cos + self.cos * sin
        )


class Thing(NamedTuple):
    """One object of the scene; its instance id is its position in `Builder.things` + 1."""

    kind: str  # a name in CLASSES
    word: str  # colour word, "" where it has none
    height: Number  # metres
    on: str  # what it stands on: "floor", "wall", or the class of the thing below it
    width: Number = 0.0  # metres, where anybody asks for it
    below: int = 0  # instance id of the thing that it stands on, likewise


class Surface(NamedTuple):
    """A horizontal rectangle that can carry things: its pose is its centre."""

    place: Place
    half_x: Number
    half_z: Number
    kind: str
    room: Number  # free height above it


class Parts(NamedTuple):
    """The finished scene geometry in world coordinates."""

    solids: Solids
    material: Int[np.ndarray, "n 7"]  # per face
    instance: Int[np.ndarray, " n"]
    inward: int  # how many of the first solids are seen from inside (room, recesses)


class Builder:
    """Boxes, cylinders and ellipsoids in the pose of the thing being built."""

    def __init__(self):
        self.rows: list[tuple[Number, ...]] = []
        self.materials: list[Material] = []
        self.things: list[Thing] = []
        self.surfaces: list[Surface] = []
        self.place = Place(0.0, 0.0, 0.0, 1.0, 0.0)
        self.against_wall = False  # whether the thing being built may hang parts on a wall
        self._numbers: dict[int, int] = {}

    def begin(self, kind: str, word: str, height: Number, place: Place, on: str = "floor") -> None:
        self.things.append(Thing(kind, word, height, on))
        self.place = place

    def number(self, material: Material) -> int:
        known = self._numbers.get(id(material))
        if known is None:
            known = self._numbers[id(material)] = len(self.materials)
            self.materials.append(material)  # also keeps the object, and so its id, alive
        return known

    def box(
        self,
        centre: tuple[Number, Number, Number],
        half: tuple[Number, Number, Number],
        material: Material,
        *,
        front: Material | None = None,
        back: Material | None = None,
        top: Material | None = None,
        bottom: Material | None = None,
        structure: bool = False,
        turn: tuple[Number, Number] | None = None,
        tilt: tuple[Number, Number] = (1.0, 0.0),
        quadric: tuple[Number, ...] = NO_QUADRIC,
    ) -> None:
        """A box (or what `quadric` leaves of it); turn = (cos, sin) about y, tilt about local x.

        A positive tilt leans the upper end towards +z. `structure` belongs to no object.
        """
        (x, y, z), (px, py, pz, cos, sin) = centre, self.place
        px, py, pz = px + cos * x + sin * z, py + y, pz - sin * x + cos * z
        if turn:
            turn_cos, turn_sin = turn
            cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
        body = self.number(material)
        self.rows.append(
            (px, py, pz, *half, cos, sin, *tilt, *quadric, body,
             body if front is None else self.number(front),
             body if top is None else self.number(top),
             body if back is None else self.number(back),
             body if bottom is None else self.number(bottom), 0 if structure else len(self.things))
        )  # fmt: skip

    def cylinder(self, x, y0, z, radius, height, material, quadric=CYLINDER, radius_z=None) -> None:
        """A vertical cylinder, cone or ellipsoid that stands at height y0."""
        half = (radius, 0.5 * height, radius_z or radius)
        self.box((x, y0 + 0.5 * height, z), half, material, quadric=quadric)

    def surface(self, x, y, z, half_x, half_z, kind, room=1.0) -> None:
        self.surfaces.append(Surface(self.place.at(x, y, z), half_x, half_z, kind, room))

    def finish(self, inward: int) -> Parts:
        rows = np.array(self.rows)
        count = len(rows)
        cos, sin, tilt_cos, tilt_sin = rows[:, 6:10].T
        axes = np.zeros((count, 3, 3))
        axes[:, 0, 0], axes[:, 0, 2] = cos, -sin
        axes[:, 1, 0], axes[:, 1, 1], axes[:, 1, 2] = tilt_sin * sin, tilt_cos, tilt_sin * cos
        axes[:, 2, 0], axes[:, 2, 1], axes[:, 2, 2] = tilt_cos * sin, -tilt_sin, tilt_cos * cos
        radii = rows[:, 3:6] * rows[:, 10:11]
        half = rows[:, 3:6].copy()
        # The box around a cylinder must not touch it, else its sides would show as facets.
        half[:, 0::2] *= np.where((rows[:, 11] > 0) & (rows[:, 10] == 1.0), 1.01, 1.0)[:, None]
        material = np.repeat(rows[:, 15:16].astype(np.int32), 7, axis=1)
        material[:, 5] = rows[:, 16]
        material[:, 3] = rows[:, 17]
        material[:, 4] = rows[:, 18]
        material[:, 2] = rows[:, 19]
        solids = Solids(rows[:, :3], axes, half, radii, rows[:, 11:15])
        return Parts(solids, material, rows[:, 20].astype(np.int32), inward)


def footprint(
    place: Place, half_x: Number, half_z: Number
) -> tuple[Number, Number, Number, Number]:
    """Axis-aligned bounds (x0, x1, z0, z1) of a turned rectangle centred at `place`."""
    wide = abs(place.cos) * half_x + abs(place.sin) * half_z
    deep = abs(place.sin) * half_x + abs(place.cos) * half_z
    return place.x - wide, place.x + wide, place.z - deep, place.z + deep


def overlaps(a: tuple[Number, ...], b: tuple[Number, ...], gap: Number = 0.0) -> bool:
    return (
        a[0] < b[1] + gap and b[0] < a[1] + gap and a[2] < b[3] + gap and b[2] < a[3] + gap
    )  # fmt: skip


def ground_map(parts: Parts, size: tuple[Number, Number], cells: int) -> Float[np.ndarray, "z x"]:
    """How much of the floor each cell has covered closely from above: 1 under things on it."""
    cover = np.zeros((cells, cells), np.float32)
    centre, half = parts.solids.centre, parts.solids.half
    reach = np.abs(parts.solids.axes) * half[:, :, None]
    reach = reach[:, 0] + reach[:, 1] + reach[:, 2]
    low, high = centre - reach, centre + reach
    kept = np.flatnonzero(low[:, 1] < 0.5)
    kept = kept[np.searchsorted(kept, parts.inward) :]
    scale = (cells / size[0], cells / size[1])
    index = np.empty((len(kept), 4), np.int64)
    for at, bound in ((0, low), (1, high)):
        index[:, at] = np.clip(bound[kept, 0] * scale[0] + 0.5, 0, cells)
        index[:, at + 2] = np.clip(bound[kept, 2] * scale[1] + 0.5, 0, cells)
    weight = 1.0 / (1.0 + 6.0 * np.maximum(low[kept, 1], 0.0))
    for (x0, x1, z0, z1), strength in zip(index.tolist(), weight.tolist(), strict=True):
        part = cover[z0:z1, x0:x1]
        np.maximum(part, strength, out=part)
    return cover
