"""What every loss promises: empty masks, invalid pixels, edges, element-wise sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CASES, COMPILED, depths, sample

from jaxpercept import losses

ELEMENTWISE = ["mse", "l1", "angular", "angular_kappa", "bce", "cross_entropy"]
READS_INVALID = "ssi_median_compat"
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", CASES)
def test_empty_mask_gives_zero_and_no_gradient(rng, name):
    pred, target, mask, keys = sample(name, rng)
    value, gradient = COMPILED[name](pred, target, jnp.zeros_like(mask), keys)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", CASES)
def test_invalid_pixels_are_never_read(rng, name):
    """NaN and infinities outside the mask change nothing, whether predicted or given."""
    pred, target, mask, keys = sample(name, rng)
    if name == READS_INVALID:  # Finite values count there; these do not.
        pred, target = jnp.where(mask, pred, 0), jnp.where(mask, target, 0)
    value, gradient = COMPILED[name](pred, target, mask, keys)
    if name != READS_INVALID:
        np.testing.assert_array_equal(jnp.where(mask, 0, gradient), 0)
    for garbage in (jnp.nan, jnp.inf, -jnp.inf):
        bad_target = 255 if name == "cross_entropy" else garbage
        changed, changed_gradient = COMPILED[name](
            jnp.where(mask, pred, garbage), jnp.where(mask, target, bad_target), mask, keys
        )
        np.testing.assert_array_equal(changed, value)
        np.testing.assert_array_equal(jnp.where(mask, changed_gradient - gradient, 0), 0)
        assert np.isfinite(changed_gradient).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "case", ["one_empty", "single", "constant", "zero", "perfect", "opposite", 1e6, 1e-13, 1e-30]
)
def test_gradients_are_finite(rng, name, case):
    pred, target, mask, keys = sample(name, rng)
    if case == "one_empty":
        mask = mask.at[0].set(False)
    elif case == "single":
        mask = jnp.zeros_like(mask).at[:, 4, 4].set(True)
    elif isinstance(case, float):
        pred = case * pred
    else:
        # Classes as logits in {0, 1}; the certainty of normals stays as it is.
        like = jax.nn.one_hot(target[..., 0], 5) if name == "cross_entropy" else target
        like = jnp.concatenate([like, pred[..., like.shape[-1] :]], axis=-1)
        pred = {
            "constant": jnp.full_like(pred, 1.7),
            "zero": jnp.zeros_like(pred),
            "perfect": like,
            "opposite": -like,
        }[case]
    value, gradient = COMPILED[name](pred, target, mask, keys)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name",
    [
        *("mse", "l1", "ssi", "ssi_median", "ssi_median_compat", "gradient", "gradient_scales"),
        *("vertical", "hdn_random", "hdsn_random", "vnl", "location"),
    ],
)
def test_equal_maps_cost_nothing(rng, name):
    _, target, mask, keys = sample(name, rng)
    value, gradient = COMPILED[name](target, target, mask, keys)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    # Of what is first aligned rounding errors remain, whose signs the L1 takes for a gradient.
    if name in ("mse", "l1", "gradient", "gradient_scales", "vertical"):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, share=st.floats(0, 1))
def test_a_mean_is_made_of_its_parts(name, seed, share):
    """Two masks that share no pixel: the losses add up by their counts."""
    rng = np.random.default_rng(seed)
    pred, target, mask, keys = sample(name, rng)
    first = mask & (rng.random(mask.shape) < share)
    parts = [(m, int(m.sum())) for m in (first, mask & ~first)]
    total = sum(n * float(COMPILED[name](pred, target, m, keys)[0]) for m, n in parts)
    whole = float(COMPILED[name](pred, target, mask, keys)[0])
    np.testing.assert_allclose(total / int(mask.sum()), whole, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*ELEMENTWISE, "ssi", "ssi_median", "soft_iou", "location"])
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_the_order_of_pixels_does_not_matter(name, seed):
    rng = np.random.default_rng(seed)
    pred, target, mask, keys = sample(name, rng)
    order = rng.permutation(mask[0].size)

    def shuffled(x):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, order].reshape(x.shape)

    expected = COMPILED[name](pred, target, mask, keys)[0]
    value = COMPILED[name](*map(shuffled, (pred, target, mask)), keys)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ssi", "ssi_median", "gradient", "soft_iou", "location"])
def test_masked_rows_might_as_well_be_cut_off(rng, name):
    pred, target, mask, keys = sample(name, rng)
    mask = mask.at[:, 8:].set(False)
    whole = COMPILED[name](pred, target, mask, keys)[0]
    cut = jax.jit(CASES[name].loss)(pred[:, :8], target[:, :8], mask[:, :8], keys)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["mse", "l1"])
def test_elementwise_losses_equal_numpy(rng, name):
    pred, target, mask, keys = sample(name, rng)
    value = COMPILED[name](pred, target, mask, keys)[0]
    chosen = np.broadcast_to(mask, pred.shape)
    error = (np.asarray(pred, np.float64) - np.asarray(target))[chosen]
    expected = np.mean(error**2) if name == "mse" else np.mean(np.abs(error))
    np.testing.assert_allclose(value, expected, rtol=3e-6)


def test_weights_of_examples_do_not_change_what_is_divided_by(rng):
    pred, target, mask, _ = sample("mse", rng)
    mask = mask.at[1].set(False)
    weights = rng.uniform(0, 3, len(pred)).astype(np.float32)
    value = jax.jit(losses.mse)(pred, target, mask, jnp.asarray(weights))
    chosen = np.broadcast_to(mask, pred.shape)
    squares = (np.asarray(pred, np.float64) - np.asarray(target)) ** 2
    sums = np.where(chosen, squares, 0).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(value, weights @ sums / chosen.sum(), rtol=3e-6)
    ones = jax.jit(losses.mse)(pred, target, mask, jnp.ones(len(pred)))
    np.testing.assert_allclose(ones, jax.jit(losses.mse)(pred, target, mask), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.l1, losses.ssi, losses.gradient, losses.bce])
def test_one_mask_channel_serves_all(rng, loss):
    pred, target = (np.concatenate([x, x[::-1]], -1, dtype=np.float32) for x in depths(rng))
    single = rng.random((*pred.shape[:3], 1)) > 0.3
    pred, target, single = map(jnp.asarray, (pred, target, single))
    full = jnp.repeat(single, 2, axis=-1)
    loss = jax.jit(loss)
    np.testing.assert_allclose(loss(pred, target, single), loss(pred, target, full), rtol=1e-6)


def test_pool_mask_equals_torch_max_pooling(rng):
    for height, width in ((16, 24), (30, 41), (8, 9)):
        valid = rng.random((2, height, width, 1)) > 0.01
        invalid = torch.from_numpy(~valid).permute(0, 3, 1, 2).float()
        pooled = torch.nn.functional.max_pool2d(invalid, 8, 8).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(losses.pool_mask(jnp.asarray(valid), 8), pooled == 0)
