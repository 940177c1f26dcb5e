"""Alignment and losses of depth against independent float64 references in NumPy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import assert_equals_torch

from jaxpercept import losses

LOSSES = {
    "ssi": jax.jit(losses.ssi),
    "ssi_median": jax.jit(losses.ssi_median),
    "gradient": jax.jit(losses.gradient),
    "vertical": jax.jit(lambda p, g, m: losses.gradient(p, g, m, vertical_only=True)),
}
scale_and_shift = jax.jit(losses.scale_and_shift)
ssi_gradient = jax.jit(jax.grad(losses.ssi))


def sample(rng, b=3, h=9, w=11, c=1, invalid=0.3):
    """Predictions correlated with targets in [1, 3], as GenPercept's losses see them."""
    target = rng.uniform(1, 3, (b, h, w, c)).astype(np.float32)
    pred = (0.6 * target + 0.7 + 0.2 * rng.normal(size=target.shape)).astype(np.float32)
    return pred, target, rng.random((b, h, w, c)) > invalid


def reference_fit(pred, target, mask):
    design = np.stack([pred[mask], np.ones(mask.sum())], axis=1).astype(np.float64)
    return np.linalg.lstsq(design, target[mask].astype(np.float64), rcond=None)[0]


def lower_median(x):
    return np.sort(x)[(x.size - 1) // 2]


def reference_ssi(pred, target, mask):
    total = 0.0
    for p, g, m in zip(pred.astype(np.float64), target.astype(np.float64), mask, strict=True):
        if not m.any():
            continue
        s, b = reference_fit(p, g, m)
        if s <= 0:
            positive = m & (g > 0)
            s, b = lower_median(g[positive]) / (lower_median(p[positive]) + 1e-8), 0
        total += np.abs(s * p[m] + b - g[m]).sum()
    return total / mask.sum()


def test_scale_and_shift_equals_lstsq(rng):
    pred, target, mask = sample(rng)
    scale, shift = scale_and_shift(*map(jnp.asarray, (pred, target, mask)))
    expected = [reference_fit(*row) for row in zip(pred, target, mask, strict=True)]
    np.testing.assert_allclose(np.stack([scale, shift], 1), expected, rtol=1e-5, atol=1e-6)


def test_fit_survives_cancellation(rng):
    """A spread of 1e-3 around 100: the uncentred determinant has no correct digit in float32."""
    pred, target, mask = sample(rng, h=64, w=64)
    pred = (100 + 1e-3 * pred).astype(np.float32)
    aligned = losses.fit_line(*map(jnp.asarray, (pred, target, mask)))(jnp.asarray(pred))
    for i in range(3):
        s, b = reference_fit(pred[i] - np.float32(100), target[i], mask[i])
        np.testing.assert_allclose(aligned[i], s * (pred[i] - 100.0) + b, atol=1e-4)


def test_singular_systems_keep_the_prediction():
    target = jnp.linspace(1, 3, 24).reshape(2, 3, 4, 1)
    mask = jnp.ones(target.shape, bool)
    for pred in (jnp.zeros_like(target), jnp.full(target.shape, 2.7), jnp.full(target.shape, 1e20)):
        scale, shift = scale_and_shift(pred, target, mask)
        np.testing.assert_array_equal(scale, 1)
        np.testing.assert_array_equal(shift, 0)


@pytest.mark.parametrize("inverted", [False, True])
def test_ssi_equals_numpy(rng, inverted):
    pred, target, mask = sample(rng)
    if inverted:  # One image upside down: the median ratio aligns it.
        pred[1] = 4 - pred[1]
    ours = LOSSES["ssi"](*map(jnp.asarray, (pred, target, mask)))
    np.testing.assert_allclose(ours, reference_ssi(pred, target, mask), rtol=1e-5)


@pytest.mark.parametrize("name", ["ssi", "ssi_median"])
@settings(max_examples=20, deadline=None)
@given(a=st.floats(0.05, 20), b=st.floats(-5, 5), seed=st.integers(0, 2**32 - 1))
def test_positive_affine_changes_are_ignored(name, a, b, seed):
    pred, target, mask = map(jnp.asarray, sample(np.random.default_rng(seed)))
    expected = LOSSES[name](pred, target, mask)
    changed = LOSSES[name](a * pred + b, target, mask)
    np.testing.assert_allclose(changed, expected, rtol=1e-4)


def test_ssi_gradient_flows_through_the_fit(rng):
    """Along the invariances the loss is flat, which a detached fit would not give."""
    pred, target, mask = map(jnp.asarray, sample(rng))
    gradient = ssi_gradient(pred, target, mask)
    per_image = (1, 2, 3)
    np.testing.assert_allclose(gradient.sum(axis=per_image), 0, atol=1e-6)
    np.testing.assert_allclose((gradient * pred).sum(axis=per_image), 0, atol=1e-6)
    assert np.abs(gradient).max() > 1e-4


def test_ssi_equals_torch(rng):
    def reference(p, g, m):
        a00, a01, a11 = (p[m] ** 2).sum(), p[m].sum(), m.sum()
        b0, b1 = (p[m] * g[m]).sum(), g[m].sum()
        det = a00 * a11 - a01**2
        s, b = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
        return (s * p + b - g)[m].abs().mean()

    assert_equals_torch(losses.ssi, reference, *sample(rng, b=1, invalid=0.2))


@pytest.mark.parametrize("channels", [1, 2])
def test_ssi_median_equals_torch(rng, channels):
    def normalised(x):
        deviation = x - x.median()  # The lower of two middle values.
        return deviation / deviation.abs().mean()

    def reference(p, g, m):
        images = zip(p, g, m, strict=True)
        error = [(normalised(a[k]) - normalised(b[k])).abs().sum() for a, b, k in images]
        return sum(error) / m.sum()

    assert_equals_torch(losses.ssi_median, reference, *sample(rng, c=channels))


def test_released_ssi_median_equals_torch(rng):
    """Statistics over every pixel, divided by the number of valid ones."""

    def normalised(x, m):
        deviation = x - x.flatten(1).median(dim=1).values[:, None, None, None]
        spread = deviation.abs().sum((1, 2, 3)) / (m.sum((1, 2, 3)) + 1e-6) + 1e-6
        return deviation / spread[:, None, None, None]

    def reference(p, g, m):
        return torch.nn.functional.l1_loss(normalised(p, m)[m], normalised(g, m)[m])

    def released(p, g, m):
        return losses.ssi_median(p, g, m, compat=True)

    arrays = sample(rng)
    assert_equals_torch(released, reference, *arrays)
    assert released(*map(jnp.asarray, arrays)) < LOSSES["ssi_median"](*map(jnp.asarray, arrays))


def test_an_inverted_prediction_is_a_large_error(rng):
    """n(−x) = −n(x), and |n| is 1 on average."""
    _, target, mask = map(jnp.asarray, sample(rng, h=31, w=33, invalid=0))
    np.testing.assert_allclose(LOSSES["ssi_median"](-target, target, mask), 2, rtol=1e-5)


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("vertical_only", [False, True])
def test_gradient_equals_torch(rng, vertical_only, scales):
    def reference(p, g, m):
        total = 0
        for step in 2 ** np.arange(scales):
            across = 1 if vertical_only else step
            d, k = ((p - g) * m)[:, ::step, ::across], m[:, ::step, ::across]
            down = (d.diff(dim=1).abs() * (k[:, 1:] & k[:, :-1])).sum()
            right = (d.diff(dim=2).abs() * (k[:, :, 1:] & k[:, :, :-1])).sum()
            total = total + (down + (0 if vertical_only else right)) / k.sum()
        return total

    def loss(p, g, m):
        return losses.gradient(p, g, m, vertical_only=vertical_only, scales=scales)

    assert_equals_torch(loss, reference, *sample(rng, h=13, w=18))


def test_vertical_gradient_misses_vertical_edges():
    step = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0])[None, None, :, None], (1, 3, 1, 1))
    flat, mask = jnp.zeros_like(step), jnp.ones(step.shape, bool)
    assert LOSSES["vertical"](step, flat, mask) == 0
    np.testing.assert_allclose(LOSSES["gradient"](step, flat, mask), 3 / 12)


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-3, 3), seed=st.integers(0, 2**32 - 1))
def test_gradient_ignores_offsets(offset, seed):
    pred, target, mask = map(jnp.asarray, sample(np.random.default_rng(seed)))
    expected = LOSSES["gradient"](pred, target, mask)
    np.testing.assert_allclose(LOSSES["gradient"](pred + offset, target, mask), expected, rtol=1e-5)
