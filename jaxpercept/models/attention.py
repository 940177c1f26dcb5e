"""The one door to scaled dot-product attention, and the attention layer built on it."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpercept.models.layers import DType, GroupNorm, Linear, on_cpu

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked")

# Scores held at once, batch x heads x queries x keys, above which queries go in chunks:
# 2^26 float32 scores are 256 MiB, and their softmax as much again.
MAX_SCORES = 2**26
# The same on a CPU, where a block should stay in the caches of two cores through the softmax's
# several passes, but be worth rearranging keys and values for: hold some queries of every image,
# and many of a single one (benchmarks/README.md has the figures).
CACHED_SCORES = 2**19
MIN_QUERIES = 32
MIN_QUERIES_OF_ONE = 512


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
        and backwards (they are computed again in the backward pass);
      - "cudnn": cuDNN's fused kernel (NVIDIA, bfloat16 or float16);
      - "auto": chunked on a CPU; cudnn on a GPU where it applies and compiles; else chunked where
        the score matrix is large (the VAE's 9216 tokens at 768 px), else xla.

    Raises ValueError for any other name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = choose_implementation(q, k, is_causal=is_causal)
    if implementation == "chunked":
        return _chunked_attention(q, k, v, is_causal)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, is_causal=is_causal)


def choose_implementation(
    q: Float[Array, "b tq n d"], k: Float[Array, "b tk n d"], *, is_causal: bool = False
) -> str:
    """What "auto" takes here for these queries and keys; see `dot_product_attention`."""
    b, tq, n, d = q.shape
    tk = k.shape[1]
    if jax.default_backend() == "gpu" and not is_causal and _cudnn_eligible(q.dtype, d, tq, tk):
        return "cudnn"
    if on_cpu():
        return "chunked"
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
    """Blocks of one head and some queries at a time, or all at once where that is within limits.

    The batch stays whole in every block: it may be sharded. Heads are looped over on CPUs only,
    where a block that fits into the cache is worth more than a long one.
    """
    b, tq, n, d = q.shape
    tk = k.shape[1]
    cached = on_cpu()
    limit = MAX_SCORES
    if cached:
        queries = max(MIN_QUERIES * b, MIN_QUERIES_OF_ONE)
        limit = min(MAX_SCORES, max(CACHED_SCORES, queries * tk))
    loop_heads = cached and n > 1 and n * b * tq * tk > limit
    num_chunks = min(tq, math.ceil((1 if loop_heads else n) * b * tq * tk / limit))
    chunk = math.ceil(tq / num_chunks)
    if chunk > 16:
        chunk = 16 * math.ceil(chunk / 16)
    # Scaling the queries saves a pass over the scores.
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q / math.sqrt(d), k, v))
    out = _blocked(q, k, v, chunk, loop_heads, is_causal)
    return jnp.moveaxis(out, 0, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _blocked(
    q: Float[Array, "n b tq d"],
    k: Float[Array, "n b tk d"],
    v: Float[Array, "n b tk d"],
    chunk: int,
    loop_heads: bool,
    is_causal: bool,
) -> Float[Array, "n b tq d"]:
    """softmax(q k^T) v in blocks, whose gradient computes the scores again.

    The gradient is that of FlashAttention (Dao et al., arXiv 2205.14135, section 3.1 and B.4).
    """
    return _blocked_forward(q, k, v, chunk, loop_heads, is_causal)[0]


def _blocked_forward(q, k, v, chunk, loop_heads, is_causal):
    def head(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        def attend(args: tuple[Array, Array]) -> tuple[Array, Array]:
            q_chunk, start = args
            scores = _scores(q_chunk, k, start, is_causal)
            top = jnp.max(scores, axis=-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, axis=-1, keepdims=True)
            out = _matmul("...qk,...kd->...qd", p.astype(v.dtype), v) / total
            return out.astype(q.dtype), top + jnp.log(total)

        return _over_chunks(attend, chunk, q)

    out, normaliser = _over_heads(head, loop_heads, q, k, v)
    return out, (q, k, v, out, normaliser)


def _blocked_backward(chunk, loop_heads, is_causal, residuals, d_out):
    def head(q: Array, k: Array, v: Array, out: Array, normaliser: Array, d_out: Array):
        def differentiate(args: tuple[Array, ...]) -> tuple[Array, Array, Array]:
            q_chunk, out_chunk, normaliser_chunk, d_chunk, start = args
            p = jnp.exp(_scores(q_chunk, k, start, is_causal) - normaliser_chunk)
            d_v = _matmul("...qd,...qk->...dk", d_chunk, p.astype(v.dtype))
            d_p = _matmul("...qd,...kd->...qk", d_chunk, v)
            mean = jnp.sum((out_chunk * d_chunk).astype(jnp.float32), axis=-1, keepdims=True)
            d_scores = (p * (d_p - mean)).astype(q.dtype)
            d_k = _matmul("...qd,...qk->...dk", q_chunk, d_scores)
            return _matmul("...qk,...kd->...qd", d_scores, k).astype(q.dtype), d_k, d_v

        d_q, d_k, d_v = _over_chunks(differentiate, chunk, q, out, normaliser, d_out, summed=2)
        d_k, d_v = d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    return _over_heads(head, loop_heads, *residuals, d_out)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _matmul(subscripts: str, x: Array, y: Array) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(
    q: Float[Array, "*b tq d"], k: Float[Array, "*b tk d"], start: Array, is_causal: bool
) -> Float[Array, "*b tq tk"]:
    """Scores in float32 of the (scaled) queries from number `start` on."""
    scores = _matmul("...qd,...kd->...qk", q, k)
    if is_causal:
        seen = (start + jnp.arange(q.shape[-2]))[:, None] >= jnp.arange(k.shape[-2])[None, :]
        scores = jnp.where(lax.expand_dims(seen, range(q.ndim - 2)), scores, -jnp.inf)
    return scores


def _over_heads(head: Callable, loop: bool, *arrays: Array) -> tuple[Array, ...]:
    return lax.map(lambda args: head(*args), arrays) if loop else head(*arrays)


def _over_chunks(
    function: Callable, chunk: int, *arrays: Float[Array, "*b t _"], summed: int = 0
) -> tuple[Array, ...]:
    """`function((*parts, start))` of `chunk` queries at a time, its last `summed` results added up.

    The last chunk is filled with zeros, which contribute nothing and are cut off again.
    """
    length = arrays[0].shape[-2]
    if chunk >= length:
        return function((*arrays, jnp.int32(0)))
    num_chunks = math.ceil(length / chunk)

    def cut(x: Array) -> Float[Array, "chunks *b chunk _"]:
        padding = [(0, 0)] * (x.ndim - 2) + [(0, num_chunks * chunk - length), (0, 0)]
        x = jnp.pad(x, padding).reshape(*x.shape[:-2], num_chunks, chunk, x.shape[-1])
        return jnp.moveaxis(x, -3, 0)

    def join(x: Array) -> Float[Array, "*b t _"]:
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], num_chunks * chunk, x.shape[-1])[..., :length, :]

    def body(totals: tuple[Array, ...], parts: tuple[Array, ...]):
        results = function(parts)
        kept = len(results) - summed
        return tuple(map(jnp.add, totals, results[kept:])), results[:kept]

    parts = (*map(cut, arrays), jnp.arange(num_chunks) * chunk)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes[len(shapes) - summed :])
    totals, results = lax.scan(body, zeros, parts)
    return (*map(join, results), *totals)


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
