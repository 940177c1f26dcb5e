"""The one door to scaled dot-product attention, and the attention layer built on it."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpercept.models.layers import DType, GroupNorm, Linear

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked")

# Scores held at once, batch x heads x queries x keys, above which queries go in chunks:
# 2^26 float32 scores are 256 MiB, and their softmax as much again.
MAX_SCORES = 2**26


def dot_product_attention(
    q: Float[Array, "b tq n d"],
    k: Float[Array, "b tk n d"],
    v: Float[Array, "b tk n d"],
    *,
    implementation: str = "auto",
    is_causal: bool = False,
) -> Float[Array, "b tq n d"]:
    """softmax(q k^T / sqrt(d)) v per head, softmax in float32.

    `implementation`:
      - "xla": the whole score matrix at once;
      - "chunked": some queries at a time, so that at most about MAX_SCORES scores exist, forwards
        and backwards (each chunk is recomputed in the backward pass);
      - "cudnn": cuDNN's fused kernel (NVIDIA, bfloat16 or float16);
      - "auto": cudnn on a GPU where it applies and compiles, else chunked where the score matrix is
        large (the VAE's 9216 tokens at 768 px), else xla.

    Raises ValueError for any other name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = _choose(q, k, is_causal)
    if implementation == "chunked":
        return _chunked_attention(q, k, v, is_causal)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, is_causal=is_causal)


def _choose(q: Float[Array, "b tq n d"], k: Float[Array, "b tk n d"], is_causal: bool) -> str:
    b, tq, n, d = q.shape
    tk = k.shape[1]
    if jax.default_backend() == "gpu" and not is_causal and _cudnn_eligible(q.dtype, d, tq, tk):
        return "cudnn"
    return "chunked" if b * n * tq * tk > MAX_SCORES else "xla"


def _cudnn_eligible(dtype: jnp.dtype, head_dim: int, tq: int, tk: int) -> bool:
    """Static limits of the fused kernel, then a trial compile.

    Odd lengths, which only the smallest feature maps have, are not what the trial compiles. Against
    a short prompt (2 or 77 tokens) the scores are as small as the queries: nothing to save.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or head_dim % 8 or head_dim > 128:
        return False
    if tq % 2 or tk % 2 or tk < 128:
        return False
    return _cudnn_compiles(jnp.dtype(dtype).name, head_dim)


@functools.cache
def _cudnn_compiles(dtype: str, head_dim: int) -> bool:
    """Whether forward and backward really compile here (driver, cuDNN and GPU decide)."""
    shape = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)

    def loss(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    except Exception:  # whatever is wrong with cuDNN, the xla path still works
        return False
    return True


def _chunked_attention(
    q: Float[Array, "b tq n d"],
    k: Float[Array, "b tk n d"],
    v: Float[Array, "b tk n d"],
    is_causal: bool,
) -> Float[Array, "b tq n d"]:
    b, tq, n, d = q.shape
    tk = k.shape[1]
    num_chunks = max(1, math.ceil(b * n * tq * tk / MAX_SCORES))
    chunk = math.ceil(tq / num_chunks)
    num_chunks = math.ceil(tq / chunk)

    def attend(start: Array, q_chunk: Array) -> Array:
        mask = None
        if is_causal:
            mask = (start + jnp.arange(chunk))[:, None] >= jnp.arange(tk)[None, :]
            mask = mask[None, None]
        return jax.nn.dot_product_attention(q_chunk, k, v, mask=mask, implementation="xla")

    # Padded queries attend to real keys and are cut off again.
    padded = jnp.pad(q, ((0, 0), (0, num_chunks * chunk - tq), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(b, num_chunks, chunk, n, d), 1, 0)
    starts = jnp.arange(num_chunks) * chunk
    out = lax.map(lambda args: jax.checkpoint(attend)(*args), (starts, chunks))
    return jnp.moveaxis(out, 0, 1).reshape(b, num_chunks * chunk, n, d)[:, :tq]


class Attention(nnx.Module):
    """Multi-head attention with diffusers' names: to_q, to_k, to_v, to_out.0.

    Attends over `context` where given, else over itself. UNet layers have no bias on q, k, v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        context_channels: int | None = None,
        qkv_bias: bool = False,
        dtype: DType = jnp.float32,
        attention: str = "auto",
    ):
        context_channels = context_channels or channels
        self.num_heads = num_heads
        self.attention = attention
        self.to_q = Linear(channels, channels, bias=qkv_bias, dtype=dtype)
        self.to_k = Linear(context_channels, channels, bias=qkv_bias, dtype=dtype)
        self.to_v = Linear(context_channels, channels, bias=qkv_bias, dtype=dtype)
        self.to_out = nnx.List([Linear(channels, channels, dtype=dtype)])

    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b l d"] | None = None
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], self.num_heads, -1)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = dot_product_attention(q, k, v, implementation=self.attention)
        return self.to_out[0](out.reshape(x.shape))


class SpatialAttention(Attention):
    """The VAE's single-head self-attention over pixels, group-normalised and residual."""

    def __init__(
        self,
        channels: int,
        *,
        num_groups: int,
        eps: float,
        dtype: DType = jnp.float32,
        attention: str = "auto",
    ):
        super().__init__(channels, 1, qkv_bias=True, dtype=dtype, attention=attention)
        self.group_norm = GroupNorm(num_groups, channels, eps=eps, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)
        return x + super().__call__(tokens).reshape(x.shape)
