"""A model that predicts: networks, the family's recipe and the task's meaning, without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpercept.diffusion.guidance import Guidance, Mixture, Text
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.steps import Row, Steps, draws_noise, sample, take
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

    def embed(self, params: Params, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """What the text tower makes of token ids, padded to its length."""
        return self.model.text_encoder.bind(params["text_encoder"])(input_ids)

    def text(self, params: Params, batch: Mapping[str, Array]) -> Text | None:
        """What a batch says to look for, None where the task reads no text."""
        if not self.task.reads_text:
            return None
        return Text(self.embed(params, batch["input_ids"]))

    def predict(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        noise: Float[Array, "b i j k"] | None = None,
        *,
        text: Text | None = None,
        mixture: Mixture | None = None,
        num_steps: int | None = None,
        first: int = 0,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b i j k"]]:
        """The decoded prediction, not clamped, and its latent.

        Args:
            params: all components, merged.
            image: the images' latents, from `encode`.
            noise: standard normal, where x starts as noise; from a later step on, what `advance`
                gave.
            text: from `embed`, for models that read one; others read the prompt of `params`.
            mixture: how conditions are mixed; None: by the recipe's guidance.
            num_steps: instead of the recipe's.
            first: the first step to take.
            key, index: for solvers that draw noise between their steps, see `steps.sample`.

        Returns:
            Three channels for each target, or those of a DPT head; the latent they were decoded
            from (with a DPT head, the image's).
        """
        if self.recipe.head == "dpt":
            timesteps = jnp.full((image.shape[0],), self.recipe.timesteps[0], jnp.int32)
            return self.dense(params, image, timesteps, text), image
        network = self.network(params, image, text, mixture)
        x = noise if first else self.start(image, noise)
        steps = self.steps(num_steps).between(first)
        last, x0 = sample(steps, network, x, key=key, index=index)
        latent = x0 if self.recipe.output == "x0" else last
        return self.decode(params, latent), latent

    def advance(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        noise: Float[Array, "b i j k"] | None = None,
        *,
        until: int,
        text: Text | None = None,
        mixture: Mixture | None = None,
        num_steps: int | None = None,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b i j k"]:
        """What x is before step `until`, from where `predict` goes on; arguments as there."""
        network = self.network(params, image, text, mixture)
        steps = self.steps(num_steps).between(0, until)
        return sample(steps, network, self.start(image, noise), key=key, index=index)[0]

    def step(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        x: Float[Array, "b i j k"],
        row: Row,
        *,
        text: Text | None = None,
        mixture: Mixture | None = None,
        clip: float | None = None,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b i j k"], Float[Array, "b i j k"]]:
        """One of the steps that `predict` takes, see `steps.take`; other arguments as there."""
        network = self.network(params, image, text, mixture)
        return take(row, network, x, clip=clip, key=key, index=index)

    def steps(self, num_steps: int | None = None) -> Steps:
        """What sampling does; None: in the recipe's number of steps.

        Raises:
            UserError: the solver draws noise between them, which a model that starts without noise
                does not know; or it takes no such number of steps.
        """
        timesteps = {} if self.recipe.timesteps is None else {"timesteps": self.recipe.timesteps}
        count = self.recipe.num_steps if num_steps is None else num_steps
        steps = self.solver.steps(count, **timesteps)
        if draws_noise(steps) and not self.recipe.draws_noise:
            raise UserError(
                f"the solver {self.solver.class_name} draws noise, and models of "
                f"{self.recipe.family} begin with none: write DDIMScheduler into their scheduler."
            )
        return steps

    def start(self, image: Float[Array, "b i j c"], noise: Array | None) -> Array:
        """What x is at first."""
        starts = {"image": image, "zeros": jnp.zeros_like(image), "noise": noise}
        return starts[self.recipe.start]

    def network(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        text: Text | None = None,
        mixture: Mixture | None = None,
    ) -> Callable[[Array, Array], Array]:
        """The function of (x, timesteps) that sampling calls, guided; arguments as of `predict`.

        All conditions of an image go through the UNet together, one next to the other, so that a
        batch stays split over the devices as it is.
        """
        if mixture is None:
            guidance = Guidance(*self.recipe.guidance)
            mixture = guidance.mixture(corrected=text is not None and text.unwanted is not None)
        branches, weights = mixture.branches, mixture.weights
        unet, empty = self.model.unet.bind(params["unet"]), empty_prompt(params, image.shape[0])
        texts = {"wanted": empty, "empty": empty}
        if text is not None:
            texts |= {"wanted": text.wanted, "unwanted": text.unwanted}
        prompt = _beside([texts[branch.text] for branch in branches])

        def guided(x: Array, t: Array) -> Array:
            seen = {True: self.unet_input(image, x)}
            if not all(branch.image for branch in branches):
                seen[False] = self.unet_input(jnp.zeros_like(image), x)
            inputs = _beside([seen[branch.image] for branch in branches])
            options = self._options(inputs.shape[0])
            outputs = unet(inputs, _beside([t] * len(branches)), prompt, **options)
            outputs = outputs.astype(jnp.float32)
            if len(branches) == 1:
                return outputs
            outputs = outputs.reshape(x.shape[0], len(branches), *outputs.shape[1:])
            return sum(weights[i] * outputs[:, i] for i in range(len(branches)))

        return guided

    def guidance(self, **changes: float | str | None) -> Guidance | None:
        """The recipe's guidance with attributes that are given changed; None: none is.

        Raises:
            UserError: there is no such guidance.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if not given:
            return None
        return dataclasses.replace(Guidance(*self.recipe.guidance), **given)

    def unet_input(
        self, image: Float[Array, "b i j c"], x: Float[Array, "b i j k"]
    ) -> Float[Array, "b i j d"]:
        """What the UNet sees of the image's latent and of x."""
        if not self.recipe.concatenate:
            return x
        if self.recipe.image_last:
            image = image / self.model.vae.config.scaling_factor
        parts = [x, image] if self.recipe.image_last else [image, x]
        # E2E-FT without noise: four channels, the image alone.
        return jnp.concatenate(parts, axis=-1)[..., : self.model.unet.config.in_channels]

    def one_step(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        timesteps: Int[Array, " b"],
        text: Text | None = None,
    ) -> Float[Array, "b i j c"]:
        """The latent that one pass over the image's latent predicts, at any timesteps."""
        output = self.network(params, image, text)(image, timesteps)
        return self.solver.schedule.to_x0(output, image, timesteps)

    def dense(
        self,
        params: Params,
        image: Float[Array, "b i j c"],
        timesteps: Int[Array, " b"],
        text: Text | None = None,
    ) -> Float[Array, "b h w d"]:
        """A DPT head's map over the UNet's features, of any range, float32, at the image's size."""
        prompt = empty_prompt(params, image.shape[0]) if text is None else text.wanted
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

    def _options(self, rows: Any) -> dict[str, Array]:
        """What the UNet reads beside the prompt; rows may be a symbolic dimension."""
        if self.recipe.task_vector is None:
            return {}
        vector = jnp.asarray(self.recipe.task_vector, jnp.float32)
        return {"class_labels": jnp.broadcast_to(vector, (rows, vector.size))}


def batch_fields(task: Task) -> tuple[str, ...]:
    """What a batch must hold to train for a task."""
    text = ("input_ids",) if task.reads_text else ()
    return tuple(dict.fromkeys(("rgb", *task.fields, *text, "index")))


def _beside(parts: Sequence[Shaped[Array, "b ..."]]) -> Shaped[Array, "k ..."]:
    """Row i of each of them, then row i + 1 of each."""
    if len(parts) == 1:
        return parts[0]
    together = jnp.stack(parts, axis=1)
    return together.reshape(-1, *together.shape[2:])
