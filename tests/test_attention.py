"""The attention dispatcher and the transformer blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock as TorchTransformerBlock
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer2D
from torch_parity import max_abs, normal, port, randomise, to_torch

from jaxpercept.models import attention
from jaxpercept.models.attention import Attention, SpatialAttention, dot_product_attention
from jaxpercept.models.blocks import BasicTransformerBlock, Transformer2DModel


def qkv(rng, b=2, tq=13, tk=13, n=2, d=8):
    shapes = (b, tq, n, d), (b, tk, n, d), (b, tk, n, d)
    return tuple(jnp.asarray(normal(rng, *shape)) for shape in shapes)


@pytest.mark.parametrize("implementation", ["auto", "xla", "chunked"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_matches_torch(rng, implementation, is_causal):
    q, k, v = qkv(rng)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v)), is_causal=is_causal
    ).transpose(1, 2)
    got = dot_product_attention(q, k, v, implementation=implementation, is_causal=is_causal)
    assert max_abs(got, want.numpy()) <= 1e-5


# One chunk, whole chunks, a last chunk of padding, one query a chunk.
@pytest.mark.parametrize(
    ("tq", "tk", "limit", "is_causal"),
    [(7, 5, 10**6, False), (12, 5, 80, False), (17, 9, 200, False), (11, 11, 1, True)],
)
def test_chunked_is_full_attention(rng, monkeypatch, tq, tk, limit, is_causal):
    monkeypatch.setattr(attention, "MAX_SCORES", limit)
    q, k, v = qkv(rng, tq=tq, tk=tk)
    got = dot_product_attention(q, k, v, implementation="chunked", is_causal=is_causal)
    want = dot_product_attention(q, k, v, implementation="xla", is_causal=is_causal)
    assert max_abs(got, want) <= 1e-5


# All at once; a head at a time; a head and five queries at a time.
@pytest.mark.parametrize("limit", [10**6, 400, 120])
@pytest.mark.parametrize("is_causal", [False, True])
def test_chunked_has_the_same_gradients(rng, monkeypatch, limit, is_causal):
    monkeypatch.setattr(attention, "MAX_SCORES", limit)
    inputs, weight = qkv(rng, tq=11), normal(rng, 2, 11, 2, 8)

    def loss(q, k, v, implementation):
        out = dot_product_attention(q, k, v, implementation=implementation, is_causal=is_causal)
        return jnp.sum(weight * out)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    for got, want in zip(grad(*inputs, "chunked"), grad(*inputs, "xla"), strict=True):
        assert max_abs(got, want) <= 1e-5


def test_chunked_bounds_memory_forwards_and_backwards(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 2**16)
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)  # 16 MiB of scores

    def peak(implementation):
        def loss(q, k, v):
            return jnp.sum(dot_product_attention(q, k, v, implementation=implementation) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak("chunked") < 4 * 2**20 < 16 * 2**20 <= peak("xla")


def test_auto_goes_in_chunks_where_scores_are_many(rng, monkeypatch):
    q, k, v = qkv(rng)
    for limit, loops in ((2**20, False), (100, True)):
        monkeypatch.setattr(attention, "MAX_SCORES", limit)
        jaxpr = str(jax.make_jaxpr(lambda q, k, v: dot_product_attention(q, k, v))(q, k, v))
        assert ("scan" in jaxpr) == loops


def test_cudnn_that_does_not_compile_is_not_chosen(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    assert attention.choose_implementation(q, q) == "xla"  # these tests have no cuDNN


def test_cudnn_is_chosen_where_it_applies(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_cudnn_compiles", lambda dtype, head_dim: True)

    def choice(tq, tk, d, dtype=jnp.bfloat16, is_causal=False):
        q, k = jnp.zeros((1, tq, 2, d), dtype), jnp.zeros((1, tk, 2, d), dtype)
        return attention.choose_implementation(q, k, is_causal=is_causal)

    assert choice(256, 256, 64) == choice(256, 256, 40, jnp.float16) == "cudnn"
    assert choice(256, 256, 64, jnp.float32) == "xla"
    assert choice(256, 256, 160) == choice(256, 256, 44) == "xla"  # head size
    assert choice(255, 255, 64) == choice(256, 77, 64) == "xla"  # lengths
    assert choice(256, 256, 64, is_causal=True) == "xla"


def test_softmax_is_float32_under_bfloat16(rng):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(rng))
    got = dot_product_attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    want = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert max_abs(got, want) <= 2**-7 * np.abs(want).max()


def test_unknown_implementation_is_named(rng):
    with pytest.raises(ValueError, match="'flash'"):
        dot_product_attention(*qkv(rng), implementation="flash")


@pytest.mark.parametrize("context_channels", [None, 12])
def test_attention_layer(rng, context_channels):
    reference = TorchAttention(
        16, cross_attention_dim=context_channels, heads=4, dim_head=4, bias=False
    )
    randomise(reference, rng)
    apply, params = port(lambda: Attention(16, 4, context_channels=context_channels), reference)
    x = normal(rng, 2, 9, 16)
    context = None if context_channels is None else normal(rng, 2, 5, 12)
    want = reference(to_torch(x), None if context is None else to_torch(context))
    assert max_abs(apply(params, x, context), want) <= 1e-5


def test_spatial_attention(rng):
    reference = TorchAttention(
        16,
        heads=1,
        dim_head=16,
        bias=True,
        eps=1e-6,
        norm_num_groups=4,
        residual_connection=True,
        upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )
    randomise(reference, rng)
    apply, params = port(lambda: SpatialAttention(16, num_groups=4, eps=1e-6), reference)
    x = normal(rng, 2, 5, 6, 16)
    assert max_abs(apply(params, x), reference(to_torch(x))) <= 1e-5


def test_basic_transformer_block(rng):
    reference = randomise(TorchTransformerBlock(16, 4, 4, cross_attention_dim=12), rng)
    apply, params = port(lambda: BasicTransformerBlock(16, 4, 12), reference)
    x, context = normal(rng, 2, 9, 16), normal(rng, 2, 5, 12)
    want = reference(to_torch(x), encoder_hidden_states=to_torch(context))
    assert max_abs(apply(params, x, context), want) <= 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_transformer_2d(rng, linear):
    reference = TorchTransformer2D(
        4,
        4,
        in_channels=16,
        num_layers=2,
        cross_attention_dim=12,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    randomise(reference, rng)
    apply, params = port(
        lambda: Transformer2DModel(16, 4, 12, num_layers=2, num_groups=8, linear_projection=linear),
        reference,
    )
    x, context = normal(rng, 2, 5, 3, 16), normal(rng, 2, 7, 12)
    want = reference(to_torch(x), encoder_hidden_states=to_torch(context), return_dict=False)[0]
    assert max_abs(apply(params, x, context), want) <= 1e-5


def test_gradients_of_a_transformer_block(rng):
    reference = randomise(TorchTransformerBlock(16, 4, 4, cross_attention_dim=12), rng)
    apply, params = port(lambda: BasicTransformerBlock(16, 4, 12), reference)
    x, context, weight = normal(rng, 1, 6, 16), normal(rng, 1, 3, 12), normal(rng, 1, 6, 16)
    grads = jax.grad(lambda p: jnp.sum(weight * apply(p, x, context)))(params)

    reference.requires_grad_(True)
    out = reference(to_torch(x), encoder_hidden_states=to_torch(context))
    (out * to_torch(weight)).sum().backward()
    for p in reference.parameters():
        p.data = p.grad
    for path, want in port(lambda: BasicTransformerBlock(16, 4, 12), reference)[1].items():
        assert max_abs(grads[path], want) <= 1e-5 * max(1, np.abs(want).max()), path
