"""Denoising diffusion of images under a caption: the pre-training of a text-to-image model.

A part of the examples can be edits instead (after InstructPix2Pix, arXiv 2211.09800, but in one
deterministic step): given the clear photograph and a caption that tells of fog, paint it in fog.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxpercept.diffusion import sampler
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.diffusion.steps import sample
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params
from jaxpercept.methods.one_step import to_signed
from jaxpercept.models.vae import decode_latents, encode_mean


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Latent diffusion (Rombach et al., arXiv 2112.10752), the text encoder trained along.

    Attributes:
        model: the networks and the schedule whose prediction type the loss follows.
        timesteps: the policy of the training timesteps.
        empty_ids: token ids of the empty prompt, padded as the captions are.
        caption_dropout: the share of examples trained without their caption, for classifier-free
            guidance (Ho and Salimans, arXiv 2207.12598).
        edit_share: the share of the hazy examples that are learnt as an edit of the clear image.
        edit_weight: how much the squared error of an edit counts. Most of an edit is a copy, so
            that its errors are small beside those of removing noise.
    """

    model: LatentModel
    timesteps: TimestepPolicy
    empty_ids: tuple[int, ...]
    caption_dropout: float = 0.1
    edit_share: float = 0.0
    edit_weight: float = 1.0

    needs_text = True

    @property
    def fields(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return ("rgb", "input_ids", "index", *(("source",) if self.edit_share else ()))

    def __post_init__(self) -> None:
        self.timesteps.distribution(self.model.schedule)  # raises if it is wrong
        for name in ("caption_dropout", "edit_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"config.method.{name} is {getattr(self, name)}: give a share in [0, 1]."
                )

    def loss(
        self, params: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean squared error of the network's output over a batch."""
        schedule = self.model.schedule
        latent = encode_mean(self.model.vae, params["vae"], to_signed(batch["rgb"]))
        key_t, key_noise, key_drop, key_edit = jax.random.split(key, 4)
        index = batch["index"]
        timesteps = sample_timesteps(self.timesteps, key_t, index, schedule)
        noise = per_example(key_noise, index, lambda k: jax.random.normal(k, latent.shape[1:]))
        drop = per_example(key_drop, index, jax.random.uniform) < self.caption_dropout
        ids = jnp.where(drop[:, None], jnp.asarray(self.empty_ids)[None], batch["input_ids"])

        text = self.model.text_encoder.bind(params["text_encoder"])(ids)
        inputs = schedule.add_noise(latent, noise, timesteps)
        target = schedule.target(latent, noise, timesteps)
        weight = 1.0
        if self.edit_share:
            chosen = per_example(key_edit, index, jax.random.uniform) < self.edit_share
            edited = chosen & jnp.any(batch["source"] != batch["rgb"], axis=(1, 2, 3))
            source = encode_mean(self.model.vae, params["vae"], to_signed(batch["source"]))
            timesteps = jnp.where(edited, schedule.num_train_timesteps - 1, timesteps)
            # One step at the timestep where a v-prediction is minus the clean latent anyway.
            edited = edited[:, None, None, None]
            inputs = jnp.where(edited, source, inputs)
            target = jnp.where(edited, GENPERCEPT.target(latent, source, timesteps), target)
            weight = jnp.where(edited, self.edit_weight, 1.0)
        output = self.model.unet.bind(params["unet"])(inputs, timesteps, text)
        mse = jnp.mean(weight * jnp.square(output.astype(jnp.float32) - target))
        return mse, {"mse": mse}

    def edit(
        self, params: Params, rgb: UInt8[Array, "b h w 3"], input_ids: Int[Array, "b l"]
    ) -> Float[Array, "b h w 3"]:
        """Images changed as the captions say, in [-1, 1], in one step."""
        source = encode_mean(self.model.vae, params["vae"], to_signed(rgb))
        text = self.model.text_encoder.bind(params["text_encoder"])(input_ids)
        timesteps = jnp.full((rgb.shape[0],), self.model.schedule.num_train_timesteps - 1)
        output = self.model.unet.bind(params["unet"])(source, timesteps, text)
        latent = GENPERCEPT.to_x0(output.astype(jnp.float32), source, timesteps)
        return jnp.clip(decode_latents(self.model.vae, params["vae"], latent), -1, 1)

    def sample(
        self,
        params: Params,
        input_ids: Int[Array, "b l"],
        key: Array,
        *,
        latent_size: tuple[int, int],
        num_steps: int = 50,
        guidance: float = 3.0,
    ) -> Float[Array, "b h w 3"]:
        """Images in [-1, 1] for captions, by DDIM with classifier-free guidance."""
        batch = input_ids.shape[0]
        empty = jnp.broadcast_to(jnp.asarray(self.empty_ids), input_ids.shape)
        text = self.model.text_encoder.bind(params["text_encoder"])(
            jnp.concatenate([input_ids, empty])
        )
        unet = self.model.unet.bind(params["unet"])

        def predict(x: Array, t: Array) -> Array:
            both = unet(jnp.concatenate([x, x]), jnp.concatenate([t, t]), text)
            conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
            return unconditional + guidance * (conditional - unconditional)

        channels = self.model.vae.config.latent_channels
        noise = jax.random.normal(key, (batch, *latent_size, channels))
        _, latent = sample(sampler.ddim(self.model.schedule, num_steps), predict, noise)
        return jnp.clip(decode_latents(self.model.vae, params["vae"], latent), -1, 1)
