"""The tiny distilled autoencoder TAESD (diffusers' AutoencoderTiny), NHWC."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpercept.models.config import AutoencoderTinyConfig
from jaxpercept.models.layers import Conv2d, DType, Identity


class ReLU(nnx.Module):
    """torch.nn.ReLU; a module so that list indices match torch's."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.nn.relu(x)


class UpsampleConv2d(Conv2d):
    """Doubling by nearest neighbour, then a 3x3 convolution."""

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b ho wo o"]:
        return super().__call__(x, upsample_to=(2 * x.shape[1], 2 * x.shape[2]))


class AutoencoderTinyBlock(nnx.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))."""

    def __init__(self, channels: int, *, dtype: DType):
        conv = [Conv2d(channels, channels, dtype=dtype) for _ in range(3)]
        self.conv = nnx.List([conv[0], ReLU(), conv[1], ReLU(), conv[2]])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = x
        for layer in self.conv:
            h = layer(h)
        return jax.nn.relu(h + x)


class _Layers(nnx.Module):
    """Layers in a row, each block recomputed in the backward pass with remat "block"."""

    def __init__(self, layers: list[nnx.Module], *, remat: str):
        self.layers = nnx.List(layers)
        self.remat = remat

    def run(self, x: Float[Array, "b h w i"]) -> Float[Array, "b ho wo o"]:
        for layer in self.layers:
            recompute = self.remat == "block" and isinstance(layer, AutoencoderTinyBlock)
            x = (jax.checkpoint(layer) if recompute else layer)(x)
        return x


class EncoderTiny(_Layers):
    """Image [b, H, W, 3] in [-1, 1] to latent; each level but the first halves, rounding up."""

    def __init__(self, config: AutoencoderTinyConfig, *, dtype: DType, remat: str):
        width = config.encoder_block_out_channels[0]
        layers: list[nnx.Module] = []
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level == 0:
                layers.append(Conv2d(config.in_channels, width, dtype=dtype))
            else:
                layers.append(Conv2d(width, width, stride=2, bias=False, dtype=dtype))
            layers += [AutoencoderTinyBlock(width, dtype=dtype) for _ in range(blocks)]
        layers.append(Conv2d(width, config.latent_channels, dtype=dtype))
        super().__init__(layers, remat=remat)

    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w c"]:
        return self.run((x + 1) / 2)  # the network sees [0, 1]


class DecoderTiny(_Layers):
    """Latent to image [b, H, W, 3], around [-1, 1]; each level but the last doubles."""

    def __init__(self, config: AutoencoderTinyConfig, *, dtype: DType, remat: str):
        width, last = config.decoder_block_out_channels[0], len(config.num_decoder_blocks) - 1
        layers = [Conv2d(config.latent_channels, width, dtype=dtype), ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks):
            layers += [AutoencoderTinyBlock(width, dtype=dtype) for _ in range(blocks)]
            if level < last:
                # torch's Upsample is a layer of its own.
                layers += [Identity(), UpsampleConv2d(width, width, bias=False, dtype=dtype)]
            else:
                layers.append(Conv2d(width, config.out_channels, dtype=dtype))
        super().__init__(layers, remat=remat)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        # A soft clamp to [-3, 3]: the 3 is fixed, whatever latent_magnitude says.
        image = self.run(jnp.tanh(z / 3) * 3)
        return 2 * image.astype(jnp.float32) - 1  # in bfloat16 this would lose the dark tones


class AutoencoderTiny(nnx.Module):
    """Encoder to latents and decoder; no latent scaling inside.

    Source: diffusers, models/autoencoders/autoencoder_tiny.py; github.com/madebyollin/taesd.

    remat: "none", or "block" to recompute each block in the backward pass. attention: unused.
    """

    def __init__(
        self,
        config: AutoencoderTinyConfig,
        *,
        dtype: DType = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ):
        self.config = config
        self.encoder = EncoderTiny(config, dtype=dtype, remat=remat)
        self.decoder = DecoderTiny(config, dtype=dtype, remat=remat)

    def encode(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w c"]:
        """Latent of an image in [-1, 1]."""
        return self.encoder(x)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        """Image of an unscaled latent, float32; values may leave [-1, 1]."""
        return self.decoder(z)
