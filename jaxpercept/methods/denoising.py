"""Denoising of the target's latent, beside the image's or blended with it (Marigold, GenPercept).

Two of the three families that GenPercept compares (arXiv 2403.06090), the third being `one_step`:
Marigold's, where the target's latent is noised with Gaussian noise and the UNet sees the image's
latent beside it (arXiv 2312.02145), and RGB blending, where the image's latent itself is the noise.
With beta = 1 at every timestep the latter is the one-step method.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpercept import losses
from jaxpercept.diffusion.corruption import INTENSITIES, intensity
from jaxpercept.diffusion.noise import multi_resolution, per_example
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params, empty_prompt
from jaxpercept.methods.one_step import to_signed
from jaxpercept.methods.perception import Perception
from jaxpercept.methods.recipe import Recipe
from jaxpercept.tasks.base import Task

NOISES = ("multi_resolution", "gaussian", "image")
CORRUPTION_TARGETS = ("released", "consistent")
_MAX_STRENGTH = 4
# Of the step's key; `split` counts from 0.
_CORRUPTION_KEY = 1000


@dataclasses.dataclass(frozen=True)
class Denoising:
    """The latent loss of a network that removes noise from the target's latent.

    Attributes:
        model: the networks.
        task: what the target image means.
        solver: how predictions step through the noise levels; its schedule is that of the training.
        timesteps: the policy of the training timesteps.
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
    """

    model: LatentModel
    task: Task
    solver: Solver
    timesteps: TimestepPolicy
    noise: str = "multi_resolution"
    noise_strength: float = 0.9
    annealed: bool = True
    num_steps: int = 10
    output: str = "x0"
    corruption: str = "none"
    corruption_strength: float = 1.0
    corruption_target: str = "released"

    needs_text = False

    @property
    def fields(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return ("rgb", *self.task.fields, "index")

    def __post_init__(self) -> None:
        for name, known in (
            ("noise", NOISES),
            ("output", ("x0", "sample")),
            ("corruption", ("none", *INTENSITIES)),
            ("corruption_target", CORRUPTION_TARGETS),
        ):
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
        self.timesteps.distribution(self.solver.schedule.num_train_timesteps)  # raises if wrong
        self.solver.steps(self.num_steps)  # likewise
        _ = self.perception

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
        """The mean squared error of the network's output over the valid latent cells."""
        schedule, perception, index = self.solver.schedule, self.perception, batch["index"]
        target = self.task.encode_target(batch)
        image = perception.encode(params, to_signed(batch["rgb"]))
        latent = perception.encode(params, target.image)
        key_t, key_noise = jax.random.split(key)
        timesteps = sample_timesteps(self.timesteps, key_t, index, schedule.num_train_timesteps)
        noise = image if self.blends else self._noise(key_noise, index, timesteps, latent.shape[1:])

        start = latent
        if self.corrupts:
            start = perception.encode(params, self._corrupted(key, batch, timesteps))
        x = schedule.add_noise(start, noise, timesteps)
        inputs = x if self.blends else jnp.concatenate([image, x], axis=-1)
        prompt = empty_prompt(params, image.shape[0])
        output = self.model.unet.bind(params["unet"])(inputs, timesteps, prompt)
        if self.corrupts and self.corruption_target == "consistent":
            noise = schedule.noise_between(x, latent, timesteps)
        wanted = schedule.target(latent, noise, timesteps)
        mask = losses.pool_mask(target.mask, self.model.downscale)
        mse = losses.mse(output.astype(jnp.float32), wanted, mask)
        return mse, {"latent_mse": mse}

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
        family = "rgb_blending" if self.blends else "marigold"
        recipe = Recipe.of(family, num_steps=self.num_steps, output=self.output)
        return Perception(self.model, recipe, self.solver, self.task)
