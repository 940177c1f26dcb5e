"""Tiles: where they are cut, how they find one scale, and that no seams remain."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpercept.errors import UserError
from jaxpercept.inference.tiles import (
    align_tiles,
    block_means,
    cut_tiles,
    merge_tiles,
    plan_tiles,
    predict_tiled,
)


def resized(values, size, method=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size[::-1], method))


def fitted(values, truth):
    """`values` under the affine map that brings them closest to `truth`."""
    design = np.stack([values.ravel(), np.ones(values.size)], axis=1)
    return (design @ np.linalg.lstsq(design, truth.ravel(), rcond=None)[0]).reshape(truth.shape)


def relative_error(values, truth):
    """Mean error after the best affine map, relative to the truth's range."""
    return np.abs(fitted(values, truth) - truth).mean() / np.ptp(truth)


def seam(values, places, tile):
    """Largest change of slope across a tile border, relative to 95 % of all rows and columns."""
    ratios = []
    for axis in range(2):
        bend = np.abs(np.diff(values, 2, axis=axis)).mean(axis=1 - axis)
        starts = {place[axis] for place in places}
        borders = {edge for start in starts for edge in (start, start + tile[axis])}
        inner = [edge for edge in sorted(borders) if 0 < edge < values.shape[axis]]
        # Pixel `edge` is the first on the other side: two second differences cross the border.
        at_borders = np.array([bend[edge - 2 : edge].mean() for edge in inner])
        ratios.append(at_borders.max() / np.quantile(bend, 0.95))
    return max(ratios)


def pasted(tiles, places, size):
    """Tiles laid over each other."""
    image = np.zeros(size)
    for tile, (top, left) in zip(tiles[..., 0], places, strict=True):
        image[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return image


def surface(kind, size):
    y, x = np.mgrid[: size[0], : size[1]] / 100.0
    return {
        "ramp": x + 2 * y,
        "bumps": np.sin(3 * x) * np.cos(4 * y) + 0.4 * np.sin(9 * x + 2 * y) + x,
    }[kind]


def distorted(rng, tiles, *, noise, bend=0.0):
    """Each tile on a scale of its own, bent a little, with noise; both relative to its spread."""
    shape = (len(tiles), 1, 1, 1)
    y, x = (np.linspace(-1, 1, n) for n in tiles.shape[1:3])
    bends = rng.uniform(-bend, bend, shape) * (np.outer(1 - y**2, x) + x**2)[..., None]
    spread = tiles.std(axis=(1, 2, 3), keepdims=True)
    errors = (bends + noise * rng.normal(size=tiles.shape)) * spread
    scales, shifts = rng.uniform(0.3, 2, shape), rng.uniform(-1, 1, shape)
    return (scales * (tiles + errors) + shifts).astype(np.float32), scales.ravel(), shifts.ravel()


def test_plan_covers_with_the_overlap_asked_for(rng):
    for _ in range(200):
        size = tuple(rng.integers(1, 300, 2).tolist())
        tile = tuple(rng.integers(2, 150, 2).tolist())
        overlap = int(rng.integers(0, min(tile)))
        places = plan_tiles(size, tile, overlap)
        assert places == sorted(set(places))
        covered = np.zeros(size, bool)
        for (top, left), area in zip(
            places, cut_tiles(covered[..., None], places, tile), strict=True
        ):
            assert area.shape == (*np.minimum(size, tile), 1)
            covered[top : top + tile[0], left : left + tile[1]] = True
        assert covered.all()
        for axis in range(2):
            starts = sorted({place[axis] for place in places})
            steps = np.diff(starts)
            assert starts[0] == 0
            assert starts[-1] == max(size[axis] - tile[axis], 0)
            if len(steps):
                assert tile[axis] - steps.max() >= overlap
                assert np.ptp(steps) <= 1
                # One tile less could not keep the overlap.
                assert (tile[axis] - overlap) * (len(starts) - 2) + tile[axis] < size[axis]


def test_plan_known_values():
    assert plan_tiles((768, 768), (768, 768), 128) == [(0, 0)]
    assert plan_tiles((100, 1000), (768, 768), 128) == [(0, 0), (0, 232)]
    assert [left for _, left in plan_tiles((8, 20), (8, 8), 2)] == [0, 6, 12]
    assert plan_tiles((9, 5), (3, 5), 0) == [(0, 0), (3, 0), (6, 0)]


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "message"),
    [
        ((0, 10), (5, 5), 1, "positive sizes"),
        ((10, 10), (5, 0), 1, "positive sizes"),
        ((10, 10), (5, 5), -1, "overlap >= 0"),
        ((10, 10), (5, 5), 5, "larger tiles than 5"),
    ],
)
def test_plan_refuses(size, tile, overlap, message):
    with pytest.raises(UserError, match=message):
        plan_tiles(size, tile, overlap)


@pytest.mark.parametrize("alignment", ["none", "affine"])
def test_exact_tiles_give_the_image_back(rng, alignment):
    for size in ((61, 83), (7, 90), (5, 5)):
        image = rng.uniform(0, 1, (*size, 1)).astype(np.float32)
        places = plan_tiles(size, (31, 29), 11)
        tiles = cut_tiles(image, places, (31, 29))
        merged = merge_tiles(tiles, places, size, alignment=alignment)
        assert merged.dtype == np.float32
        np.testing.assert_allclose(merged, image, atol=2e-5)


def test_tile_larger_than_the_image(rng):
    image = rng.uniform(0, 1, (20, 30, 1)).astype(np.float32)
    places = plan_tiles((20, 30), (64, 64), 16)
    tiles = cut_tiles(image, places, (64, 64))
    assert (places, tiles.shape) == ([(0, 0)], (1, 20, 30, 1))
    merged = merge_tiles(tiles, places, (20, 30), alignment="affine")
    np.testing.assert_allclose(merged, image, atol=1e-6)
    # With an anchor the only tile takes its scale.
    merged = merge_tiles(tiles, places, (20, 30), alignment="affine", anchor=0.4 * image + 0.3)
    np.testing.assert_allclose(merged, 0.4 * image + 0.3, atol=1e-5)


def test_blending_is_a_weighted_mean(rng):
    places = plan_tiles((40, 70), (24, 24), 9)
    tiles = rng.uniform(-1, 1, (len(places), 1, 1, 2)) * np.ones((1, 24, 24, 1))
    merged = merge_tiles(tiles.astype(np.float32), places, (40, 70), alignment="none")
    low, high = tiles.min(axis=(0, 1, 2)), tiles.max(axis=(0, 1, 2))
    assert (merged >= low - 1e-6).all()
    assert (merged <= high + 1e-6).all()
    # Outside all overlaps a tile is alone.
    np.testing.assert_allclose(merged[0, 0], tiles[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(merged[-1, -1], tiles[-1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("kind", ["ramp", "bumps"])
def test_scales_and_shifts_are_found_exactly(rng, kind, anchored):
    size, tile = (150, 203), (64, 71)
    truth = surface(kind, size)[..., None]
    places = plan_tiles(size, tile, 16)
    tiles, scales, shifts = distorted(rng, cut_tiles(truth, places, tile), noise=0)
    found_scales, found_shifts = align_tiles(tiles, places, truth if anchored else None)
    # Found scale and shift undo the tile's, up to one affine map of the whole.
    total_scale = found_scales * scales
    total_shift = found_scales * shifts + found_shifts
    if anchored:
        np.testing.assert_allclose(total_scale, 1, rtol=1e-4)
        np.testing.assert_allclose(total_shift, 0, atol=1e-3)
    else:
        np.testing.assert_allclose(total_scale, total_scale.mean(), rtol=1e-3)
        np.testing.assert_allclose(total_shift, total_shift.mean(), atol=5e-3)
        np.testing.assert_allclose([found_scales.mean(), found_shifts.mean()], [1, 0], atol=1e-9)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("kind", ["ramp", "bumps"])
def test_no_seams_and_one_scale(rng, kind, anchored):
    size, tile = (211, 307), (96, 96)
    truth = surface(kind, size)
    places = plan_tiles(size, tile, 24)
    tiles, _, _ = distorted(rng, cut_tiles(truth[..., None], places, tile), noise=1e-3, bend=0.03)
    anchor = resized(resized(truth, (26, 38), Image.Resampling.BOX), size)[..., None]
    merged = merge_tiles(
        tiles, places, size, alignment="affine", anchor=anchor if anchored else None
    )[..., 0]
    assert 0 <= merged.min() < merged.max() <= 1
    # At most 0.0014, that is the bends; 0.06 and more without alignment.
    assert relative_error(merged, truth) < 0.003
    unaligned = merge_tiles(tiles, places, size, alignment="none")[..., 0]
    assert relative_error(unaligned, truth) > 0.03
    # At most 1.05; tiles laid over each other have 1.5 and more even on one scale.
    assert seam(merged, places, tile) < 1.15
    scales, shifts = align_tiles(tiles, places, anchor if anchored else None)
    aligned = tiles * scales[:, None, None, None] + shifts[:, None, None, None]
    assert seam(pasted(aligned, places, size), places, tile) > 1.2
    assert seam(pasted(tiles, places, size), places, tile) > 5


@pytest.mark.parametrize("anchored", [True, False])
def test_what_one_tile_alone_sees_moves_no_other(anchored):
    size, tile = (96, 260), (96, 80)
    truth = surface("bumps", size)[..., None]
    places = plan_tiles(size, tile, 35)
    tiles = cut_tiles(truth, places, tile).astype(np.float32)
    # A quarter of the overlap of the first two tiles, as high as the image's spread; with an
    # anchor it may be higher.
    tiles[1, :40, :20] += (3 if anchored else 1) * truth.std()
    scales, shifts = align_tiles(tiles, places, truth if anchored else None)
    np.testing.assert_allclose(scales, 1, atol=0.005)
    np.testing.assert_allclose(shifts, 0, atol=0.005)


@pytest.mark.parametrize("anchored", [True, False])
def test_scales_are_positive(anchored):
    size, tile = (64, 300), (64, 96)
    truth = surface("bumps", size)[..., None]
    places = plan_tiles(size, tile, 28)
    tiles = cut_tiles(truth, places, tile).astype(np.float32)
    tiles[-1] *= -1
    scales, _ = align_tiles(tiles, places, truth if anchored else None)
    assert (scales > 0).all()
    # The inverted tile does no harm to the others.
    np.testing.assert_allclose(scales[:-1], scales[0], rtol=0.1)


@pytest.mark.parametrize("anchored", [True, False])
def test_flat_tiles(rng, anchored):
    size, tile = (64, 200), (64, 64)
    truth = np.where(np.arange(200) < 100, 0.2, 0.8) * np.ones((64, 1))
    places = plan_tiles(size, tile, 16)
    tiles, _, _ = distorted(rng, cut_tiles(truth[..., None], places, tile), noise=0)
    anchor = truth[..., None] if anchored else None
    merged = merge_tiles(tiles, places, size, alignment="affine", anchor=anchor)[..., 0]
    assert relative_error(merged, truth) < 1e-4
    flat = np.full_like(tiles, 0.5)
    anchor = np.full((*size, 1), 0.3) if anchored else None
    merged = merge_tiles(flat, places, size, alignment="affine", anchor=anchor)
    np.testing.assert_allclose(merged, merged[0, 0, 0], atol=1e-6)


def test_an_anchor_stops_errors_from_adding_up(rng):
    size, tile = (48, 2000), (48, 48)
    truth = surface("bumps", size) / 20
    places = plan_tiles(size, tile, 12)
    anchor = resized(resized(truth, (6, 250), Image.Resampling.BOX), size)[..., None]
    cut = cut_tiles(truth[..., None], places, tile)
    errors = []
    # Now and then the errors of one draw of bends cancel.
    for _ in range(3):
        tiles, _, _ = distorted(rng, cut, noise=0, bend=0.1)
        for guide in (anchor, None):
            merged = merge_tiles(tiles, places, size, alignment="affine", anchor=guide)
            errors.append(relative_error(merged[..., 0], truth))
    assert max(errors[::2]) < 0.005
    assert sum(errors[::2]) < sum(errors[1::2]) / 2


def test_scales_that_no_overlap_tells_stay():
    """Steps in the first and last tile, and between them nothing but flat tiles of any height."""
    steps = np.where((np.arange(300) < 30) | (np.arange(300) > 270), 0.2, 0.8) * np.ones((64, 1))
    places = plan_tiles((64, 300), (64, 64), 16)
    tiles = cut_tiles(steps[..., None], places, (64, 64))
    heights = 0.1 * np.arange(len(places)).reshape(-1, 1, 1, 1)
    scales, shifts = align_tiles((tiles + heights).astype(np.float32), places)
    np.testing.assert_allclose(scales, 1, rtol=1e-3)
    np.testing.assert_allclose(np.ptp(shifts + heights.ravel()), 0, atol=1e-3)


def test_a_wrong_anchor_bends_the_whole_a_little(rng):
    size, tile = (96, 300), (96, 96)
    truth = surface("bumps", size)[..., None]
    places = plan_tiles(size, tile, 24)
    tiles, _, _ = distorted(rng, cut_tiles(truth, places, tile), noise=1e-3)
    anchor = truth + truth.std() * np.sin(np.arange(300) / 40)[:, None]
    merged = merge_tiles(tiles, places, size, alignment="affine", anchor=anchor)
    # The overlaps are exact, and the anchor is off by its whole spread: 0.044 against 0.125.
    assert relative_error(merged, truth) < 0.5 * relative_error(anchor, truth)


def test_tiles_that_do_not_overlap_stay_as_they_are(rng):
    tiles = rng.uniform(0, 1, (3, 8, 8, 1)).astype(np.float32)
    scales, shifts = align_tiles(tiles, [(0, 0), (0, 8), (0, 16)])
    np.testing.assert_allclose(scales, 1, rtol=1e-6)
    np.testing.assert_allclose(shifts, 0, atol=5e-3)


def test_the_range_is_kept_without_clipping():
    places = plan_tiles((8, 30), (8, 16), 4)
    image = np.linspace(0, 1, 30, dtype=np.float32) * np.ones((8, 1), np.float32)
    tiles = cut_tiles(image[..., None], places, (8, 16))
    low = merge_tiles(tiles * 3 - 1, places, (8, 30), alignment="affine")[..., 0]
    assert (low.min(), low.max()) == (0, 1)
    np.testing.assert_allclose(low, image, atol=1e-5)
    # What lies inside stays: the anchor's scale means something to the caller.
    anchor = 0.5 * image[..., None] + 0.2
    inside = merge_tiles(tiles, places, (8, 30), alignment="affine", anchor=anchor)
    np.testing.assert_allclose(inside, anchor, atol=1e-5)


def test_unit_vectors(rng):
    size, tile = (50, 90), (32, 32)
    normals = rng.normal(size=(*size, 3))
    normals = (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)
    places = plan_tiles(size, tile, 9)
    tiles = cut_tiles(normals, places, tile)
    merged = merge_tiles(tiles, places, size, alignment="unit")
    np.testing.assert_allclose(merged, normals, atol=1e-5)
    # Tiles that disagree still give unit vectors, opposite ones included.
    tiles[1] *= -1
    merged = merge_tiles(tiles, places, size, alignment="unit")
    np.testing.assert_allclose(np.linalg.norm(merged, axis=-1), 1, atol=1e-5)
    up, down = (np.full((1, 4, 4, 3), sign * np.eye(3)[1], np.float32) for sign in (1, -1))
    cancelled = merge_tiles(np.concatenate([up, down]), [(0, 0), (0, 0)], (4, 4), alignment="unit")
    np.testing.assert_array_equal(cancelled, np.broadcast_to([0, 0, 1], (4, 4, 3)))


def test_refusals(rng):
    tiles = rng.random((2, 4, 4, 1), np.float32)
    places = [(0, 0), (0, 4)]
    with pytest.raises(UserError, match="do not cover"):
        merge_tiles(tiles, places, (4, 9), alignment="none")
    with pytest.raises(UserError, match="resize it to the image's"):
        merge_tiles(tiles, places, (4, 8), alignment="affine", anchor=tiles[0])
    with pytest.raises(UserError, match="no common scale"):
        merge_tiles(np.repeat(tiles, 3, -1), places, (4, 8), alignment="affine")


def test_a_network_that_normalises_each_tile(rng):
    size, tile = (130, 170), (64, 64)
    truth = surface("bumps", size)
    image = np.repeat(truth[..., None], 3, axis=-1).astype(np.float32)
    shapes = []

    def predict(batch):
        shapes.append(batch.shape)
        low, high = (f(batch, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        return ((batch - low) / (high - low))[..., :1]

    merged = predict_tiled(predict, image, tile=tile, overlap=20, alignment="affine")
    assert shapes == [(12, 64, 64, 3)]
    assert relative_error(merged[..., 0], truth) < 2e-3


@pytest.mark.skipif("JAXPERCEPT_DATA" not in os.environ, reason="no real data on this machine")
def test_real_depth_maps_in_tiles(rng):
    size, tile = (960, 1280), (320, 320)
    folder = Path(os.environ["JAXPERCEPT_DATA"]) / "nyuv2" / "depth"
    places = plan_tiles(size, tile, 64)
    for number in rng.integers(1, 1400, 4):
        truth = resized(np.asarray(Image.open(folder / f"{number:04d}.png"), np.float32), size)
        truth = (truth - truth.min()) / np.ptp(truth)
        cut = cut_tiles(truth[..., None], places, tile)
        tiles, _, _ = distorted(rng, cut, noise=0.003, bend=0.05)
        coarse = resized(truth, (60, 80), Image.Resampling.BOX) + 0.02 * rng.normal(size=(60, 80))
        anchor = resized(coarse, size)[..., None]
        merged = merge_tiles(tiles, places, size, alignment="affine", anchor=anchor)[..., 0]
        errors = [relative_error(values, truth) for values in (merged, anchor[..., 0])]
        print(f"image {number}: merged {errors[0]:.4f}, anchor {errors[1]:.4f}")
        # 0.001 to 0.003, mostly the bends; the anchor alone has 0.015.
        assert errors[0] < 0.006
        # Objects have edges too, wherever tiles end.
        assert seam(fitted(merged, truth) - truth, places, tile) < 1.2
        assert seam(fitted(pasted(tiles, places, size), truth) - truth, places, tile) > 5


def test_tiles_that_disagree_keep_their_contrast(rng):
    """Maps of no contrast would agree best; each tile keeps 70 % of the anchor's spread."""

    def smooth(*size):
        return resized(rng.random((4, 4)), size)[..., None]

    truth = smooth(96, 128)
    places = plan_tiles((96, 128), (64, 64), 32)
    cut = cut_tiles(truth, places, (64, 64))
    own = np.stack([smooth(64, 64) for _ in places])
    for tiles in [own, (cut + own) / 2]:
        scales, _ = align_tiles(tiles, places, truth)
        for scale, tile, area in zip(scales, tiles, cut, strict=True):
            spread = scale * block_means(tile[..., 0]).std()
            assert spread > 0.699 * block_means(area[..., 0]).std()


def test_numbers_are_taken_from_the_tile_a_pixel_lies_deepest_in(rng):
    size, tile = (9, 40), (9, 16)
    places = plan_tiles(size, tile, 4)
    assert places == [(0, 0), (0, 12), (0, 24)]
    tiles = np.stack([np.full((*tile, 1), 3.0 * i) for i in range(3)])
    merged = merge_tiles(tiles, places, size, alignment="nearest")[..., 0]
    # Nothing lies between: the borders are in the middle of the overlaps, 12..15 and 24..27.
    np.testing.assert_array_equal(merged[0], np.repeat([0.0, 3.0, 6.0], [14, 12, 14]))
    np.testing.assert_array_equal(merged, np.broadcast_to(merged[0], size))
    classes = rng.integers(0, 40, (30, 41, 1)).astype(np.float32)
    places = plan_tiles((30, 41), (16, 16), 5)
    again = merge_tiles(cut_tiles(classes, places, (16, 16)), places, (30, 41), alignment="nearest")
    np.testing.assert_array_equal(again, classes)
