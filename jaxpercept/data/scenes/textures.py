"""Periodic texture tiles with mip levels, and the tone curves of the virtual camera.

Every tile says, per texel, how much of a material's second and third colour shows (the rest is
its first colour), so that one atlas serves every palette. All tables are built from integer
hashes, additions, products and square roots only: these are exact in IEEE arithmetic, so the
pictures made from them are the same to the bit on every machine.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Number = int | float

SIZE = 128
LEVELS = 8  # 128, 64, ... 1 texels a side

TILES = (
    "flat", "cloud", "grain", "wood", "planks", "tiles", "checker", "bricks", "stripes",
    "bands", "dots", "plaid", "blobs", "books", "blinds", "panel", "drawers", "landscape",
    "poster", "window", "curtain", "screen", "clutter", "speckle", "oven", "weave", "parquet",
    "door", "folds", "cupboards",
)  # fmt: skip
TILE = {name: number for number, name in enumerate(TILES)}


class Atlas(NamedTuple):
    """Flat texel arrays of all tiles and mip levels, and where each (tile, level) starts."""

    second: Float[np.ndarray, " texels"]
    third: Float[np.ndarray, " texels"]
    start: Int[np.ndarray, "tiles levels"]


def _uniform(stream: int, *shape: int) -> Float[np.ndarray, "..."]:
    """Uniform numbers in [0, 1) that depend on `stream` only."""
    return np.random.Generator(np.random.Philox(key=[0x7E87, stream])).random(shape)


def _upsample(grid: Float[np.ndarray, "h w"], rows: int, cols: int) -> Float[np.ndarray, "a b"]:
    """Periodic smoothstep interpolation of a coarse grid (value noise)."""
    for axis, size in ((0, rows), (1, cols)):
        cells = grid.shape[axis]
        at = (np.arange(size) + 0.5) * (cells / size)
        low = np.floor(at).astype(int)
        part = at - low
        part = part * part * (3.0 - 2.0 * part)
        part = part[:, None] if axis == 0 else part[None, :]
        a = np.take(grid, low % cells, axis=axis)
        b = np.take(grid, (low + 1) % cells, axis=axis)
        grid = a + (b - a) * part
    return grid


def noise(stream: int, rows: int, cols: int, octaves: int, gain: Number = 0.5) -> np.ndarray:
    """Fractal value noise in [0, 1]: `rows` x `cols` cells in the first octave."""
    total, scale, amplitude = np.zeros((SIZE, SIZE)), 0.0, 1.0
    for octave in range(octaves):
        shape = (min(rows << octave, SIZE), min(cols << octave, SIZE))
        total += amplitude * _upsample(_uniform(stream * 16 + octave, *shape), SIZE, SIZE)
        scale += amplitude
        amplitude *= gain
    total /= scale
    return (total - total.min()) / (total.max() - total.min())


def _step(value: np.ndarray, edge: np.ndarray | Number, width: Number) -> np.ndarray:
    """A ramp from 0 to 1 around `edge`."""
    return np.clip((value - edge) / width + 0.5, 0.0, 1.0)


def _cells(across: int, up: int, shift: Number = 0.0) -> tuple[np.ndarray, ...]:
    """(column, row, x within the cell, y within the cell) of a grid of cells over the tile."""
    y, x = np.meshgrid(*(2 * [(np.arange(SIZE) + 0.5) / SIZE]), indexing="ij")
    row = np.floor(y * up).astype(int)
    along = x * across + shift * (row % 2)
    column = np.floor(along).astype(int) % across
    return column, row, along % 1.0, (y * up) % 1.0


def _frame(x: np.ndarray, y: np.ndarray, left: Number, low: Number, right: Number, high: Number):
    """1 inside the rectangle, 0 outside."""
    return ((x > left) & (x < right) & (y > low) & (y < high)).astype(float)


def _draw(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the second and third colour over one tile; row 0 is the bottom."""
    zero = np.zeros((SIZE, SIZE))
    _, _, x, y = _cells(1, 1)
    fine = noise(seed, 32, 32, 3, 0.8)
    if name == "flat":
        return 0.6 * noise(seed + 100, 3, 3, 4) + 0.4 * fine, zero
    if name == "cloud":
        return noise(seed, 4, 4, 5), 0.25 * noise(seed + 100, 8, 8, 3)
    if name == "grain":
        return fine, 0.3 * noise(seed + 100, 6, 6, 3)
    if name == "wood":
        rings = (noise(seed, 2, 12, 4, 0.6) * 5.0) % 1.0
        return np.abs(2 * rings - 1) * 0.6 + 0.4 * noise(seed + 100, 4, 48, 2), zero
    if name in ("planks", "parquet"):
        column, row, cx, cy = _cells(8, 2, 0.37) if name == "planks" else _cells(4, 4)
        if name == "parquet":
            turn = (column + row) % 2 == 0
            cx, cy = np.where(turn, cx, cy), np.where(turn, cy, cx)
        tone = _uniform(seed, 8, 8)[row % 8, column % 8]
        gap = 1.0 - _frame(cx, cy, 0.05, 0.012, 0.95, 0.988)
        streaks = noise(seed + 100, 3, 48, 2)
        return np.clip(0.65 * tone + 0.35 * streaks, 0, 1) * (1 - gap), 0.7 * gap
    if name == "tiles":
        column, row, cx, cy = _cells(4, 4)
        grout = 1.0 - _frame(cx, cy, 0.04, 0.04, 0.96, 0.96)
        tone = 0.5 * _uniform(seed, 4, 4)[row, column] + 0.5 * noise(seed + 100, 8, 8, 3)
        return tone * (1 - grout), grout
    if name == "checker":
        column, row, _, _ = _cells(4, 4)
        return ((column + row) % 2) * (0.85 + 0.15 * fine), zero
    if name == "bricks":
        column, row, cx, cy = _cells(4, 12, 0.5)
        mortar = 1.0 - _frame(cx, cy, 0.04, 0.1, 0.96, 0.9)
        tone = 0.7 * _uniform(seed, 12, 4)[row, column] + 0.3 * fine
        return tone * (1 - mortar), mortar
    if name == "stripes":
        column, _, cx, _ = _cells(8, 1)
        thin = _frame(cx, y, 0.4, -1, 0.6, 2)
        return (column % 2).astype(float) * (1 - thin), 0.8 * thin
    if name == "bands":
        edges = np.sort(_uniform(seed, 14))
        band = np.searchsorted(edges, y) % 14
        tones = _uniform(seed + 100, 14, 2)
        return 0.6 * tones[band, 0], 0.4 * _step(tones[band, 1], 0.6, 0.1)
    if name == "dots":
        _, _, cx, cy = _cells(6, 6, 0.5)
        away = np.sqrt((cx - 0.5) ** 2 + (cy - 0.5) ** 2)
        return 1.0 - _step(away, 0.3, 0.08), zero
    if name == "plaid":
        _, _, cx, cy = _cells(5, 5)
        vertical, horizontal = _frame(cx, y, 0.2, -1, 0.6, 2), _frame(x, cy, -1, 0.2, 2, 0.6)
        line = np.maximum(_frame(cx, y, 0.8, -1, 0.88, 2), _frame(x, cy, -1, 0.8, 2, 0.88))
        return 0.5 * (vertical + horizontal) * (1 - line), 0.9 * line
    if name == "blobs":
        petals = _step(noise(seed, 7, 7, 2), 0.55, 0.06)
        return petals, (1 - petals) * _step(noise(seed + 100, 9, 9, 2), 0.62, 0.06)
    if name == "books":
        edges = np.cumsum(0.4 + _uniform(seed, 26))
        book = np.searchsorted(edges / edges[-1], x)
        tones = _uniform(seed + 100, 27, 4)
        gap = _step(y, 0.6 + 0.38 * tones[book, 2], 0.02)
        label = _frame(x, y, 0, 0.3, 1, 0.42) * (tones[book, 3] > 0.5)
        second = np.clip(tones[book, 0] + 0.3 * label, 0, 1)
        third = _step(tones[book, 1], 0.55, 0.2) * (1 - second)
        return second * (1 - gap), np.maximum(third * (1 - gap), gap)
    if name == "blinds":
        _, _, _, cy = _cells(1, 16)
        return np.clip(1.2 * cy - 0.1, 0, 1), zero
    if name in ("panel", "door", "cupboards"):
        _, _, cx, cy = _cells(*{"panel": (2, 1), "door": (2, 3), "cupboards": (4, 1)}[name])
        inner = _frame(cx, cy, 0.14, 0.1, 0.86, 0.9)
        core = _frame(cx, cy, 0.2, 0.15, 0.8, 0.85)
        gap = 1.0 - _frame(cx, cy, 0.02, 0.01, 0.98, 0.99)
        knob = _frame(cx, cy, 0.84, 0.45, 0.94, 0.6)
        if name == "door":
            gap, knob = (
                1.0 - _frame(x, y, 0.02, 0.0, 0.98, 0.985),
                _frame(x, y, 0.86, 0.45, 0.94, 0.5),
            )
        shade = 0.5 * (inner - core) + 0.15 * core + 0.1 * fine
        edge = np.maximum(gap, knob)
        return shade * (1 - edge), 0.8 * edge
    if name == "drawers":
        _, _, cx, cy = _cells(1, 4)
        gap = 1.0 - _frame(cx, cy, 0.03, 0.04, 0.97, 0.96)
        knob = np.maximum(_frame(cx, cy, 0.2, 0.42, 0.3, 0.6), _frame(cx, cy, 0.7, 0.42, 0.8, 0.6))
        edge = np.maximum(gap, knob)
        return (0.2 * cy + 0.1 * fine) * (1 - edge), 0.85 * edge
    if name in ("landscape", "window"):
        hills = _upsample(_uniform(seed, 1, 6), 1, SIZE)
        ground = 1.0 - _step(y, 0.25 + 0.35 * hills[0][None, :], 0.05)
        second = ground * (0.4 + 0.6 * noise(seed + 100, 8, 8, 3))
        bars = 1.0 - _frame(x, y, 0.06, 0.05, 0.94, 0.95)
        if name == "window":
            bars = np.maximum(bars, _frame(x, y, 0.475, 0, 0.525, 1))
            bars = np.maximum(bars, _frame(x, y, 0, 0.48, 1, 0.52))
        return second * (1 - bars), bars
    if name in ("poster", "clutter"):
        second, third, count = zero.copy(), zero.copy(), 14 if name == "poster" else 60
        for left, low, width, height, a, b in _uniform(seed, count, 6):
            part = 0.45 if name == "poster" else 0.22
            inside = _frame((x - left) % 1.0, (y - low) % 1.0, -1, -1, width * part, height * part)
            second = second * (1 - inside) + a * inside
            third = third * (1 - inside) + b * (1 - a) * inside
        return second, third
    if name == "curtain":
        wave = _upsample(_uniform(seed, 1, 18), 1, SIZE)[0][None, :] + zero
        return wave, zero
    if name == "folds":
        return _step(noise(seed, 3, 3, 3), 0.5, 0.8), 0.2 * fine
    if name == "screen":
        frame = 1.0 - _frame(x, y, 0.03, 0.05, 0.97, 0.95)
        glare = np.clip(x + y - 1.1, 0, 1) * (1 - frame)
        return 0.5 * frame, 0.6 * glare
    if name == "speckle":
        return _step(fine, 0.55, 0.2), (1 - _step(fine, 0.55, 0.2)) * _step(1 - fine, 0.72, 0.1)
    if name == "oven":
        glass = _frame(x, y, 0.1, 0.12, 0.9, 0.66)
        strip = _frame(x, y, 0.05, 0.78, 0.95, 0.95)
        handle = _frame(x, y, 0.1, 0.69, 0.9, 0.74)
        return np.clip(0.9 * glass + 0.5 * strip, 0, 1), handle
    if name == "weave":
        column, row, cx, cy = _cells(16, 16)
        over = np.where((column + row) % 2 == 0, cx, cy)
        return 4 * over * (1 - over), zero
    raise KeyError(name)


@functools.cache
def atlas() -> Atlas:
    """All tiles with their mip levels; built once a process in a few tenths of a second."""
    second, third = [], []
    start = np.zeros((len(TILES), LEVELS), np.int32)
    offset = 0
    for number, name in enumerate(TILES):
        second_part, third_part = _draw(name, 1000 + 211 * number)
        layers = (second_part, np.minimum(third_part, 1.0 - second_part))
        for level in range(LEVELS):
            start[number, level] = offset
            offset += layers[0].size
            second.append(layers[0].astype(np.float32).ravel())
            third.append(layers[1].astype(np.float32).ravel())
            layers = tuple(
                0.25 * (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2])
                if level < LEVELS - 1
                else a
                for a in layers
            )
    return Atlas(np.concatenate(second), np.concatenate(third), start)


@functools.cache
def gaussian_tile() -> Float[np.ndarray, "512 512"]:
    """Sensor noise: sums of twelve uniform bytes, of unit variance, read at random offsets."""
    draws = np.random.Generator(np.random.Philox(key=[0x7E87, 1])).integers(
        0, 256, (12, 512, 512), dtype=np.int32
    )
    return ((draws.sum(0) - 1530) / 256.0).astype(np.float32)


@functools.cache
def tone_curve(gamma_step: int, contrast_step: int) -> Float[np.ndarray, " 4096"]:
    """Linear light in [0, 1] (4096 steps) -> display value in [0, 255].

    gamma = 1.8 + 0.1 * gamma_step; the S-curve mixes in smoothstep by 0.1 * contrast_step. The
    powers are computed in float64 and rounded to 1/64 grey level, so that the last bit of a
    platform's `pow` cannot show.
    """
    gamma, contrast = 1.8 + 0.1 * gamma_step, 0.1 * contrast_step
    table = []
    for step in range(4096):
        value = math.pow((step + 0.5) / 4096.0, 1.0 / gamma)
        value += contrast * (value * value * (3.0 - 2.0 * value) - value)
        table.append(round(255.0 * value * 64.0) / 64.0)
    return np.array(table, np.float32)


@functools.cache
def _linear_of_byte() -> tuple[float, ...]:
    return tuple(round(math.pow(byte / 255.0, 2.2), 6) for byte in range(256))


def linear(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    """8-bit display colour -> linear light."""
    table = _linear_of_byte()
    return table[rgb[0]], table[rgb[1]], table[rgb[2]]
