"""Denoising of the target's latent, beside the image's or blended with it.

Two of the three families that GenPercept compares (arXiv 2403.06090), the third being `one_step`:
Marigold's, where the target's latent is noised with Gaussian noise and the UNet sees the image's
latent beside it (arXiv 2312.02145), and RGB blending, where the image's latent itself is the noise.
With beta = 1 at every timestep the latter is the one-step method.

InstructPix2Pix (arXiv 2211.09800), on which ADDP (arXiv 2504.11457) builds, is Marigold's with a
text beside each image. There the latents of targets are drawn from the autoencoder's posterior;
here all latents are its mean.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpercept import losses
from jaxpercept.diffusion.corruption import INTENSITIES, intensity
from jaxpercept.diffusion.guidance import Guidance, Text
from jaxpercept.diffusion.noise import multi_resolution, per_example
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.timesteps import (
    USES,
    TimestepPolicy,
    drawn_policy,
    loss_weights,
    sample_timesteps,
)
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params, empty_prompt
from jaxpercept.methods.one_step import to_signed
from jaxpercept.methods.perception import Perception, batch_fields
from jaxpercept.methods.recipe import Recipe
from jaxpercept.tasks.base import Task

NOISES = ("multi_resolution", "gaussian", "image")
CORRUPTION_TARGETS = ("released", "consistent")
_MAX_STRENGTH = 4
# Of the step's key; `split` counts from 0.
_CORRUPTION_KEY, _DROPOUT_KEY = 1000, 1001


@dataclasses.dataclass(frozen=True)
class Denoising:
    """The latent loss of a network that removes noise from the target's latent.

    Attributes:
        model: the networks.
        task: what the target image means.
        solver: how predictions step through the noise levels; its schedule is that of the training.
        timesteps: the policy of the training timesteps.
        batch_size: examples of one update, over all devices and micro-batches, among which the
            timesteps are stratified; 0 where nothing is trained, or to draw each on its own.
        timestep_use: what the policy's probabilities are for: "sample" draws the timesteps by them,
            "loss" weighs the loss of uniform timesteps by them, and "importance" draws by them and
            weighs the loss inversely (`diffusion.timesteps.loss_weights`).
        stratified: that each update's timesteps are a fair sample of those of the policy.
        family: "marigold", or "instruct_pix2pix", which has the image's latent behind and unscaled.
            With noise="image" the image has no place beside, and the family is "rgb_blending".
        noise: "multi_resolution" (Marigold's, see `diffusion.noise`), "gaussian", or "image": the
            image's latent, without a copy of it beside (RGB blending).
        noise_strength: of the coarser levels of multi-resolution noise.
        annealed: that strength falls with the timestep, to 0 at t = 0.
        num_steps: steps of a prediction.
        output: what is decoded, the last predicted "x0" (GenPercept) or the last "sample"
            (Marigold).
        corruption: make x_t of a corrupted target (ADDP, see `diffusion.corruption`). Its intensity
            is "increasing" with the timestep, as there, "constant" or "decreasing"; "none": x_t is
            made of the target itself.
        corruption_strength: factor of that intensity, above 0, at most 4.
        corruption_target: "consistent": the network learns the output that means the clean target
            exactly. "released": as in ADDP's code for depth, the one of the clean target and the
            noise that was drawn. A v-prediction then means ᾱ · corrupted + (1 − ᾱ) · clean, an
            ε-prediction the corrupted target, which corrects nothing; for "sample" both are one.
        drop_text, drop_image, drop_both: the shares of the examples without their text, without
            the image's latent and without both, where the task reads a text, so that a prediction
            can be guided (InstructPix2Pix: 0.05 each).
        text_guidance, image_guidance: of a prediction, see `diffusion.guidance`; 1: none.
    """

    model: LatentModel
    task: Task
    solver: Solver
    timesteps: TimestepPolicy
    batch_size: int
    timestep_use: str = "sample"
    stratified: bool = True
    family: str = "marigold"
    noise: str = "multi_resolution"
    noise_strength: float = 0.9
    annealed: bool = True
    num_steps: int = 10
    output: str = "x0"
    corruption: str = "none"
    corruption_strength: float = 1.0
    corruption_target: str = "released"
    drop_text: float = 0.0
    drop_image: float = 0.0
    drop_both: float = 0.0
    text_guidance: float = 1.0
    image_guidance: float = 1.0

    needs_text = False

    @property
    def fields(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return batch_fields(self.task)

    def __post_init__(self) -> None:
        choices = {
            "family": ("marigold", "instruct_pix2pix"),
            "noise": NOISES,
            "output": ("x0", "sample"),
            "timestep_use": USES,
            "corruption": ("none", *INTENSITIES),
            "corruption_target": CORRUPTION_TARGETS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"config.method.{name} is {getattr(self, name)!r}: use {' or '.join(known)}."
                )
        if not 0 <= self.noise_strength <= 1:
            raise UserError(
                f"config.method.noise_strength is {self.noise_strength}: give a value in [0, 1]."
            )
        if self.task.channels not in (1, 3):
            raise UserError(f"{self.task.name} has no image to denoise: use the method one_step.")
        if not 0 < self.corruption_strength <= _MAX_STRENGTH:
            raise UserError(
                f"config.method.corruption_strength is {self.corruption_strength}: give a value "
                f"above 0, at most {_MAX_STRENGTH}; corruption='none' leaves it out."
            )
        if self.corrupts and not self.task.corruptible:
            raise UserError(
                f"the targets of {self.task.name} cannot be corrupted: set "
                "config.method.corruption to 'none'."
            )
        if self.blends and self.family != "marigold":
            raise UserError(
                "the image's latent is the noise with config.method.noise='image', so that none "
                "lies beside: set config.method.family to 'marigold'."
            )
        dropped = (self.drop_text, self.drop_image, self.drop_both)
        if min(dropped) < 0 or sum(dropped) > 1:
            raise UserError(
                f"config.method.drop_text, drop_image and drop_both are {dropped}: give shares of "
                "the examples, together at most 1."
            )
        if any(dropped) and not self.task.reads_text:
            raise UserError(
                f"the task {self.task.name} reads no text that could guide it: set "
                "config.method.drop_text, drop_image and drop_both to 0."
            )
        loss_weights(self.timesteps, self.solver.schedule, self.timestep_use)  # raises if wrong
        Guidance(self.text_guidance, self.image_guidance)  # likewise
        self.perception.steps()

    @property
    def blends(self) -> bool:
        """Whether the image's latent is the noise."""
        return self.noise == "image"

    @property
    def corrupts(self) -> bool:
        """Whether x_t is made of something else than the target."""
        return self.corruption != "none"

    def loss(
        self, params: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The squared error of the network's output over the valid latent cells.

        The loss is weighed by the timesteps, the term `latent_mse` is not.
        """
        schedule, perception, index = self.solver.schedule, self.perception, batch["index"]
        target = self.task.encode_target(batch)
        image = perception.encode(params, to_signed(batch["rgb"]))
        latent = perception.encode(params, target.image)
        key_t, key_noise = jax.random.split(key)
        timesteps, weights = self._draw(key_t, index)
        noise = image if self.blends else self._noise(key_noise, index, timesteps, latent.shape[1:])

        start = latent
        if self.corrupts:
            start = perception.encode(params, self._corrupted(key, batch, timesteps))
        x = schedule.add_noise(start, noise, timesteps)
        if self.corrupts and self.corruption_target == "consistent":
            noise = schedule.noise_between(x, latent, timesteps)
        wanted = schedule.target(latent, noise, timesteps)

        image, text = self._conditions(params, batch, image, key)
        output = perception.network(params, image, text, Guidance().mixture())(x, timesteps)
        mask = losses.pool_mask(target.mask, self.model.downscale)
        cells = self.task.cell_weights(batch, self.model.downscale)
        if cells is not None:
            weights = weights[:, None, None, None] * cells
        loss = losses.mse(output, wanted, mask, weights)
        return loss, {"latent_mse": losses.mse(output, wanted, mask)}

    def _draw(
        self, key: Key[Array, ""], index: Int[Array, " b"]
    ) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
        """The timesteps of the examples, and the factors of their losses."""
        schedule, use = self.solver.schedule, self.timestep_use
        policy = drawn_policy(self.timesteps, use)
        strata = self.batch_size if self.stratified else 0
        timesteps = sample_timesteps(policy, key, index, schedule, strata=strata)
        weights = loss_weights(self.timesteps, schedule, use).astype(np.float32)
        return timesteps, jnp.asarray(weights)[timesteps]

    def _conditions(
        self, params: Params, batch: dict[str, Array], image: Float[Array, "b i j c"], key: Array
    ) -> tuple[Float[Array, "b i j c"], Text | None]:
        """The image's latent and its text, either or both taken away from some examples."""
        text = self.perception.text(params, batch)
        if not (self.drop_text or self.drop_image or self.drop_both):
            return image, text
        key = jax.random.fold_in(key, _DROPOUT_KEY)
        place = per_example(key, batch["index"], jax.random.uniform)[:, None, None]
        only_text, text_or_image = self.drop_text, self.drop_text + self.drop_image
        some = place < text_or_image + self.drop_both
        no_text = some & ((place < only_text) | (place >= text_or_image))
        no_image = (some & (place >= only_text))[..., None]
        wanted = jnp.where(no_text, empty_prompt(params, image.shape[0]), text.wanted)
        return jnp.where(no_image, 0, image), Text(wanted)

    def _corrupted(
        self, key: Key[Array, ""], batch: dict[str, Array], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        total = self.solver.schedule.num_train_timesteps
        strength = self.corruption_strength * intensity(timesteps, total, self.corruption)
        key = jax.random.fold_in(key, _CORRUPTION_KEY)
        keys = per_example(key, batch["index"], lambda k: k)
        return self.task.corrupt(batch, strength, keys)

    def _noise(
        self,
        key: Key[Array, ""],
        index: Int[Array, " b"],
        timesteps: Int[Array, " b"],
        shape: tuple[int, ...],
    ) -> Float[Array, "b i j c"]:
        if self.noise == "gaussian":
            return per_example(key, index, lambda k: jax.random.normal(k, shape))
        total = self.solver.schedule.num_train_timesteps
        share = timesteps / total if self.annealed else jnp.ones(timesteps.shape)
        keys = per_example(key, index, lambda k: k)
        return jax.vmap(lambda k, s: multi_resolution(k, shape, s))(
            keys, self.noise_strength * share
        )

    @property
    def perception(self) -> Perception:
        """How the trained model predicts."""
        recipe = Recipe.of(
            "rgb_blending" if self.blends else self.family,
            num_steps=self.num_steps,
            output=self.output,
            padded_prompt=self.task.reads_text,
            guidance=(self.text_guidance, self.image_guidance),
        )
        return Perception(self.model, recipe, self.solver, self.task)
