"""A latent diffusion checkpoint with its weights taken away."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.models.functional import Functional

Params = dict[str, dict[str, Array]]
"""`{component: {diffusers path: array}}`; the component "prompt" holds the encoded empty prompt."""


@dataclasses.dataclass(frozen=True)
class LatentModel:
    """The networks and the noise schedule every method works with.

    Weights are never part of it: they travel as `Params`, arguments of the jitted functions.
    """

    unet: Functional | None
    vae: Functional
    text_encoder: Functional | None
    schedule: NoiseSchedule
    decoder: Functional | None = None
    """An autoencoder that decodes in the VAE's place, such as a tiny one."""
    head: Functional | None = None
    """A decoder that reads the UNet's features instead of a latent."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along each axis."""
        return self.vae.config.downsampling


def empty_prompt(params: Params, batch_size: Any) -> Float[Array, "b l d"]:
    """The empty prompt's embedding, encoded once before training, for every image of a batch.

    The batch size is an int, or a symbolic dimension of `jax.export`.
    """
    embedding = params["prompt"]["embedding"]
    return jnp.broadcast_to(embedding, (batch_size, *embedding.shape[1:]))
