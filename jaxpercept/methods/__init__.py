"""Methods: how a prediction comes out of the networks, and what its training minimises.

A method is a frozen dataclass with `fields` (what it reads of a batch), `needs_text`, and
`loss(params, batch, key) -> (loss, terms)`; one that trains a perception model also has
`perception`, how that predicts. A new method is one file here and one entry in `build_method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpercept.checkpoints.description import Description
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.errors import UserError
from jaxpercept.methods.autoencoder import Autoencoder
from jaxpercept.methods.denoising import Denoising
from jaxpercept.methods.latent_model import LatentModel
from jaxpercept.methods.one_step import OneStep
from jaxpercept.methods.perception import Perception
from jaxpercept.methods.recipe import Recipe
from jaxpercept.methods.text_to_image import TextToImage
from jaxpercept.models.config import VAEConfig
from jaxpercept.models.functional import functional
from jaxpercept.tasks import TASKS, get_task, reads_text

Method = OneStep | Denoising | TextToImage | Autoencoder
PERCEPTION = {"one_step": OneStep, "denoising": Denoising}
"""The methods that train perception models."""
_METHODS = {**PERCEPTION, "text_to_image": TextToImage, "autoencoder": Autoencoder}
COMPONENTS = {
    "one_step": ("unet", "vae"),
    "denoising": ("unet", "vae"),
    "text_to_image": ("unet", "vae", "text_encoder"),
    "autoencoder": ("vae",),
}
"""The networks each method trains or runs with."""


def components_of(method: Mapping[str, Any], task: str = "") -> tuple[str, ...]:
    """The networks of a method with these options, for a task."""
    decoder = {"dpt": ("head",), "tiny": ("decoder",)}.get(method.get("decoder"), ())
    text = ("text_encoder",) if reads_text(task) else ()
    return (*COMPONENTS.get(method.get("name", ""), ()), *text, *decoder)


def build_method(
    description: Description,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    batch_size: int = 0,
) -> Method:
    """The method a description names, over its networks.

    Args:
        description: with a non-empty `method`.
        dtype: compute dtype of the networks; losses and schedule stay in float32.
        remat: "none" or "block", see `models.functional`.
        attention: the attention implementation, see `models.attention`.
        batch_size: examples of one update, over all devices and micro-batches; 0 where nothing is
            trained.

    Raises:
        UserError: an unknown method or option, or a component the method needs is missing or of
            another kind.
    """
    options = dict(description.method)
    name = options.pop("name", "")
    if name not in COMPONENTS:
        raise UserError(f"the method {name!r} is unknown: use one of {', '.join(COMPONENTS)}.")
    _check_options(name, options)
    components = components_of(description.method, description.task)
    missing = [part for part in components if part not in description.components]
    if missing:
        raise UserError(
            f"the method {name!r} needs {' and '.join(missing)}, which "
            f"{description.base_checkpoint or 'the checkpoint'} does not hold: start from a "
            "complete one."
        )
    if name == "autoencoder" and not isinstance(description.components["vae"], VAEConfig):
        raise UserError(
            f"the method 'autoencoder' trains an {VAEConfig.CLASS_NAME}, and "
            f"{description.base_checkpoint or 'the checkpoint'} holds an "
            f"{description.components['vae'].CLASS_NAME}: start from another one."
        )
    model = _networks(description, components, dtype=dtype, remat=remat, attention=attention)
    if name == "autoencoder":
        return Autoencoder(model=model, **options)
    options["timesteps"] = TimestepPolicy.parse(options.get("timesteps", "uniform"))
    if name == "text_to_image":
        options["empty_ids"] = tuple(options.get("empty_ids", ()))
        return TextToImage(model=model, **options)
    task = get_task(description.task, **description.task_options)
    if not task.fields:
        trainable = ", ".join(known for known in TASKS if TASKS[known].fields)
        raise UserError(f"The task {description.task!r} cannot be trained yet: use {trainable}.")
    if name == "denoising":
        solver = Solver.from_config(description.scheduler)
        return Denoising(model=model, task=task, solver=solver, batch_size=batch_size, **options)
    weights = dict(options.pop("pixel_weights", {}))
    options["pixel_weights"] = tuple(sorted((k, w) for k, w in weights.items() if w))
    return OneStep(model=model, task=task, **options)


def build_perception(
    description: Description,
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
    vae_tile: int = 0,
) -> Perception:
    """How the described model predicts, whether it was trained here or elsewhere.

    Args:
        description: with a non-empty `task`.
        dtype: compute dtype of the networks; the solver's arithmetic stays in float32.
        attention: the attention implementation, see `models.attention`.
        vae_tile: pixels of the autoencoder's tiles; 0: in one piece.

    Raises:
        UserError: the networks do not fit the family, or the scheduler cannot be sampled with.
    """
    if description.recipe:
        recipe = Recipe.of(**description.recipe)
        components = tuple(description.components)
        model = _networks(description, components, dtype=dtype, attention=attention)
        task = get_task(description.task, **description.task_options)
        solver = recipe.solver(description.scheduler)
        return Perception(model, recipe, solver, task, vae_tile)
    perception = build_method(description, dtype=dtype, attention=attention).perception
    return dataclasses.replace(perception, vae_tile=vae_tile)


def _networks(
    description: Description,
    components: Sequence[str],
    *,
    dtype: Any,
    remat: str = "none",
    attention: str,
) -> LatentModel:
    networks = {
        part: functional(
            description.components[part],
            dtype=jnp.dtype(dtype),
            remat=remat,
            attention=attention,
            # A head that reads the features stands in the place of the output convolution.
            head=not (part == "unet" and "head" in components),
            lora=description.lora_of(part),
        )
        for part in components
    }
    schedule = NoiseSchedule.from_config(description.scheduler)
    return LatentModel(**{"unet": None, "text_encoder": None, **networks}, schedule=schedule)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    given = {"model", "task", "solver", "batch_size"}  # by what surrounds the method
    known = {field.name for field in dataclasses.fields(_METHODS[name])} - given
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"config.method has the key {unknown[0]!r}, which {name} has not: use "
            f"{', '.join(sorted(known))}."
        )
