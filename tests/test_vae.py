"""The autoencoder against torch diffusers."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_checkpoints import FULL_VAE
from torch_parity import max_abs, normal, params_of, quick_jit, randomise, to_torch

from jaxpercept.models.config import VAEConfig
from jaxpercept.models.functional import functional
from jaxpercept.models.vae import decode_latents, encode_mean

TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
VARIANTS = {
    "stable-diffusion": {"layers_per_block": 2},
    "plain": ONE_LEVEL
    | {
        "latent_channels": 6,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}


def torch_vae(rng, **changes):
    return randomise(diffusers.AutoencoderKL(**TINY | changes), rng)


def ported(reference, **options):
    vae = functional(VAEConfig.from_dict(dict(reference.config)), **options)
    return vae, params_of(reference, vae.shapes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_decode_match_torch(rng, variant):
    reference = torch_vae(rng, **VARIANTS[variant])
    vae, params = ported(reference)
    x = normal(rng, 2, 12, 9, 3)  # an odd side: the encoder rounds down
    z = normal(rng, 2, 5, 4, vae.config.latent_channels)

    moments = quick_jit(lambda p, x: vae.bind(p).encode(x))(params, x)
    assert max_abs(moments, reference.encode(to_torch(x)).latent_dist.parameters) <= 1e-5
    image = quick_jit(lambda p, z: vae.bind(p).decode(z))(params, z)
    assert max_abs(image, reference.decode(to_torch(z)).sample) <= 1e-5


def test_scaling_is_diffusers(rng):
    reference = torch_vae(rng, **ONE_LEVEL, scaling_factor=0.4)
    vae, params = ported(reference)
    x, z = normal(rng, 1, 6, 5, 3), normal(rng, 1, 6, 5, 4)
    latent = quick_jit(functools.partial(encode_mean, vae))(params, jnp.asarray(x))
    assert max_abs(latent, 0.4 * reference.encode(to_torch(x)).latent_dist.mean) <= 1e-5
    image = quick_jit(functools.partial(decode_latents, vae))(params, jnp.asarray(z))
    assert max_abs(image, reference.decode(to_torch(z) / 0.4).sample) <= 1e-5


def test_bfloat16_is_close_and_remat_changes_nothing(rng):
    reference = torch_vae(rng, **ONE_LEVEL)
    vae, params = ported(reference)
    z, weight = jnp.asarray(normal(rng, 1, 6, 5, 4)), normal(rng, 1, 6, 5, 3)

    def value_and_grad(vae):
        def loss(params, z):
            image = decode_latents(vae, params, z)
            return jnp.sum(weight * image), image

        return quick_jit(jax.value_and_grad(loss, argnums=1, has_aux=True))(params, z)

    (_, image), grad = value_and_grad(vae)
    (_, remat_image), remat_grad = value_and_grad(functional(vae.config, remat="block"))
    scale = float(jnp.abs(grad).max())
    assert max_abs(image, remat_image) <= 1e-5 * float(jnp.abs(image).max())
    assert max_abs(grad, remat_grad) <= 1e-5 * scale

    half = functional(vae.config, dtype=jnp.bfloat16)
    low = quick_jit(functools.partial(decode_latents, half))(params, z)
    assert low.dtype == jnp.float32
    error = np.asarray(low) - np.asarray(image)
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.std(image)


@pytest.mark.slow
def test_full_size(rng):
    """The VAE of Stable Diffusion 1.x and 2.x."""
    reference = randomise(diffusers.AutoencoderKL(**FULL_VAE), rng)
    vae, params = ported(reference)
    x, z = rng.uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32), normal(rng, 1, 16, 16, 4)
    with torch.no_grad():
        want_moments = reference.encode(to_torch(x)).latent_dist.parameters
        want_image = reference.decode(to_torch(z)).sample
    moments = jax.jit(lambda p, x: vae.bind(p).encode(x))(params, x)
    image = jax.jit(lambda p, z: vae.bind(p).decode(z))(params, z)
    encoder, decoder = max_abs(moments, want_moments), max_abs(image, want_image)
    print(f"VAE: encoder {encoder:.1e} of {want_moments.abs().max():.2f}", end="; ")
    print(f"decoder {decoder:.1e} of {want_image.abs().max():.2f}")
    assert encoder <= 1e-5
    assert decoder <= 1e-5
