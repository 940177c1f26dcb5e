"""Procedural indoor scenes with exact ground truth, the same on every machine.

`render(index)` draws a room from (seed, index), casts a camera's rays exactly, and shades the
picture with textures, lights, cast shadows and a camera model. The room is plain, with boxes,
balls, cylinders and cones on the floor, or furnished like real ones.

Conventions
- Pixel (row i, column j) looks along ((j + 0.5 - cx) / fx, (i + 0.5 - cy) / fy, 1) with x right,
  y down and z forward; `intrinsics` = (fx, fy, cx, cy) in pixels of this picture.
- depth is planar: the z coordinate in metres, not the distance along the ray.
- normals are unit vectors in camera coordinates, +x right, +y up, +z towards the viewer
  (Marigold's convention in diffusers).
- instance 0 is the room itself and its openings; instance k > 0 is one object.
- classes holds numbers into `CLASSES`.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxpercept.data.scenes.builder import CLASS, CLASSES, Parts
from jaxpercept.data.scenes.language import caption, phrases, sights
from jaxpercept.data.scenes.layout import FurnishedRoom
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.plain import PlainRoom
from jaxpercept.data.scenes.plan import Camera, Layout
from jaxpercept.data.scenes.raster import (
    FACES,
    Bounds,
    Buffers,
    Solids,
    View,
    bound,
    to_camera,
)
from jaxpercept.data.scenes.shading import develop, shade, surfels
from jaxpercept.errors import UserError

__all__ = ["CLASSES", "Scene", "SceneSource", "render"]


class Scene(TypedDict):
    """One rendered scene; arrays as in the module's conventions."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float[np.ndarray, "h w 1"]
    valid: Bool[np.ndarray, "h w 1"]
    normals: Float[np.ndarray, "h w 3"]
    instance: Int[np.ndarray, "h w"]
    classes: Int[np.ndarray, "h w"]
    caption: str
    phrases: list[tuple[str, int]]
    intrinsics: Float[np.ndarray, " 4"]
    index: int


def _view(camera: Camera, height: int, width: int) -> View:
    focal = camera.focal * width
    cx, cy = (0.5 + camera.shift[0]) * width, 0.5 * height + camera.shift[1] * width
    u = ((np.arange(width) + 0.5 - cx) / focal).astype(np.float32)
    v = ((cy - 0.5 - np.arange(height)) / focal).astype(np.float32)
    rotation = np.array([camera.right, camera.up, camera.forward])
    return View(np.array(camera.position), rotation, u, v, (focal, focal), (cx, cy))


def _cast(parts: Parts, solids: Solids, view: View, layout: Layout) -> Buffers:
    bounds = bound(solids, view)
    buffers = Buffers(view)
    inward = parts.inward
    buffers.room(bounds, 0)
    if inward > 1:
        part = Bounds(*(column[1:inward] for column in bounds))
        buffers.recesses(part, 1, layout.recess_walls)
    outward = Bounds(*(column[inward:] for column in bounds))
    buffers.solids(outward, Solids(*(column[inward:] for column in solids)), inward)
    return buffers


def _class_table(parts: Parts, layout: Layout) -> Int[np.ndarray, " faces"]:
    """The class of every face: the object's, or wall, floor or ceiling for the room."""
    kinds = [CLASS["wall"]] + [CLASS[thing.kind] for thing in layout.builder.things]
    table = np.repeat(np.array(kinds, np.int32)[parts.instance][:, None], FACES, axis=1)
    for number in range(parts.inward):
        if parts.instance[number] == 0:
            table[number, 2], table[number, 3] = CLASS["floor"], CLASS["ceiling"]
    return table.ravel()


def compose(draws: Draws, *, furnished: bool) -> Layout:
    """A whole scene before it is rendered, drawn from `draws`."""
    return (FurnishedRoom if furnished else PlainRoom)(draws).compose()


def render(
    index: int, *, height: int = 96, width: int = 128, seed: int = 0, furnished: bool = False
) -> Scene:
    """Scene `index` of the stream `seed`; the size changes the sampling, not the scene.

    Raises:
        UserError: for a negative index or seed, or a picture smaller than 8 x 8.
    """
    if index < 0 or seed < 0:
        raise UserError(f"scene index {index} and seed {seed} must not be negative.")
    if height < 8 or width < 8:
        raise UserError(f"scene size {height}x{width} is too small: use at least 8x8.")
    draws = Draws(seed, index)
    layout = compose(draws, furnished=furnished)
    parts = layout.builder.finish(1 + len(layout.recess_walls))
    view = _view(layout.camera, height, width)
    solids = to_camera(parts.solids, view)
    with np.errstate(invalid="ignore"):  # rays that miss a quadric have no root
        buffers = _cast(parts, solids, view, layout)
        s = surfels(buffers, solids, parts.inward)
        radiance = shade(s, view, parts, solids, layout)
    rgb = develop(radiance, view, draws)

    instance = np.repeat(parts.instance, FACES).take(s.face).reshape(height, width)
    depth = s.z.reshape(height, width, 1)
    normals = np.stack([s.nx, s.ny, -s.nz], axis=-1).reshape(height, width, 3)
    seen = sights(layout.builder.things, instance, depth)
    return Scene(
        rgb=rgb,
        depth=depth,
        valid=np.ones((height, width, 1), bool),
        normals=normals,
        instance=instance,
        classes=_class_table(parts, layout).take(s.face).reshape(height, width),
        caption=caption(layout.kind, seen, layout.wall_word, layout.floor_word, draws),
        phrases=phrases(seen),
        intrinsics=np.array([*view.focal, *view.centre], np.float32),
        index=index,
    )


class SceneSource:
    """Random access to scenes `start` ... `start + size - 1`, as Grain's sources want it."""

    def __init__(
        self,
        seed: int = 0,
        size: int = 100_000,
        start: int = 0,
        *,
        height: int = 96,
        width: int = 128,
        furnished: bool = False,
    ):
        if size < 1 or start < 0:
            raise UserError(f"scene source needs size >= 1 and start >= 0, not {size}, {start}.")
        self.size, self.start = size, start
        self.options = {"height": height, "width": width, "seed": seed, "furnished": furnished}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, record: int) -> Scene:
        if not 0 <= record < self.size:
            raise IndexError(f"scene {record} of a source of {self.size}")
        return render(self.start + record, **self.options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"SceneSource(size={self.size}, start={self.start}, {options})"
