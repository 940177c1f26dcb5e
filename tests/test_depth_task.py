import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpercept import losses
from jaxpercept.errors import UserError
from jaxpercept.tasks import get_task
from jaxpercept.tasks.depth import DEPTH, DepthTask

encode_target = jax.jit(DEPTH.encode_target)


@functools.cache
def pixel_losses(*names, task=DEPTH):
    """Jitted `task.pixel_losses`; with names, each of these with weight 1."""
    weights = dict.fromkeys(names, 1.0) or None
    return jax.jit(lambda decoded, target, mask: task.pixel_losses(decoded, target, mask, weights))


def batch(rng, b=3, h=12, w=16):
    valid = rng.random((b, h, w, 1)) > 0.2
    depth = np.where(valid, rng.gamma(2.0, 2.0, (b, h, w, 1)) + 0.5, 0).astype(np.float32)
    quantiles = [np.quantile(d[v], [0.02, 0.98]) for d, v in zip(depth, valid, strict=True)]
    arrays = {"depth": depth, "valid": valid, "depth_range": np.array(quantiles, np.float32)}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def test_target_equals_the_recipe(rng):
    data = batch(rng)
    target, mask = encode_target(data)
    assert target.shape == (3, 12, 16, 3)
    assert target.dtype == jnp.float32
    np.testing.assert_array_equal(mask, data["valid"])
    for i in range(3):
        d = np.asarray(data["depth"][i], np.float64)
        low, high = np.quantile(d[np.asarray(mask[i])], [0.02, 0.98])
        expected = np.clip((d - low) / (high - low) * 2 - 1, -1, 1)
        np.testing.assert_allclose(target[i], expected.repeat(3, -1), atol=2e-6)
    # The nearest 2 % are -1, the farthest 2 % are +1.
    measured = np.asarray(target)[np.asarray(mask)[..., 0]]
    assert 0.01 < (measured[:, 0] == -1).mean() < 0.04
    assert 0.01 < (measured[:, 0] == 1).mean() < 0.04


@pytest.mark.parametrize("bad_range", [(2.0, 2.0), (0.0, 0.0), (np.nan, np.nan), (3.0, 1.0)])
def test_degenerate_ranges_are_masked_out(rng, bad_range):
    data = batch(rng)
    data["depth_range"] = data["depth_range"].at[1].set(jnp.array(bad_range, jnp.float32))
    target, mask = encode_target(data)
    assert np.isfinite(target).all()
    assert not mask[1].any()
    assert mask[0].any()
    assert mask[2].any()


def test_target_is_finite_where_depth_is_not(rng):
    data = batch(rng)
    data["depth"] = jnp.where(data["valid"], data["depth"], jnp.nan)
    assert np.isfinite(encode_target(data)[0]).all()


def test_decode_and_prediction(rng):
    image = jnp.asarray(rng.normal(size=(2, 5, 6, 3)).astype(np.float32) * 2)
    decoded = DEPTH.decode(image)
    np.testing.assert_allclose(decoded, np.asarray(image).mean(-1, keepdims=True), atol=1e-6)
    prediction = DEPTH.to_prediction(image)
    np.testing.assert_allclose(prediction, np.clip((decoded + 1) / 2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(DEPTH.to_prediction(decoded), prediction)
    assert DEPTH.decode(image.astype(jnp.bfloat16)).dtype == jnp.float32


def test_prediction_inverts_the_target(rng):
    data = batch(rng)
    target, _ = encode_target(data)
    near, far = data["depth_range"].T[:, :, None, None, None]
    restored = DEPTH.to_prediction(target) * (far - near) + near
    np.testing.assert_allclose(restored, jnp.clip(data["depth"], near, far), rtol=1e-4, atol=1e-4)


def test_pixel_losses_are_genpercepts(rng):
    target, mask = encode_target(batch(rng))
    decoded = target + 0.3 * jnp.asarray(rng.normal(size=target.shape).astype(np.float32))
    terms = pixel_losses()(decoded, target, mask)
    # In [1, 3], as the released code has them.
    p, g = decoded.mean(axis=-1, keepdims=True) + 2, target[..., :1] + 2
    expected = {
        "mse": losses.mse(p, g, mask),
        "ssi": 0.5 * jax.jit(losses.ssi)(p, g, mask),
        "grad": 2 * losses.gradient(p, g, mask),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)


def test_weights_choose_the_terms(rng):
    target, mask = encode_target(batch(rng))
    terms = DEPTH.pixel_losses(-target, target, mask, {"l1": 3.0, "mse": 0.5})
    assert set(terms) == {"l1", "mse"}
    error = 2 * np.asarray(target[..., :1])[np.asarray(mask)]
    np.testing.assert_allclose(terms["l1"], 3 * np.abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["mse"], 0.5 * (error**2).mean(), rtol=1e-5)
    with pytest.raises(UserError, match="angular"):
        DEPTH.pixel_losses(-target, target, mask, {"angular": 1.0})


def test_upside_down_predictions_are_not_rewarded(rng):
    """The least-squares fit would flip them; the loss must prefer even a flat prediction's sign."""
    target, mask = encode_target(batch(rng))
    flipped = pixel_losses("ssi")(-target, target, mask)["ssi"]
    upright = pixel_losses("ssi")(target * 0.5, target, mask)["ssi"]
    assert upright < 1e-5
    assert flipped > 0.2


def test_released_gradient_switch(rng):
    target, mask = encode_target(batch(rng))
    decoded = jnp.zeros_like(target)
    released = DepthTask(vertical_gradient=True)
    faithful = pixel_losses("grad", task=released)(decoded, target, mask)
    expected = losses.gradient(decoded[..., :1], target[..., :1], mask, vertical_only=True)
    np.testing.assert_allclose(faithful["grad"], expected, rtol=1e-6)
    assert faithful["grad"] < pixel_losses("grad")(decoded, target, mask)["grad"]


def test_registry():
    assert get_task("depth") == DEPTH
    assert (DEPTH.name, DEPTH.kind, DEPTH.channels) == ("depth", "affine_depth", 1)
    assert set(DEPTH.default_weights) <= set(DEPTH.loss_names)
    assert hash(DEPTH) == hash(DepthTask())
    with pytest.raises(UserError, match="dpeth"):
        get_task("dpeth")
