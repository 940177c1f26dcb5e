"""One deterministic step from image latents to prediction (GenPercept, arXiv 2403.06090).

With beta = 1 for every timestep, alphas_cumprod is zero: the noisy input is the RGB latent itself
and the v-prediction target is minus the target's latent, so a single forward pass of the UNet on
the RGB latent gives the prediction, whatever the timestep [recipes: GenPercept v2, `ddim.py` and
`genpercept_trainer.py`]. The losses are the latent MSE, pixel losses on the decoded prediction
(the gradient flows through the decoder), or both.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept import losses
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params, empty_prompt
from jaxpercept.methods.perception import Perception
from jaxpercept.methods.recipe import Recipe
from jaxpercept.models.vae import decode_latents, encode_mean
from jaxpercept.tasks.depth import DepthTask


@dataclasses.dataclass(frozen=True)
class OneStep:
    """GenPercept's one-step method.

    Attributes:
        model: the networks; its own schedule is not used, GenPercept's beta = 1 schedule is.
        task: what the target image means, and its pixel losses.
        timesteps: the policy of the training timesteps. The input does not depend on the timestep;
            only the time embedding does. GenPercept draws them uniformly.
        inference_timestep: the timestep at prediction (1: one leading DDIM step with offset 1).
        latent_weight: weight of the masked MSE between latents; 0 leaves it out.
        pixel_weights: (name, weight) of each of the task's pixel losses; empty leaves them out.
    """

    model: LatentModel
    task: DepthTask
    timesteps: TimestepPolicy
    inference_timestep: int = 1
    latent_weight: float = 1.0
    pixel_weights: tuple[tuple[str, float], ...] = ()

    needs_text = False
    fields = ("rgb", "depth", "valid", "depth_range", "index")

    def __post_init__(self) -> None:
        unet, vae = self.model.unet.config, self.model.vae.config
        if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
            raise UserError(
                f"one_step feeds the UNet {vae.latent_channels} latent channels, this one takes "
                f"{unet.in_channels} and gives {unet.out_channels}: start from a plain "
                "text-to-image checkpoint."
            )
        total = GENPERCEPT.num_train_timesteps
        self.timesteps.distribution(total)  # raises where the policy does not fit
        if not 0 <= self.inference_timestep < total:
            raise UserError(
                f"config.method.inference_timestep is {self.inference_timestep}: give one of 0 to "
                f"{total - 1}."
            )
        for name, _ in self.pixel_weights:
            if name not in self.task.loss_names:
                raise UserError(
                    f"config.method.pixel_weights has {name!r}, which {self.task.name} has not: "
                    f"use {', '.join(self.task.loss_names)}."
                )
        if not self.latent_weight and not self.pixel_weights:
            raise UserError("config.method asks for no loss: set latent_weight or pixel_weights.")

    def _latent(self, params: Params, rgb_latent: Array, timesteps: Array) -> Array:
        """The predicted latent [b, h, w, c] from the RGB latent [b, h, w, c]."""
        prompt = empty_prompt(params, rgb_latent.shape[0])
        output = self.model.unet.bind(params["unet"])(rgb_latent, timesteps, prompt)
        return GENPERCEPT.to_x0(output.astype(jnp.float32), rgb_latent, timesteps)

    def loss(
        self, params: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The weighted sum of the losses over a batch, and each of them by name."""
        rgb = to_signed(batch["rgb"])
        target, mask = self.task.encode_target(batch)
        rgb_latent = encode_mean(self.model.vae, params["vae"], rgb)
        timesteps = sample_timesteps(
            self.timesteps, key, batch["index"], GENPERCEPT.num_train_timesteps
        )
        latent = self._latent(params, rgb_latent, timesteps)

        terms, total = {}, jnp.float32(0)
        if self.latent_weight:
            # x0 = -output, so this is GenPercept's MSE between the output and the v target.
            target_latent = encode_mean(self.model.vae, params["vae"], target)
            latent_mask = losses.pool_mask(mask, self.model.downscale)
            terms["latent_mse"] = losses.mse(latent, target_latent, latent_mask)
            total += self.latent_weight * terms["latent_mse"]
        if self.pixel_weights:
            decoded = decode_latents(self.model.vae, params["vae"], latent).astype(jnp.float32)
            pixel = self.task.pixel_losses(decoded, target, mask, dict(self.pixel_weights))
            terms |= pixel
            total += sum(pixel.values())
        return total, terms

    @property
    def perception(self) -> Perception:
        """How the trained model predicts."""
        recipe = Recipe.of("genpercept", timesteps=(self.inference_timestep,))
        return Perception(self.model, recipe, recipe.solver({}), self.task)


def to_signed(rgb: Array) -> Float[Array, "b h w 3"]:
    """uint8 [0, 255] to float32 [-1, 1]; float images are already there and pass unchanged."""
    if jnp.issubdtype(rgb.dtype, jnp.floating):
        return rgb
    return rgb.astype(jnp.float32) / 127.5 - 1.0
