"""What a scene is before it is rendered, and which furniture each kind of room holds."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpercept.data.scenes.builder import Builder
from jaxpercept.data.scenes.palette import Number

# Along the walls and in the middle of each kind of room: furniture and how likely it is.
ROOMS: dict[str, tuple[Number, dict[str, Number], dict[str, Number]]] = {
    "bedroom": (5, {"bed": 4, "nightstand": 3, "cabinet": 2.5, "wardrobe": 2, "desk": 1.2,
                    "shelf": 1.2, "chair": 1, "lamp": 1, "armchair": 0.6, "television": 0.5},
                {"bed": 2.5, "chair": 1, "prop": 2}),
    "living room": (5, {"sofa": 4, "armchair": 2, "television": 2, "shelf": 2.5, "cabinet": 2,
                        "lamp": 1.5, "chair": 0.8, "desk": 0.6, "wardrobe": 0.4},
                    {"coffee": 3, "armchair": 1.5, "sofa": 1.5, "prop": 1.5, "table": 0.7}),
    "kitchen": (4, {"counter": 6, "fridge": 2, "oven": 1.5, "cabinet": 1, "table": 0.5,
                    "shelf": 0.7},
                {"table": 2, "chair": 2, "counter": 1.5, "prop": 1}),
    "dining room": (2.5, {"cabinet": 3, "shelf": 1.5, "chair": 1.5, "lamp": 0.7, "television": 0.4},
                    {"dining": 5, "chair": 1.5, "prop": 1}),
    "office": (3.5, {"desk": 4, "shelf": 3, "cabinet": 2.5, "chair": 1, "table": 1,
                     "wardrobe": 0.7},
               {"desk": 1.5, "chair": 3, "table": 1.5, "prop": 1.5}),
    "bathroom": (1.8, {"sink": 3, "toilet": 2.5, "bathtub": 1.5, "cabinet": 1, "oven": 0.7},
                 {"prop": 1.5, "chair": 0.2}),
    "corridor": (0.8, {"cabinet": 1.5, "shelf": 1, "chair": 1, "wardrobe": 0.7, "lamp": 0.4},
                 {"prop": 1}),
    "storage room": (1.2, {"shelf": 4, "cabinet": 2, "wardrobe": 1, "table": 1, "fridge": 0.4},
                     {"prop": 4, "table": 1, "chair": 0.6}),
}  # fmt: skip


class Camera(NamedTuple):
    """World position, rows right/up/forward, focal length and centre in units of the width."""

    position: tuple[float, float, float]
    right: tuple[float, float, float]
    up: tuple[float, float, float]
    forward: tuple[float, float, float]
    focal: float
    shift: tuple[float, float]


class Light(NamedTuple):
    position: tuple[float, float, float]
    colour: tuple[float, float, float]
    falloff: float  # metres at which inverse-square falloff begins


class Strands(NamedTuple):
    """n hairs or blades: quadratic curves in world coordinates that taper towards their tip."""

    root: Float[np.ndarray, "n 3"]
    bend: Float[np.ndarray, "n 3"]  # the middle control point
    tip: Float[np.ndarray, "n 3"]
    radius: Float[np.ndarray, " n"]  # at the root, metres


class Matter(NamedTuple):
    """How a matte's subject is made; its solids are the last ones of the scene."""

    first: int  # number of its first solid
    shells: int  # so many of them only colour the strands
    soft: list[tuple[str, float]]  # then so many let light through: how, and how opaque
    strands: Strands


class Subject(NamedTuple):
    """What a picture is about."""

    instance: int
    joints: Float[np.ndarray, "17 4"] | None = None  # x, y, z in the world; reach to the skin
    matter: Matter | None = None


class Layout(NamedTuple):
    """A scene before it is rendered."""

    kind: str
    builder: Builder
    size: tuple[float, float, float]  # x, height, z
    camera: Camera
    lights: list[Light]  # the first casts shadows
    ambient: tuple[float, float, float]
    recess_walls: list[int]  # room face each recess opens on
    recess_light: list[float]  # how bright each recess is within
    wall_word: str
    floor_word: str
    subject: Subject | None = None
