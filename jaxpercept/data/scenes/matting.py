"""A matte's subject in front of its scene: exact opacity, and the picture composed with it.

The scene is shaded twice, as a whole: without the subject (the background B) and with its solids
grown by a pixel (the foreground F, defined wherever the subject reaches). Its opacity alpha is the
share of 4 x 4 points of each pixel that it covers, times how opaque it is there, and the picture
is alpha F + (1 - alpha) B on its 8-bit levels, so that alpha explains the picture exactly.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from jaxpercept.data.scenes.builder import Parts
from jaxpercept.data.scenes.casting import cast, view_of
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.plan import Layout, Matter, Strands
from jaxpercept.data.scenes.raster import (
    CURVED,
    FACES,
    NEAR,
    Buffers,
    Solids,
    View,
    bound,
    multiply,
)
from jaxpercept.data.scenes.shading import Surfels, develop, expose, shade, surfels
from jaxpercept.data.scenes.textures import noise

SAMPLES = 4  # a side of each pixel
GROWTH = 0.8  # pixels by which solids grow in the foreground
FULL = 16  # the level of a point that is covered fully
NARROW = 0.71  # a strand of this radius covers a point wherever it passes
TAPER = 0.7  # of a strand's radius is lost towards its tip
f32 = np.float32


class Matte(NamedTuple):
    """The picture and what it is composed of."""

    rgb: UInt8[np.ndarray, "h w 3"]
    alpha: Float32[np.ndarray, "h w 1"]
    foreground: UInt8[np.ndarray, "h w 3"]
    background: UInt8[np.ndarray, "h w 3"]
    seen: Surfels  # the subject's where alpha is at least a half


def composite(layout: Layout, parts: Parts, solids: Solids, view: View, draws: Draws) -> Matte:
    """The matte of a layout whose subject has matter."""
    matter = layout.subject.matter
    shape = (len(view.v), len(view.u))
    back = cast(parts, solids, view, layout, matter.first)
    front = Buffers(view)
    front.w[:], front.face[:] = back.w, back.face
    soft_from = matter.first + matter.shells
    opaque_from = soft_from + len(matter.soft)
    grown = _grown(solids, view)
    _paint(front, _layer(solids, view, matter.first, soft_from))
    soft = _layer(grown, view, soft_from, opaque_from)
    _paint(front, soft)
    opaque = _layer(grown, view, opaque_from, len(parts.instance))
    _paint(front, opaque)

    behind, before = (surfels(buffers, solids, parts.inward) for buffers in (back, front))
    fine = view_of(layout.camera, SAMPLES * shape[0], SAMPLES * shape[1])
    levels = _levels(_layer(solids, fine, opaque_from, len(parts.instance)))
    draw_strands(levels, matter.strands, fine)
    alpha = _share(levels)
    if matter.soft:
        part = _share(_levels(_layer(solids, fine, soft_from, opaque_from)))
        shown = (soft.w > 0) & (opaque.w == 0)
        shown &= soft.face % FACES == CURVED
        facing = np.where(shown, _facing(before).reshape(shape), f32(1.0))
        part *= _opacity(matter, soft.face // FACES - soft_from, facing, shape) * (soft.w > 0)
        alpha = f32(1.0) - (f32(1.0) - alpha) * (f32(1.0) - part)
    # A hair beyond its shell has no colour.
    alpha *= front.face >= matter.first * FACES

    parts = _without_shells(parts, matter)
    light = shade(before, view, parts, solids, layout)
    exposure = expose(light, draws)
    foreground = develop(light, view, exposure)
    background = develop(shade(behind, view, parts, solids, layout), view, exposure)
    mine = (alpha >= f32(0.5)).ravel()
    seen = Surfels(*(np.where(mine, a, b) for a, b in zip(before, behind, strict=True)))
    alpha = alpha[:, :, None]
    return Matte(blend(alpha, foreground, background), alpha, foreground, background, seen)


def blend(
    alpha: Float32[np.ndarray, "h w 1"],
    foreground: UInt8[np.ndarray, "h w 3"],
    background: UInt8[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """alpha F + (1 - alpha) B, rounded."""
    mixed = alpha * foreground.astype(f32) + (f32(1.0) - alpha) * background.astype(f32)
    return (mixed + f32(0.5)).astype(np.uint8)


def trimap(alpha: Float32[np.ndarray, "h w 1"]) -> UInt8[np.ndarray, "h w 1"]:
    """255 foreground, 0 background, 128 unknown: what is within a fiftieth of the picture's height
    (at least a pixel) of opacities strictly between 0 and 1, or of an edge from 0 to 1."""
    clear, full = alpha[:, :, 0] <= 0, alpha[:, :, 0] >= 1
    reach = max(1, round(len(alpha) / 50))
    part = ~(clear | full)
    # An edge right between two pixels is dilated from both of them.
    unknown = _dilate(part, reach) | (_dilate(clear, reach) & _dilate(full, reach))
    return np.where(unknown, 128, np.where(full, 255, 0)).astype(np.uint8)[:, :, None]


def _dilate(mask: Bool[np.ndarray, "h w"], reach: int) -> Bool[np.ndarray, "h w"]:
    """True within `reach` pixels, in rows and columns."""
    for _ in range(2):
        wide = mask.copy()
        for step in range(1, reach + 1):
            wide[step:] |= mask[:-step]
            wide[:-step] |= mask[step:]
        mask = wide.T
    return mask


def _without_shells(parts: Parts, matter: Matter) -> Parts:
    """Parts whose shells are too small to cast a shadow."""
    half = parts.solids.half.copy()
    half[matter.first : matter.first + matter.shells] = 1e-3
    return parts._replace(solids=parts.solids._replace(half=half))


def _grown(solids: Solids, view: View) -> Solids:
    grow = (GROWTH / view.focal[0] * np.maximum(solids.centre[:, 2], NEAR))[:, None]
    return solids._replace(half=solids.half + grow, radii=solids.radii + grow)


def _layer(solids: Solids, view: View, first: int, last: int) -> Buffers:
    """Solids `first` to `last` alone; w is 0 where there is none."""
    buffers = Buffers(view)
    if first < last:
        part = Solids(*(column[first:last] for column in solids))
        buffers.solids(bound(part, view), part, first)
    return buffers


def _paint(buffers: Buffers, layer: Buffers) -> None:
    """Put a layer over what the buffers show, however far."""
    hit = layer.w > 0
    np.copyto(buffers.w, layer.w, where=hit)
    np.copyto(buffers.face, layer.face, where=hit)


def _levels(layer: Buffers) -> UInt8[np.ndarray, "H W"]:
    """FULL where the layer shows something."""
    return (layer.w > 0) * np.uint8(FULL)


def _share(levels: UInt8[np.ndarray, "H W"]) -> Float32[np.ndarray, "h w"]:
    """The mean level of each pixel's points, in [0, 1]; a sum of integers, so exact."""
    height, width = levels.shape
    blocks = levels.reshape(height // SAMPLES, SAMPLES, width // SAMPLES, SAMPLES)
    total = blocks.sum((1, 3), dtype=np.int32)
    return total.astype(f32) * f32(1.0 / (FULL * SAMPLES**2))


def _facing(s: Surfels) -> Float32[np.ndarray, " n"]:
    """The cosine between surface and line of sight."""
    across = -(s.nx * s.x + s.ny * s.y + s.nz * s.z)
    return np.maximum(across / np.sqrt(s.x * s.x + s.y * s.y + s.z * s.z), f32(0.0))


@functools.cache
def _wisps() -> Float[np.ndarray, "128 128"]:
    return noise(977, 4, 4, 4).astype(f32)


def _opacity(
    matter: Matter, number: np.ndarray, facing: Float32[np.ndarray, "h w"], shape: tuple[int, int]
) -> Float32[np.ndarray, "h w"]:
    """How opaque the soft solid `number` is where the line of sight meets it at this cosine.

    Glass is more so at its rim, smoke vanishes there, gauze is the same everywhere.
    """
    number = np.clip(number, 0, len(matter.soft) - 1)
    level = np.array([opacity for _, opacity in matter.soft], f32)[number]
    rim = f32(1.0) - facing
    result = level
    kinds = np.array([{"veil": 0, "glass": 1, "cloud": 2}[kind] for kind, _ in matter.soft])[number]
    if (kinds == 1).any():
        glass = level + (f32(1.0) - level) * f32(0.8) * rim * rim
        result = np.where(kinds == 1, glass, result)
    if (kinds == 2).any():
        rows, columns = (np.arange(n) * 128 // (n + n // 3) for n in shape)
        wisps = f32(0.55) + f32(0.45) * _wisps()[rows[:, None], columns[None]]
        result = np.where(kinds == 2, level * facing * facing * wisps, result)
    return result


def draw_strands(levels: UInt8[np.ndarray, "H W"], strands: Strands, view: View) -> None:
    """Raise the points of the view that strands cover, however near other things are.

    A strand that is narrower than the grid of points is drawn wide enough to have no gaps, at a
    level so much below FULL.
    """
    if not len(strands.root):
        return
    row, column, radius = _traced(strands, view)
    if not row.size:
        return
    level = np.minimum(FULL / NARROW * radius + 0.5, FULL).astype(np.uint8)
    radius = np.maximum(radius, NARROW)
    reach = int(radius.max() + 0.5)
    height, width = levels.shape
    wide = np.zeros((height + 2 * reach, width + 2 * reach), np.uint8)
    base_row, base_column = np.floor(row), np.floor(column)
    row, column = base_row + 0.5 - row, base_column + 0.5 - column
    base = base_row.astype(np.intp) * wide.shape[1] + base_column.astype(np.intp)
    square, flat = radius * radius, wide.reshape(-1)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            nearest = max(abs(down) - 0.5, 0.0) ** 2 + max(abs(right) - 0.5, 0.0) ** 2
            if nearest <= square.max():
                hit = (row + down) ** 2 + (column + right) ** 2 <= square
                at = base[hit] + ((down + reach) * wide.shape[1] + right + reach)
                flat[at] = np.maximum(flat[at], level[hit])
    np.maximum(levels, wide[reach : reach + height, reach : reach + width], out=levels)


def _traced(strands: Strands, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and radius, in the view's pixels, of points along the strands, tips first."""
    ends = multiply(np.concatenate(strands[:3]) - view.position, view.rotation)
    near = max(float(ends[:, 2].min()), NEAR)
    long = sum(
        np.sqrt(((a - b) ** 2).sum(1)).max()
        for a, b in ((strands.root, strands.bend), (strands.bend, strands.tip))
    )
    steps = int(long * view.focal[0] / near) + 2
    t = ((np.arange(steps, 0, -1) - 0.5) / steps)[:, None, None]
    root, bend, tip = np.split(ends, 3)
    at = ((1 - t) * (1 - t) * root + 2 * t * (1 - t) * bend + t * t * tip).reshape(-1, 3)
    x, y, z = at.T
    scale = view.focal[0] / np.maximum(z, NEAR)
    column, row = view.centre[0] + x * scale, view.centre[1] - y * scale
    radius = (strands.radius * (1.0 - TAPER * t[:, 0])).ravel() * scale
    above = multiply(at, view.rotation.T)[:, 1] > -view.position[1]  # the floor
    inside = above & (z > NEAR) & (row >= 0) & (row < len(view.v))
    inside &= (column >= 0) & (column < len(view.u))
    return row[inside], column[inside], radius[inside]
