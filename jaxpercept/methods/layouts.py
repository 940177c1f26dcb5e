"""One-step models in the layouts that diffusers knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.values import in_short
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.errors import UserError
from jaxpercept.tasks import get_task
from jaxpercept.tasks.normals import NormalsTask

_PIPELINES = {
    "depth": "MarigoldDepthPipeline",
    "disparity": "MarigoldDepthPipeline",
    "normals": "MarigoldNormalsPipeline",
}


def as_stable_diffusion(description: Description) -> Description:
    """With GenPercept's scheduler file (beta = 1), whose one step is at the model's timestep.

    [GenPercept `hf_configs/scheduler_beta_1.0_1.0`]
    """
    scheduler = {**GENPERCEPT.to_config(), "steps_offset": _timestep(description)}
    return dataclasses.replace(description, scheduler=scheduler)


def as_marigold(
    description: Description, unet: Mapping[str, Any]
) -> tuple[Description, dict[str, Any]]:
    """A model that diffusers' Marigold pipelines run, and that predicts the same.

    Those give the UNet [image, noise] in eight channels and decode the last sample. The weights
    for the noise are zero; with beta = 1 and nothing left to denoise after the one step
    (`set_alpha_to_one`), the last sample is minus the UNet's output, as GenPercept has it.

    Raises:
        UserError: diffusers has no pipeline for the task, or the model reads a prompt, and those
            give the empty one.
    """
    name = description.task
    if name not in _PIPELINES:
        raise UserError(
            f"diffusers has no pipeline for the task {name!r}: leave --layout=marigold out."
        )
    if prompt := description.config.get("prompt"):
        raise UserError(
            f"the model was trained with the prompt {in_short(repr(prompt))}, and diffusers' "
            "Marigold pipelines read the empty one: leave --layout=marigold out."
        )
    task = get_task(name, **description.task_options)
    config = description.components["unet"]
    kernel = np.asarray(unet["conv_in.kernel"])
    widened = {**unet, "conv_in.kernel": np.concatenate([kernel, np.zeros_like(kernel)], axis=2)}
    index: dict[str, Any] = {
        "_class_name": _PIPELINES[name],
        "prediction_type": name,
        "default_denoising_steps": 1,
        "default_processing_resolution": max(description.resolution),
    }
    if isinstance(task, NormalsTask):
        index["use_full_z_range"] = task.full_z_range
    else:
        index |= task.merge_options  # scale_invariant, shift_invariant
    scheduler = as_stable_diffusion(description).scheduler | {"set_alpha_to_one": True}
    components = {
        **description.components,
        "unet": dataclasses.replace(config, in_channels=2 * config.in_channels),
    }
    changed = dataclasses.replace(
        description, components=components, scheduler=scheduler, model_index=index
    )
    return changed, widened


def _timestep(description: Description) -> int:
    return description.method.get("inference_timestep", 1)
