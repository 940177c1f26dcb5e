"""The convolutional autoencoder of latent diffusion (diffusers' AutoencoderKL), NHWC."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpercept.models.attention import SpatialAttention
from jaxpercept.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxpercept.models.config import VAEConfig
from jaxpercept.models.functional import Functional
from jaxpercept.models.layers import Conv2d, DType, GroupNorm

EPS = 1e-6  # of every GroupNorm in the VAE


class _Stage(nnx.Module):
    """Residual blocks, without a timestep; the base of every stage below."""

    def __init__(
        self, config: VAEConfig, widths: list[tuple[int, int]], *, dtype: DType, remat: str
    ):
        self.remat = remat
        self.resnets = nnx.List(
            [
                ResnetBlock2D(i, o, num_groups=config.norm_num_groups, eps=EPS, dtype=dtype)
                for i, o in widths
            ]
        )

    def resnet(self, index: int, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        block = self.resnets[index]
        return (jax.checkpoint(block) if self.remat == "block" else block)(x)


class DownEncoderBlock2D(_Stage):
    """Residual blocks, then (but for the last) halving with rounding down."""

    def __init__(self, config: VAEConfig, level: int, *, dtype: DType, remat: str):
        width = config.block_out_channels[level]
        width_in = config.block_out_channels[max(level - 1, 0)]
        widths = [(width_in, width)] + [(width, width)] * (config.layers_per_block - 1)
        super().__init__(config, widths, dtype=dtype, remat=remat)
        self.downsample = level < len(config.block_out_channels) - 1
        if self.downsample:
            padding = ((0, 1), (0, 1))
            self.downsamplers = nnx.List([Downsample2D(width, padding=padding, dtype=dtype)])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b ho wo o"]:
        for i in range(len(self.resnets)):
            x = self.resnet(i, x)
        return self.downsamplers[0](x) if self.downsample else x


class UpDecoderBlock2D(_Stage):
    """One residual block more than the encoder has, then (but for the last) doubling."""

    def __init__(self, config: VAEConfig, index: int, *, dtype: DType, remat: str):
        widths = config.block_out_channels[::-1]
        width, width_in = widths[index], widths[max(index - 1, 0)]
        pairs = [(width_in, width)] + [(width, width)] * config.layers_per_block
        super().__init__(config, pairs, dtype=dtype, remat=remat)
        self.upsample = index < len(widths) - 1
        if self.upsample:
            self.upsamplers = nnx.List([Upsample2D(width, dtype=dtype)])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b ho wo o"]:
        for i in range(len(self.resnets)):
            x = self.resnet(i, x)
        return self.upsamplers[0](x) if self.upsample else x


class VAEMidBlock2D(_Stage):
    """Residual block, one head of attention over all pixels (where configured), residual block."""

    def __init__(self, config: VAEConfig, *, dtype: DType, remat: str, attention: str):
        width = config.block_out_channels[-1]
        super().__init__(config, [(width, width)] * 2, dtype=dtype, remat=remat)
        self.has_attention = config.mid_block_add_attention
        if self.has_attention:
            self.attentions = nnx.List(
                [
                    SpatialAttention(
                        width,
                        num_groups=config.norm_num_groups,
                        eps=EPS,
                        dtype=dtype,
                        attention=attention,
                    )
                ]
            )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnet(0, x)
        if self.has_attention:
            x = self.attentions[0](x)
        return self.resnet(1, x)


class Encoder(nnx.Module):
    """Image [b, H, W, 3] to [b, h, w, 2 * latent_channels]."""

    def __init__(self, config: VAEConfig, *, dtype: DType, remat: str, attention: str):
        widths = config.block_out_channels
        down = functools.partial(DownEncoderBlock2D, config, dtype=dtype, remat=remat)
        self.conv_in = Conv2d(config.in_channels, widths[0], dtype=dtype)
        self.down_blocks = nnx.List([down(i) for i in range(len(widths))])
        self.mid_block = VAEMidBlock2D(config, dtype=dtype, remat=remat, attention=attention)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=EPS, dtype=dtype)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, dtype=dtype)

    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w o"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nnx.Module):
    """Latent [b, h, w, latent_channels] to image [b, H, W, 3]."""

    def __init__(self, config: VAEConfig, *, dtype: DType, remat: str, attention: str):
        widths = config.block_out_channels
        up = functools.partial(UpDecoderBlock2D, config, dtype=dtype, remat=remat)
        self.conv_in = Conv2d(config.latent_channels, widths[-1], dtype=dtype)
        self.mid_block = VAEMidBlock2D(config, dtype=dtype, remat=remat, attention=attention)
        self.up_blocks = nnx.List([up(i) for i in range(len(widths))])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=EPS, dtype=dtype)
        self.conv_out = Conv2d(widths[0], config.out_channels, dtype=dtype)

    def __call__(self, z: Float[Array, "b h w i"]) -> Float[Array, "b H W o"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nnx.Module):
    """Encoder to the moments of a Gaussian over latents, and decoder; no latent scaling inside.

    Images are in [-1, 1]. Source: diffusers, models/autoencoders/autoencoder_kl.py; Rombach et al.,
    arXiv 2112.10752.

    remat: "none", or "block" to recompute each residual block in the backward pass.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DType = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ):
        self.config = config
        options = {"dtype": dtype, "remat": remat, "attention": attention}
        channels = config.latent_channels
        self.encoder = Encoder(config, **options)
        self.decoder = Decoder(config, **options)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * channels, 2 * channels, 1, padding=0, dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(channels, channels, 1, padding=0, dtype=dtype)

    def encode(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w m"]:
        """Mean and log-variance of the latent, concatenated along channels, unclamped."""
        moments = self.encoder(x)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        """Image of an unscaled latent; values may leave [-1, 1]."""
        return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)


def encode_mean(
    vae: Functional, params: Mapping[str, Any], x: Float[Array, "b H W i"]
) -> Float[Array, "b h w c"]:
    """Scaled latent of an image in [-1, 1], float32: what it encodes to times scaling_factor.

    Of an AutoencoderKL the posterior's mean, as GenPercept encodes images and targets (recipes.md
    1.2); an AutoencoderTiny encodes to the latent itself.
    """
    # The mean's channels come first, and an AutoencoderTiny has no others.
    latent = vae.bind(params).encode(x)[..., : vae.config.latent_channels]
    return latent.astype(jnp.float32) * vae.config.scaling_factor


def decode_latents(
    vae: Functional, params: Mapping[str, Any], z: Float[Array, "b h w c"]
) -> Float[Array, "b H W o"]:
    """Image of a scaled latent, float32, unclamped."""
    return vae.bind(params).decode(z / vae.config.scaling_factor).astype(jnp.float32)
