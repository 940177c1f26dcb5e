"""How to predict, beyond the sizes of images."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxpercept.diffusion.guidance import Guidance
from jaxpercept.errors import UserError
from jaxpercept.methods import Perception

RESAMPLE = ("bilinear", "bicubic", "nearest", "nearest-exact", "area")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to predict, beyond the sizes.

    Attributes:
        num_steps: denoising steps; None: the model's own number.
        ensemble_size: predictions for each image, which differ in their noise and become one.
        flip: also predict for the mirrored image and merge both.
        seed: of the noise; that of a prediction depends only on (seed, image, member).
        resample_input, resample_output: methods of `resize.resize`.
        merge: arguments of the ensembling function, such as `reduction`.
        guidance: how strongly text, image and correction pull; None: as the model's recipe says.
    """

    num_steps: int | None = None
    ensemble_size: int = 1
    flip: bool = False
    seed: int = 0
    resample_input: str = "bilinear"
    resample_output: str = "bilinear"
    merge: tuple[tuple[str, Any], ...] = ()
    guidance: Guidance | None = None

    @property
    def members(self) -> int:
        """Predictions for each image."""
        return self.ensemble_size * (2 if self.flip else 1)


def check_options(perception: Perception, options: Options) -> None:
    """Raises a UserError where the options do not fit the model."""
    recipe, steps = perception.recipe, options.num_steps
    if recipe.timesteps is not None and steps not in (None, 1):
        raise UserError(
            f"this model predicts in one step, not {steps}: leave num_inference_steps out."
        )
    if recipe.timesteps is None:
        perception.steps(steps)  # raises where it does not fit
    if not 0 <= options.seed < 2**32:
        raise UserError(f"seed {options.seed} does not fit: give one of 0 to {2**32 - 1}.")
    if options.ensemble_size < 1:
        raise UserError(f"ensemble_size is {options.ensemble_size}: give at least 1.")
    if options.ensemble_size > 1 and not recipe.draws_noise:
        raise UserError(
            f"ensemble_size {options.ensemble_size} is pointless for a deterministic model, "
            "whose predictions are all equal: leave it out."
        )
    reads_text = perception.task.reads_text
    if options.flip and perception.task.needs_prompt:
        raise UserError(
            "this model reads a text for each image, and in a mirrored one left is right: leave "
            "flip out."
        )
    if options.guidance is not None and not reads_text:
        raise UserError("this model reads no text that could guide it: leave the guidance out.")
    for name in ("resample_input", "resample_output"):
        if getattr(options, name) not in RESAMPLE:
            argument = name.replace("resample", "resample_method")
            raise UserError(
                f"{argument} {getattr(options, name)!r} is unknown: use {', '.join(RESAMPLE)}."
            )
