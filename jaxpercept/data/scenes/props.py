"""Small things: clutter on tables and floors, plants, and what hangs on walls."""

from jaxpercept.data.scenes.builder import (
    CYLINDER,
    ELLIPSOID,
    Builder,
    Place,
    Surface,
    cone,
    rounded,
)
from jaxpercept.data.scenes.furniture import lamp, screen
from jaxpercept.data.scenes.palette import (
    Draws,
    Number,
    clutter,
    colour,
    fabric,
    light_panel,
    metal,
    paint,
    picture,
    rotation,
    scaled,
    wood,
)

ON_TABLE = {
    "box": 3, "book": 4, "cup": 3, "vase": 1.5, "monitor": 0, "bottle": 2.5, "bowl": 1.5,
    "ball": 0.7, "plant": 1, "lamp": 1, "bag": 0.7, "cylinder": 1, "cone": 0.4,
}  # fmt: skip
ON_FLOOR = {
    "box": 4, "bag": 2, "bin": 2, "ball": 1, "plant": 1.5, "stool": 1.5, "pillow": 1, "book": 0.7,
    "cylinder": 0.7, "cone": 0.5, "vase": 0.5,
}  # fmt: skip


def prop(b: Builder, draws: Draws, kind: str, place: Place, size: Number, on: str) -> None:
    """One small thing of about `size` metres at `place`; `on` is what it stands on."""
    place = place.turned(*rotation(draws.between(-3.1, 3.1)))
    if kind == "lamp":
        lamp(b, draws, place.at(0, 0, -0.15), 0.3, draws.between(0.4, 0.65), 0.3)
        b.things[-1] = b.things[-1]._replace(on=on)
        return
    if kind == "monitor":
        b.begin("monitor", "black", 0.45, place, on)
        screen(b, draws, draws.between(0.2, 0.3))
        return
    material = paint(draws, vivid=True)
    if kind in ("bag", "pillow"):
        material = fabric(draws)
    elif kind in ("box", "stool") and draws.chance(0.5):
        material = wood(draws) if draws.chance(0.5) else picture(draws)
    if kind == "box" and draws.chance(0.3):
        material = paint(draws, "brown")
    x, y, z = (size * draws.between(0.6, 1.3) for _ in range(3))
    b.begin(kind, material.word, y, place, on)
    if kind == "box":
        b.box((0, 0.4 * y, 0), (0.5 * x, 0.4 * y, 0.5 * z), material)
        if draws.chance(0.25):
            b.box((0, 0.8 * y + 0.01, 0), (0.52 * x, 0.02, 0.52 * z), material)
    elif kind == "book":
        for number in range(draws.whole(1, 4)):
            cover = picture(draws) if draws.chance(0.4) else paint(draws, vivid=True)
            b.box((0, 0.02 + 0.035 * number, 0), (0.13, 0.0165, 0.1), cover,
                  turn=rotation(draws.between(-0.4, 0.4)))  # fmt: skip
    elif kind == "cup":
        b.cylinder(0, 0, 0, 0.045, 0.1, material, cone(draws.between(0.9, 1.3)))
    elif kind == "bottle":
        b.cylinder(0, 0, 0, 0.04, 0.2, material)
        b.cylinder(0, 0.2, 0, 0.04, 0.06, material, cone(0.35))
        b.cylinder(0, 0.25, 0, 0.016, 0.05, material)
    elif kind == "bowl":
        b.cylinder(0, 0, 0, 0.14, 0.08, material, cone(1.9))
    elif kind == "ball":
        b.cylinder(0, 0, 0, 0.4 * x, 0.8 * x, material, ELLIPSOID)
    elif kind == "vase":
        b.cylinder(0, 0, 0, 0.3 * x, 0.9 * y, material, ELLIPSOID)
        b.cylinder(0, 0.8 * y, 0, 0.1 * x, 0.25 * y, material, cone(1.5))
    elif kind == "plant":
        leaves = [fabric(draws, "green")._replace(word="green") for _ in range(draws.whole(2, 5))]
        b.cylinder(0, 0, 0, 0.3 * x, 0.45 * y, material, cone(1.4))
        for leaf in leaves:
            part = 0.28 * draws.between(0.5, 1.2)
            centre = (draws.between(-0.3, 0.3) * x, y * draws.between(0.6, 1.2),
                      draws.between(-0.3, 0.3) * z)  # fmt: skip
            b.box(centre, (part * x, part * y, part * z), leaf, quadric=ELLIPSOID,
                  tilt=rotation(draws.between(-0.8, 0.8)))  # fmt: skip
    elif kind in ("bag", "pillow"):
        flat = 0.4 if kind == "pillow" else 1.0
        b.box((0, 0.5 * y * flat, 0), (0.5 * x, 0.5 * y * flat, 0.35 * z), material,
              quadric=rounded(draws.between(1.1, 1.4)))  # fmt: skip
    elif kind == "bin":
        b.cylinder(0, 0, 0, 0.35 * x, 0.9 * y, material, cone(draws.between(1.0, 1.4)))
    elif kind == "stool":
        b.cylinder(0, 0.42, 0, 0.18, 0.05, material)
        for cx, cz in ((-0.12, -0.12), (0.12, -0.12), (-0.12, 0.12), (0.12, 0.12)):
            b.cylinder(cx, 0, cz, 0.018, 0.43, material)
    else:
        b.cylinder(0, 0, 0, 0.35 * x, y, material, CYLINDER if kind == "cylinder" else cone(0.0))


def clutter_surface(b: Builder, draws: Draws, surface: Surface, count: int) -> None:
    """Put `count` things on a surface, side by side in random order."""
    if surface.kind == "desk" and draws.chance(0.7):
        prop(b, draws, "monitor", surface.place.at(0, 0, -0.3 * surface.half_z), 0.4, "desk")
        turn = surface.place
        b.place = turn
    for number in range(count):
        along = ((number + draws.next()) / count * 2 - 1) * surface.half_x
        across = draws.between(-1, 1) * surface.half_z
        kind = draws.weighted(ON_TABLE)
        if surface.kind == "bed":
            kind = draws.pick(("bag", "pillow", "book", "box"))
        size = min(draws.between(0.12, 0.38), surface.room * 0.7)
        prop(b, draws, kind, surface.place.at(along, 0, across), size, surface.kind)


def rug(b: Builder, draws: Draws, place: Place, half_x: Number, half_z: Number) -> None:
    cloth = fabric(draws)
    b.begin("rug", cloth.word, 0.01, place)
    if draws.chance(0.25):
        b.cylinder(0, 0, 0, half_x, 0.012, cloth, radius_z=half_z)
    else:
        b.box((0, 0.006, 0), (half_x, 0.006, half_z), cloth)


def picture_frame(b: Builder, draws: Draws, place: Place, half: tuple[Number, Number]) -> None:
    art = picture(draws)
    frame = wood(draws) if draws.chance(0.4) else paint(draws)
    kind = "picture"
    if draws.chance(0.12):
        kind, art = "mirror", light_panel(draws, "cloud", 0.25)._replace(word="", gloss=0.4)
    b.begin(kind, art.word, 2 * half[1], place, "wall")
    if draws.chance(0.75):
        edge = draws.between(0.02, 0.06)
        b.box((0, 0, 0.012), (half[0] + edge, half[1] + edge, 0.012), frame)
        b.box((0, 0, 0.015), (half[0], half[1], 0.012), frame, front=art)
    else:
        b.box((0, 0, 0.008), (*half, 0.008), art)


def door(b: Builder, draws: Draws, place: Place) -> None:
    leaf = wood(draws) if draws.chance(0.45) else paint(draws, "white")
    face = leaf._replace(tile=light_panel(draws, "door", 0).tile, fit=True, size_u=1, size_v=1,
                         second=scaled(leaf.first, 0.45),
                         third=scaled(leaf.first, 0.2))  # fmt: skip
    frame = leaf if draws.chance(0.5) else paint(draws, "white")
    wide, high = draws.between(0.38, 0.48), draws.between(1.98, 2.12)
    b.begin("door", leaf.word, high, place, "wall")
    b.box((0, 0.5 * high + 0.04, 0.015), (wide + 0.08, 0.5 * high + 0.04, 0.015), frame)
    if draws.chance(0.3):  # ajar
        b.place = place.at(-wide, 0, 0.03).turned(*rotation(-draws.between(0.2, 1.4)))
        b.box((wide, 0.5 * high, 0.0), (wide, 0.5 * high, 0.02), leaf, front=face, back=face)
    else:
        b.box((0, 0.5 * high, 0.025), (wide, 0.5 * high, 0.02), leaf, front=face)


def curtains(
    b: Builder, draws: Draws, place: Place, half: Number, low: Number, high: Number
) -> None:
    """Two curtains left and right of an opening `half` wide from `low` to `high`."""
    cloth = fabric(draws, vivid=draws.chance(0.5))
    folds = clutter(draws, "curtain")
    base = cloth.first
    cloth = folds._replace(word=cloth.word, first=base, second=scaled(base, 0.5), third=base,
                           size_u=0.8, size_v=2.0)  # fmt: skip
    b.begin("curtain", cloth.word, high - low, place, "wall")
    wide = draws.between(0.12, 0.3)
    for side in (-1, 1):
        b.box((side * (half + 0.3 * wide), 0.5 * (low + high), 0.06),
              (wide, 0.5 * (high - low), 0.04), cloth)  # fmt: skip
    b.box((0, high + 0.02, 0.06), (half + wide, 0.02, 0.02), metal(draws))


def wall_shelf(b: Builder, draws: Draws, place: Place, half: Number) -> None:
    board = wood(draws)
    b.begin("shelf", board.word, 0.3, place, "wall")
    b.box((0, 0, 0.12), (half, 0.015, 0.12), board)
    goods = clutter(draws, draws.pick(("books", "books", "clutter")))
    part = draws.between(0.3, 0.9) * half
    b.box((part - half, 0.13, 0.09), (part, 0.115, 0.08), goods,
          front=goods._replace(fit=True, size_u=1.0, size_v=1.0))  # fmt: skip


def radiator(b: Builder, draws: Draws, place: Place) -> None:
    white = colour(draws, "white")[1]
    shell = paint(draws, "white")._replace(
        tile=light_panel(draws, "stripes", 0).tile, first=white, second=scaled(white, 0.6),
        third=scaled(white, 0.4), size_u=0.4,
    )  # fmt: skip
    b.begin("radiator", "white", 0.6, place, "wall")
    b.box((0, 0.4, 0.06), (draws.between(0.3, 0.7), 0.28, 0.05), shell)


def clock(b: Builder, draws: Draws, place: Place) -> None:
    face = paint(draws, draws.pick(("white", "black", "red")))
    b.begin("clock", face.word, 0.3, place, "wall")
    radius = draws.between(0.12, 0.2)
    b.box((0, 0, 0.02), (radius, 0.02, radius), face, tilt=(0.0, 1.0), quadric=CYLINDER)
