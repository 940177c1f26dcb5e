"""One deterministic step from image latents to prediction (GenPercept, arXiv 2403.06090).

With beta = 1 for every timestep, alphas_cumprod is zero: the noisy input is the RGB latent itself
and the v-prediction target is minus the target's latent, so a single forward pass of the UNet on
the RGB latent gives the prediction, whatever the timestep [recipes: GenPercept v2, `ddim.py` and
`genpercept_trainer.py`]. The losses are the latent MSE, pixel losses on the decoded prediction
(the gradient flows through the decoder), or both.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept import losses
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params
from jaxpercept.methods.perception import Perception, batch_fields
from jaxpercept.methods.recipe import Recipe
from jaxpercept.models.vae import decode_latents
from jaxpercept.tasks.base import Task, to_signed


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
        decoder: "vae"; "dpt" for a head that reads the UNet's features, without latents; or "tiny"
            for a small network that decodes the latents in the autoencoder's place.
        teacher_weight: weight of the L1 between the tiny decoder's image and the autoencoder's.
    """

    model: LatentModel
    task: Task
    timesteps: TimestepPolicy
    inference_timestep: int = 1
    latent_weight: float = 1.0
    pixel_weights: tuple[tuple[str, float], ...] = ()
    decoder: str = "vae"
    teacher_weight: float = 0.0

    needs_text = False

    @property
    def fields(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return batch_fields(self.task)

    def __post_init__(self) -> None:
        unet, vae = self.model.unet.config, self.model.vae.config
        if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
            raise UserError(
                f"one_step feeds the UNet {vae.latent_channels} latent channels, this one takes "
                f"{unet.in_channels} and gives {unet.out_channels}: start from a plain "
                "text-to-image checkpoint."
            )
        total = GENPERCEPT.num_train_timesteps
        self.timesteps.distribution(GENPERCEPT)  # raises where the policy does not fit
        if not 0 <= self.inference_timestep < total:
            raise UserError(
                f"config.method.inference_timestep is {self.inference_timestep}: give one of 0 to "
                f"{total - 1}."
            )
        self.task.check_weights(dict(self.pixel_weights))
        own = {"latent_weight": self.latent_weight, "teacher_weight": self.teacher_weight}
        for name, weight in (*own.items(), *self.pixel_weights):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"config.method gives {name} the weight {weight}: give 0 or more.")
        if not any(own.values()) and not self.pixel_weights:
            raise UserError("config.method asks for no loss: set latent_weight or pixel_weights.")
        if self.decoder not in ("vae", "dpt", "tiny"):
            raise UserError(f"config.method.decoder is {self.decoder!r}: use vae, dpt or tiny.")
        if self.teacher_weight and self.decoder != "tiny":
            raise UserError(
                "config.method.teacher_weight compares a tiny decoder with the autoencoder: set "
                "config.method.decoder to tiny, or the weight to 0."
            )
        channels = self.task.head_channels
        if self.decoder == "dpt":
            self._check_head()
        elif channels > 3 or channels == 2:
            raise UserError(
                f"the autoencoder gives three channels and {self.task.name} needs {channels}: set "
                "config.method.decoder to dpt."
            )

    def _check_head(self) -> None:
        gives, wanted = self.model.head.config.out_channels, self.task.head_channels
        if gives != wanted:
            raise UserError(
                f"the head gives {gives} channels and {self.task.name} needs {wanted}: correct "
                "config.architecture.head, or leave it out."
            )
        if self.latent_weight:
            raise UserError(
                "a DPT head predicts no latent: set config.method.latent_weight to 0 and "
                "pixel_weights."
            )

    def loss(
        self, params: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The weighted sum of the losses over a batch, and each of them by name."""
        perception, index = self.perception, batch["index"]
        target = self.task.encode_target(batch)
        image = perception.encode(params, to_signed(batch["rgb"]))
        key_t, key_pixels = jax.random.split(key)
        timesteps = sample_timesteps(self.timesteps, key_t, index, GENPERCEPT)
        text = perception.text(params, batch)
        if self.decoder == "dpt":
            decoded = perception.dense(params, image, timesteps, text)
        else:
            latent = perception.one_step(params, image, timesteps, text)

        terms, total = {}, jnp.float32(0)
        if self.decoder != "dpt" and (self.pixel_weights or self.teacher_weight):
            decoded = perception.decode(params, latent)
        if self.teacher_weight:
            taught = decode_latents(self.model.vae, params["vae"], jax.lax.stop_gradient(latent))
            everywhere = jnp.ones_like(taught[..., :1], bool)
            terms["teacher"] = losses.l1(decoded, jax.lax.stop_gradient(taught), everywhere)
            total += self.teacher_weight * terms["teacher"]
        if self.latent_weight:
            # x0 = -output, so this is GenPercept's MSE between the output and the v target.
            target_latent = perception.encode(params, target.image)
            latent_mask = losses.pool_mask(target.mask, self.model.downscale)
            weights = self.task.cell_weights(batch, self.model.downscale)
            terms["latent_mse"] = losses.mse(latent, target_latent, latent_mask, weights)
            total += self.latent_weight * terms["latent_mse"]
        if self.pixel_weights:
            keys = per_example(key_pixels, index, lambda k: k)
            pixel = self.task.pixel_losses(decoded, target, dict(self.pixel_weights), keys)
            terms |= pixel
            total += sum(pixel.values())
        return total, terms

    @property
    def perception(self) -> Perception:
        """How the trained model predicts."""
        recipe = Recipe.of(
            "genpercept",
            timesteps=(self.inference_timestep,),
            head="dpt" if self.decoder == "dpt" else "vae",
            padded_prompt=self.task.reads_text,
        )
        return Perception(self.model, recipe, recipe.solver({}), self.task)
