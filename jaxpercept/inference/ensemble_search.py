"""diffusers' search for the alignment of an ensemble's members, on the host.

What it computes, and how far its result can be trusted, says `jaxpercept.inference.ensemble`.
[`pipelines/marigold/pipeline_marigold_depth.py`, `ensemble_depth`]
"""

import functools
import itertools
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxpercept.inference.median import lower_median
from jaxpercept.resize import nearest_index

MIN_RANGE = 1e-6
"""Ranges of maps count as at least this."""


def search_alignment(
    maps: Float[np.ndarray, "e h w"],
    *,
    shift_invariant: bool,
    reduction: str,
    regularizer_strength: float,
    max_iter: int,
    tol: float,
    max_res: int | None,
) -> tuple[Float[np.ndarray, "e"], Float[np.ndarray, "e"]]:
    """(scale, shift) of each member, float32, as diffusers' BFGS finds them."""
    from scipy import optimize

    maps = _subsample(maps, max_res)
    low, high = maps.min(axis=(1, 2)), maps.max(axis=(1, 2))
    scale = 1 / np.maximum(high - low if shift_invariant else high, np.float32(MIN_RANGE))
    start = np.concatenate([scale, -scale * low]) if shift_invariant else scale
    with warnings.catch_warnings():
        # A line search among rounding errors is bound to fail at times.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = optimize.minimize(
            _diffusers_cost(maps, reduction, regularizer_strength),
            start.astype(np.float64),
            method="BFGS",
            tol=tol,
            options={"maxiter": max_iter, "disp": False},
        )
    return _scale_and_shift(found.x, len(maps))


def _subsample(maps: np.ndarray, max_res: int | None) -> np.ndarray:
    """Pixels nearest-exact, so that the long side has max_res of them at most."""
    height, width = maps.shape[1:]
    long = max(height, width)
    if max_res is None or long <= max_res:
        return maps
    rows, columns = (
        nearest_index(size, max(size * max_res // long, 1), "nearest-exact")
        for size in (height, width)
    )
    return maps[:, rows[:, None], columns]


def _scale_and_shift(parameters: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32; without shifts these are 0."""
    scale, shift = np.zeros((2, count), np.float32)
    scale[:] = parameters[:count]
    shift[: len(parameters) - count] = parameters[count:]
    return scale, shift


def _diffusers_cost(
    maps: np.ndarray, reduction: str, regularizer_strength: float
) -> Callable[[np.ndarray], float]:
    """diffusers' cost of scales and shifts, with torch's float32 operations in torch's order.

    Finite differences change one parameter at a time, and a scale by less than float32 resolves:
    the terms of the other members are kept from one call to the next.
    """
    count = len(maps)
    maps = maps.reshape(count, -1)
    buffer = np.empty(maps.shape[1], np.float32)
    block = 1 << 13  # So many pixels of all members stay in the cache.

    @functools.lru_cache(2 * count)
    def aligned(index: int, scale: np.float32, shift: np.float32) -> np.ndarray:
        scaled = maps[index] * scale
        return np.add(scaled, shift, out=scaled)

    @functools.cache
    def distance(first: tuple, second: tuple) -> float:
        np.subtract(aligned(*first), aligned(*second), out=buffer)
        np.multiply(buffer, buffer, out=buffer)
        return float(np.sqrt(torch_sum(buffer) / np.float32(len(buffer))))

    @functools.cache
    def extremes(*members: tuple) -> tuple[np.float32, np.float32]:
        rows = [aligned(*member) for member in members]
        lows, highs = [], []
        for start in range(0, len(buffer), block):
            part = [row[start : start + block] for row in rows]
            if reduction == "mean":
                merged = _cascade(np.stack(part)) / np.float32(count)
            else:
                merged = lower_median(part, np.minimum, np.maximum)
            lows.append(merged.min())
            highs.append(merged.max())
        return min(lows), max(highs)

    def cost(parameters: np.ndarray) -> float:
        members = [*zip(range(count), *_scale_and_shift(parameters, count), strict=True)]
        total = 0.0
        for first, second in itertools.combinations(members, 2):
            total += distance(first, second)
        if regularizer_strength > 0:
            low, high = extremes(*members)
            missing = float(abs(low)) + float(abs(np.float32(1) - high))
            total += missing * regularizer_strength
        return total

    return cost


def torch_sum(x: Float[np.ndarray, "k"]) -> np.float32:
    """Float32 sum of 8 or more values in the order of torch on x86 with one thread.

    [`aten/src/ATen/native/cpu/SumKernel.cpp`]: four accumulators of eight lanes. More threads share
    the work from 32,768 values on, and so change the bits.
    """
    lanes, vectors = 8, len(x) // 8
    rows = vectors // 4
    partial = _cascade(x[: rows * 32].reshape(rows, 32)).reshape(4, lanes)
    total = partial[0]
    for vector in x[rows * 32 : vectors * 8].reshape(-1, lanes):
        total = total + vector
    for other in partial[1:]:
        total = total + other
    result = np.float32(0)
    for value in (*x[vectors * 8 :], *total):
        result += value
    return result


def _cascade(rows: Float[np.ndarray, "r k"]) -> Float[np.ndarray, "k"]:
    """Σ rows: sums of at least 16 rows, sums of as many of those sums, and so on, four levels."""
    step = 1 << max(4, max(len(rows) - 1, 0).bit_length() // 4)
    total = np.zeros(rows.shape[1], np.float32)
    for _ in range(3):
        whole = len(rows) // step * step
        total = total + rows[whole:].sum(axis=0)
        rows = rows[:whole].reshape(-1, step, rows.shape[1]).sum(axis=1)
    return total + rows.sum(axis=0)
