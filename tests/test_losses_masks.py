"""Losses of masks and classes against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import assert_equals_torch, classes, heat_maps, mattes

from jaxpercept import losses

bce = jax.jit(jax.value_and_grad(losses.bce))
soft_iou = jax.jit(jax.value_and_grad(losses.soft_iou))
cross_entropy = jax.jit(jax.value_and_grad(losses.cross_entropy))
ONE = jnp.ones((1, 1, 1, 1), bool)


def sample(rng, pair, invalid=0.3):
    pred, target = pair(rng)
    target = target.astype(np.float32 if target.dtype == np.float64 else np.uint8)
    return pred.astype(np.float32), target, rng.random((*pred.shape[:3], 1)) > invalid


def one(value):
    return jnp.full((1, 1, 1, 1), value)


def test_bce_equals_torch(rng):
    pred, target, mask = sample(rng, mattes)
    pred = pred.clip(0.02, 0.98)

    def reference(q, t, m):
        return F.binary_cross_entropy(q[m], t[m])

    assert_equals_torch(losses.bce, reference, pred, target, mask)


def test_location_equals_torch(rng):
    """And joints without a blob do not count."""
    pred, target, mask = sample(rng, heat_maps)
    target[1, ..., 2] = -1

    def reference(q, t, m):
        total = []
        for i, channel in np.ndindex(*target.shape[::3]):
            if (i, channel) != (1, 2):
                a, b = (10 * x[i, ..., channel][m[i, ..., 0]] for x in (q, t))
                total.append(F.kl_div(a.log_softmax(0), b.softmax(0), reduction="sum"))
        return sum(total) / len(total)

    assert_equals_torch(losses.location, reference, pred, target, mask)


def test_a_guess_of_the_place_costs_less_than_an_empty_heat_map():
    """For squared errors it is the other way round."""
    y, x = np.mgrid[:48, :64]

    def blob(row, sigma):
        heat = 2 * np.exp(-((y - row) ** 2 + (x - 30) ** 2) / (2 * sigma**2)) - 1
        return jnp.asarray(heat[None, ..., None], jnp.float32)

    truth, guess, mask = blob(20, 2), blob(22, 6), jnp.ones((1, 48, 64, 1), bool)
    empty = jnp.full_like(truth, -1)
    assert losses.location(guess, truth, mask) < losses.location(empty, truth, mask) / 2
    assert losses.mse(guess, truth, mask) > 2 * losses.mse(empty, truth, mask)


@pytest.mark.parametrize("q", [-3.0, -0.5, 0.0, 0.005])
def test_bce_goes_on_straight_below_one_percent(q):
    """Value and slope of −log q at 0.01; the same from the other side for background."""
    expected = -np.log(0.01) + 100 * (0.01 - q)
    for pred, target, slope in ((q, 1.0, -100), (1 - q, 0.0, 100)):
        value, gradient = bce(one(pred), one(target), ONE)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4)


def test_bce_does_not_reward_overshooting():
    for pred, target in ((1.5, 1.0), (-0.5, 0.0)):
        value, gradient = bce(one(pred), one(target), ONE)
        assert value == 0
        assert gradient == 0


@settings(max_examples=20, deadline=None)
@given(t=st.floats(0.05, 0.95), q=st.floats(-1, 2))
def test_bce_is_least_at_the_target(t, q):
    """Also for mattes, whose targets lie between 0 and 1."""
    at_target = bce(one(t), one(t), ONE)
    elsewhere, gradient = bce(one(q), one(t), ONE)
    np.testing.assert_allclose(at_target[1], 0, atol=1e-4)
    assert elsewhere >= at_target[0] - 1e-6
    assert abs(q - t) < 1e-3 or np.sign(gradient) == np.sign(q - t)


def test_soft_iou_equals_torch(rng):
    """One image has no valid pixel and does not count."""
    pred, target, mask = sample(rng, mattes)
    mask[1] = False

    def reference(q, t, m):
        ratios = []
        for i in (0, 2, 3):
            a, b = q[i][m[i]].clamp(0, 1), t[i][m[i]]
            ratios.append(1 - ((a * b).sum() + 1) / ((a + b - a * b).sum() + 1))
        return torch.stack(ratios).mean()

    assert_equals_torch(losses.soft_iou, reference, pred, target, mask)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_soft_iou_lies_between_zero_and_one(seed):
    """Zero for equal binary masks, near one for a mask and its complement."""
    pred, _, mask = map(jnp.asarray, sample(np.random.default_rng(seed), mattes))
    binary = (pred > 0.5).astype(jnp.float32)
    np.testing.assert_allclose(soft_iou(binary, binary, mask)[0], 0, atol=1e-6)
    assert 0 <= soft_iou(pred, binary, mask)[0] <= 1
    np.testing.assert_allclose(
        soft_iou(1 - binary, binary, mask)[0], 1, atol=1 / float(mask.sum(axis=(1, 2, 3)).min())
    )


def test_soft_iou_counts_images_alike(rng):
    """A missed object costs the same, small or large."""
    target = np.zeros((2, 20, 20, 1), np.float32)
    target[0, :2, :2], target[1, :18, :18] = 1, 1
    mask = jnp.ones(target.shape, bool)
    first, second = target.copy(), target.copy()
    first[0], second[1] = 0, 0
    costs = [soft_iou(jnp.asarray(x), jnp.asarray(target), mask)[0] for x in (first, second)]
    np.testing.assert_allclose(costs, [(1 - 1 / 5) / 2, (1 - 1 / 325) / 2], rtol=1e-5)


def test_soft_iou_of_background_alone_has_a_gradient():
    pred, mask = jnp.full((1, 4, 4, 1), 0.1), jnp.ones((1, 4, 4, 1), bool)
    assert (soft_iou(pred, jnp.zeros_like(pred), mask)[1] > 0).all()


def test_cross_entropy_equals_torch(rng):
    """255 where nothing is known, as label images have it."""
    pred, target, mask = sample(rng, classes)
    target = np.where(mask, target, 255).astype(np.uint8)

    def reference(p, labels, m):
        labels = labels[..., 0].long()
        return F.cross_entropy(p.permute(0, 3, 1, 2), labels, ignore_index=255)

    assert_equals_torch(losses.cross_entropy, reference, pred, target, mask)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_saturated_class_logits(size):
    pred = jnp.array([size, 0, -size])[None, None, None]
    for label, expected in ((0, 0), (1, size), (2, 2 * size)):
        value, gradient = cross_entropy(pred, jnp.full((1, 1, 1, 1), label), ONE)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[0, 0, 0], np.eye(3)[0] - np.eye(3)[label], atol=1e-6)


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_a_label_without_a_class_is_not_passed_over(rng, label):
    pred, target, mask = map(jnp.asarray, sample(rng, classes, invalid=0))
    wrong = target.astype(jnp.int32).at[0, 0, 0].set(label)
    assert np.isnan(cross_entropy(pred, wrong, mask)[0])
    hidden = mask.at[0, 0, 0].set(False)
    assert np.isfinite(cross_entropy(pred, wrong, hidden)[0])
