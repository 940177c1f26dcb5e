"""Residual, resampling and transformer blocks shared by the UNet and the VAE (diffusers' names)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpercept.models.attention import Attention
from jaxpercept.models.layers import (
    Conv2d,
    DType,
    GroupNorm,
    Identity,
    LayerNorm,
    Linear,
)


class ResnetBlock2D(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with a 1x1 shortcut where widths differ.

    `time_channels=None` (the VAE) leaves the time projection out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
        dtype: DType = jnp.float32,
    ):
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps, dtype=dtype)
        self.conv1 = Conv2d(in_channels, out_channels, dtype=dtype)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels, dtype=dtype)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps, dtype=dtype)
        self.conv2 = Conv2d(out_channels, out_channels, dtype=dtype)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1, padding=0, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w o"]:
        h = self.conv1(self.norm1(x, silu=True))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(self.norm2(h, silu=True))
        return h + (self.conv_shortcut(x) if self.has_shortcut else x)


class Downsample2D(nnx.Module):
    """Stride-2 3x3 convolution.

    The UNet pads one pixel on every side (sizes round up); the VAE encoder pads bottom and right
    only, `padding=((0, 1), (0, 1))` (sizes round down).
    """

    def __init__(
        self,
        channels: int,
        *,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
        dtype: DType = jnp.float32,
    ):
        self.conv = Conv2d(channels, channels, stride=2, padding=padding, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest upsampling to `size` (twice the input where not given), then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype: DType = jnp.float32):
        self.conv = Conv2d(channels, channels, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b ho wo c"]:
        size = size or (2 * x.shape[1], 2 * x.shape[2])
        return self.conv(x, upsample_to=size)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, in_features: int, features: int, *, dtype: DType = jnp.float32):
        self.linear_1 = Linear(in_features, features, dtype=dtype)
        self.linear_2 = Linear(features, features, dtype=dtype)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class GEGLU(nnx.Module):
    """Linear to value and gate; value * gelu(gate), the exact erf GELU (arXiv 2002.05202)."""

    def __init__(self, in_features: int, features: int, *, dtype: DType = jnp.float32):
        self.proj = Linear(in_features, 2 * features, dtype=dtype)

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back; net.1 is torch's dropout."""

    def __init__(self, channels: int, *, dtype: DType = jnp.float32):
        self.net = nnx.List(
            [
                GEGLU(channels, 4 * channels, dtype=dtype),
                Identity(),
                Linear(4 * channels, channels, dtype=dtype),
            ]
        )

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward; each residual after a LayerNorm (eps 1e-5)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        context_channels: int,
        *,
        dtype: DType = jnp.float32,
        attention: str = "auto",
    ):
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.attn1 = Attention(channels, num_heads, dtype=dtype, attention=attention)
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.attn2 = Attention(
            channels, num_heads, context_channels=context_channels, dtype=dtype, attention=attention
        )
        self.norm3 = LayerNorm(channels, dtype=dtype)
        self.ff = FeedForward(channels, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b l d"]
    ) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, residual; its GroupNorm has eps 1e-6.

    `linear_projection` (SD 2.x) projects in and out with linear layers, else with 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        context_channels: int,
        *,
        num_layers: int = 1,
        num_groups: int = 32,
        linear_projection: bool = False,
        dtype: DType = jnp.float32,
        attention: str = "auto",
    ):
        def projection() -> Linear | Conv2d:
            if linear_projection:
                return Linear(channels, channels, dtype=dtype)
            return Conv2d(channels, channels, 1, padding=0, dtype=dtype)

        self.norm = GroupNorm(num_groups, channels, eps=1e-6, dtype=dtype)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    channels, num_heads, context_channels, dtype=dtype, attention=attention
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = projection()

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        # Both projections act on each pixel alone, so they may run before and after flattening.
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self.proj_out(tokens.reshape(b, h, w, c)) + x
