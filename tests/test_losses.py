"""Checked against independent float64 NumPy references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept import losses

LOSSES = {
    "mse": jax.jit(losses.mse),
    "l1": jax.jit(losses.l1),
    "ssi": jax.jit(losses.ssi),
    "gradient": jax.jit(losses.gradient),
    "vertical": jax.jit(lambda p, g, m: losses.gradient(p, g, m, vertical_only=True)),
}
scale_and_shift = jax.jit(losses.scale_and_shift)
WITH_GRADIENT = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in LOSSES.items()}


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


def reference_gradient(pred, target, mask, vertical_only):
    d = (pred.astype(np.float64) - target) * mask
    total = (np.abs(np.diff(d, axis=1)) * mask[:, 1:] * mask[:, :-1]).sum()
    if not vertical_only:
        total += (np.abs(np.diff(d, axis=2)) * mask[:, :, 1:] * mask[:, :, :-1]).sum()
    return total / mask.sum()


@pytest.mark.parametrize("channels", [1, 4])
def test_elementwise_losses_equal_numpy(rng, channels):
    pred, target, mask = sample(rng, c=channels)
    error = (pred.astype(np.float64) - target)[mask]
    arrays = tuple(map(jnp.asarray, (pred, target, mask)))
    np.testing.assert_allclose(LOSSES["mse"](*arrays), np.mean(error**2), rtol=3e-6)
    np.testing.assert_allclose(LOSSES["l1"](*arrays), np.mean(np.abs(error)), rtol=3e-6)


def test_one_mask_channel_serves_all(rng):
    pred, target, mask = map(jnp.asarray, sample(rng, c=4))
    single = mask[..., :1]
    full = jnp.repeat(single, 4, axis=-1)
    for loss in LOSSES.values():
        np.testing.assert_allclose(loss(pred, target, single), loss(pred, target, full), rtol=1e-6)
    latent = losses.latent_mse(pred, target, single)
    np.testing.assert_allclose(latent, losses.mse(pred, target, full), rtol=1e-6)


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


@settings(max_examples=20, deadline=None)
@given(a=st.floats(0.05, 20), b=st.floats(-5, 5), seed=st.integers(0, 2**32 - 1))
def test_ssi_ignores_positive_affine_changes(a, b, seed):
    pred, target, mask = map(jnp.asarray, sample(np.random.default_rng(seed)))
    expected = LOSSES["ssi"](pred, target, mask)
    changed = LOSSES["ssi"](a * pred + b, target, mask)
    np.testing.assert_allclose(changed, expected, rtol=1e-4)


def test_ssi_gradient_flows_through_the_fit(rng):
    """Along the invariances the loss is flat, which a detached fit would not give."""
    pred, target, mask = map(jnp.asarray, sample(rng))
    gradient = WITH_GRADIENT["ssi"](pred, target, mask)[1]
    per_image = (1, 2, 3)
    np.testing.assert_allclose(gradient.sum(axis=per_image), 0, atol=1e-6)
    np.testing.assert_allclose((gradient * pred).sum(axis=per_image), 0, atol=1e-6)
    assert np.abs(gradient).max() > 1e-4


def test_ssi_gradient_equals_torch(rng):
    pred, target, mask = sample(rng, b=1, invalid=0.2)
    p = torch.from_numpy(pred).double().requires_grad_()
    g, m = torch.from_numpy(target).double(), torch.from_numpy(mask)
    a00, a01, a11 = (p[m] ** 2).sum(), p[m].sum(), m.sum()
    b0, b1 = (p[m] * g[m]).sum(), g[m].sum()
    det = a00 * a11 - a01**2
    s, b = (a11 * b0 - a01 * b1) / det, (a00 * b1 - a01 * b0) / det
    (s * p + b - g)[m].abs().mean().backward()
    ours = WITH_GRADIENT["ssi"](*map(jnp.asarray, (pred, target, mask)))[1]
    np.testing.assert_allclose(ours, p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("vertical_only", [False, True])
def test_gradient_equals_numpy(rng, vertical_only):
    pred, target, mask = sample(rng)
    loss = LOSSES["vertical" if vertical_only else "gradient"]
    ours = loss(*map(jnp.asarray, (pred, target, mask)))
    expected = reference_gradient(pred, target, mask, vertical_only)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_vertical_gradient_misses_vertical_edges():
    step = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0])[None, None, :, None], (1, 3, 1, 1))
    flat, mask = jnp.zeros_like(step), jnp.ones(step.shape, bool)
    assert LOSSES["vertical"](step, flat, mask) == 0
    np.testing.assert_allclose(LOSSES["gradient"](step, flat, mask), 3 / 12)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_mask_gives_zero_and_no_gradient(rng, name):
    pred, target, mask = map(jnp.asarray, sample(rng))
    value, gradient = WITH_GRADIENT[name](pred, target, jnp.zeros_like(mask))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["one_empty", "constant", "zero", "perfect", "inverted", "single"])
def test_gradients_are_finite(rng, name, case):
    pred, target, mask = map(jnp.asarray, sample(rng))
    if case == "one_empty":
        mask = mask.at[0].set(False)
    elif case == "single":
        mask = jnp.zeros_like(mask).at[:, 4, 4].set(True)
    else:
        pred = {
            "constant": jnp.full_like(pred, 1.7),
            "zero": jnp.zeros_like(pred),
            "perfect": target,
            "inverted": 4 - target,
        }[case]
    value, gradient = WITH_GRADIENT[name](pred, target, mask)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_invalid_pixels_are_never_read(rng, name):
    pred, target, mask = map(jnp.asarray, sample(rng))
    step = WITH_GRADIENT[name]
    clean_value, clean_gradient = step(pred, target, mask)
    value, gradient = step(pred, jnp.where(mask, target, jnp.nan), mask)
    np.testing.assert_allclose(value, clean_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, clean_gradient, rtol=1e-5, atol=1e-7)


def test_bfloat16_inputs_are_computed_in_float32(rng):
    pred, target, mask = map(jnp.asarray, sample(rng))
    pred = pred.astype(jnp.bfloat16)
    for loss in LOSSES.values():
        value = loss(pred, target, mask)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, loss(pred.astype(jnp.float32), target, mask), rtol=1e-6)


def test_pool_mask_equals_torch_max_pooling(rng):
    for height, width in ((16, 24), (30, 41), (8, 9)):
        valid = rng.random((2, height, width, 1)) > 0.01
        invalid = torch.from_numpy(~valid).permute(0, 3, 1, 2).float()
        pooled = torch.nn.functional.max_pool2d(invalid, 8, 8).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(losses.pool_mask(jnp.asarray(valid), 8), pooled == 0)


@pytest.mark.parametrize("name", ["ssi", "gradient"])
def test_losses_do_not_depend_on_the_sharding(rng, name):
    pred, target, mask = sample(rng, b=8)
    pred[3] = 4 - target[3]  # One device takes the median branch.
    arrays = tuple(map(jnp.asarray, (pred, target, mask)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    value, gradient = WITH_GRADIENT[name](*arrays)
    sharded_value, sharded_gradient = WITH_GRADIENT[name](*jax.device_put(arrays, sharding))
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-4, atol=1e-6)
