"""Images beyond memory: predict overlapping tiles of one shape and merge them without seams.

    places = plan_tiles(image.shape[:2], tile, overlap)
    tiles = predict(cut_tiles(image, places, tile))
    merged = merge_tiles(tiles, places, image.shape[:2], alignment="affine", anchor=coarse)

All tiles have one shape, and so the network is compiled once. A network that predicts up to scale
and shift chooses both anew for each tile; one least-squares problem over all tiles finds them.
NumPy only; predictions are on the host already.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Shaped

from jaxpercept.errors import UserError

Alignment = Literal["affine", "none", "unit", "nearest"]
Place = tuple[int, int]
Size = tuple[int, int]

# Block means along each side of an area on which two maps are compared: enough to fit a line, and
# few enough to average noise and the detail that a coarse map lacks.
_BLOCKS = 32
_ROUNDS = 8
# Differences below this part of the spread are not worth calling outliers.
_NEGLIGIBLE = 1e-3
# A scale is at least this part of the typical one: near 0 a tile is flat, below it is inverted.
_LEAST_SCALE = 1e-2
# ... and with an anchor, it gives the tile at least this part of the anchor's spread there.
_LEAST_SPREAD = 0.7
# Decides what the data leave open (the scale of a constant tile), and nothing else.
_RIDGE = 1e-6
# A variance below this is rounding.
_CONSTANT = 1e-12


def plan_tiles(size: Size, tile: Size, overlap: int) -> list[Place]:
    """Where to cut overlapping tiles.

    Args:
        size: (height, width) of the image.
        tile: (height, width) of the tiles; where the image is smaller, its extent.
        overlap: least overlap of neighbours in pixels.

    Returns:
        (top, left) of the fewest tiles that cover the image, row by row, spread evenly.

    Raises:
        UserError: an empty image or tile, or an overlap that leaves no room to advance.
    """
    if min(*size, *tile) < 1 or overlap < 0:
        raise UserError(
            f"tiles of {tile} pixels with an overlap of {overlap} cannot cover an image of {size}: "
            "give positive sizes and an overlap >= 0."
        )
    rows, columns = (_starts(*axis, overlap) for axis in zip(size, tile, strict=True))
    return list(itertools.product(rows, columns))


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if tile >= size:
        return [0]
    if overlap >= tile:
        raise UserError(
            f"an overlap of {overlap} pixels needs larger tiles than {tile}: make it smaller, a "
            "quarter of the tile at most."
        )
    gaps = -(-(size - tile) // (tile - overlap))
    # Rounding down keeps every step at most tile - overlap, because that is an integer.
    return [i * (size - tile) // gaps for i in range(gaps + 1)]


def cut_tiles(
    image: Shaped[np.ndarray, "H W c"], places: Sequence[Place], tile: Size
) -> Shaped[np.ndarray, "t h w c"]:
    """The image's tiles at `places`, of `tile`'s size or the image's extent where smaller."""
    height, width = np.minimum(tile, image.shape[:2])
    return np.stack([image[top : top + height, left : left + width] for top, left in places])


def predict_tiled(
    predict: Callable[[np.ndarray], np.ndarray],
    image: Shaped[np.ndarray, "H W 3"],
    *,
    tile: Size,
    overlap: int,
    alignment: Alignment,
    anchor: Float[np.ndarray, "H W c"] | None = None,
) -> Float32[np.ndarray, "H W c"]:
    """Cut, predict and merge.

    Args:
        predict: [t, h, w, 3] to [t, h, w, c]; it gets all tiles at once and batches them itself.
        image: the whole image.
        tile, overlap: as in `plan_tiles`.
        alignment, anchor: as in `merge_tiles`.
    """
    size = image.shape[:2]
    places = plan_tiles(size, tile, overlap)
    tiles = predict(cut_tiles(image, places, tile))
    return merge_tiles(tiles, places, size, alignment=alignment, anchor=anchor)


def merge_tiles(
    tiles: Float[np.ndarray, "t h w c"],
    places: Sequence[Place],
    size: Size,
    *,
    alignment: Alignment,
    anchor: Float[np.ndarray, "H W c"] | None = None,
) -> Float32[np.ndarray, "H W c"]:
    """One map from the predictions of overlapping tiles, blended with raised-cosine windows.

    Args:
        tiles: predictions of the tiles, all finite.
        places: (top, left) of each, from `plan_tiles`.
        size: (height, width) of the image.
        alignment: "affine" for maps up to scale and shift (depth, disparity; one channel), which
            `align_tiles` brings to one scale; "unit" for unit vectors (normals), normalised after
            blending; "nearest" for numbers that cannot be blended (classes), each pixel's from the
            tile it lies deepest in; "none" for all that needs neither.
        anchor: for "affine", a coarse prediction of the whole image, resized to its size. Without
            it, errors of the tiles' scales add up over many tiles.

    Returns:
        float32. For "affine" in [0, 1] if tiles and anchor are: values that the fit puts outside
        are not clipped, which would flatten the nearest or farthest parts, but the whole map is
        squeezed; that is another scale and shift, and these mean nothing.

    Raises:
        UserError: the tiles do not cover the image, the anchor has another size, or the alignment
            is unknown or does not fit.
    """
    if alignment not in get_args(Alignment):
        raise UserError(
            f"the alignment {alignment!r} is unknown: use {', '.join(get_args(Alignment))}."
        )
    if alignment == "affine" and tiles.shape[-1] != 1:
        raise UserError(f"tiles of {tiles.shape[-1]} channels have no common scale: use unit.")
    if anchor is not None and anchor.shape[:2] != size:
        raise UserError(f"the anchor is {anchor.shape[:2]}: resize it to the image's {size}.")
    count, height, width, channels = tiles.shape
    scales, shifts = np.ones(count), np.zeros(count)
    if alignment == "affine":
        scales, shifts = align_tiles(tiles, places, anchor)
    rows = _windows([top for top, _ in places], height)
    columns = _windows([left for _, left in places], width)
    total = np.zeros((*size, channels), np.float32)
    weight = np.zeros((*size, 1), np.float32)
    for tile, (top, left), scale, shift in zip(tiles, places, scales, shifts, strict=True):
        area = np.s_[top : top + height, left : left + width]
        window = (rows[top][:, None] * columns[left])[..., None]
        if alignment == "nearest":
            total[area] = np.where(window > weight[area], tile, total[area])
            weight[area] = np.maximum(window, weight[area])
        else:
            total[area] += window * (np.float32(scale) * tile + np.float32(shift))
            weight[area] += window
    if not weight.all():
        raise UserError(f"the tiles do not cover the image of {size}: use plan_tiles.")
    merged = total if alignment == "nearest" else total / weight
    if alignment == "unit":
        return _unit(merged)
    return _squeeze(merged) if alignment == "affine" else merged


def _windows(starts: Sequence[int], extent: int) -> dict[int, Float32[np.ndarray, " extent"]]:
    """Weights along one axis by a tile's start: raised-cosine ramps where neighbours overlap."""
    order = sorted(set(starts))
    windows = {start: np.ones(extent, np.float32) for start in order}
    for before, after in itertools.pairwise(order):
        overlap = before + extent - after
        if overlap > 0:
            # Half a pixel inside: positive everywhere, and the two ramps add up to 1.
            rise = np.sin((np.arange(overlap) + 0.5) / overlap * np.pi / 2) ** 2
            windows[before][-overlap:] *= rise[::-1].astype(np.float32)
            windows[after][:overlap] *= rise.astype(np.float32)
    return windows


def _unit(vectors: Float[np.ndarray, "H W c"]) -> Float[np.ndarray, "H W c"]:
    """Unit vectors; where opposite ones have cancelled, towards the viewer (0, 0, 1)."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    viewer = np.eye(vectors.shape[-1], dtype=vectors.dtype)[-1]
    return np.where(length > 1e-6, vectors / np.maximum(length, 1e-6), viewer)


def _squeeze(values: Float[np.ndarray, "H W 1"]) -> Float[np.ndarray, "H W 1"]:
    """Into [0, 1] by one affine map; unchanged if there already."""
    low, high = min(values.min(), 0), max(values.max(), 1)
    return np.clip((values - low) / (high - low), 0, 1)


@dataclasses.dataclass(frozen=True)
class _Agreement:
    """A tile that should equal another one, or the anchor, on the block means of an area.

    Attributes:
        unknowns: the scales and offsets that take part.
        design: their coefficients.
        target: what they should give: the anchor, or 0 for a difference of tiles.
        area: pixels of a block.
    """

    unknowns: list[int]
    design: Float[np.ndarray, "k u"]
    target: Float[np.ndarray, " k"]
    area: float


def align_tiles(
    tiles: Float[np.ndarray, "t h w 1"],
    places: Sequence[Place],
    anchor: Float[np.ndarray, "H W 1"] | None = None,
    *,
    anchor_weight: float = 0.03,
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Scales and shifts with which overlapping tiles agree: scale * tile + shift.

    One linear least-squares problem: squared differences in all overlaps, plus `anchor_weight`
    times those from the anchor, both over pixels; reweighted a few rounds by Cauchy's function, so
    that edges and objects on which tiles disagree hardly count. The anchor also fixes the scale
    and shift of the whole; without one, or with a constant one, the mean scale is 1 and the mean
    shift 0.

    Least squares shrinks the scales of tiles that disagree: maps of no contrast agree best. So a
    scale is at least 1 % of the typical one, and with an anchor at least what gives the tile 70 %
    of the anchor's spread at its place; those that come out below are set to that, and the others
    solved again.
    """
    count = len(tiles)
    size = tiles.shape[1:3]
    maps = tiles[..., 0]
    # The unknowns are scales and the values at the tiles' means, which are nearly independent.
    means = maps.mean((1, 2), dtype=np.float64)
    contrast = np.mean([values.var(dtype=np.float64) for values in maps])
    if contrast <= _CONSTANT:
        contrast = 1.0
    coarse = [] if anchor is None else [_at(anchor[..., 0], place, size) for place in places]
    coarse_contrast = np.mean([area.var(dtype=np.float64) for area in coarse]) if coarse else 0.0
    if coarse_contrast <= _CONSTANT:
        coarse = []
    typical = np.sqrt(coarse_contrast / contrast) if coarse else 1.0
    offsets = np.array([area.mean(dtype=np.float64) for area in coarse]) if coarse else means

    # The weak pull towards typical values, of scales rather than of offsets.
    prior = np.r_[np.full(count, typical), offsets]
    pull = _RIDGE * contrast * np.diag(np.r_[np.ones(count), np.full(count, _RIDGE)])
    if not coarse:
        # The overlaps allow any common scale and shift: fix the means, with any strength.
        both = np.kron(np.eye(2), np.ones(count))
        pull += both.T @ np.diag([contrast, 1.0]) @ both / count
    pull *= size[0] * size[1]

    least = np.full(count, _LEAST_SCALE * typical)
    for i, area in enumerate(coarse):
        spread, wanted = block_means(maps[i]).std(), block_means(area).std()
        if spread > np.sqrt(_CONSTANT):
            least[i] = max(least[i], _LEAST_SPREAD * wanted / spread)
    groups = [
        (_overlaps(maps, means, places), 1.0),
        (_to_anchor(maps, means, coarse), anchor_weight),
    ]
    solution = _robust_solve(
        [group for group in groups if group[0]],
        (pull, pull @ prior),
        least=least,
        negligible=_NEGLIGIBLE * typical * np.sqrt(contrast),
    )
    scales = solution[:count]
    shifts = solution[count:] - scales * means
    if not coarse:
        shifts = (shifts - shifts.mean()) / scales.mean()
        scales = scales / scales.mean()
    return scales, shifts


def _at(values: np.ndarray, place: Place, size: Size) -> np.ndarray:
    return values[place[0] : place[0] + size[0], place[1] : place[1] + size[1]]


def _overlaps(
    maps: Float[np.ndarray, "t h w"], means: Float[np.ndarray, " t"], places: Sequence[Place]
) -> list[_Agreement]:
    """Every two tiles that overlap should agree there."""
    count, *extent = maps.shape
    terms = []
    for i, j in itertools.combinations(range(count), 2):
        offset = [b - a for a, b in zip(places[i], places[j], strict=True)]
        height, width = (n - abs(d) for n, d in zip(extent, offset, strict=True))
        if min(height, width) > 0:
            from_i = max(offset[0], 0), max(offset[1], 0)
            from_j = max(-offset[0], 0), max(-offset[1], 0)
            a = block_means(_at(maps[i], from_i, (height, width))).ravel() - means[i]
            b = block_means(_at(maps[j], from_j, (height, width))).ravel() - means[j]
            ones = np.ones_like(a)
            design = np.stack([a, ones, -b, -ones], axis=1)
            unknowns = [i, count + i, j, count + j]
            terms.append(_Agreement(unknowns, design, 0 * a, height * width / len(a)))
    return terms


def _to_anchor(
    maps: Float[np.ndarray, "t h w"],
    means: Float[np.ndarray, " t"],
    coarse: Sequence[Float[np.ndarray, "h w"]],
) -> list[_Agreement]:
    """Every tile should equal the anchor at its place."""
    count = len(maps)
    terms = []
    for i, anchor in enumerate(coarse):
        a, target = (block_means(values).ravel() for values in (maps[i], anchor))
        design = np.stack([a - means[i], np.ones_like(a)], axis=1)
        terms.append(_Agreement([i, count + i], design, target, anchor.size / len(a)))
    return terms


def _robust_solve(
    groups: Sequence[tuple[Sequence[_Agreement], float]],
    prior: tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]],
    *,
    least: Float[np.ndarray, " s"],
    negligible: float,
) -> Float[np.ndarray, " n"]:
    """Iteratively reweighted least squares; each group has its own size of residuals.

    Args:
        groups: agreements, none empty, and the weight of each group. All weigh the same in the
            first round: a strong anchor finds the outliers of overlaps.
        prior: normal equations to begin with.
        least: of each of the first unknowns, the scales.
        negligible: as in `robust_weights`.
    """
    weights = [[np.ones_like(term.target) for term in group] for group, _ in groups]
    for turn in range(_ROUNDS):
        matrix, vector = (part.copy() for part in prior)
        for (group, factor), group_weights in zip(groups, weights, strict=True):
            for term, weight in zip(group, group_weights, strict=True):
                strength = term.area * (factor if turn else 1.0)
                weighted = strength * weight[:, None] * term.design
                matrix[np.ix_(term.unknowns, term.unknowns)] += weighted.T @ term.design
                vector[term.unknowns] += weighted.T @ term.target
        solution = _bounded_solve(matrix, vector, least)
        weights = []
        for group, _ in groups:
            residuals = [term.design @ solution[term.unknowns] - term.target for term in group]
            ends = np.cumsum([len(residual) for residual in residuals])[:-1]
            every = np.concatenate(residuals)
            weights.append(np.split(robust_weights(every, negligible), ends))
    return solution


def _bounded_solve(
    matrix: Float[np.ndarray, "n n"],
    vector: Float[np.ndarray, " n"],
    least: Float[np.ndarray, " s"],
) -> Float[np.ndarray, " n"]:
    """Solve normal equations; the first unknowns are at least `least`."""
    bound = np.full(len(vector), -np.inf)
    bound[: len(least)] = least
    fixed = np.zeros(len(vector), bool)
    while True:
        free = ~fixed
        solution = bound.copy()
        known = matrix[np.ix_(free, fixed)] @ bound[fixed]
        solution[free] = np.linalg.solve(matrix[np.ix_(free, free)], vector[free] - known)
        low = solution < bound
        if not low.any():
            return solution
        fixed |= low


def robust_weights(residual: Float[np.ndarray, " k"], negligible: float) -> Float[np.ndarray, " k"]:
    """Cauchy's weights 1 / (1 + (r / 2.385 sigma)^2), sigma from the median absolute residual.

    Args:
        residual: any unit.
        negligible: least sigma; it must be positive unless all residuals are 0.
    """
    sigma = max(1.4826 * float(np.median(np.abs(residual))), negligible, np.finfo(float).tiny)
    return 1 / (1 + (residual / (2.385 * sigma)) ** 2)


def block_means(values: Float[np.ndarray, "h w"], most: int = _BLOCKS) -> Float[np.ndarray, "i j"]:
    """float64 means over equal blocks, at least `most` along each side if there are as many pixels.

    Fewer pixels than a block at the bottom and right belong to none.
    """
    height, width = (max(size // most, 1) for size in values.shape)
    rows, columns = values.shape[0] // height, values.shape[1] // width
    whole = values[: rows * height, : columns * width]
    blocks = whole.reshape(rows, height, columns, width)
    return blocks.mean((1, 3), dtype=np.float64)
