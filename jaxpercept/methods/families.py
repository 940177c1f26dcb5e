"""Which family of perception models a diffusers checkpoint belongs to, and what it predicts.

    model_index.json                UNet           family          task
    MarigoldDepthPipeline           8 channels     marigold        prediction_type
    MarigoldPipeline                8 channels     marigold        prediction_type, else depth
    MarigoldNormalsPipeline         8 channels     marigold        normals
    MarigoldIntrinsicsPipeline      4 (n + 1)      marigold        intrinsics
    GenPerceptPipeline              4 channels     genpercept      to be named
      with genpercept_pipeline off  4 channels     rgb_blending    to be named
    LotusGPipeline                  8 + task       lotus_g         to be named
    LotusDPipeline, DirectRegres... 4 + task       lotus_d         to be named
    StableDiffusionPipeline         8 channels     e2e_ft          to be named
    StableDiffusionPipeline         4 channels     to be named: it may be a text-to-image model
    StableDiffusionInstructPix2...  8 channels     instruct_pix2pix  to be named
    none                            4 channels     genpercept      to be named

A folder that is itself a UNet (config.json and weights, as GenPercept publishes them) takes
everything else from a base checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpercept.errors import UserError
from jaxpercept.methods.recipe import FAMILIES
from jaxpercept.models.config import UNetConfig
from jaxpercept.tasks import TASKS

# The published models' own; theirs is the long side of a square.
_RESOLUTION = 768
_RESOLUTIONS = {"instruct_pix2pix": 512}
_BY_CLASS = {
    "MarigoldPipeline": "marigold",
    "MarigoldDepthPipeline": "marigold",
    "MarigoldNormalsPipeline": "marigold",
    "MarigoldIntrinsicsPipeline": "marigold",
    "GenPerceptPipeline": "genpercept",
    "LotusGPipeline": "lotus_g",
    "LotusDPipeline": "lotus_d",
    "DirectRegressionPipeline": "lotus_d",
    "StableDiffusionInstructPix2PixPipeline": "instruct_pix2pix",
}
_TEXT_TO_IMAGE = "StableDiffusionPipeline"


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What a checkpoint predicts, and how.

    Attributes:
        recipe: arguments of `methods.recipe.Recipe.of`.
        task: a key of `tasks.TASKS`.
        task_options: the task's attributes.
        resolution: (height, width) the model works at by default.
    """

    recipe: dict[str, Any]
    task: str
    task_options: dict[str, Any]
    resolution: tuple[int, int]


def recognise(
    source: str,
    model_index: Mapping[str, Any],
    unet: UNetConfig,
    scheduler: Mapping[str, Any],
    *,
    family: str | None = None,
    task: str | None = None,
    head: str = "vae",
) -> Recognised | None:
    """The family and the task of a checkpoint; None for a text-to-image model.

    Args:
        source: names the checkpoint in error messages.
        model_index: content of model_index.json, {} where there is none.
        unet: the UNet's architecture.
        scheduler: content of scheduler_config.json, {} where there is none.
        family, task: what the files do not say; they win over what the files say.
        head: "dpt" where the weights of a DPT head are there.

    Raises:
        UserError: the task or the family cannot be told from the files and was not named, or the
            UNet does not fit.
    """
    class_name = model_index.get("_class_name", "")
    found = family or _family(model_index, unet)
    if found is None:
        if task is None:
            return None
        raise UserError(
            f"{source} may be a text-to-image model: name the family of perception models it "
            f"belongs to with --family ({', '.join(FAMILIES)}), or fine-tune it."
        )
    if found not in FAMILIES:
        raise UserError(f"The family {found!r} is unknown: use {', '.join(FAMILIES)}.")
    task = task or _task(class_name, model_index)
    if task is None:
        raise UserError(
            f"{source} is a {found} model, but its files do not say what it predicts: name it with "
            f"--task ({', '.join(TASKS)})."
        )
    if task not in TASKS:
        raise UserError(f"Unknown task {task!r}; choose one of: {', '.join(sorted(TASKS))}.")
    recipe: dict[str, Any] = {"family": found}
    if found in ("marigold", "rgb_blending"):
        # Without a number of its own: the authors' 10 steps of v1-0, 4 of v1-1, 1 of LCM.
        default = 10 if scheduler.get("timestep_spacing") == "leading" else 4
        default = 1 if scheduler.get("_class_name") == "LCMScheduler" else default
        recipe["num_steps"] = model_index.get("default_denoising_steps") or default
    if head != "vae":
        recipe["head"] = head
    side = model_index.get("default_processing_resolution") or _RESOLUTIONS.get(found, _RESOLUTION)
    return Recognised(recipe, task, _task_options(task, model_index), (side, side))


def _family(model_index: Mapping[str, Any], unet: UNetConfig) -> str | None:
    class_name = model_index.get("_class_name", "")
    if class_name == "GenPerceptPipeline" and not model_index.get("genpercept_pipeline", True):
        return "rgb_blending"
    if unet.class_embed_type == "projection":
        return "lotus_g" if unet.in_channels > unet.out_channels else "lotus_d"
    if class_name in _BY_CLASS:
        return _BY_CLASS[class_name]
    if not model_index and unet.in_channels == unet.out_channels:
        return "genpercept"
    if class_name == _TEXT_TO_IMAGE and unet.in_channels == 2 * unet.out_channels:
        return "e2e_ft"
    return None


def _task(class_name: str, model_index: Mapping[str, Any]) -> str | None:
    if class_name in ("MarigoldPipeline", "MarigoldDepthPipeline"):
        return model_index.get("prediction_type") or "depth"
    if class_name == "MarigoldNormalsPipeline":
        return "normals"
    return "intrinsics" if class_name == "MarigoldIntrinsicsPipeline" else None


def _task_options(task: str, model_index: Mapping[str, Any]) -> dict[str, Any]:
    names = {"normals": {"use_full_z_range": "full_z_range"}}
    if task in ("depth", "disparity"):
        names[task] = {key: key for key in ("scale_invariant", "shift_invariant")}
    given = {ours: model_index.get(theirs) for theirs, ours in names.get(task, {}).items()}
    return {key: value for key, value in given.items() if value is not None}
