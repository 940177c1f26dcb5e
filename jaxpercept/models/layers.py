"""The small layers every model is made of: convolution, linear, norms, embedding, resampling.

Arrays are NHWC (or [batch, tokens, channels]); weights keep their stored dtype and are cast to the
layer's compute `dtype` where they are used; norm statistics are float32 whatever that dtype is.
Constructors fill parameters with zeros: real values come from a checkpoint or from
`Functional.init` (see functional.py), and models are built abstractly, without memory.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

DType = jnp.dtype | type | str

# Zero padding of one spatial axis: (before, after).
Pad = tuple[int, int]


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: tuple[Pad, Pad] = ((0, 0), (0, 0)),
) -> Float[Array, "b ho wo o"]:
    """2D cross-correlation, NHWC x HWIO -> NHWC. Every convolution of the package ends here."""
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]  # a matrix product, which no backend runs slower than a 1x1 conv
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def per_channel(v: Float[Array, "c"], ndim: int) -> Float[Array, "*ones c"]:
    """Shapes a channel vector to broadcast against a channels-last array of `ndim` axes."""
    return lax.expand_dims(v, range(ndim - 1))


class Conv2d(nnx.Module):
    """torch.nn.Conv2d, with `padding` an int (both sides) or ((top, bottom), (left, right))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[Pad, Pad] = 1,
        bias: bool = True,
        dtype: DType = jnp.float32,
    ):
        self.stride = stride
        self.padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, in_channels, out_channels)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_channels,)))
        self.use_bias = bias

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b ho wo o"]:
        kernel = self.kernel[...].astype(self.dtype)
        y = conv2d(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        if self.use_bias:
            y = y + per_channel(self.bias[...].astype(self.dtype), y.ndim)
        return y


class Linear(nnx.Module):
    """torch.nn.Linear over the last axis; the kernel is stored [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: DType = jnp.float32,
    ):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(jnp.zeros((in_features, out_features)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.use_bias = bias

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        if self.use_bias:
            y = y + per_channel(self.bias[...].astype(self.dtype), y.ndim)
        return y


class GroupNorm(nnx.Module):
    """torch.nn.GroupNorm over [batch, *space, channels].

    Two passes (mean, then mean squared deviation) in float32: E[x^2] - E[x]^2 in one pass loses
    all digits where a channel's mean is large against its spread, as in the VAE decoder.
    """

    def __init__(self, num_groups: int, channels: int, *, eps: float, dtype: DType = jnp.float32):
        if channels % num_groups:
            raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
        self.num_groups = num_groups
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def _group_mean(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *ones c"]:
        """Mean over space and the channels of a group, repeated for each channel of the group."""
        # Space first, with channels left in their lanes; then the few channels of each group.
        space = tuple(range(1, x.ndim - 1))
        channel_mean = jnp.mean(x, axis=space)
        batch, channels = channel_mean.shape
        grouped = channel_mean.reshape(batch, self.num_groups, -1)
        mean = jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape)
        return lax.expand_dims(mean.reshape(batch, channels), space)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        x = x.astype(jnp.float32)
        centred = x - self._group_mean(x)
        variance = self._group_mean(jnp.square(centred))
        scale = per_channel(self.scale[...].astype(jnp.float32), x.ndim)
        bias = per_channel(self.bias[...].astype(jnp.float32), x.ndim)
        y = centred * (lax.rsqrt(variance + self.eps) * scale) + bias
        return y.astype(self.dtype)


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last axis (eps 1e-5 by default, as torch's)."""

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: DType = jnp.float32):
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scale = per_channel(self.scale[...].astype(jnp.float32), x.ndim)
        bias = per_channel(self.bias[...].astype(jnp.float32), x.ndim)
        return (centred * lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class Embedding(nnx.Module):
    """torch.nn.Embedding: rows of a table."""

    def __init__(self, num_embeddings: int, features: int, *, dtype: DType = jnp.float32):
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Param(jnp.zeros((num_embeddings, features)))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch c"]:
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)


class Identity(nnx.Module):
    """Holds the place of a weightless torch module (dropout) so that list indices match torch's."""

    def __call__(self, x: Array) -> Array:
        return x


def timestep_embedding(
    timesteps: Float[Array, "b"] | Int[Array, "b"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: int | float = 0,
) -> Float[Array, "b d"]:
    """Sinusoidal features of the timestep, float32 (DDPM, arXiv 2006.11239, as diffusers has them).

    Frequencies fall geometrically from 1 to 1/10000 over `dim // 2 - freq_shift` steps;
    `flip_sin_to_cos` puts the cosines first. An odd `dim` gets one zero at the end.
    """
    half = dim // 2
    exponent = -jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    phase = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    parts = (
        [jnp.cos(phase), jnp.sin(phase)] if flip_sin_to_cos else [jnp.sin(phase), jnp.cos(phase)]
    )
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim - 2 * half)))


def resize_nearest(x: Float[Array, "b h w c"], size: Sequence[int]) -> Float[Array, "b ho wo c"]:
    """torch's mode="nearest": output row i reads input row floor(i * in / out).

    Neither jax.image's "nearest" nor torch's "nearest-exact", which sample at pixel centres.
    """
    b, h, w, c = x.shape
    height, width = size
    if (height, width) == (2 * h, 2 * w):
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return doubled.reshape(b, height, width, c)
    rows = jnp.arange(height) * h // height
    columns = jnp.arange(width) * w // width
    return jnp.take(jnp.take(x, rows, axis=1), columns, axis=2)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
