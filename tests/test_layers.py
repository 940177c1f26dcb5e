"""The layers that compute in another order than torch, where their shortcuts apply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_parity import from_torch, max_abs, normal, to_torch

from jaxpercept.models import layers


def output_and_gradients(function, weight, *inputs):
    """Output, then the gradient of its weighted sum by each input."""

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(weight * out), out

    argnums = tuple(range(len(inputs)))
    gradients, out = jax.jit(jax.grad(loss, argnums, has_aux=True))(*map(jnp.asarray, inputs))
    return out, *gradients


def assert_all_close(got, want, tolerance):
    """Relative to the largest element of each."""
    for a, b in zip(got, want, strict=True):
        assert max_abs(a, b) <= tolerance * np.abs(b).max()


def as_kernel(kernel):
    """HWIO to torch's OIHW."""
    return torch.tensor(kernel.transpose(3, 2, 0, 1))


@pytest.mark.parametrize("size", [(32, 24), (31, 23)], ids=["doubled", "uneven"])
def test_upsampling_convolution(rng, size):
    x, kernel = normal(rng, 2, 16, 12, 5), normal(rng, 3, 3, 5, 7)  # 384 pixels: sub-pixel on CPUs
    weight = normal(rng, 2, *size, 7)
    got = output_and_gradients(lambda x, k: layers.upsample_conv2d(x, k, size), weight, x, kernel)
    x, kernel = to_torch(x).requires_grad_(), as_kernel(kernel).requires_grad_()
    want = torch.conv2d(torch.nn.functional.interpolate(x, size), kernel, padding=1)
    (want * to_torch(weight)).sum().backward()
    want_kernel = kernel.grad.numpy().transpose(2, 3, 1, 0)
    assert_all_close(got, (from_torch(want), from_torch(x.grad), want_kernel), 2e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [1, 0])
def test_convolution_of_few_pixels_and_many_channels(rng, padding, stride):
    x, kernel = normal(rng, 1, 5, 4, 1024), normal(rng, 3, 3, 1024, 6)
    height, width = (-(-(side - 2 + 2 * padding) // stride) for side in (5, 4))
    weight = normal(rng, 1, height, width, 6)
    pads = ((padding, padding),) * 2
    got = output_and_gradients(
        lambda x, k: layers.conv2d(x, k, stride=stride, padding=pads), weight, x, kernel
    )
    # Sums of 9216 terms, rounded differently by every processor: held to the exact ones.
    x, kernel = to_torch(x).double().requires_grad_(), as_kernel(kernel).double().requires_grad_()
    want = torch.conv2d(x, kernel, stride=stride, padding=padding)
    (want * to_torch(weight)).sum().backward()
    want_kernel = kernel.grad.numpy().transpose(2, 3, 1, 0)
    assert_all_close(got, (from_torch(want), from_torch(x.grad), want_kernel), 1e-5)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0, 10])
def test_group_norm_and_its_gradients(rng, silu, offset):
    x, weight = normal(rng, 2, 7, 5, 12) + np.float32(offset), normal(rng, 2, 7, 5, 12)
    scale, bias = normal(rng, 12), normal(rng, 12)
    got = output_and_gradients(
        lambda *args: layers._group_norm(*args, 3, 1e-6, silu), weight, x, scale, bias
    )
    x, scale, bias = to_torch(x).double(), torch.tensor(scale).double(), torch.tensor(bias).double()
    inputs = [v.requires_grad_() for v in (x, scale, bias)]
    want = torch.nn.functional.group_norm(x, 3, scale, bias, 1e-6)
    want = torch.nn.functional.silu(want) if silu else want
    (want * to_torch(weight)).sum().backward()
    want = (from_torch(want), from_torch(x.grad), *(v.grad.numpy() for v in inputs[1:]))
    assert_all_close(got, want, 2e-6 if offset == 0 else 2e-5)


def test_group_norm_keeps_only_its_input_for_the_backward_pass():
    x, v = jax.ShapeDtypeStruct((2, 8, 8, 32), "float32"), jax.ShapeDtypeStruct((32,), "float32")

    def backward(*args):
        return jax.vjp(lambda *args: layers._group_norm(*args, 8, 1e-6, True), *args)[1]

    kept = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, x, v, v)))
    assert kept < 1.1 * x.size
