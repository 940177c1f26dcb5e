"""A model that predicts: networks, the family's recipe and the task's meaning, without weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpercept.diffusion.sampler import Solver, sample
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params, empty_prompt
from jaxpercept.methods.recipe import Recipe
from jaxpercept.models.vae import decode_latents, encode_mean
from jaxpercept.models.vae_tiling import decode_tiled, encode_tiled
from jaxpercept.resize import resize
from jaxpercept.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Perception:
    """How images become predictions; all functions are pure and take the weights.

    Attributes:
        model: the networks.
        recipe: the family's.
        solver: the noise schedule, and how to step through it.
        task: what the decoded image means.
        vae_tile: the autoencoder works in overlapping tiles of so many pixels; 0: in one piece.
    """

    model: LatentModel
    recipe: Recipe
    solver: Solver
    task: Task
    vae_tile: int = 0

    def __post_init__(self) -> None:
        unet, latent = self.model.unet.config, self.model.vae.config.latent_channels
        self.recipe.check_channels(unet.in_channels, unet.out_channels, latent)
        if self.recipe.start != "noise" and self.targets > 1:
            raise UserError(f"A {self.recipe.family} model predicts one target, not several.")

    @property
    def targets(self) -> int:
        """How many images one latent holds: 1, but for Marigold's intrinsics."""
        return self.model.unet.config.out_channels // self.model.vae.config.latent_channels

    def encode(self, params: Params, rgb: Float[Array, "b h w 3"]) -> Float[Array, "b i j c"]:
        """Latents of images in [-1, 1]: the posterior's mean, scaled."""
        if self.vae_tile:
            return encode_tiled(self.model.vae, params["vae"], rgb, tile=self.vae_tile)
        return encode_mean(self.model.vae, params["vae"], rgb)

    def predict(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        noise: Float[Array, "b i j k"] | None = None,
        *,
        num_steps: int | None = None,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b i j k"]]:
        """The decoded prediction, not clamped, and its latent.

        Args:
            params: all components, merged.
            image: the images' latents, from `encode`.
            noise: standard normal, where x starts as noise.
            num_steps: instead of the recipe's.
            key, index: for solvers that draw noise between their steps, see `sampler.sample`.

        Returns:
            Three channels for each target, or those of a DPT head; the latent they were decoded
            from (with a DPT head, the image's).
        """
        if self.recipe.head == "dpt":
            timesteps = jnp.full((image.shape[0],), self.recipe.timesteps[0], jnp.int32)
            return self.dense(params, image, timesteps), image
        latent = self.latent(params, image, noise, num_steps=num_steps, key=key, index=index)
        return self.decode(params, latent), latent

    def latent(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        noise: Float[Array, "b i j k"] | None = None,
        *,
        num_steps: int | None = None,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b i j k"]:
        """The predicted latent; arguments as for `predict`."""
        recipe = self.recipe
        unet = self.model.unet.bind(params["unet"])
        prompt, options = self._conditions(params, image)

        def network(x: Array, t: Array) -> Array:
            inputs = jnp.concatenate([image, x], axis=-1) if recipe.concatenate else x
            # E2E-FT without noise: four channels, the image alone.
            return unet(inputs[..., : unet.config.in_channels], t, prompt, **options)

        starts = {"image": image, "zeros": jnp.zeros_like(image), "noise": noise}
        timesteps = {} if recipe.timesteps is None else {"timesteps": recipe.timesteps}
        steps = self.solver.steps(num_steps or recipe.num_steps, **timesteps)
        last, x0 = sample(steps, network, starts[recipe.start], key=key, index=index)
        return x0 if recipe.output == "x0" else last

    def one_step(
        self, params: Params, image: Float[Array, "b i j c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b i j c"]:
        """The latent that one pass over the image's latent predicts, at any timesteps."""
        prompt, options = self._conditions(params, image)
        output = self.model.unet.bind(params["unet"])(image, timesteps, prompt, **options)
        return self.solver.schedule.to_x0(output.astype(jnp.float32), image, timesteps)

    def dense(
        self, params: Params, image: Float[Array, "b i j c"], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w d"]:
        """A DPT head's map over the UNet's features, of any range, float32, at the image's size."""
        prompt, _ = self._conditions(params, image)
        features = self.model.unet.bind(params["unet"]).features(image, timesteps, prompt)
        decoded = self.model.head.bind(params["head"])(features).astype(jnp.float32)
        size = tuple(edge * self.model.downscale for edge in image.shape[1:3])
        return resize(decoded, size, "bilinear")

    def decode(self, params: Params, latent: Float[Array, "b i j k"]) -> Float[Array, "b h w d"]:
        """Images of latents, not clamped, float32; those of several targets side by side."""
        channels = self.model.vae.config.latent_channels
        vae, weights = self.model.vae, params["vae"]
        if self.model.decoder is not None:
            vae, weights = self.model.decoder, params["decoder"]

        def one(z: Array) -> Array:
            if self.vae_tile:
                return decode_tiled(vae, weights, z, tile=self.vae_tile)
            return decode_latents(vae, weights, z)

        parts = [one(latent[..., i * channels : (i + 1) * channels]) for i in range(self.targets)]
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def to_prediction(self, decoded: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
        """The task's map of what `predict` decoded, padding cut off."""
        if self.recipe.head == "dpt":
            decoded = self.task.from_head(decoded)
        return self.task.to_prediction(decoded)

    def _conditions(
        self, params: Params, image: Float[Array, "b i j c"]
    ) -> tuple[Array, dict[str, Array]]:
        options, batch = {}, image.shape[0]
        if self.recipe.task_vector is not None:
            vector = jnp.asarray(self.recipe.task_vector, jnp.float32)
            options["class_labels"] = jnp.broadcast_to(vector, (batch, vector.size))
        return empty_prompt(params, batch), options
