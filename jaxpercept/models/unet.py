"""The conditional UNet of Stable Diffusion 1.x and 2.x (diffusers' UNet2DConditionModel), NHWC."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpercept.models.blocks import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
)
from jaxpercept.models.config import UNetConfig
from jaxpercept.models.layers import Conv2d, DType, GroupNorm, timestep_embedding

Feature = Float[Array, "b h w c"]


class _Level(nnx.Module):
    """What every stage holds: residual blocks, each followed by a transformer or not."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths: list[tuple[int, int]],
        *,
        num_transformers: int,
        dtype: DType,
        remat: str,
        attention: str,
    ):
        groups = config.norm_num_groups
        self.remat = remat
        self.resnets = nnx.List(
            [
                ResnetBlock2D(
                    in_channels,
                    out_channels,
                    time_channels=4 * config.block_out_channels[0],
                    num_groups=groups,
                    eps=config.norm_eps,
                    dtype=dtype,
                )
                for in_channels, out_channels in widths
            ]
        )
        if num_transformers:
            self.attentions = nnx.List(
                [
                    Transformer2DModel(
                        widths[0][1],
                        config.per_level("attention_head_dim")[level],
                        config.per_level("cross_attention_dim")[level],
                        num_layers=config.per_level("transformer_layers_per_block")[level],
                        num_groups=groups,
                        linear_projection=config.use_linear_projection,
                        dtype=dtype,
                        attention=attention,
                    )
                    for _ in range(num_transformers)
                ]
            )
        self.has_attention = num_transformers > 0

    def checkpointed(self, function: Callable) -> Callable:
        """Recomputes `function` in the backward pass instead of storing what it computed."""
        return jax.checkpoint(function) if self.remat == "block" else function

    def layer(
        self, index: int, x: Feature, time: Float[Array, "b t"], context: Float[Array, "b l d"]
    ) -> Float[Array, "b h w co"]:
        """Residual block `index` and its transformer."""

        def apply(x: Array, time: Array, context: Array) -> Array:
            x = self.resnets[index](x, time)
            return self.attentions[index](x, context) if self.has_attention else x

        return self.checkpointed(apply)(x, time, context)


class DownBlock(_Level):
    """DownBlock2D and CrossAttnDownBlock2D."""

    def __init__(self, config: UNetConfig, level: int, **options):
        width = config.block_out_channels[level]
        width_in = config.block_out_channels[max(level - 1, 0)]
        num_layers = config.per_level("layers_per_block")[level]
        has_attention = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(
            config,
            level,
            [(width_in if i == 0 else width, width) for i in range(num_layers)],
            num_transformers=num_layers if has_attention else 0,
            **options,
        )
        self.downsample = level < len(config.block_out_channels) - 1
        if self.downsample:
            self.downsamplers = nnx.List([Downsample2D(width, dtype=options["dtype"])])

    def __call__(
        self, x: Feature, time: Float[Array, "b t"], context: Float[Array, "b l d"]
    ) -> tuple[Float[Array, "b ho wo co"], list[Array]]:
        """The block's output and everything it passes to the up path, in order."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            skips.append(x)
        if self.downsample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(_Level):
    """UNetMidBlock2DCrossAttn: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, **options):
        width = config.block_out_channels[-1]
        super().__init__(config, -1, [(width, width)] * 2, num_transformers=1, **options)

    def __call__(
        self, x: Feature, time: Float[Array, "b t"], context: Float[Array, "b l d"]
    ) -> Feature:
        x = self.layer(0, x, time, context)
        return self.checkpointed(self.resnets[1])(x, time)


class UpBlock(_Level):
    """UpBlock2D and CrossAttnUpBlock2D. `index` counts from the lowest resolution up."""

    def __init__(self, config: UNetConfig, index: int, **options):
        widths = config.block_out_channels[::-1]
        level = len(widths) - 1 - index
        width, width_below, width_above = (
            widths[index],
            widths[max(index - 1, 0)],
            widths[min(index + 1, len(widths) - 1)],
        )
        num_layers = config.per_level("layers_per_block")[level] + 1
        # The skips come back in reverse: the last one is the input of this level's down block.
        inputs = [width_below] + [width] * (num_layers - 1)
        skips = [width] * (num_layers - 1) + [width_above]
        has_attention = config.up_block_types[index] == "CrossAttnUpBlock2D"
        super().__init__(
            config,
            level,
            [(a + b, width) for a, b in zip(inputs, skips, strict=True)],
            num_transformers=num_layers if has_attention else 0,
            **options,
        )
        self.upsample = level > 0
        if self.upsample:
            self.upsamplers = nnx.List([Upsample2D(width, dtype=options["dtype"])])

    def __call__(
        self,
        x: Feature,
        skips: list[Array],
        time: Float[Array, "b t"],
        context: Float[Array, "b l d"],
        size: tuple[int, int] | None,
    ) -> Float[Array, "b ho wo co"]:
        """Takes its skips off the end of `skips`; `size` is that of the next block's skips."""
        for i in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(i, x, time, context)
        return self.upsamplers[0](x, size) if self.upsample else x


class UNet2DConditionModel(nnx.Module):
    """Predicts from a noisy (or RGB) latent, the timestep and a text embedding.

    Latents of any size: down-samplers round up, up-samplers go to the exact size of the skip they
    meet (recipes.md 1.1). Source: diffusers, models/unets/unet_2d_condition.py; Rombach et al.,
    arXiv 2112.10752.

    remat: "none", or "block" to recompute each residual block and its transformer in the backward
    pass, keeping only their inputs.
    head: False leaves conv_norm_out and conv_out away; only `features` can be called then.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DType = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        head: bool = True,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.head = head
        widths = config.block_out_channels
        time_channels = 4 * widths[0]
        options = {"dtype": dtype, "remat": remat, "attention": attention}

        self.conv_in = Conv2d(config.in_channels, widths[0], dtype=dtype)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels, dtype=dtype)
        if config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, time_channels, dtype=dtype
            )
        levels = range(len(widths))
        self.down_blocks = nnx.List([DownBlock(config, i, **options) for i in levels])
        self.mid_block = MidBlock(config, **options)
        self.up_blocks = nnx.List([UpBlock(config, i, **options) for i in levels])
        if head:
            self.conv_norm_out = GroupNorm(
                config.norm_num_groups, widths[0], eps=config.norm_eps, dtype=dtype
            )
            self.conv_out = Conv2d(widths[0], config.out_channels, dtype=dtype)

    def _embed_time(
        self,
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        class_labels: Float[Array, "b k"] | None,
    ) -> Float[Array, "b t"]:
        features = timestep_embedding(
            timesteps,
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        time = self.time_embedding(features)
        if (self.config.class_embed_type is None) != (class_labels is None):
            raise ValueError(
                f"class_labels must be given exactly when class_embed_type is set; it is "
                f"{self.config.class_embed_type!r}"
            )
        return time if class_labels is None else time + self.class_embedding(class_labels)

    def __call__(
        self,
        sample: Float[Array, "b h w c_in"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        encoder_hidden_states: Float[Array, "b l d"],
        class_labels: Float[Array, "b k"] | None = None,
        return_features: bool = False,
    ) -> Float[Array, "b h w c_out"] | tuple[Float[Array, "b h w c_out"], tuple[Array, ...]]:
        """The network's output in the compute dtype.

        class_labels: the task vector of class_embed_type "projection" (Lotus: sin, cos of the
          switch, 4 numbers).
        return_features: also return what `features` does.
        """
        if not self.head:
            raise ValueError("this UNet was built with head=False: call its features method")
        features = self.features(sample, timesteps, encoder_hidden_states, class_labels)
        x = self.conv_out(self.conv_norm_out(features[-1], silu=True))
        return (x, tuple(features)) if return_features else x

    def features(
        self,
        sample: Float[Array, "b h w c_in"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        encoder_hidden_states: Float[Array, "b l d"],
        class_labels: Float[Array, "b k"] | None = None,
    ) -> list[Array]:
        """Each up block's output, lowest resolution first, after its upsampler.

        A DPT head reads these (dpt.py); conv_norm_out and conv_out read the last one.
        """
        time = self._embed_time(timesteps, class_labels)
        context = encoder_hidden_states.astype(self.dtype)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, context)
            skips += block_skips
        x = self.mid_block(x, time, context)

        features = []
        for block in self.up_blocks:
            remaining = len(skips) - len(block.resnets)
            size = skips[remaining - 1].shape[1:3] if remaining else None
            x = block(x, skips, time, context, size)
            features.append(x)
        return features
