"""The small layers every model is made of: convolution, linear, norms, embedding, resampling.

Arrays are NHWC (or [batch, tokens, channels]); weights keep their stored dtype and are cast to the
layer's compute `dtype` where they are used; norm statistics are float32 whatever that dtype is.
Constructors fill parameters with zeros: real values come from a checkpoint or from
`Functional.init` (see functional.py), and models are built abstractly, without memory.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

DType = jnp.dtype | type | str

# Zero padding of one spatial axis: (before, after).
Pad = tuple[int, int]
Pads = tuple[Pad, Pad]


_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it, what is traced suits every backend: for `jax.export`, any batch size included."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def on_cpu() -> bool:
    """Whether to choose what is fastest on CPUs."""
    return jax.default_backend() == "cpu" and not _portable.get()


def conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: Pads = ((0, 0), (0, 0)),
) -> Float[Array, "b ho wo o"]:
    """2D cross-correlation, NHWC x HWIO -> NHWC. Every convolution of the package ends here.

    The choices below are those that benchmarks/README.md has figures for.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]  # a matrix product, which no backend runs slower than a 1x1 conv
    deep = on_cpu() and kernel.shape[2] >= 1024
    if deep and math.prod(x.shape[:3]) <= 256 * stride**2:
        # XLA's CPU convolution rearranges the kernel at each call, here most of the work.
        patches = _patches(x, kernel.shape[:2], stride, padding)
        return patches @ kernel.reshape(-1, kernel.shape[-1])
    return _convolution(x, kernel, stride, padding)


def _xla_convolution(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], stride: int, padding: Pads
) -> Float[Array, "b ho wo o"]:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# The same with a gradient that flips its kernel late. The input's gradient is a convolution with
# the flipped kernel; XLA for CPUs would flip the kernels of a whole network at the start, since
# nothing keeps it from it, and hold them all.
_convolution = jax.custom_vjp(_xla_convolution, nondiff_argnums=(2, 3))


def _convolution_forward(x, kernel, stride, padding):
    return _xla_convolution(x, kernel, stride, padding), (x, kernel)


def _convolution_backward(stride, padding, residuals, d_y):
    x, kernel = residuals
    if on_cpu():
        # What is made of the kernel waits for d_y; XLA drops optimization barriers too early here.
        kernel = kernel + 0 * d_y[0, 0, 0, 0]
    convolve = functools.partial(_xla_convolution, stride=stride, padding=padding)
    return jax.vjp(convolve, x, kernel)[1](d_y)


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _patches(
    x: Float[Array, "b h w i"], window: tuple[int, int], stride: int, padding: Pads
) -> Float[Array, "b ho wo k"]:
    """Windows of the padded image as one vector each, in the order of a kernel's rows."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (size - k + 1 for size, k in zip(x.shape[1:3], window, strict=True))
    taps = itertools.product(*map(range, window))
    parts = [x[:, i : i + height : stride, j : j + width : stride] for i, j in taps]
    return jnp.concatenate(parts, axis=-1)


def upsample_conv2d(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], size: tuple[int, int]
) -> Float[Array, "b ho wo o"]:
    """Nearest upsampling to `size`, then a 3x3 convolution with one pixel of padding.

    Where the size is doubled, each output pixel sees only 2x2 different inputs, so that 2x2
    kernels, one for each parity of row and column, do with 4/9 of the multiplications (the
    sub-pixel convolution of Shi et al., arXiv 1609.05158, backwards). That pays on CPUs, where
    there are enough pixels to make up for adding the kernels' taps.
    """
    b, h, w, _ = x.shape
    if not (on_cpu() and size == (2 * h, 2 * w) and b * h * w >= 256):
        return conv2d(resize_nearest(x, size), kernel, padding=((1, 1), (1, 1)))

    def fold(taps: Float[Array, "3 *rest"], parity: int) -> Float[Array, "2 *rest"]:
        """Even outputs see (before, here, here), odd ones (here, here, after)."""
        first, second, third = taps
        return jnp.stack([first, second + third] if parity == 0 else [first + second, third])

    def outputs(row: int) -> Float[Array, "b h w 2 o"]:
        """Every second row: one convolution for both parities of the column, side by side."""
        rows = fold(kernel, row).swapaxes(0, 1)
        folded = [fold(rows, column).swapaxes(0, 1) for column in (0, 1)]
        # Padded beforehand: where padding makes the output larger than the input, XLA's gradient
        # of the kernel takes ten to a hundred times as long.
        padded = jnp.pad(x, ((0, 0), (1 - row, row), (1, 1), (0, 0)))
        y = conv2d(padded, jnp.concatenate(folded, axis=-1))
        even, odd = jnp.split(y, 2, axis=-1)
        return jnp.stack([even[:, :, :-1], odd[:, :, 1:]], axis=3)

    return jnp.stack([outputs(row) for row in (0, 1)], axis=2).reshape(b, 2 * h, 2 * w, -1)


def per_channel(v: Float[Array, "c"], ndim: int) -> Float[Array, "*ones c"]:
    """Shapes a channel vector to broadcast against a channels-last array of `ndim` axes."""
    return lax.expand_dims(v, range(ndim - 1))


class Conv2d(nnx.Module):
    """torch.nn.Conv2d, with `padding` an int (both sides) or ((top, bottom), (left, right))."""

    lora_scale: float | None = None  # set where lora.py has added lora_A and lora_B

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | Pads = 1,
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

    def __call__(
        self, x: Float[Array, "b h w i"], *, upsample_to: tuple[int, int] | None = None
    ) -> Float[Array, "b ho wo o"]:
        """`upsample_to`: first resize to this height and width by nearest neighbour."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if upsample_to:
            y = upsample_conv2d(x, kernel, upsample_to)
        else:
            y = conv2d(x, kernel, stride=self.stride, padding=self.padding)
        if self.use_bias:
            y = y + per_channel(self.bias[...].astype(self.dtype), y.ndim)
        if self.lora_scale is not None:
            y = y + self.lora_B(self.lora_scale * self.lora_A(x, upsample_to=upsample_to))
        return y


class Linear(nnx.Module):
    """torch.nn.Linear over the last axis; the kernel is stored [in, out]."""

    lora_scale: float | None = None  # set where lora.py has added lora_A and lora_B

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
        if self.lora_scale is not None:
            # Scaled between the two, where it is no pass over arrays of the full width.
            y = y + self.lora_B(self.lora_scale * self.lora_A(x))
        return y


class GroupNorm(nnx.Module):
    """torch.nn.GroupNorm over [batch, *space, channels], followed by SiLU where asked for.

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

    def __call__(self, x: Float[Array, "b *space c"], *, silu: bool = False) -> Float[Array, "..."]:
        scale, bias = self.scale[...], self.bias[...]
        return _group_norm(x, scale, bias, self.num_groups, self.eps, silu).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm(
    x: Float[Array, "b *space c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    num_groups: int,
    eps: float,
    silu: bool,
) -> Float[Array, "b *space c"]:
    """GroupNorm (and SiLU), float32, keeping nothing but its input for the backward pass.

    Autodiff would keep the centred input, the normalised one and the sigmoid as well: on a CPU
    these layers are bound by memory, and they are half of what training holds.
    """
    return _group_norm_forward(x, scale, bias, num_groups, eps, silu)[0]


def _group_norm_forward(x, scale, bias, num_groups, eps, silu):
    wide = x.astype(jnp.float32)
    mean = _group_mean(_space_mean(wide), num_groups, x.ndim)
    variance = _group_mean(_space_mean(jnp.square(wide - mean)), num_groups, x.ndim)
    inverse = lax.rsqrt(variance + eps)
    y = _affine(_normalise(wide, mean, inverse), scale, bias)
    return jax.nn.silu(y) if silu else y, (x, scale, bias, mean, inverse)


def _group_norm_backward(num_groups, eps, silu, residuals, d_y):
    # The barrier keeps XLA from storing the forward pass's intermediate results after all.
    (x, scale, bias, mean, inverse), d_y = lax.optimization_barrier((residuals, d_y))
    wide, wide_scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    if silu:
        y = _affine(_normalise(wide, mean, inverse), scale, bias)
        sigmoid = jax.nn.sigmoid(y)
        d_y = d_y * (sigmoid * (1 + y * (1 - sigmoid)))
    # Means over the space of each image, [b, c]: of d_y and of d_y * normalised(x).
    d_bias = _space_mean(d_y)
    flat_mean, flat_inverse = (v.reshape(d_bias.shape) for v in (mean, inverse))
    d_scale = (_space_mean(d_y * wide) - flat_mean * d_bias) * flat_inverse
    offset = _group_mean(d_bias * per_channel(wide_scale, 2), num_groups, x.ndim)
    slope = _group_mean(d_scale * per_channel(wide_scale, 2), num_groups, x.ndim)
    d_x = d_y * per_channel(wide_scale, x.ndim) - offset - _normalise(wide, mean, inverse) * slope
    pixels = math.prod(x.shape[1:-1])
    d_scale, d_bias = (pixels * jnp.sum(d, axis=0) for d in (d_scale, d_bias))
    d_x = (d_x * inverse).astype(x.dtype)
    return d_x, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _space_mean(x: Float[Array, "b *space c"]) -> Float[Array, "b c"]:
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def _group_mean(v: Float[Array, "b c"], num_groups: int, ndim: int) -> Float[Array, "b *ones c"]:
    """Mean over the channels of each group, repeated for each of them, shaped to broadcast."""
    grouped = v.reshape(v.shape[0], num_groups, -1)
    mean = jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape)
    return lax.expand_dims(mean.reshape(v.shape), range(1, ndim - 1))


def _normalise(x: Array, mean: Array, inverse: Array) -> Float[Array, "b *space c"]:
    return (x - mean) * inverse


def _affine(x: Array, scale: Array, bias: Array) -> Float[Array, "b *space c"]:
    scale, bias = (per_channel(v.astype(jnp.float32), x.ndim) for v in (scale, bias))
    return x * scale + bias


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
