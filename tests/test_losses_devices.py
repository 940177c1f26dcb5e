"""Losses and the machine: devices, precision, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_cases import CASES, COMPILED, sample

from jaxpercept import losses

RANDOM = ["hdn_random", "hdsn_random", "vnl"]


@pytest.mark.parametrize(
    "name", ["mse", "ssi", "ssi_median", "gradient_scales", "soft_iou", "location", *RANDOM]
)
def test_two_devices_give_the_value_of_one(rng, name):
    pred, target, mask, keys = sample(name, rng)
    if name == "ssi":
        pred = pred.at[3].set(4 - target[3])  # One device takes the median branch.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.device_put((pred, target, mask, keys), NamedSharding(mesh, P("data")))
    value, gradient = COMPILED[name](pred, target, mask, keys)
    split_value, split_gradient = COMPILED[name](*split)
    np.testing.assert_allclose(split_value, value, rtol=1e-5)
    np.testing.assert_allclose(split_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_belong_to_the_example(rng, name):
    """The keys go with the examples, in whatever order these come; other keys, other value."""
    pred, target, mask, keys = sample(name, rng)
    value, gradient = COMPILED[name](pred, target, mask, keys)
    order = jnp.asarray(rng.permutation(4))
    moved, moved_gradient = COMPILED[name](pred[order], target[order], mask[order], keys[order])
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    np.testing.assert_allclose(moved_gradient, gradient[order], rtol=1e-4, atol=1e-6)
    other = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    assert COMPILED[name](pred, target, mask, other)[0] != value


@pytest.mark.parametrize(
    "name",
    [
        *("mse", "ssi", "ssi_median", "gradient", "hdn_random"),
        *("angular_kappa", "bce", "cross_entropy"),
    ],
)
def test_bfloat16_inputs_are_computed_in_float32(rng, name):
    pred, target, mask, keys = sample(name, rng)
    pred = pred.astype(jnp.bfloat16)
    value = jax.jit(CASES[name].loss)(pred, target, mask, keys)
    assert value.dtype == jnp.float32
    expected = COMPILED[name](pred.astype(jnp.float32), target, mask, keys)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


def test_contexts_take_no_memory_of_their_own():
    """The gradient takes a few numbers a pixel, and no more for four times the contexts."""

    def memory(contexts):
        image = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.float32)
        mask = jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.bool)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

        def loss(*arguments):
            return losses.hdsn_random(*arguments, random_num=contexts)

        compiled = jax.jit(jax.grad(loss)).lower(image, image, mask, keys).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = memory(8)
    assert base < 200 * (2 * 64 * 64)
    assert memory(32) < 1.1 * base
