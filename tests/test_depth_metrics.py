"""Checked against the protocol in plain float64 NumPy, one image at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept.errors import UserError
from jaxpercept.metrics import depth as metrics
from jaxpercept.metrics.depth import METRICS

evaluate_depth = jax.jit(
    metrics.evaluate_depth,
    static_argnames=("alignment", "min_depth", "max_depth", "alignment_max_res"),
)
depth_metrics = jax.jit(metrics.depth_metrics)
align_least_squares = jax.jit(metrics.align_least_squares, static_argnums=3)
align_disparity = jax.jit(metrics.align_disparity)
RANGE = {"min_depth": 1e-3, "max_depth": 10.0}


def scenes(rng, b=3, h=40, w=56, invalid=0.3):
    """Predictions in [0,1] loosely related to depths in (0.5, 9.5) m, zeros where invalid."""
    depth = rng.uniform(0.5, 9.5, (b, h, w, 1)).astype(np.float32)
    pred = np.clip(depth / 12 + rng.normal(size=depth.shape) * 0.08 + 0.1, 0, 1).astype(np.float32)
    valid = rng.random(depth.shape) > invalid
    return pred, np.where(valid, depth, 0).astype(np.float32), valid


def reference_fit(pred, target):
    design = np.stack([pred, np.ones_like(pred)], axis=1)
    return np.linalg.lstsq(design, target, rcond=None)[0]


def reference_metrics(p, d):
    log_error = np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d),
        "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "rmse_log": np.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
        "silog": 100 * np.sqrt(np.mean(log_error**2) - np.mean(log_error) ** 2),
        "i_rmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
        "valid_pixels": d.size,
    }


def reference(pred, target, valid, alignment, min_depth, max_depth):
    p, d = pred[valid].astype(np.float64), target[valid].astype(np.float64)
    if alignment == "least_square":
        scale, shift = reference_fit(p, d)
        p = scale * p + shift
    elif alignment == "least_square_disparity":
        scale, shift = reference_fit(p[p > 0], 1 / d[p > 0])
        p = 1 / np.maximum(scale * p + shift, 1e-3)
    elif alignment == "median":
        p = p * np.median(d) / np.median(p)
    return reference_metrics(np.maximum(np.clip(p, min_depth, max_depth), 1e-6), d)


def assert_equals_reference(ours, pred, target, valid, alignment="least_square", **limits):
    assert set(ours) == {*METRICS, "valid_pixels"}
    for i in range(len(pred)):
        expected = reference(pred[i], target[i], valid[i], alignment, **limits)
        for name, value in expected.items():
            rtol = 1e-4 if name == "i_rmse" else 1e-5  # 1 / p of an aligned p near 0
            np.testing.assert_allclose(ours[name][i], value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("alignment", ["least_square", "least_square_disparity", "median", "none"])
def test_protocol_equals_numpy(rng, alignment):
    pred, target, valid = scenes(rng)
    if alignment == "least_square_disparity":
        pred = np.where(target > 0, 0.4 / np.maximum(target, 0.1) + pred / 5, pred)
    if alignment == "none":
        pred = pred * 12
    ours = evaluate_depth(*map(jnp.asarray, (pred, target, valid)), alignment=alignment, **RANGE)
    assert_equals_reference(ours, pred, target, valid, alignment, **RANGE)


def test_full_size_images_far_from_the_origin(rng):
    """Sums over 480x640 pixels of large, nearly constant depths keep five digits."""
    pred, target, valid = scenes(rng, b=1, h=480, w=640)
    target = np.where(valid, target + 300, 0).astype(np.float32)
    limits = {"min_depth": 1e-3, "max_depth": 350.0}
    ours = evaluate_depth(*map(jnp.asarray, (pred, target, valid)), **limits)
    assert_equals_reference(ours, pred, target, valid, **limits)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.1, 10), shift=st.floats(-3, 3), seed=st.integers(0, 2**32 - 1))
def test_any_affine_change_of_the_truth_is_perfect(scale, shift, seed):
    _, target, valid = scenes(np.random.default_rng(seed), b=1, h=12, w=16)
    if not valid.any():
        return
    pred = (target * scale + shift).astype(np.float32)
    ours = evaluate_depth(*map(jnp.asarray, (pred, target, valid)), **RANGE)
    assert ours["abs_rel"][0] < 1e-5
    assert ours["delta1"][0] == 1


def test_images_do_not_influence_each_other(rng):
    pred, target, valid = map(jnp.asarray, scenes(rng))
    together = evaluate_depth(pred, target, valid, **RANGE)
    alone = evaluate_depth(pred[1:2], target[1:2], valid[1:2], **RANGE)
    for name in METRICS:
        np.testing.assert_allclose(together[name][1], alone[name][0], rtol=1e-5)


def test_invalid_pixels_are_never_read(rng):
    pred, target, valid = scenes(rng)
    garbage = np.where(valid, 0, np.nan).astype(np.float32)
    clean = evaluate_depth(*map(jnp.asarray, (pred, target, valid)), **RANGE)
    dirty = evaluate_depth(*map(jnp.asarray, (pred + garbage, target + garbage, valid)), **RANGE)
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name])


def test_targets_of_zero_are_invalid_whatever_the_mask_says(rng):
    pred, target, valid = map(jnp.asarray, scenes(rng))
    everything = jnp.ones_like(valid)
    ours = evaluate_depth(pred, target, everything, **RANGE)
    np.testing.assert_array_equal(ours["valid_pixels"], valid.sum(axis=(1, 2, 3)))
    assert all(np.isfinite(ours[name]).all() for name in METRICS)


@pytest.mark.parametrize("alignment", ["least_square", "least_square_disparity", "median", "none"])
def test_empty_mask_counts_zero_pixels(rng, alignment):
    pred, target, valid = map(jnp.asarray, scenes(rng))
    valid = valid.at[1].set(False)
    ours = evaluate_depth(pred, target, valid, alignment=alignment, **RANGE)
    assert ours["valid_pixels"][1] == 0
    assert all(ours[name][1] == 0 for name in METRICS)
    assert all(np.isfinite(ours[name]).all() for name in METRICS)


def test_constant_prediction_becomes_the_mean_depth(rng):
    _, target, valid = scenes(rng)
    baseline = metrics.constant_depth_metrics(jnp.asarray(target), jnp.asarray(valid), **RANGE)
    for i in range(3):
        d = target[i][valid[i]].astype(np.float64)
        expected = reference_metrics(np.full_like(d, d.mean()), d)
        for name in METRICS:
            np.testing.assert_allclose(baseline[name][i], expected[name], rtol=1e-5, err_msg=name)
    third = jnp.full(target.shape, 1 / 3, jnp.float32)
    again = evaluate_depth(third, jnp.asarray(target), jnp.asarray(valid), **RANGE)
    np.testing.assert_allclose(again["abs_rel"], baseline["abs_rel"], rtol=1e-6)


def test_fit_at_reduced_resolution_equals_torch_nearest(rng):
    pred, target, valid = scenes(rng, b=2, h=50, w=37)
    for limit in (50, 49, 20):
        ours = align_least_squares(*map(jnp.asarray, (pred, target, valid)), limit)
        factor = min(limit / 50, limit / 37, 1)
        down = torch.nn.Upsample(scale_factor=factor, mode="nearest")
        for i in range(2):
            planes = torch.from_numpy(
                np.stack([pred[i, ..., 0], target[i, ..., 0], valid[i, ..., 0]])
            )
            p, d, m = (down(planes[None]) if factor < 1 else planes[None])[0].double().numpy()
            scale, shift = reference_fit(p[m > 0], d[m > 0])
            np.testing.assert_allclose(ours[i], scale * pred[i] + shift, rtol=1e-5, atol=1e-5)


def test_disparity_alignment_recovers_depth(rng):
    _, target, valid = scenes(rng)
    disparity = np.where(valid, 0.3 / np.maximum(target, 0.1) + 0.05, 0).astype(np.float32)
    aligned = align_disparity(*map(jnp.asarray, (disparity, target, valid)))
    np.testing.assert_allclose(aligned[valid], target[valid], rtol=1e-5)
    assert np.asarray(aligned).max() <= 1e3 * (1 + 1e-6)


def test_silog_ignores_a_global_factor(rng):
    _, target, valid = map(jnp.asarray, scenes(rng))
    ours = depth_metrics(target * 1.7, target, valid)
    np.testing.assert_allclose(ours["silog"], 0, atol=1e-4)
    np.testing.assert_allclose(ours["abs_rel"], 0.7, rtol=1e-5)
    np.testing.assert_array_equal(ours["delta2"], 0)
    np.testing.assert_array_equal(ours["delta3"], 1)


def test_delta_threshold_is_strict():
    ours = depth_metrics(
        jnp.full((1, 2, 2, 1), 1.25), jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1), bool)
    )
    assert (ours["delta1"][0], ours["delta2"][0]) == (0, 1)


def test_unknown_alignment(rng):
    with pytest.raises(UserError, match="affine"):
        evaluate_depth(*map(jnp.asarray, scenes(rng)), alignment="affine", **RANGE)
