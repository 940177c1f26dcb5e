"""Deferred shading: textures, lights, shadows, occlusion and the camera, once per pixel.

Everything per pixel is float32 sums, products, quotients, square roots and table look-ups,
in a fixed order, so that the picture does not depend on the machine.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxpercept.data.scenes.builder import Parts, ground_map
from jaxpercept.data.scenes.layout import Layout, Light
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.raster import (
    CURVED,
    FACES,
    Buffers,
    Solids,
    View,
    bound,
    multiply,
    to_camera,
)
from jaxpercept.data.scenes.textures import (
    LEVELS,
    SIZE,
    TILE,
    atlas,
    gaussian_tile,
    tone_curve,
)

SHADOW_SIZE = 96
GROUND_CELLS = 96
_U_AXIS, _V_AXIS = np.array([2, 2, 0, 0, 0, 0, 0]), np.array([1, 1, 2, 2, 1, 1, 1])
f32 = np.float32


class Surfels(NamedTuple):
    """Per pixel (flattened): position and normal in camera coordinates, inverse depth, face."""

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    z: Float[np.ndarray, " n"]
    nx: Float[np.ndarray, " n"]
    ny: Float[np.ndarray, " n"]
    nz: Float[np.ndarray, " n"]
    face: Int[np.ndarray, " n"]


def normal_table(solids: Solids, inward: int) -> Float[np.ndarray, "n 7 3"]:
    table = np.zeros((len(solids.centre), FACES, 3))
    table[:, 1:6:2] = solids.axes
    table[:, 0:6:2] = -solids.axes
    table[:inward] *= -1.0
    return table


def surfels(buffers: Buffers, solids: Solids, inward: int) -> Surfels:
    """Positions and exact unit normals of what the buffers show."""
    z = f32(1.0) / buffers.w
    x, y = buffers.view.u * z, buffers.view.v[:, None] * z
    x, y, z, face = x.ravel(), y.ravel(), z.ravel(), buffers.face.ravel()
    table = normal_table(solids, inward).astype(f32).reshape(-1, 3)
    nx, ny, nz = (np.ascontiguousarray(table[:, k]).take(face) for k in range(3))
    if (solids.quadric[:, 0] > 0).any():
        curved = np.flatnonzero(face % FACES == CURVED)
        if curved.size:
            owner = face[curved] // FACES
            nx[curved], ny[curved], nz[curved] = _curved_normals(
                solids, owner, x[curved], y[curved], z[curved]
            )
    return Surfels(x, y, z, nx, ny, nz, face)


def _curved_normals(solids: Solids, owner, x, y, z) -> tuple[np.ndarray, ...]:
    """Gradient of X^2 + Z^2 + k2 Y^2 + k1 Y + k0 at points of the quadrics `owner`."""
    inverse = (1.0 / solids.radii)[:, :, None]
    scaled = (solids.axes * inverse).astype(f32).reshape(-1, 9)[owner].T
    centre = solids.centre.astype(f32)[owner].T
    k2, k1 = solids.quadric[:, 1].astype(f32)[owner], solids.quadric[:, 2].astype(f32)[owner]
    x, y, z = x - centre[0], y - centre[1], z - centre[2]
    a = scaled[0] * x + scaled[1] * y + scaled[2] * z
    b = k2 * (scaled[3] * x + scaled[4] * y + scaled[5] * z) + f32(0.5) * k1
    c = scaled[6] * x + scaled[7] * y + scaled[8] * z
    gx = scaled[0] * a + scaled[3] * b + scaled[6] * c
    gy = scaled[1] * a + scaled[4] * b + scaled[7] * c
    gz = scaled[2] * a + scaled[5] * b + scaled[8] * c
    inverse = f32(1.0) / np.sqrt(gx * gx + gy * gy + gz * gz)
    return gx * inverse, gy * inverse, gz * inverse


def _surface_table(
    parts: Parts, solids: Solids, layout: Layout, focal: float
) -> Float[np.ndarray, "22 faces"]:
    """Per face: texture axes u (4), v (4), footprint, colours (9), tile, bump, gloss, glow."""
    count = len(solids.centre)
    rows = np.array(
        [(*m.first, *m.second, *m.third, m.size_u, m.size_v, m.fit, m.turn, m.tile, m.bump,
          m.gloss, m.glow) for m in layout.builder.materials]
    )[parts.material]  # fmt: skip
    fit, turn = rows[..., 11] > 0, rows[..., 12] > 0
    along_u = np.where(turn & ~fit, _V_AXIS, _U_AXIS)
    along_v = np.where(turn & ~fit, _U_AXIS, _V_AXIS)
    solid = np.arange(count)[:, None]
    table = np.empty((count, FACES, 22))
    for at, along, size in ((0, along_u, rows[..., 9]), (4, along_v, rows[..., 10])):
        span = np.where(fit, 2.0 * solids.half[solid, along] / size, size)
        direction = solids.axes[solid, along] / span[..., None]
        table[..., at : at + 3] = direction
        start = np.where(fit, 0.5 * size, (solid * 0.37 + 0.11 * at) % 1.0)
        table[..., at + 3] = start - (direction * solids.centre[:, None, :]).sum(-1)
    reach = np.maximum(
        np.abs(table[..., 0:3]).max(-1), np.abs(table[..., 4:7]).max(-1)
    )  # fmt: skip
    table[..., 8] = reach * (1.4 * SIZE / focal)
    table[..., 9:12] = rows[..., 0:3]
    table[..., 12:15] = rows[..., 3:6] - rows[..., 0:3]
    table[..., 15:18] = rows[..., 6:9] - rows[..., 0:3]
    table[..., 18] = rows[..., 13]
    table[..., 19:22] = rows[..., 14:17]
    # What lies beyond a doorway is lit by other lamps: mostly darker, seldom brighter.
    for number in range(1, parts.inward):
        table[number, :, 9:18] *= layout.recess_light[number - 1]
    return np.ascontiguousarray(table.reshape(-1, 22).T.astype(f32))


def _texture(s: Surfels, table: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, ...]:
    """Albedo [3][n] and the mottling factor [n], with mip levels from the pixel footprint."""
    tiles = atlas()
    rows = [table[k].take(s.face) for k in range(19)]
    u = rows[0] * s.x + rows[1] * s.y + rows[2] * s.z + rows[3]
    v = rows[4] * s.x + rows[5] * s.y + rows[6] * s.z + rows[7]
    footprint = np.maximum(rows[8] * s.z / np.maximum(cosine, f32(0.2)), f32(1.0))
    level = np.minimum((footprint.view(np.int32) >> 23) - 127, LEVELS - 1)
    size_f = ((127 + 7 - level) << 23).astype(np.int32).view(f32)
    size = size_f.astype(np.int32)
    mask = size - 1
    column = np.floor(u * size_f).astype(np.int32) & mask
    row = np.floor(v * size_f).astype(np.int32) & mask
    at = tiles.start.ravel().take(rows[18].astype(np.int32) * LEVELS + level)
    at = at + row * size + column
    second, third = tiles.second.take(at), tiles.third.take(at)
    albedo = [
        rows[9 + k] + rows[12 + k] * second + rows[15 + k] * third for k in range(3)
    ]  # fmt: skip
    detail = f32(0.43) * size_f
    column = np.floor((u + v) * detail).astype(np.int32) & mask
    row = np.floor((v - u) * detail).astype(np.int32) & mask
    at = tiles.start[TILE["cloud"]].take(level) + row * size + column
    return albedo, tiles.second.take(at) - f32(0.5)


def _light_view(light: Light, layout: Layout) -> View:
    """A shadow camera at the light that looks at the floor in the middle of the picture."""
    camera = layout.camera
    ahead = 2.3
    flat = (camera.forward[0] ** 2 + camera.forward[2] ** 2) ** 0.5 or 1.0
    target = (
        camera.position[0] + ahead * camera.forward[0] / flat,
        0.3,
        camera.position[2] + ahead * camera.forward[2] / flat,
    )
    forward = np.array([t - p for t, p in zip(target, light.position, strict=True)])
    forward /= np.sqrt((forward * forward).sum())
    side = np.array([camera.right[0], 0.0, camera.right[2]])
    side -= (side * forward).sum() * forward
    side /= np.sqrt((side * side).sum())
    over = np.array([
        forward[1] * side[2] - forward[2] * side[1],
        forward[2] * side[0] - forward[0] * side[2],
        forward[0] * side[1] - forward[1] * side[0],
    ])  # fmt: skip
    half, spread = 0.5 * SHADOW_SIZE, 1.5
    axis = ((np.arange(SHADOW_SIZE) + 0.5 - half) * (spread / half)).astype(f32)
    return View(np.array(light.position), np.stack([side, over, forward]), axis, -axis,
                (half / spread, half / spread), (half, half))  # fmt: skip


def _shadow(s: Surfels, view: View, parts: Parts, layout: Layout) -> Float[np.ndarray, " n"]:
    """1 where the first light reaches the pixel, 0 in cast shadow, soft at the edges."""
    light = _light_view(layout.lights[0], layout)
    world = Solids(*(part[parts.inward :] for part in parts.solids))
    seen = to_camera(world, light)
    buffers = Buffers(light)
    buffers.solids(bound(seen, light), seen, 0, faces=False)
    depth = buffers.w
    depth[0], depth[-1], depth[:, 0], depth[:, -1] = 0, 0, 0, 0
    turn = multiply(light.rotation, view.rotation).astype(f32)
    shift = multiply((view.position - light.position)[None], light.rotation)[0].astype(f32)
    x, y, z = (a + n * f32(0.02) for a, n in ((s.x, s.nx), (s.y, s.ny), (s.z, s.nz)))
    lx, ly, lz = (turn[k, 0] * x + turn[k, 1] * y + (turn[k, 2] * z + shift[k]) for k in range(3))
    w = f32(1.0) / np.maximum(lz, f32(0.05))
    half = f32(0.5 * SHADOW_SIZE)
    column = lx * w * f32(light.focal[0]) + half
    row = half - ly * w * f32(light.focal[1])
    np.clip(column, 0, SHADOW_SIZE - 1, out=column)
    np.clip(row, 0, SHADOW_SIZE - 1, out=row)
    at = row.astype(np.int32) * SHADOW_SIZE + column.astype(np.int32)
    lit = (depth.ravel().take(at) <= w * f32(1.04)).astype(f32)
    shape = (len(view.v), len(view.u))
    return _blur(lit.reshape(1, *shape), 0.33)[0].ravel()


def _blur(image: Float[np.ndarray, "c h w"], side: float) -> Float[np.ndarray, "c h w"]:
    """Separable three-tap blur with weight `side` on each neighbour; edges repeat."""
    side, middle = f32(side), f32(1.0 - 2.0 * side)
    out = image * middle
    part = image * side
    out[:, 1:] += part[:, :-1]
    out[:, :-1] += part[:, 1:]
    out[:, 0] += part[:, 0]
    out[:, -1] += part[:, -1]
    image = out * middle
    out *= side
    image[:, :, 1:] += out[:, :, :-1]
    image[:, :, :-1] += out[:, :, 1:]
    image[:, :, 0] += out[:, :, 0]
    image[:, :, -1] += out[:, :, -1]
    return image


def _occlusion(s: Surfels, view: View, parts: Parts, layout: Layout) -> np.ndarray:
    """How open the surroundings are: corners of the room and the floor near things are darker."""
    turn, (ox, oy, oz) = view.rotation.astype(f32), view.position.tolist()
    open_part = None
    for axis, origin, size in ((0, ox, layout.size[0]), (1, oy, layout.size[1]),
                               (2, oz, layout.size[2])):  # fmt: skip
        r = turn[:, axis]
        at = r[0] * s.x + r[1] * s.y + (r[2] * s.z + f32(origin))
        n = f32(0.5) * (r[0] * s.nx + r[1] * s.ny + r[2] * s.nz)
        reach = f32(0.22)
        near = (f32(0.5) - n) * reach / (np.maximum(at, 0) + reach)
        near += (f32(0.5) + n) * reach / (np.maximum(f32(size) - at, 0) + reach)
        part = f32(1.0) - f32(0.75) * near
        open_part = part if open_part is None else open_part * part
        if axis == 0:
            world_x = at
        elif axis == 2:
            world_z = at
        else:
            upward = n
    ground = np.flatnonzero(s.face == 2)
    if ground.size and parts.inward < len(parts.instance):
        cover = ground_map(parts, (layout.size[0], layout.size[2]), GROUND_CELLS)
        for step in (1, 2, 4):
            for axis in (0, 1):
                cover = f32(0.5) * cover + f32(0.25) * (
                    np.roll(cover, step, axis) + np.roll(cover, -step, axis)
                )
        column = world_x[ground] * f32(GROUND_CELLS / layout.size[0])
        row = world_z[ground] * f32(GROUND_CELLS / layout.size[2])
        at = np.clip(row, 0, GROUND_CELLS - 1).astype(np.int32) * GROUND_CELLS
        at += np.clip(column, 0, GROUND_CELLS - 1).astype(np.int32)
        open_part[ground] *= f32(1.0) - f32(0.7) * cover.ravel().take(at)
    return open_part, upward


def shade(
    s: Surfels, view: View, parts: Parts, solids: Solids, layout: Layout
) -> Float[np.ndarray, "3 n"]:
    """Linear radiance of every pixel."""
    table = _surface_table(parts, solids, layout, view.focal[0])
    inverse = np.sqrt(s.x * s.x + s.y * s.y + s.z * s.z)
    np.divide(f32(1.0), inverse, out=inverse)
    facing = -(s.nx * s.x + s.ny * s.y + s.nz * s.z) * inverse
    albedo, mottle = _texture(s, table, facing)
    bump, gloss, glow = (table[k].take(s.face) for k in (19, 20, 21))
    is_open, upward = _occlusion(s, view, parts, layout)
    is_open *= f32(1.0) + bump * mottle
    ambient = (f32(0.85) + f32(0.3) * upward) * is_open
    light_sum = [ambient * f32(part) for part in layout.ambient]
    shine = None
    for number, light in enumerate(layout.lights):
        at = multiply((np.array(light.position) - view.position)[None], view.rotation)[0]
        lx, ly, lz = f32(at[0]) - s.x, f32(at[1]) - s.y, f32(at[2]) - s.z
        square = lx * lx + ly * ly + lz * lz
        near = f32(1.0) / np.sqrt(square)
        incidence = s.nx * lx + s.ny * ly + s.nz * lz
        reach = f32(light.falloff * light.falloff)
        power = np.maximum(incidence, 0) * near * (reach / (square + reach))
        if number == 0:
            blocked = _shadow(s, view, parts, layout)
            power *= f32(0.12) + f32(0.88) * blocked
            # Mirror direction . light direction = 2 (n.l)(n.v) - l.v
            mirror = f32(2.0) * incidence * facing + (lx * s.x + ly * s.y + lz * s.z) * inverse
            mirror = np.maximum(mirror * near, 0)
            for _ in range(4):
                mirror *= mirror
            shine = mirror * gloss * blocked
        power *= f32(0.35) + f32(0.65) * is_open
        for k in range(3):
            light_sum[k] += power * f32(light.colour[k])
    radiance = np.empty((3, s.x.size), f32)
    for k in range(3):
        radiance[k] = albedo[k] * (light_sum[k] + glow) + shine
    return radiance


def develop(
    radiance: Float[np.ndarray, "3 n"], view: View, draws: Draws
) -> UInt8[np.ndarray, "h w 3"]:
    """The camera: exposure, white balance, vignetting, blur, tone curve, noise, 8 bits."""
    height, width = len(view.v), len(view.u)
    # Means by integer sums: the order of float sums could differ between machines.
    green = radiance[1]
    steps = np.minimum(green * f32(1024.0), f32(8192.0)).astype(np.int32)
    mean = int(steps.sum()) / steps.size + 1.0
    mean = int(np.minimum(steps, int(2.0 * mean)).sum()) / steps.size + 1.0
    exposure = draws.between(0.11, 0.34) * 1024.0 / mean
    warm = draws.between(-0.12, 0.2)
    gains = (exposure * (1.0 + warm), exposure, exposure * (1.0 - warm))
    fall = f32(draws.between(0.0, 0.35))
    vignette = f32(1.0) - fall * (view.u * view.u + (view.v * view.v)[:, None])
    image = radiance.reshape(3, height, width)
    image = np.minimum(image * (vignette * np.array(gains, f32)[:, None, None]), f32(1.5))
    image = _blur(image, draws.between(0.08, 0.24))
    curve = tone_curve(draws.whole(0, 6), draws.whole(0, 6))
    image = curve.take((np.minimum(image, f32(0.9999)) * f32(4096.0)).astype(np.int32))
    grain = gaussian_tile()
    rows, columns = draws.whole(0, 511), draws.whole(0, 511)
    level = draws.between(0.3, 4.0)
    for k in range(3):
        image[k] += _window(grain, rows + 171 * k, columns + 67 * k, height, width) * f32(level)
    np.clip(image + f32(0.5), 0, 255, out=image)
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def _window(tile: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """A periodic tile's rectangle that starts at (row, column)."""
    rows, columns = len(tile), tile.shape[1]
    row, column = row % rows, column % columns
    if row + height <= rows and column + width <= columns:
        return tile[row : row + height, column : column + width]
    return tile.take(range(row, row + height), 0, mode="wrap").take(
        range(column, column + width), 1, mode="wrap"
    )
