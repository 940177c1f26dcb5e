"""Operations of traced programs, counted by hand and by XLA."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpercept.models.attention import dot_product_attention
from jaxpercept.training.flops import count_flops

sizes = st.integers(1, 9)


def flops(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jnp.ones(shape) for shape in shapes)))


@given(b=sizes, m=sizes, k=sizes, n=sizes)
def test_a_product(b, m, k, n):
    assert flops(jnp.matmul, (b, m, k), (b, k, n)) == 2 * b * m * k * n


def convolution(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


@given(b=sizes, side=st.integers(3, 9), i=sizes, o=sizes, groups=st.integers(1, 3))
def test_a_convolution(b, side, i, o, groups):
    """And XLA agrees, where nothing is padded."""
    shapes = (b, side, side, i * groups), (3, 3, i, o * groups)
    expected = 2 * b * (side - 2) ** 2 * 9 * i * o * groups
    function = lambda x, kernel: convolution(x, kernel, groups=groups)  # noqa: E731
    assert flops(function, *shapes) == expected
    lowered = jax.jit(function).lower(*(jnp.ones(shape) for shape in shapes))
    assert lowered.cost_analysis()["flops"] == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_its_gradient_is_twice_as_much_again(stride):
    """Of a dilated image the zeros do not count, but for those at the edge."""
    shapes = (2, 65, 65, 8), (3, 3, 8, 16)
    forward = flops(lambda x, k: convolution(x, k, stride), *shapes)
    loss = lambda x, k: (convolution(x, k, stride) ** 2).sum()  # noqa: E731
    both = flops(jax.value_and_grad(loss, argnums=(0, 1)), *shapes)
    assert both == pytest.approx(3 * forward, rel=0.1)
    # Without a use there is nothing to compute: of one argument's gradient, and of the loss.
    assert flops(jax.grad(loss), *shapes) == pytest.approx(2 * forward, rel=0.1)
    linear = jax.grad(lambda x, k: convolution(x, k, stride).sum())
    assert flops(linear, *shapes) == pytest.approx(forward, rel=0.1)


def test_loops_branches_and_what_is_computed_again():
    square, one = (4, 4), 2 * 4**3

    def turns(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)[0]

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: x @ x @ x)

    def nested(x):
        return jax.jit(turns)(x) @ x

    assert flops(turns, square) == 7 * one
    assert flops(branches, square) == 2 * one
    assert flops(nested, square) == 8 * one
    twice = lambda f: flops(jax.grad(lambda x: jnp.sin(f(jnp.sin(x) @ x)).sum()), square)  # noqa: E731
    assert twice(jax.checkpoint(lambda x: jnp.sin(x @ x))) > twice(lambda x: jnp.sin(x @ x))


def test_the_gradient_of_a_frozen_weight_is_not_counted():
    """That a custom gradient computes, too."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    for f in (product, jax.jit(product)):
        gradient = jax.value_and_grad(lambda x, w, f=f: (f(x, w) ** 2).sum())
        assert flops(gradient, (4, 5), (5, 6)) == 2 * (2 * 4 * 5 * 6)


def test_attention_in_blocks_is_counted_whole():
    """XLA's own count has one block."""
    shape = (1, 2048, 2, 16)
    function = lambda q, k, v: dot_product_attention(q, k, v, implementation="chunked")  # noqa: E731
    expected = 2 * 2 * 2048**2 * 2 * 16
    assert flops(function, shape, shape, shape) == expected
    lowered = jax.jit(function).lower(*(jnp.ones(shape) for _ in range(3)))
    assert lowered.cost_analysis()["flops"] < expected / 2
