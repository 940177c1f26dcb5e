"""From a scene's geometry to what each pixel sees: the camera, the buffers, the classes."""

import numpy as np
from jaxtyping import Int

from jaxpercept.data.scenes.builder import CLASS, Parts
from jaxpercept.data.scenes.plan import Camera, Layout
from jaxpercept.data.scenes.raster import FACES, Bounds, Buffers, Solids, View, bound


def view_of(camera: Camera, height: int, width: int) -> View:
    """The camera's pinhole for a picture of this size."""
    focal = camera.focal * width
    cx, cy = (0.5 + camera.shift[0]) * width, 0.5 * height + camera.shift[1] * width
    u = ((np.arange(width) + 0.5 - cx) / focal).astype(np.float32)
    v = ((cy - 0.5 - np.arange(height)) / focal).astype(np.float32)
    rotation = np.array([camera.right, camera.up, camera.forward])
    return View(np.array(camera.position), rotation, u, v, (focal, focal), (cx, cy))


def cast(
    parts: Parts, solids: Solids, view: View, layout: Layout, stop: int | None = None
) -> Buffers:
    """Inverse depth and visible face of the room, its recesses and the solids before `stop`."""
    bounds = bound(solids, view)
    buffers = Buffers(view)
    inward = parts.inward
    buffers.room(bounds, 0)
    if inward > 1:
        part = Bounds(*(column[1:inward] for column in bounds))
        buffers.recesses(part, 1, layout.recess_walls)
    outward = Bounds(*(column[inward:stop] for column in bounds))
    buffers.solids(outward, Solids(*(column[inward:stop] for column in solids)), inward)
    return buffers


def class_table(parts: Parts, layout: Layout) -> Int[np.ndarray, " faces"]:
    """The class of every face: the object's, or wall, floor or ceiling for the room."""
    kinds = [CLASS["wall"]] + [CLASS[thing.kind] for thing in layout.builder.things]
    table = np.repeat(np.array(kinds, np.int32)[parts.instance][:, None], FACES, axis=1)
    for number in range(parts.inward):
        if parts.instance[number] == 0:
            table[number, 2], table[number, 3] = CLASS["floor"], CLASS["ceiling"]
    return table.ravel()
