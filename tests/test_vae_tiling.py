"""Tiled encoding and decoding against AutoencoderKL's with its tiling enabled."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_parity import max_abs, normal, params_of, quick_jit, randomise, to_torch

from jaxpercept.errors import UserError
from jaxpercept.models import vae_tiling
from jaxpercept.models.config import AutoencoderTinyConfig, VAEConfig
from jaxpercept.models.functional import functional
from jaxpercept.models.vae import decode_latents, encode_mean
from jaxpercept.models.vae_tiling import decode_tiled, encode_tiled

KL = {
    "block_out_channels": [4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.4,
}
TINY = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 0),
    num_decoder_blocks=(0, 1),
)


def tiled(module, tile, overlap):
    """An AutoencoderKL made to work in tiles of `tile` latent pixels, this share in common."""
    module.enable_tiling()
    module.tile_sample_min_size, module.tile_latent_min_size = 2 * tile, tile
    module.tile_overlap_factor = overlap
    return module


def test_networks_in_tiles_match_torch(rng):
    """Attention and norms see one tile each."""
    module = randomise(diffusers.AutoencoderKL(**KL), rng)
    vae = functional(VAEConfig.from_dict(dict(module.config)))
    params = params_of(module, vae.shapes)
    z = normal(rng, 2, 6, 17, 4)
    decode = quick_jit(lambda p, z: decode_tiled(vae, p, z, tile=16))
    want = tiled(module, 8, 0.25).decode(to_torch(z) / 0.4).sample
    assert max_abs(decode(params, z), want) <= 1e-5
    x = normal(rng, 2, 32, 16, 3)
    encode = quick_jit(lambda p, x: encode_tiled(vae, p, x, tile=16, overlap=0))
    want = tiled(module, 8, 0.0).encode(to_torch(x)).latent_dist.mean
    assert max_abs(encode(params, x), 0.4 * want) <= 1e-5


# A network that is cheap to run and gives its place in the tile and the tile's size away.


def _stamp(height, width, xp):
    y, x = xp.arange(height)[:, None] / 7, xp.arange(width)[None, :] / 5
    return y * y * x - x * x + height / 9 + width / 17


class Stamped(torch.nn.Module):
    """Encoder (scale 0.5; the moments' second half repeats the first) or decoder (scale 2)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        x = torch.nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        y = x * (1 + x.mean((2, 3), keepdim=True)) + _stamp(*x.shape[2:], torch)
        return torch.cat([y, y], dim=1) if self.scale < 1 else y


@pytest.fixture
def traced(monkeypatch):
    """The same in place of the networks of `vae_tiling`; gives the tile shapes it is traced for."""
    shapes = []

    def network(resample):
        def apply(vae, params, x):
            shapes.append(x.shape[1:3])
            x = resample(x)
            return (
                x * (1 + x.mean((1, 2), keepdims=True))
                + _stamp(*x.shape[1:3], jnp)[None, ..., None]
            )

        return apply

    monkeypatch.setattr(vae_tiling, "encode_mean", network(lambda x: x[:, ::2, ::2]))
    twice = network(lambda x: x.repeat(2, axis=1).repeat(2, axis=2))
    monkeypatch.setattr(vae_tiling, "decode_latents", twice)
    return shapes


CASES = [
    # latent size, tile and overlap in latent pixels, shapes
    ((40, 17), (8, 2), 4),  # many tiles; the last longer than the overlap
    ((20, 20), (8, 2), 4),  # the last exactly the overlap
    ((8, 24), (8, 2), 4),  # one side no larger than a tile is cut all the same, as by diffusers
    ((7, 9), (8, 2), 4),  # full tiles in neither direction
    ((5, 19), (8, 2), 3),
    ((24, 14), (8, 4), 6),  # the last within the overlap: so is the end of the one before
    ((19, 25), (8, 2), 9),  # the same on both axes
    ((16, 24), (8, 0), 1),  # no overlap
    ((30, 33), (12, 3), 4),
]


@pytest.mark.parametrize(("size", "tile", "shapes"), CASES)
def test_arrangement_and_blending_match_torch(rng, traced, size, tile, shapes):
    side, overlap = tile[0], tile[1] / tile[0]
    module = diffusers.AutoencoderKL(
        **KL, latent_channels=3, use_quant_conv=False, use_post_quant_conv=False
    )
    module.encoder, module.decoder = Stamped(0.5), Stamped(2)
    module = tiled(module, side, overlap)
    vae = functional(VAEConfig.from_dict(dict(module.config)))
    options = {"tile": 2 * side, "overlap": overlap}

    z = normal(rng, 2, *size, 3)
    image = jax.jit(lambda z: decode_tiled(vae, {}, z, **options))(z)
    assert max_abs(image, module.decode(to_torch(z)).sample) <= 1e-5
    # One traced body a shape.
    assert len(traced) == len(set(traced)) == shapes

    x = normal(rng, 2, 2 * size[0], 2 * size[1], 3)
    latent = jax.jit(lambda x: encode_tiled(vae, {}, x, **options))(x)
    assert max_abs(latent, module.encode(to_torch(x)).latent_dist.mean) <= 1e-5
    assert len(traced) == 2 * shapes


def test_tiny_autoencoder_is_tiled_the_same_way(rng):
    """Its decoder in AutoencoderKL's tiling: diffusers tiles AutoencoderTiny in another way."""
    tiny = randomise(diffusers.AutoencoderTiny.from_config(TINY.to_dict()), rng)
    module = diffusers.AutoencoderKL(**KL, use_post_quant_conv=False)
    module.decoder = tiny.decoder
    vae = functional(TINY)
    z = normal(rng, 1, 13, 6, 4)
    decode = quick_jit(lambda p, z: decode_tiled(vae, p, z, tile=16))
    image = decode(params_of(tiny, vae.shapes), z)
    assert max_abs(image, tiled(module, 8, 0.25).decode(to_torch(z)).sample) <= 1e-5


def test_images_no_larger_than_a_tile_are_not_cut(rng):
    vae = functional(TINY)
    params = vae.init(0)
    x, z = normal(rng, 1, 15, 16, 3), normal(rng, 1, 8, 7, 4)  # any size, as without tiles

    @quick_jit
    def run(params, x, z):
        whole = encode_mean(vae, params, x), decode_latents(vae, params, z)
        in_tiles = encode_tiled(vae, params, x, tile=16), decode_tiled(vae, params, z, tile=16)
        return whole, in_tiles

    for whole, in_tiles in zip(*run(params, x, z), strict=True):
        np.testing.assert_array_equal(in_tiles, whole)


def test_sizes_that_do_not_fit(rng):
    vae = functional(TINY)
    params = vae.init(0)
    x, z = jnp.zeros((1, 20, 15, 3)), jnp.zeros((1, 9, 9, 4))
    with pytest.raises(UserError, match=r"20 x 15 pixels .* resize it to multiples of 2\.$"):
        encode_tiled(vae, params, x, tile=16)
    for tile in (0, 15, -16):
        with pytest.raises(UserError, match=rf"tile must be a positive multiple of 2 .* {tile}\.$"):
            decode_tiled(vae, params, z, tile=tile)
    for overlap in (-0.25, 0.75, 0.3):
        with pytest.raises(UserError, match=rf"overlap must lie .* not {overlap}\.$"):
            decode_tiled(vae, params, z, tile=16, overlap=overlap)


def test_memory_does_not_grow_with_the_image():
    """What the compiled program needs beside arguments and result."""
    vae = functional(TINY)

    def bytes_needed(function, *shape, **tiles) -> int:
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        run = jax.jit(lambda p, x: function(vae, p, x, **tiles))
        return run.lower(vae.shapes, image).compile().memory_analysis().temp_size_in_bytes

    # 3 x 3 and 11 x 11 full tiles, and those of the border.
    small = bytes_needed(decode_tiled, 1, 80, 80, 4, tile=64)
    large = bytes_needed(decode_tiled, 1, 272, 272, 4, tile=64)
    assert large <= 1.01 * small
    assert bytes_needed(decode_latents, 1, 272, 272, 4) > 20 * large
    small = bytes_needed(encode_tiled, 1, 160, 160, 3, tile=64)
    assert bytes_needed(encode_tiled, 1, 544, 544, 3, tile=64) <= 1.01 * small
