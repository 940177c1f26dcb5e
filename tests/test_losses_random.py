"""Losses that draw random numbers: the draws, then the loss of these draws in float64 torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import assert_equals_torch, is_steady

from jaxpercept import losses
from jaxpercept.losses.hierarchical import _depth_ranges, _windows
from jaxpercept.losses.virtual_normals import _triangles

LOSSES = {name: jax.jit(getattr(losses, name)) for name in ("hdn_random", "hdsn_random", "vnl")}
depth_ranges = jax.jit(_depth_ranges, static_argnums=3)
windows_of = jax.jit(_windows, static_argnums=(0, 1, 3))
triangles = jax.jit(_triangles, static_argnums=2)
HIERARCHICAL = ["hdn_random", "hdsn_random"]
seeds = st.integers(0, 2**32 - 1)


def sample(rng, b=3, h=14, w=15, invalid=0.3):
    target = rng.uniform(1, 3, (b, h, w, 1)).astype(np.float32)
    pred = (0.6 * target + 0.7 + 0.2 * rng.normal(size=target.shape)).astype(np.float32)
    return pred, target, rng.random((b, h, w, 1)) > invalid


def draw_keys(rng, b=3):
    return jax.random.split(jax.random.key(int(rng.integers(2**31))), b)


def test_ranges_of_depth_lie_within_the_image(rng):
    _, target, mask = sample(rng)
    mask[2] = False
    depth, valid = (x.reshape(3, -1) for x in (target, mask))
    low, high = depth_ranges(jnp.asarray(depth), jnp.asarray(valid), draw_keys(rng), 200)
    assert low.shape == high.shape == (200, 3)
    for i in range(2):
        least, most = depth[i][valid[i]].min(), depth[i][valid[i]].max()
        start, end = ((np.asarray(x[:, i]) - least) / (most - least) for x in (low, high))
        assert (start >= 0).all()
        assert (start <= 0.75).all()
        assert (end - start >= 0.1 - 1e-6).all()
        assert (end <= 1 + 1e-6).all()
        assert start.std() > 0.1
        assert end.std() > 0.1
    assert np.isfinite(low).all()
    assert not np.allclose(low[:, 0] - low[0, 0], low[:, 1] - low[0, 1])


@pytest.mark.parametrize("size", [(40, 64), (3, 5), (1, 1)])
def test_windows_lie_within_the_image(rng, size):
    h, w = size
    windows = np.asarray(windows_of(h, w, draw_keys(rng), 200))
    assert windows.shape == (201, 3, 4)
    np.testing.assert_array_equal(windows[-1], [[0, 0, h, w]] * 3)
    top, left, bottom, right = np.moveaxis(windows[:-1], -1, 0)
    for start, end, side in ((top, bottom, h), (left, right, w)):
        assert (start >= 0).all()
        assert (start < side).all()
        assert (end - start >= max(side // 8, 1)).all()
        assert (end - start <= max(side // 2, 1)).all()
        if side > 8:
            assert start.max() > side * 0.8
            assert len(np.unique(end - start)) > 3
    if h > 8:
        assert (windows[:-1, 0] != windows[:-1, 1]).any()


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_losses_equal_torch(rng, name):
    pred, target, mask = sample(rng)
    keys = draw_keys(rng)
    if name == "hdn_random":
        flat = (jnp.asarray(x.reshape(3, -1)) for x in (target, mask))
        low, high = (np.asarray(x)[..., None, None, None] for x in depth_ranges(*flat, keys, 10))
        contexts = (target >= low) & (target <= high) & mask
    else:
        rows, columns = np.indices((14, 15))[..., None]
        top, left, bottom, right = np.moveaxis(np.asarray(windows_of(14, 15, keys, 20)), -1, 0)[
            ..., None, None, None
        ]
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        contexts = inside & mask

    def normalised(x):
        deviation = x - x.median().detach()
        spread = deviation.abs().mean()
        return deviation / (spread if spread > 0 else 1)

    def reference(p, g, m):
        total, count = 0, 0
        for context in torch.from_numpy(contexts):
            for a, b, inside in zip(p, g, context, strict=True):
                if inside.any():
                    total = total + (normalised(a[inside]) - normalised(b[inside])).abs().sum()
                    count += inside.sum()
        return total / count

    def loss(p, g, m):
        return getattr(losses, name)(p, g, m, keys)

    assert_equals_torch(loss, reference, pred, target, mask)


@pytest.mark.parametrize("name", HIERARCHICAL)
@settings(max_examples=20, deadline=None)
@given(a=st.floats(0.05, 20), b=st.floats(-5, 5), seed=seeds)
def test_hierarchical_losses_ignore_positive_affine_changes(name, a, b, seed):
    rng = np.random.default_rng(seed)
    pred, target, mask = map(jnp.asarray, sample(rng))
    keys = draw_keys(rng)
    expected = LOSSES[name](pred, target, mask, keys)
    changed = LOSSES[name](a * pred + b, target, mask, keys)
    np.testing.assert_allclose(changed, expected, rtol=1e-4)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_an_inverted_prediction_is_a_large_error(rng, name):
    """n(−x) = −n(x) but for medians between two values, and |n| is 1 on average."""
    _, target, mask = map(jnp.asarray, sample(rng, h=40, w=40))
    value = LOSSES[name](-target, target, mask, draw_keys(rng))
    np.testing.assert_allclose(value, 2, atol=0.1)


def test_small_differences_of_depth_count_within_contexts(rng):
    """Relief of 1 % of the range, lost in the prediction: nearly nothing to the whole image."""
    left, right = np.full((3, 40, 20, 1), 1.0), np.full((3, 40, 20, 1), 3.0)
    steps = np.concatenate([left, right], 2) + 0.001 * rng.normal(size=(3, 40, 40, 1))
    relief = (steps + 0.02 * rng.normal(size=steps.shape)).astype(np.float32)
    pred, target = jnp.asarray(steps.astype(np.float32)), jnp.asarray(relief)
    mask, keys = jnp.ones(pred.shape, bool), draw_keys(rng)
    whole = jax.jit(losses.ssi_median)(pred, target, mask)
    assert LOSSES["hdsn_random"](pred, target, mask, keys) > 5 * whole
    assert LOSSES["hdn_random"](pred, target, mask, keys) > 5 * whole


@settings(max_examples=20, deadline=None)
@given(seed=seeds, invalid=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_triangles_have_valid_corners(seed, invalid):
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 8, 9, 1)) >= invalid
    corners = np.asarray(triangles(jnp.asarray(mask), draw_keys(rng), 30))
    assert corners.shape == (3, 3, 30)
    for i, valid in enumerate(mask.reshape(3, -1)):
        for corner in corners[:, i]:
            assert valid[corner[: valid.sum()]].all()
            assert len(np.unique(corner)) == 30
    if invalid < 0.9:
        assert (corners[0, 0] != corners[1, 0]).any()
        assert (corners[:, 0] != corners[:, 1]).any()


def reference_normals(depth, corners, focal):
    """Normals [n, 3] and the points [n, 3, 3] of triangles of one image, depth [h, w, 1]."""
    h, w, _ = depth.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rays = torch.stack([(x - (w - 1) / 2) / focal, (y - (h - 1) / 2) / focal, torch.ones(h, w)], -1)
    points = (rays.double() * depth).reshape(-1, 3)[corners.T]
    normal = torch.linalg.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
    return torch.nn.functional.normalize(normal, dim=-1), points


def well_shaped(points, min_distance):
    """All angles at least 30 degrees by the law of cosines, all sides long, all depths positive."""
    a, b, c = ((points[:, i] - points[:, i - 1]).norm(dim=-1) for i in range(3))
    angles = [
        torch.acos((x**2 + y**2 - z**2) / (2 * x * y)).rad2deg()
        for x, y, z in ((a, b, c), (b, c, a), (c, a, b))
    ]
    long = torch.stack([a, b, c]).min(dim=0).values > min_distance
    return long & (torch.stack(angles).min(dim=0).values >= 30) & (points[..., 2] > 0).all(dim=1)


@pytest.mark.parametrize(("with_focal", "invalid"), [(False, 0.3), (True, 0.3), (True, 0.9)])
def test_vnl_equals_torch(rng, with_focal, invalid):
    """With 10 % of the pixels valid there are fewer of them than triangles.

    Where a triangle is about to count, or has almost no area, float32 and float64 may differ: such
    inputs are drawn anew.
    """
    focal = np.array([9, 13, 20], np.float32) if with_focal else np.full(3, 15 * np.sqrt(0.75))

    def reference(p, g, m):
        kept = []
        for i in range(3):
            chosen = torch.from_numpy(corners[:, i, : mask[i].sum()])
            true, points = reference_normals(g[i], chosen, focal[i])
            usable = well_shaped(points, 0.6)
            ours, _ = reference_normals(p[i], chosen, focal[i])
            error = (ours - true).abs().sum(-1)[usable].sort().values
            kept.append(error[len(error) // 4 :])
        return torch.cat(kept).mean()

    def loss(p, g, m):
        return losses.vnl(p, g, m, keys, jnp.asarray(focal) if with_focal else None)

    for _ in range(100):
        pred, target, mask = sample(rng, invalid=invalid)
        target[0, :4] *= -1  # A depth that is not positive makes no triangle.
        keys = draw_keys(rng)
        corners = np.array(triangles(jnp.asarray(mask), keys, int(14 * 15 * 0.2)))
        if is_steady(rng, reference, pred, target, mask):
            break
    assert_equals_torch(loss, reference, pred, target, mask)


def plane(normal, size=(16, 20), focal=20.0):
    """Depth of the plane normal · P = 2 before the camera."""
    y, x = np.indices(size)
    h, w = size
    rays = np.stack([(x - (w - 1) / 2) / focal, (y - (h - 1) / 2) / focal, np.ones(size)], -1)
    return jnp.asarray((2 / (rays @ normal))[None, ..., None].astype(np.float32))


@settings(max_examples=10, deadline=None)
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_vnl_of_two_planes_is_the_distance_of_their_normals(seed, scale):
    """Every triangle in a plane has its normal, and scaling the depth tilts no plane."""
    rng = np.random.default_rng(seed)
    normals = rng.uniform(-0.3, 0.3, (2, 3)) + np.array([0, 0, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    pred, target = map(plane, normals)
    mask = jnp.asarray(rng.random(target.shape) > 0.3)
    value = LOSSES["vnl"](scale * pred, target, mask, draw_keys(rng, 1), jnp.array([20.0]))
    np.testing.assert_allclose(value, np.abs(normals[0] - normals[1]).sum(), rtol=1e-4, atol=1e-5)


def test_vnl_without_a_usable_triangle_is_zero(rng):
    pred, target, mask = map(jnp.asarray, sample(rng))
    close = jax.jit(jax.value_and_grad(lambda p: losses.vnl(p, 0.1 * target, mask, draw_keys(rng))))
    value, gradient = close(pred)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
