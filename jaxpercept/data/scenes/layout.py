"""Draws a furnished room: the walls, the camera, the furniture along walls and in the middle."""

from jaxpercept.data.scenes import props
from jaxpercept.data.scenes.builder import Builder, Place, footprint, overlaps
from jaxpercept.data.scenes.furniture import KINDS
from jaxpercept.data.scenes.palette import (
    Draws,
    Number,
    floor,
    light_panel,
    paint,
    rotation,
    scaled,
    tint,
    wall,
    wood,
)
from jaxpercept.data.scenes.plan import ROOMS, Camera, Layout, Light

MAX_SOLIDS = 64


class FurnishedRoom:
    """A room of one of the kinds of `ROOMS`, as it is composed."""

    openings = 0.42  # the share of the walls with a doorway or a window

    def __init__(self, draws: Draws):
        self.draws, self.b = draws, Builder()
        self.kind = self._kind()
        self.size = self._size()
        self.taken: list[tuple[Number, Number, Number, Number]] = []
        self.hung: list[tuple[Number, Number, Number, Number]] = []
        self.recess_walls: list[int] = []
        self.recess_light: list[Number] = []
        self.windows: list[Place] = []
        self.curtains: list[tuple[Place, Number, Number, Number]] = []
        self._aim()
        self._shell()

    def _kind(self) -> str:
        return self.draws.weighted({name: row[0] for name, row in ROOMS.items()})

    def _size(self) -> tuple[Number, Number, Number]:
        draws = self.draws
        high = draws.middle(2.25, 2.9) if draws.chance(0.9) else draws.between(2.8, 3.8)
        if self.kind == "corridor":
            return draws.between(1.1, 2.2), high, draws.between(4.0, 9.0)
        if self.kind == "bathroom":
            return draws.between(1.7, 3.2), high, draws.between(2.2, 3.8)
        grow = draws.next()
        return 3.2 + 4.0 * draws.next() * (0.4 + 0.6 * grow), high, 3.1 + 5.0 * grow * draws.next()

    def _aim(self) -> None:
        draws = self.draws
        _, high, deep = self.size
        share = draws.between(0.17, 0.83)
        back = draws.between(0.08, 0.5) if draws.chance(0.75) else draws.between(0.15, 0.45) * deep
        narrow = self.kind == "corridor"
        yaw = (0.5 - share) * (0.3 if narrow else 1.2)
        yaw += draws.middle(-0.35, 0.35) if narrow else draws.middle(-0.95, 0.95)
        pitch = draws.middle(-0.56, 0.14) if draws.chance(0.85) else draws.middle(-0.8, 0.25)
        eye = min(draws.middle(0.85, 1.85), high - 0.3)
        self._look(share, back, eye, yaw, pitch, draws.middle(-0.09, 0.09))

    def _look(
        self, share: Number, back: Number, eye: Number, yaw: Number, pitch: Number, roll: Number
    ) -> None:
        """Put the camera at a share of the width, metres from the back wall and the floor."""
        draws, (wide, _, deep) = self.draws, self.size
        cy, sy = self.yaw = rotation(yaw)
        cp, sp = rotation(pitch)
        cr, sr = rotation(roll)
        right, up = (cy, 0.0, -sy), (-sy * sp, cp, -cy * sp)
        self.camera = Camera(
            (share * wide, eye, min(back, 0.6 * deep)),
            tuple(cr * a + sr * b for a, b in zip(right, up, strict=True)),
            tuple(cr * b - sr * a for a, b in zip(right, up, strict=True)),
            (sy * cp, sp, cy * cp),
            0.811 * draws.between(0.86, 1.15),
            (draws.between(-0.02, 0.02), draws.between(-0.02, 0.02)),
        )

    def _shell(self) -> None:
        """The room itself, its skirting tone, doorways, windows, corners that jut out."""
        draws, (wide, high, deep) = self.draws, self.size
        paper, self.ground = wall(draws), floor(draws)
        other = wall(draws) if draws.chance(0.25) else paper
        over = paint(draws, "white", gloss=0.0) if draws.chance(0.85) else paper
        self.wall = paper
        half = (0.5 * wide, 0.5 * high, 0.5 * deep)
        self.b.box(half, half, paper, front=other, top=over, bottom=self.ground, structure=True)
        for face in self.facing():
            place, length = self.wall_place(face)
            if draws.chance(self.openings):
                self._recess(face, place, length)

    def facing(self) -> list[int]:
        """Room faces (0 -x, 1 +x, 5 +z) that the camera sees, the far wall first."""
        forward = self.camera.forward
        faces = [5]
        if forward[0] < 0.45:
            faces.append(0)
        if forward[0] > -0.45:
            faces.append(1)
        return faces

    def wall_place(self, face: int) -> tuple[Place, Number]:
        """The wall's frame (origin in the middle of its foot, z into the room) and its length."""
        wide, _, deep = self.size
        if face == 5:
            return Place(0.5 * wide, 0.0, deep, -1.0, 0.0), wide
        if face == 0:
            return Place(0.0, 0.0, 0.5 * deep, 0.0, 1.0), deep
        return Place(wide, 0.0, 0.5 * deep, 0.0, -1.0), deep

    def _recess(self, face: int, place: Place, length: Number) -> None:
        draws, high = self.draws, self.size[1]
        if draws.chance(0.45):  # a doorway to another room
            half, top = draws.between(0.38, 0.7), draws.between(1.95, 2.2)
            if length < 2 * half + 0.3:
                return
            depth = draws.between(0.6, 4.0)
            along = draws.between(-0.5, 0.5) * (length - 2 * half - 0.1)
            spot = place.at(along, 0, 0)
            back = wall(draws)
            light = draws.between(0.1, 1.1)
            self.b.place = spot
            self.b.box((0, 0.5 * top, -0.5 * depth), (half, 0.5 * top, 0.5 * depth), back,
                       back=back, bottom=self.ground, structure=True)  # fmt: skip
            self.taken.append(footprint(spot.at(0, 0, 0.35), half, 0.35))
            self.hung.append(footprint(spot, half, 0.2))
        else:  # a window in a niche
            half, low = draws.between(0.4, 1.1), draws.between(0.7, 1.1)
            if length < 2 * half + 0.3:
                return
            top = min(draws.between(1.9, 2.2), high - 0.1)
            depth, light = draws.between(0.06, 0.25), 1.0
            along = draws.between(-0.5, 0.5) * (length - 2 * half - 0.2)
            spot = place.at(along, 0, 0)
            self.hung.append(footprint(spot, half, 0.2))
            kind = draws.weighted({"window": 3, "blinds": 2, "flat": 1})
            pane = light_panel(draws, kind, draws.between(0.8, 4.0))
            if draws.chance(0.15):
                pane = pane._replace(glow=0.05)  # night
            self.b.begin("window", "", top - low, spot, "wall")
            self.b.box((0, 0.5 * (low + top), -0.5 * depth), (half, 0.5 * (top - low), 0.5 * depth),
                       paint(draws, "white"), back=pane)  # fmt: skip
            if pane.glow > 0.1:
                self.windows.append(spot.at(0, 0.5 * (low + top), 0))
            if draws.chance(0.35):
                self.curtains.append((spot, half, low, top))
        self.recess_walls.append(face)
        self.recess_light.append(light)

    # Placement ------------------------------------------------------------------------------

    def ahead(self, x: Number, z: Number) -> tuple[Number, Number]:
        """(forward, sideways) floor distances from the camera."""
        (cy, sy), (cx, _, cz) = self.yaw, self.camera.position
        return sy * (x - cx) + cy * (z - cz), cy * (x - cx) - sy * (z - cz)

    def seen(self, x: Number, z: Number, margin: Number) -> bool:
        forward, sideways = self.ahead(x, z)
        return forward > 0.1 and abs(sideways) < forward * 0.5 / self.camera.focal + margin

    def free(
        self, area: tuple[Number, Number, Number, Number], top: Number, gap: Number = 0.02
    ) -> bool:
        """Whether an object fits: inside the room, clear of the others and of the camera."""
        wide, _, deep = self.size
        if area[0] < -0.01 or area[1] > wide + 0.01 or area[2] < -0.01 or area[3] > deep + 0.01:
            return False
        if not self.far(area, 0.12 if top < self.camera.position[1] - 0.35 else 0.6):
            return False
        return not any(overlaps(area, other, gap) for other in self.taken)

    def far(self, area: tuple[Number, Number, Number, Number], near: Number) -> bool:
        """Whether the area keeps `near` metres on the floor plan from the camera."""
        cx, _, cz = self.camera.position
        dx = max(area[0] - cx, cx - area[1], 0.0)
        dz = max(area[2] - cz, cz - area[3], 0.0)
        return dx * dx + dz * dz >= near * near

    def put(
        self, name: str, place: Place, dims: tuple[Number, Number, Number], on_wall: bool
    ) -> bool:
        w, h, d = dims
        centre = place.at(0, 0, 0.5 * d)
        area = footprint(centre, 0.5 * w, 0.5 * d)
        if not self.seen(centre.x, centre.z, 0.5 * max(w, d)) or not self.free(area, h):
            return False
        forward, sideways = self.ahead(centre.x, centre.z)
        tall = h > self.camera.position[1] - 0.25
        if tall and forward < 1.7 and abs(sideways) < 0.35 * forward and self.draws.chance(0.85):
            return False  # it would hide the room
        self.taken.append(area)
        self.b.against_wall = on_wall
        KINDS[name].build(self.b, self.draws, place, w, h, d)
        return True

    def dims(self, name: str) -> tuple[Number, Number, Number]:
        row = KINDS[name]
        return tuple(self.draws.between(a, b) for a, b in zip(row.low, row.high, strict=True))

    @property
    def full(self) -> bool:
        return len(self.b.rows) > MAX_SOLIDS

    def along_walls(self) -> None:
        draws, furniture = self.draws, ROOMS[self.kind][1]
        density = draws.between(0.55, 1.0)
        for face in self.facing():
            place, length = self.wall_place(face)
            at = draws.between(0.0, 0.6) - 0.5 * length
            while at < 0.5 * length - 0.35 and not self.full:
                name = draws.weighted(furniture)
                dims = self.dims(name)
                sideways = name == "bed" and draws.chance(0.35)
                w = dims[2] if sideways else dims[0]
                spot = place.at(at + 0.5 * w, 0.0, 0.02 if draws.chance(0.7) else 0.1)
                if sideways:
                    spot = spot.at(0.5 * w, 0, 0.5 * dims[0]).turned(0.0, -1.0)
                if draws.chance(density) and self.put(name, spot, dims, True):
                    at += w
                    if name == "desk" and draws.chance(0.7):
                        chair = spot.at(
                            draws.between(-0.2, 0.2), 0, dims[2] + draws.between(0.3, 0.6)
                        )
                        self.turned_put("chair", chair, 3.14 + draws.between(-0.5, 0.5))
                at += draws.between(0.02, 0.45) + (0.5 if draws.chance(0.15) else 0.0)

    def turned_put(self, name: str, centre: Place, angle: Number) -> bool:
        """Put furniture with its middle at `centre`, turned by `angle`."""
        dims = self.dims(name)
        spot = centre.turned(*rotation(angle))
        return self.put(name, spot.at(0, 0, -0.5 * dims[2]), dims, False)

    def spot_in_view(self, low: Number, high: Number, spread: Number = 0.9) -> Place:
        """A point on the floor in front of the camera at a forward distance in [low, high]."""
        (cy, sy), (cx, _, cz) = self.yaw, self.camera.position
        forward = self.draws.between(low, high)
        side = self.draws.between(-spread, spread) * forward * 0.5 / self.camera.focal
        cos, sin = self.yaw if self.draws.chance(0.3) else (1.0, 0.0)
        return Place(cx + sy * forward + cy * side, 0.0, cz + cy * forward - sy * side, cos, sin)

    def in_the_middle(self) -> None:
        draws, furniture = self.draws, ROOMS[self.kind][2]
        if draws.chance(0.3):
            spot = self.spot_in_view(1.2, 3.5, 0.6)
            half = (draws.between(0.5, 1.3), draws.between(0.4, 1.0))
            if self.free(footprint(spot, *half), 0.0, -9.0):
                props.rug(self.b, draws, spot, *half)
        for _ in range(draws.whole(1, 6)):
            name = draws.weighted(furniture)
            spot = self.spot_in_view(0.9, 4.2)
            if self.full:
                return
            if name == "prop":
                self.floor_prop(spot)
            elif name == "dining" or (name == "table" and draws.chance(0.5)):
                if self.turned_put(
                    "table", spot, draws.pick((0.0, 1.5708)) + draws.between(-0.1, 0.1)
                ):
                    for _ in range(draws.whole(1, 4)):
                        side = draws.pick((-1, 1))
                        seat = spot.at(draws.between(-0.5, 0.5), 0, side * draws.between(0.6, 0.9))
                        angle = (0.0 if side < 0 else 3.1416) + draws.between(-0.4, 0.4)
                        self.turned_put("chair", seat, angle)
            else:
                self.turned_put(name, spot, draws.between(-3.14, 3.14))

    def floor_prop(
        self,
        spot: Place,
        sizes: tuple[Number, Number] = (0.2, 0.55),
        kinds: dict[str, Number] = props.ON_FLOOR,
    ) -> None:
        draws = self.draws
        size = draws.between(*sizes)
        if self.free(footprint(spot, 0.6 * size, 0.6 * size), size) and not self.full:
            self.taken.append(footprint(spot, 0.5 * size, 0.5 * size))
            props.prop(self.b, draws, draws.weighted(kinds), spot, size, "floor")

    def foreground(self) -> None:
        """Something close that cuts into the picture from the side or from below."""
        draws = self.draws
        name = draws.pick(("chair", "armchair", "table", "cabinet", "desk", "counter", "wardrobe",
                           "shelf", "bed", "sofa"))  # fmt: skip
        spot = self.spot_in_view(0.75, 1.7, 0.0)
        side = draws.pick((-1, 1)) * draws.between(0.6, 1.1)
        forward, _ = self.ahead(spot.x, spot.z)
        cy, sy = self.yaw
        reach = side * forward * 0.5 / self.camera.focal
        spot = spot._replace(x=spot.x + cy * reach, z=spot.z - sy * reach)
        self.turned_put(
            name, spot, draws.pick((0.0, 1.5708, 3.1416, -1.5708)) + draws.between(-0.2, 0.2)
        )

    def structure(self) -> None:
        """Wall corners and columns that jut into the room, and ceiling beams."""
        draws, (wide, high, deep) = self.draws, self.size
        if draws.chance(0.3) and self.kind != "corridor":
            half_x, half_z = draws.between(0.2, 0.3 * wide), draws.between(0.2, 0.25 * deep)
            x = draws.pick((half_x, wide - half_x))
            z = draws.pick((deep - half_z, draws.between(0.4, 0.8) * deep))
            area = (x - half_x, x + half_x, z - half_z, z + half_z)
            if self.free(area, high, 0.05) and self.far(area, 1.2):
                self.taken.append(area)
                self.b.place = Place(x, 0.0, z, 1.0, 0.0)
                self.b.box(
                    (0, 0.5 * high, 0), (half_x, 0.5 * high, half_z), self.wall, structure=True
                )
        skirt = paint(draws, "white") if draws.chance(0.5) else wood(draws)
        if draws.chance(0.55):
            for face in self.facing():
                self.b.place, length = self.wall_place(face)
                self.b.box((0, 0.05, 0.007), (0.5 * length, 0.05, 0.007), skirt, structure=True)

    def on_walls(self) -> None:
        draws, high = self.draws, self.size[1]
        for spot, half, low, top in self.curtains:
            props.curtains(self.b, draws, spot, half, draws.pick((0.05, low - 0.1)), top + 0.08)
        for face in self.facing():
            place, length = self.wall_place(face)
            for _ in range(draws.whole(1, 4)):
                spot = place.at(draws.between(-0.45, 0.45) * length, 0, 0)
                if not self.seen(spot.x, spot.z, 0.3) or self.full:
                    continue
                kind = draws.weighted({"picture": 5, "door": 1.6, "shelf": 1, "clock": 0.4,
                                       "radiator": 0.5, "screen": 0.4})  # fmt: skip
                area = footprint(spot.at(0, 0, 0.1), 0.5, 0.1)
                if any(overlaps(area, other) for other in self.hung):
                    continue
                self.hung.append(area)
                if kind == "door":
                    if self.free(area, 2.0):
                        props.door(self.b, draws, spot)
                        self.taken.append(area)
                elif kind == "radiator":
                    if self.free(area, 0.7):
                        props.radiator(self.b, draws, spot)
                else:
                    self._hang(kind, spot.at(0, draws.between(1.35, 1.75), 0), high)

    def _hang(self, kind: str, spot: Place, high: Number) -> None:
        draws = self.draws
        if kind == "clock":
            props.clock(self.b, draws, spot)
        elif kind == "shelf":
            props.wall_shelf(self.b, draws, spot, draws.between(0.3, 0.7))
        elif kind == "screen":
            half = draws.between(0.4, 0.65)
            self.b.begin("television", "black", 1.2 * half, spot.at(0, -0.6 * half, 0.05), "wall")
            props.screen(self.b, draws, half)
        else:
            half = (draws.between(0.15, 0.5), draws.between(0.15, min(0.45, high - spot.y - 0.1)))
            props.picture_frame(self.b, draws, spot, half)

    def ceiling_lights(self) -> list[Light]:
        """The lights; the first casts shadows."""
        draws, (wide, high, deep) = self.draws, self.size
        cx, eye, cz = self.camera.position
        warm = draws.next()
        tone = (1.0, 0.98 - 0.25 * warm, 0.95 - 0.5 * warm)
        lamp = Light((wide * draws.between(0.2, 0.8), high - draws.between(0.1, 0.4),
                      deep * draws.between(0.25, 0.8)), tone, draws.between(0.8, 2.5))  # fmt: skip
        if draws.chance(0.5) and self.seen(lamp.position[0], lamp.position[2], 0.2):
            x, _, z = lamp.position
            self.b.begin("lamp", "white", 0.2, Place(x, 0, z, 1, 0), "ceiling")
            panel = light_panel(draws, "flat", draws.between(1.0, 3.0))
            self.b.cylinder(0, high - 0.09, 0, draws.between(0.12, 0.25), 0.09, panel)
        day = (0.85 + 0.15 * draws.next(), 0.95, 1.0)
        lights = []
        for spot in self.windows:
            inside = spot.at(0, 0.2, 0.35)
            power = draws.between(0.5, 2.5)
            lights.append(Light((inside.x, inside.y, inside.z), tuple(power * c for c in day),
                                draws.between(1.0, 2.5)))  # fmt: skip
        back = (cx + draws.between(-0.6, 0.6), min(high - 0.1, eye + draws.between(0.1, 0.9)),
                max(0.1, cz - draws.between(0.0, 0.5)))  # fmt: skip
        behind = Light(back, tint(draws, (250, 245, 235)), draws.between(1.0, 3.0))
        choice = draws.weighted({"lamp": 5, "behind": 2, "window": 2.5 if lights else 0.0})
        if choice == "lamp":
            return [lamp, *lights[:1]]
        if choice == "behind":
            dim = lamp._replace(colour=scaled(lamp.colour, draws.between(0.2, 1.0)))
            return [behind, dim, *lights[:1]]
        return [lights[0], lamp._replace(colour=scaled(lamp.colour, draws.between(0.1, 0.6)))]

    def compose(self) -> Layout:
        """The whole scene, independent of the picture's size."""
        self.furnish()
        draws = self.draws
        level = draws.between(0.06, 0.35)
        ambient = tuple(level * draws.between(0.85, 1.1) for _ in range(3))
        return Layout(
            self.kind, self.b, self.size, self.camera, self.lights, ambient, self.recess_walls,
            self.recess_light, self.wall.word, self.ground.word,
        )  # fmt: skip

    def furnish(self) -> None:
        draws = self.draws
        self.structure()
        if draws.chance(0.28):
            self.foreground()
        if draws.chance(0.5):
            self.in_the_middle()
            self.along_walls()
        else:
            self.along_walls()
            self.in_the_middle()
        for _ in range(draws.whole(0, 5)):
            self.floor_prop(self.spot_in_view(0.9, 3.5))
        self.on_walls()
        self.lights = self.ceiling_lights()
        for surface in self.b.surfaces:
            if self.full:
                break
            if self.seen(surface.place.x, surface.place.z, 0.4):
                props.clutter_surface(self.b, draws, surface, draws.whole(0, 5))
