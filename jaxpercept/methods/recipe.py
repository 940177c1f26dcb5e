"""From an image's latent to the prediction's latent: one table row for every family of models.

    family            x starts as    the UNet sees     steps                         decoded
    genpercept        image latent   x                 1, any timestep (beta = 1)    x_0 = -output
    rgb_blending      image latent   x                 the scheduler's               x_0
    marigold          noise          [image, x]        the scheduler's               last x
    e2e_ft            zeros          [image, x]        1, trailing: 999              x_0
    lotus_d           image latent   x, task vector    1, at 999                     x_0 = output
    lotus_g           noise          [image, x], task  1, at 999                     x_0 = output
    instruct_pix2pix  noise          [x, image], text  the scheduler's, guided       last x

Sources: GenPercept `genpercept_pipeline.py`, Marigold `marigold_depth_pipeline.py`, E2E-FT
`training/train.py` and `Marigold/marigold/marigold_pipeline.py`, Lotus `pipeline.py`,
InstructPix2Pix diffusers' `pipeline_stable_diffusion_instruct_pix2pix.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.errors import UserError

# Lotus's switch is u = (1, 0) for predicting and (0, 1) for reconstructing the image; the network
# gets (sin u, cos u).
_LOTUS = (math.sin(1.0), math.sin(0.0), math.cos(1.0), math.cos(0.0))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a family's models predict.

    Attributes:
        start: what x is at first: the "image" latent, "zeros" or "noise".
        concatenate: whether the UNet sees the image's latent beside x. One that has too few input
            channels for both sees the image alone (E2E-FT's noise_type None).
        image_last: the image's latent comes behind x, not before it, and is not scaled: it is the
            autoencoder's own (InstructPix2Pix).
        output: what is decoded, the last predicted "x0" or the last "sample". They differ where the
            last step leaves some noise, as in Marigold v1.
        num_steps: the number of steps unless another is asked for.
        timesteps: the timestep of a model that only knows one step; None for the solver's.
        task_vector: Lotus's switch, added to the time embedding.
        scheduler: what replaces entries of the checkpoint's scheduler_config.json.
        padded_prompt: whether the empty prompt is padded to the text tower's length.
        head: "vae", or "dpt" for GenPercept's decoder that reads the UNet's features.
        guidance: of text and image, `diffusion.guidance.Guidance`'s first two.
    """

    family: str
    start: str = "image"
    concatenate: bool = False
    image_last: bool = False
    output: str = "x0"
    num_steps: int = 1
    timesteps: tuple[int, ...] | None = None
    task_vector: tuple[float, ...] | None = None
    scheduler: tuple[tuple[str, Any], ...] = ()
    padded_prompt: bool = False
    head: str = "vae"
    guidance: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, family: str, **changes: Any) -> Recipe:
        """The family's recipe, some values changed.

        Raises:
            UserError: an unknown family.
        """
        if family not in FAMILIES:
            raise UserError(f"The family {family!r} is unknown: use {', '.join(FAMILIES)}.")
        for name in ("timesteps", "guidance"):
            if changes.get(name) is not None:
                changes[name] = tuple(changes[name])
        return dataclasses.replace(FAMILIES[family], **changes)

    @property
    def draws_noise(self) -> bool:
        """Whether two predictions for one image can differ."""
        return self.start == "noise"

    def solver(self, scheduler: Mapping[str, Any]) -> Solver:
        """The solver, from the content of the checkpoint's scheduler_config.json."""
        return Solver.from_config({**scheduler, **dict(self.scheduler)})

    def check_channels(self, in_channels: int, out_channels: int, latent: int) -> None:
        """Raises a UserError where a UNet cannot be of this family."""
        targets = out_channels // latent
        wanted = {targets * latent + (latent if self.concatenate else 0)}
        if self.start == "zeros":
            wanted.add(latent)
        if out_channels % latent or in_channels not in wanted:
            raise UserError(
                f"A {self.family} model with {out_channels} output channels has a UNet of "
                f"{' or '.join(map(str, sorted(wanted)))} input channels, this one has "
                f"{in_channels}: it is of another family."
            )


_ONE_STEP_OF_LOTUS = {
    "timesteps": (999,),
    "task_vector": _LOTUS,
    # The published files name PNDM or DDIM, which take no timesteps from outside.
    "scheduler": (("_class_name", "DDPMScheduler"), ("prediction_type", "sample")),
    "padded_prompt": True,
}
FAMILIES = {
    recipe.family: recipe
    for recipe in (
        Recipe("genpercept", timesteps=(1,), scheduler=tuple(GENPERCEPT.to_config().items())),
        Recipe("rgb_blending", num_steps=10),
        Recipe("marigold", start="noise", concatenate=True, output="sample", num_steps=4),
        Recipe(
            "e2e_ft",
            start="zeros",
            concatenate=True,
            scheduler=(("_class_name", "DDIMScheduler"), ("timestep_spacing", "trailing")),
        ),
        Recipe("lotus_d", **_ONE_STEP_OF_LOTUS),
        Recipe("lotus_g", start="noise", concatenate=True, **_ONE_STEP_OF_LOTUS),
        # The guidance and the steps of ADDP's referring segmentation.
        Recipe(
            "instruct_pix2pix",
            start="noise",
            concatenate=True,
            image_last=True,
            output="sample",
            num_steps=100,
            padded_prompt=True,
            guidance=(3.0, 1.5),
        ),
    )
}
