"""Angular losses against torch in float64, and Bae et al.'s density against its integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import assert_equals_torch, normals, normals_and_kappa

from jaxpercept import losses
from jaxpercept.losses.normals import unit

angular = jax.jit(losses.angular)
with_gradient = jax.jit(jax.value_and_grad(losses.angular))
kappa_with_gradient = jax.jit(jax.value_and_grad(losses.angular_kappa))
seeds = st.integers(0, 2**32 - 1)


def sample(rng, pair=normals, invalid=0.3):
    pred, target = (x.astype(np.float32) for x in pair(rng))
    return pred, target, rng.random((*pred.shape[:3], 1)) > invalid


def angles(p, g):
    cosine = torch.nn.functional.cosine_similarity(p, g, dim=-1)
    return torch.acos(cosine.clamp(-1 + 1e-4, 1 - 1e-4))


def test_angular_equals_torch(rng):
    def reference(p, g, m):
        return angles(p, g)[m[..., 0]].mean()

    assert_equals_torch(losses.angular, reference, *sample(rng))


def test_angular_kappa_equals_torch(rng):
    def reference(p, g, m):
        alpha, kappa = angles(p[..., :3], g), torch.nn.functional.elu(p[..., 3]) + 1.01
        loss = (
            -torch.log(kappa**2 + 1) + kappa * alpha + torch.log(1 + torch.exp(-kappa * torch.pi))
        )
        return loss[m[..., 0]].mean()

    arguments = sample(rng, normals_and_kappa)
    assert_equals_torch(losses.angular_kappa, reference, *arguments, atol=1e-6)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0, 10.0])
def test_kappa_loss_is_a_density_on_the_sphere(logit):
    """exp(−loss) / 2π integrates to 1; the clip moves angles by less than 1e-4 of the mass."""
    count = 5000
    alpha = (np.arange(count) + 0.5) * np.pi / count
    target = np.stack([np.sin(alpha), 0 * alpha, np.cos(alpha)], -1).astype(np.float32)
    mask = jnp.ones((1, 1, 1, 1), bool)
    pred = jnp.array([0, 0, 1, logit])[None, None, None]
    each = jax.vmap(lambda g: losses.angular_kappa(pred, g[None, None, None], mask))
    loss = jax.jit(each)(jnp.asarray(target))
    density = np.exp(-np.asarray(loss, np.float64)) / (2 * np.pi)
    integral = (density * 2 * np.pi * np.sin(alpha)).sum() * np.pi / count
    np.testing.assert_allclose(integral, 1, rtol=1e-3)


def test_equal_and_opposite_vectors_lie_at_the_clip(rng):
    _, target, mask = map(jnp.asarray, sample(rng))
    margin = np.arccos(1 - 1e-4)
    for pred, expected in ((3 * target, margin), (-target, np.pi - margin)):
        value, gradient = with_gradient(pred, target, mask)
        np.testing.assert_allclose(value, expected, rtol=1e-3)
        np.testing.assert_array_equal(gradient, 0)


def test_vectors_without_length_are_at_a_right_angle(rng):
    pred, target, mask = map(jnp.asarray, sample(rng))
    for p, g in ((0 * pred, target), (pred, 0 * target), (0 * pred, 0 * target)):
        value, gradient = with_gradient(p, g, mask)
        np.testing.assert_allclose(value, np.pi / 2, rtol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, exponent=st.integers(-7, 30))
def test_length_does_not_matter(seed, exponent):
    pred, target, mask = map(jnp.asarray, sample(np.random.default_rng(seed)))
    expected, gradient = with_gradient(pred, target, mask)
    scale = float(10.0**exponent)
    value, scaled = with_gradient(scale * (pred + jnp.sign(pred)), target, mask)
    expected, gradient = with_gradient(pred + jnp.sign(pred), target, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(scaled * scale, gradient, rtol=1e-3, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_rotating_both_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    pred, target, mask = sample(rng)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    expected = angular(*map(jnp.asarray, (pred, target, mask)))
    value = angular(*map(jnp.asarray, (pred @ rotation, target @ rotation, mask)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("logit", [-1e30, -100.0, 100.0, 1e30])
def test_saturated_certainty_stays_finite(rng, logit):
    pred, target, mask = sample(rng, normals_and_kappa)
    pred[..., 3] = logit
    value, gradient = kappa_with_gradient(*map(jnp.asarray, (pred, target, mask)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if logit == -100:  # kappa is 0.01: nothing is known, and the loss barely depends on the angle.
        np.testing.assert_allclose(value, np.log(2), atol=0.03)


def test_unit_vectors_of_any_size():
    sizes = jnp.array([[1e37], [1e20], [1.0], [1e-7]])
    vectors = sizes * jnp.array([[3.0, -4.0, 0.0]])
    np.testing.assert_allclose(unit(vectors), [[0.6, -0.8, 0]] * 4, rtol=1e-6)
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), 0)
    axis = jnp.array([[0.0, 0.0, 5.0]])
    jacobian = jax.jacobian(lambda v: unit(v)[0])(axis)[:, 0]
    np.testing.assert_allclose(jacobian, np.diag([0.2, 0.2, 0]), atol=1e-7)
