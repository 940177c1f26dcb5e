"""Every loss with inputs of its kind, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxpercept import losses

B, H, W = 4, 12, 14
CLASSES = 5


class Case(NamedTuple):
    """A loss as loss(pred, target, mask, keys), and `pair(rng)` -> pred, target."""

    loss: Callable[..., Any]
    pair: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def depths(rng):
    """Predictions correlated with targets in [1, 3], as GenPercept's losses see them."""
    target = rng.uniform(1, 3, (B, H, W, 1))
    return 0.6 * target + 0.7 + 0.2 * rng.normal(size=target.shape), target


def colours(rng):
    return rng.normal(size=(B, H, W, 4)), rng.normal(size=(B, H, W, 4))


def normals(rng):
    target = rng.normal(size=(B, H, W, 3))
    target /= np.linalg.norm(target, axis=-1, keepdims=True)
    return target + 0.5 * rng.normal(size=target.shape), target


def normals_and_kappa(rng):
    pred, target = normals(rng)
    return np.concatenate([pred, rng.normal(size=(B, H, W, 1))], -1), target


def mattes(rng):
    """Decoded mattes overshoot [0, 1]."""
    return rng.uniform(-0.2, 1.2, (B, H, W, 1)), rng.uniform(0, 1, (B, H, W, 1))


def heat_maps(rng):
    return rng.uniform(-1, 1, (B, H, W, 3)), rng.uniform(-1, 1, (B, H, W, 3))


def classes(rng):
    return 2 * rng.normal(size=(B, H, W, CLASSES)), rng.integers(0, CLASSES, (B, H, W, 1))


def without_keys(loss, **options):
    return lambda pred, target, mask, keys: loss(pred, target, mask, **options)


CASES = {
    "mse": Case(without_keys(losses.mse), colours),
    "l1": Case(without_keys(losses.l1), colours),
    "ssi": Case(without_keys(losses.ssi), depths),
    "ssi_median": Case(without_keys(losses.ssi_median), depths),
    "ssi_median_compat": Case(without_keys(losses.ssi_median, compat=True), depths),
    "gradient": Case(without_keys(losses.gradient), depths),
    "gradient_scales": Case(without_keys(losses.gradient, scales=3), depths),
    "vertical": Case(without_keys(losses.gradient, vertical_only=True), depths),
    "hdn_random": Case(losses.hdn_random, depths),
    "hdsn_random": Case(losses.hdsn_random, depths),
    "vnl": Case(losses.vnl, depths),
    "angular": Case(without_keys(losses.angular), normals),
    "angular_kappa": Case(without_keys(losses.angular_kappa), normals_and_kappa),
    "bce": Case(without_keys(losses.bce), mattes),
    "soft_iou": Case(without_keys(losses.soft_iou), mattes),
    "location": Case(without_keys(losses.location), heat_maps),
    "cross_entropy": Case(without_keys(losses.cross_entropy), classes),
}
COMPILED = {name: jax.jit(jax.value_and_grad(case.loss)) for name, case in CASES.items()}


def sample(name, rng, invalid=0.3):
    """pred, target, mask and keys for the case of that name."""
    pred, target = CASES[name].pair(rng)
    if np.issubdtype(target.dtype, np.floating):
        target = target.astype(np.float32)
    mask = rng.random((B, H, W, 1)) >= invalid
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), B)
    return *map(jnp.asarray, (pred.astype(np.float32), target, mask)), keys


def in_torch(reference, pred, *arguments):
    """Value and gradient in pred of `reference`, in float64."""
    p = torch.from_numpy(np.asarray(pred)).double().requires_grad_()
    rest = [torch.from_numpy(np.asarray(x)) for x in arguments]
    rest = [x.double() if x.is_floating_point() else x for x in rest]
    expected = reference(p, *rest)
    expected.backward()
    return expected.item(), p.grad.numpy()


def assert_equals_torch(loss, reference, pred, *arguments, rtol=1e-5, atol=0.0):
    """Value and gradient in pred, against `reference(pred, *arguments)` of float64 tensors.

    Args:
      atol: of the value, for losses whose terms differ in sign and may add up to almost nothing.
    """
    value, gradient = jax.jit(jax.value_and_grad(loss))(*map(jnp.asarray, (pred, *arguments)))
    expected, expected_gradient = in_torch(reference, pred, *arguments)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)
    scale = np.abs(expected_gradient).max()
    assert scale > 0
    np.testing.assert_allclose(gradient, expected_gradient, rtol=rtol, atol=rtol * scale)


def is_steady(rng, reference, pred, *arguments, rtol=1e-5):
    """Whether a millionth more or less leaves the gradient, as it does away from a threshold."""
    _, gradient = in_torch(reference, pred, *arguments)
    for _ in range(4):
        moved = [
            x * (1 + 1e-6 * rng.choice([-1.0, 1.0], x.shape)) if x.dtype == np.float32 else x
            for x in (pred, *arguments)
        ]
        change = np.abs(in_torch(reference, *moved)[1] - gradient).max()
        if change > rtol * np.abs(gradient).max():
            return False
    return True
