"""From an image's latent to the prediction's latent: one description for every family of models.

    family         x starts as    the UNet sees     steps                         decoded
    genpercept     image latent   x                 1, any timestep (beta = 1)    x_0 = -output
    rgb_blending   image latent   x                 the scheduler's               x_0
    marigold       noise          [image, x]        the scheduler's               last x
    e2e_ft         zeros          [image, x]        1, trailing: 999              x_0
    lotus_d        image latent   x, task vector    1, at 999                     x_0 = output
    lotus_g        noise          [image, x], task  1, at 999                     x_0 = output

Sources: GenPercept `genpercept_pipeline.py`, Marigold `marigold_depth_pipeline.py`, E2E-FT
`training/train.py` and `Marigold/marigold/marigold_pipeline.py`, Lotus `pipeline.py`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpercept.diffusion.sampler import Solver, sample
from jaxpercept.errors import UserError
from jaxpercept.methods.latent_model import LatentModel, Params, empty_prompt

STARTS = ("image", "zeros", "noise")
OUTPUTS = ("x0", "sample")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a latent prediction comes out of the networks.

    Attributes:
        model: the networks.
        solver: the noise schedule and how to step through it.
        start: what x is at first: the image's latent, zeros or noise.
        concatenate: whether the UNet sees the image's latent beside x. One that has too few input
            channels for both sees the image alone (E2E-FT's noise_type None).
        output: what is decoded, the last predicted x_0 or the last sample. They differ where the
            last step leaves some noise, as in Marigold v1.
        num_steps: the number of steps unless another is asked for.
        timesteps: the timesteps of those steps instead of the solver's own.
        task_vector: Lotus's switch, added to the time embedding.
        targets: how many images one latent holds (Marigold's intrinsics), channel by channel.
    """

    model: LatentModel
    solver: Solver
    start: str = "image"
    concatenate: bool = False
    output: str = "x0"
    num_steps: int = 1
    timesteps: tuple[int, ...] | None = None
    task_vector: tuple[float, ...] | None = None
    targets: int = 1

    def __post_init__(self) -> None:
        unet, latent = self.model.unet.config, self.model.vae.config.latent_channels
        predicted = self.targets * latent
        wanted = [predicted + latent, latent] if self.concatenate else [predicted]
        if self.start != "zeros":
            wanted = wanted[:1]
        if unet.in_channels not in wanted or unet.out_channels != predicted:
            raise UserError(
                f"this kind of model has a UNet of {wanted[0]} input and {predicted} output "
                f"channels, this one has {unet.in_channels} and {unet.out_channels}: it is of "
                "another kind."
            )

    @property
    def draws_noise(self) -> bool:
        """Whether two predictions for one image can differ."""
        return self.start == "noise"

    def latent(
        self,
        params: Params,
        image: Float[Array, "b h w c"],
        noise: Float[Array, "b h w k"] | None = None,
        *,
        num_steps: int | None = None,
        key: Key[Array, ""] | None = None,
        index: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """The predicted latent.

        Args:
            params: all components, merged.
            image: the images' latents.
            noise: standard normal, where x starts as noise.
            num_steps: instead of the recipe's.
            key, index: for solvers that draw noise between their steps, see `sampler.sample`.
        """
        unet = self.model.unet.bind(params["unet"])
        prompt = empty_prompt(params, image.shape[0])
        options = {}
        if self.task_vector is not None:
            vector = jnp.asarray(self.task_vector, jnp.float32)
            options["class_labels"] = jnp.broadcast_to(vector, (image.shape[0], vector.size))

        def predict(x: Array, t: Array) -> Array:
            inputs = jnp.concatenate([image, x], axis=-1) if self.concatenate else x
            inputs = inputs[..., : self.model.unet.config.in_channels]
            return unet(inputs, t, prompt, **options)

        starts = {"image": image, "zeros": jnp.zeros_like(image), "noise": noise}
        steps = self.solver.steps(num_steps or self.num_steps, timesteps=self.timesteps)
        last, x0 = sample(steps, predict, starts[self.start], key=key, index=index)
        return x0 if self.output == "x0" else last
