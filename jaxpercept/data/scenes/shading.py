"""Deferred shading: textures, lights, shadows, occlusion and the camera, once per pixel.

Everything per pixel is float32 sums, products, quotients, square roots and table look-ups,
in a fixed order, so that the picture does not depend on the machine.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxpercept.data.scenes.builder import Parts, ground_map
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.plan import Layout, Light
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
    atlas,
    gaussian_tile,
    tone_curve,
)

SHADOW_SIZE = 76
GROUND_CELLS = 64
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
    x, y, z, face = x.ravel(), y.ravel(), z.ravel(), buffers.face.ravel().astype(np.intp)
    table = normal_table(solids, inward).astype(f32).reshape(-1, 3)
    nx, ny, nz = (np.ascontiguousarray(table[:, k]).take(face, mode="clip") for k in range(3))
    if (solids.quadric[:, 0] > 0).any():
        is_curved = np.zeros((len(solids.centre), FACES), bool)
        is_curved[:, CURVED] = solids.quadric[:, 0] > 0
        curved = np.flatnonzero(is_curved.ravel().take(face, mode="clip"))
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


def _along(view: View, z: Float[np.ndarray, " n"], direction) -> Float[np.ndarray, " n"]:
    """direction . position of every pixel: affine in (u, v), times the depth."""
    a, b, c = (f32(part) for part in direction)
    return ((view.v[:, None] * b + c) + view.u * a).ravel() * z


def _surface_table(
    parts: Parts, solids: Solids, layout: Layout, focal: float
) -> Float[np.ndarray, "21 faces"]:
    """Per face: texture axes u (4), v (4), footprint, colours (9), tile, gloss, glow."""
    material = np.array(
        [(*m.first, *m.second, *m.third, m.size_u, m.size_v, m.fit, m.turn, m.tile, m.gloss,
          m.glow) for m in layout.builder.materials]
    ).T.take(parts.material.ravel(), axis=1)  # fmt: skip
    count = len(solids.centre)
    fit = material[11] > 0
    swap = np.flatnonzero((material[12] > 0) & ~fit)
    base = np.arange(count)[:, None] * 3
    along_u, along_v = (base + _U_AXIS).ravel(), (base + _V_AXIS).ravel()
    along_u[swap], along_v[swap] = along_v[swap], along_u[swap]
    shift = (along_u + along_v) * 0.123  # patterns of like things do not repeat alike
    axes, half = solids.axes.reshape(-1, 3).T, solids.half.ravel()
    centre = np.repeat(solids.centre.T, FACES, axis=1)
    table = np.empty((21, count * FACES))
    table[8] = 0
    for at, along, size in ((0, along_u, material[9]), (4, along_v, material[10])):
        per_metre = 1.0 / np.where(fit, 2.0 * half.take(along) / size, size)
        start = np.where(fit, 0.5 * size, (shift + 0.11 * at) % 1.0)
        for k in range(3):
            part = axes[k].take(along) * per_metre
            table[at + k] = part
            start -= part * centre[k]
        table[at + 3] = start
        np.maximum(table[8], per_metre, out=table[8])
    table[8] *= 1.2 * SIZE / focal
    table[9:12] = material[0:3]
    table[12:15] = material[3:6] - material[0:3]
    table[15:18] = material[6:9] - material[0:3]
    table[18:21] = material[13:16]
    # What lies beyond a doorway is lit by other lamps: mostly darker, seldom brighter.
    for number in range(1, parts.inward):
        table[9:18, number * FACES : (number + 1) * FACES] *= layout.recess_light[number - 1]
    return table.astype(f32)


def _texture(s: Surfels, table: np.ndarray, cosine: np.ndarray) -> list[np.ndarray]:
    """Albedo [3][n], with mip levels from the pixel footprint."""
    tiles = atlas()
    rows = [table[k].take(s.face, mode="clip") for k in range(19)]
    u = rows[0] * s.x + rows[1] * s.y + rows[2] * s.z + rows[3]
    v = rows[4] * s.x + rows[5] * s.y + rows[6] * s.z + rows[7]
    footprint = np.maximum(rows[8] * s.z / np.maximum(cosine, f32(0.2)), f32(1.0))
    level = np.minimum((footprint.view(np.int32) >> 23) - 127, LEVELS - 1)
    size_f = ((127 + 7 - level) << 23).astype(np.int32).view(f32)
    size = size_f.astype(np.int32)
    mask = size - 1
    column = np.floor(u * size_f).astype(np.int32) & mask
    row = np.floor(v * size_f).astype(np.int32) & mask
    at = tiles.start.ravel().take(rows[18].astype(np.int32) * LEVELS + level, mode="clip")
    at = (at + row * size + column).astype(np.intp)
    second, third = tiles.second.take(at, mode="clip"), tiles.third.take(at, mode="clip")
    albedo = [
        rows[9 + k] + rows[12 + k] * second + rows[15 + k] * third for k in range(3)
    ]  # fmt: skip
    return albedo


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
    half, spread = 0.5 * SHADOW_SIZE, 1.3
    axis = ((np.arange(SHADOW_SIZE) + 0.5 - half) * (spread / half)).astype(f32)
    return View(np.array(light.position), np.stack([side, over, forward]), axis, -axis,
                (half / spread, half / spread), (half, half))  # fmt: skip


def _shadow(s: Surfels, view: View, parts: Parts, layout: Layout) -> Float[np.ndarray, " n"]:
    """1 where the first light reaches the pixel, 0 in cast shadow, soft at the edges."""
    light = _light_view(layout.lights[0], layout)
    world = Solids(*(part[parts.inward :] for part in parts.solids))
    # Legs and trinkets cast no shadow worth its time; soft edges may cast hard ones.
    extent = np.sort(world.half, axis=1)
    world = Solids(*(part[(extent[:, 1] > 0.035) & (extent[:, 2] > 0.09)] for part in world))
    seen = to_camera(world, light)
    round_shape = (seen.radii <= seen.half).all(1)
    seen.quadric[:, 0] *= round_shape
    buffers = Buffers(light)
    buffers.solids(bound(seen, light), seen, 0, faces=False)
    depth = buffers.w
    depth[0], depth[-1], depth[:, 0], depth[:, -1] = 0, 0, 0, 0
    turn = multiply(light.rotation, view.rotation).astype(f32)
    shift = multiply((view.position - light.position)[None], light.rotation)[0].astype(f32)
    shape = (len(view.v), len(view.u))
    x, y, z = (
        (a.reshape(shape)[::2, ::2] + n.reshape(shape)[::2, ::2] * f32(0.02))
        for a, n in ((s.x, s.nx), (s.y, s.ny), (s.z, s.nz))
    )
    lx, ly, lz = (turn[k, 0] * x + turn[k, 1] * y + (turn[k, 2] * z + shift[k]) for k in range(3))
    w = f32(1.0) / np.maximum(lz, f32(0.05))
    half = f32(0.5 * SHADOW_SIZE)
    column = np.clip(lx * w * f32(light.focal[0]) + half, 0, SHADOW_SIZE - 1)
    row = np.clip(half - ly * w * f32(light.focal[1]), 0, SHADOW_SIZE - 1)
    at = row.astype(np.intp) * SHADOW_SIZE + column.astype(np.intp)
    lit = (depth.ravel().take(at, mode="clip") <= w * f32(1.04)).astype(f32)
    lit = _blur(lit[None], 0.25)[0].repeat(2, axis=0).repeat(2, axis=1)
    return lit[: shape[0], : shape[1]].ravel()


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


def _occlusion(
    s: Surfels, view: View, parts: Parts, layout: Layout
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """How open the surroundings are (corners of the room and the floor near things are darker),
    and the upward part of the normal."""
    turn, (ox, oy, oz) = view.rotation.astype(f32), view.position.tolist()
    reach, strength = 0.22, 0.75
    # Between two walls at distances p and q, with p + q = K counted from `reach` behind each, and
    # n the normal's part along the axis: (1/2 - n)/p + (1/2 + n)/q = (K/2 + n (p - q)) / (p q).
    factors, across, normal = [], [], []
    for axis, origin, size in zip(range(3), (ox, oy, oz), layout.size, strict=True):
        r = turn[:, axis]
        at = _along(view, s.z, r) + f32(origin - 0.5 * size)
        n = r[0] * s.nx + r[1] * s.ny + r[2] * s.nz
        span = 0.5 * size + reach
        product = np.maximum(f32(span * span) - at * at, f32(reach * (size + reach)))
        factors.append(
            f32(1.0) - (f32(strength * reach * span) + f32(strength * reach) * n * at) / product
        )
        across.append(at)
        normal.append(n)
    open_part = factors[0] * factors[1] * factors[2]
    ground = np.flatnonzero(s.face == 2)
    if ground.size and parts.inward < len(parts.instance):
        cover = ground_map(parts, (layout.size[0], layout.size[2]), GROUND_CELLS)
        for step in (1, 2, 3):
            for _ in range(2):
                spread = f32(0.5) * cover
                cover *= f32(0.25)
                spread[step:] += cover[:-step]
                spread[:-step] += cover[step:]
                cover = spread.T
        row, column = (
            (across[k].take(ground) + f32(0.5 * layout.size[k]))
            * f32(GROUND_CELLS / layout.size[k])
            for k in (2, 0)
        )
        at = np.clip(row, 0, GROUND_CELLS - 1).astype(np.int32) * GROUND_CELLS
        at += np.clip(column, 0, GROUND_CELLS - 1).astype(np.int32)
        open_part[ground] *= f32(1.0) - f32(0.7) * cover.ravel().take(at, mode="clip")
    return open_part, normal[1]


def shade(
    s: Surfels, view: View, parts: Parts, solids: Solids, layout: Layout
) -> Float[np.ndarray, "3 n"]:
    """Linear radiance of every pixel."""
    table = _surface_table(parts, solids, layout, view.focal[0])
    distance = s.z * s.z * (((view.v * view.v)[:, None] + f32(1.0)) + view.u * view.u).ravel()
    inverse = f32(1.0) / np.sqrt(distance)
    across = s.nx * s.x + s.ny * s.y + s.nz * s.z
    facing = across * -inverse
    albedo = _texture(s, table, facing)
    gloss = table[19].take(s.face, mode="clip")
    is_open, upward = _occlusion(s, view, parts, layout)
    ambient = (f32(0.85) + f32(0.15) * upward) * is_open
    is_open *= f32(0.65)
    is_open += f32(0.35)
    light_sum = [ambient * f32(part) for part in layout.ambient]
    for number, light in enumerate(layout.lights):
        # With l the light's and p the pixel's position: |l - p|^2 and n.(l - p), expanded.
        at = multiply((np.array(light.position) - view.position)[None], view.rotation)[0]
        toward = _along(view, s.z, at)
        square = distance - f32(2.0) * toward + f32((at * at).sum())
        near = f32(1.0) / np.sqrt(np.maximum(square, f32(0.01)))
        a, b, c = at.astype(f32)
        incidence = a * s.nx + b * s.ny + c * s.nz - across
        reach = f32(light.falloff * light.falloff)
        power = np.maximum(incidence, 0) * near * (reach / (square + reach))
        power *= is_open
        if number == 0:
            lit = _shadow(s, view, parts, layout)
            # Mirror direction . light direction = 2 (n.l)(n.v) - l.v; the floor keeps the
            # sixteenth power out of the slow subnormal numbers.
            mirror = f32(2.0) * incidence * facing + (toward - distance) * inverse
            mirror = np.maximum(mirror * near, f32(0.1))
            for _ in range(4):
                mirror *= mirror
            shine = mirror * gloss * lit
            power *= f32(0.12) + f32(0.88) * lit
        for k in range(3):
            light_sum[k] += power * f32(light.colour[k])
    radiance = np.empty((3, s.x.size), f32)
    glow = table[20].take(s.face, mode="clip") if table[20].any() else None
    for k in range(3):
        if glow is not None:
            light_sum[k] += glow
        np.multiply(albedo[k], light_sum[k], out=radiance[k])
        radiance[k] += shine
    return radiance


class Exposure(NamedTuple):
    """How the camera makes a picture of light."""

    gains: tuple[float, float, float]
    fall: float  # vignetting
    blur: float
    curve: tuple[int, int]
    grain: tuple[int, int]  # where the noise is read
    level: float


def expose(radiance: Float[np.ndarray, "3 n"], draws: Draws) -> Exposure:
    """Exposure for this light, and everything else drawn."""
    # Means by integer sums: the order of float sums could differ between machines.
    green = radiance[1, ::3]
    steps = np.minimum(green * f32(1024.0), f32(8192.0)).astype(np.int32)
    mean = int(steps.sum()) / steps.size + 1.0
    mean = int(np.minimum(steps, int(2.0 * mean)).sum()) / steps.size + 1.0
    exposure = draws.between(0.1, 0.4) * 1024.0 / mean
    warm = draws.between(-0.12, 0.2)
    return Exposure(
        (exposure * (1.0 + warm), exposure, exposure * (1.0 - warm)),
        draws.between(0.0, 0.35),
        draws.between(0.12, 0.25),
        (draws.whole(0, 6), draws.whole(0, 6)),
        (draws.whole(0, 511), draws.whole(0, 511)),
        draws.between(0.3, 4.0),
    )


def develop(
    radiance: Float[np.ndarray, "3 n"], view: View, exposure: Exposure
) -> UInt8[np.ndarray, "h w 3"]:
    """White balance, vignetting, blur, tone curve, noise, 8 bits."""
    height, width = len(view.v), len(view.u)
    fall = f32(exposure.fall)
    vignette = f32(1.0) - fall * (view.u * view.u + (view.v * view.v)[:, None])
    image = radiance.reshape(3, height, width)
    gains = np.array([4096.0 * gain for gain in exposure.gains], f32)[:, None, None]
    image = np.minimum(image * (vignette * gains), f32(1.5 * 4096.0))
    image = _blur(image, exposure.blur)
    curve = tone_curve(*exposure.curve)
    image = curve.take(image.astype(np.intp), mode="clip")
    grain = gaussian_tile()
    rows, columns = exposure.grain
    picture = np.empty((height, width, 3), np.uint8)
    for k in range(3):
        part = _window(grain, rows + 171 * k, columns + 67 * k, height, width)
        noisy = part * f32(exposure.level)
        noisy += image[k]
        np.maximum(noisy, 0, out=noisy)
        np.minimum(noisy, f32(255.4), out=noisy)
        noisy += f32(0.5)
        np.copyto(picture[:, :, k], noisy, casting="unsafe")
    return picture


def _window(tile: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """A periodic tile's rectangle that starts at (row, column)."""
    rows, columns = len(tile), tile.shape[1]
    row, column = row % rows, column % columns
    if row + height <= rows and column + width <= columns:
        return tile[row : row + height, column : column + width]
    return tile.take(range(row, row + height), 0, mode="wrap").take(
        range(column, column + width), 1, mode="wrap"
    )
