"""Training the autoencoder whose latents the diffusion model lives in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept import losses
from jaxpercept.diffusion.noise import per_example
from jaxpercept.methods.latent_model import LatentModel, Params
from jaxpercept.methods.one_step import to_signed


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A KL-regularised autoencoder (Rombach et al., arXiv 2112.10752), without the adversary.

    The reconstruction loss is L1, plus the L1 of image gradients, which keeps edges without a
    perceptual network or a discriminator, plus the L1 of each latent cell's mean colour, without
    which a small network learns brightness first and colours much later.

    Attributes:
        model: only the VAE is used.
        gradient_weight: weight of the image-gradient term.
        cell_weight: weight of the term on the cells' mean colours.
        kl_weight: weight of the KL divergence to a unit normal, per latent element.
    """

    model: LatentModel
    gradient_weight: float = 1.0
    cell_weight: float = 1.0
    kl_weight: float = 1e-4

    needs_text = False
    fields = ("rgb", "index")

    def loss(
        self, params: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Reconstruction and KL over a batch; `latent_std` gives the scaling factor, 1 / std."""
        rgb = to_signed(batch["rgb"])
        vae = self.model.vae.bind(params["vae"])
        moments = vae.encode(rgb).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        log_variance = jnp.clip(log_variance, -30, 20)
        noise = per_example(key, batch["index"], lambda k: jax.random.normal(k, mean.shape[1:]))
        image = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise).astype(jnp.float32)

        everywhere = jnp.ones_like(rgb[..., :1], bool)
        l1 = losses.l1(image, rgb, everywhere)
        gradient = losses.gradient(image, rgb, everywhere)
        cells = jnp.mean(jnp.abs(_cell_means(image - rgb, self.model.downscale)))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        total = l1 + self.gradient_weight * gradient + self.cell_weight * cells
        total += self.kl_weight * kl
        terms = {"l1": l1, "gradient": gradient, "cells": cells, "kl": kl}
        terms["latent_std"] = jnp.std(mean)
        return total, terms

    def reconstruct(self, params: Params, rgb: Array) -> Float[Array, "b h w 3"]:
        """The image after encoding (posterior mean) and decoding, in [-1, 1]."""
        vae = self.model.vae.bind(params["vae"])
        mean, _ = jnp.split(vae.encode(to_signed(rgb)), 2, axis=-1)
        return jnp.clip(vae.decode(mean).astype(jnp.float32), -1, 1)


def _cell_means(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b i j c"]:
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))
