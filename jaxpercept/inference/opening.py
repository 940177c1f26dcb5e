"""Opening any checkpoint as a perception model: what it is, and all the weights it needs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp

from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.diffusers import Checkpoint, load_autoencoder, load_parts
from jaxpercept.checkpoints.load import encode_empty_prompt, load_model, resolve
from jaxpercept.errors import UserError
from jaxpercept.inference.predictor import Params
from jaxpercept.methods import Perception, build_perception
from jaxpercept.methods.families import recognise
from jaxpercept.methods.recipe import Recipe

DTYPES = ("float32", "bfloat16", "float16")
_NETWORKS = ("unet", "vae", "text_encoder")
Source = str | os.PathLike[str]


def open_perception(
    source: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: Source | None = None,
    vae: Source | None = None,
    decoder: Source | None = None,
) -> tuple[Description, Params]:
    """A checkpoint of any kind and family; arguments as `PerceptionPipeline.from_pretrained`.

    Returns:
        The description, with an empty task where it is a text-to-image model that predicts nothing,
        and the weights as NumPy arrays.

    Raises:
        UserError: nothing complete there, or something must be named.
    """
    folder = Path(resolve(source)).expanduser()
    if (folder / FILE_NAME).is_file():
        named = {"task": task, "family": family, "base": base}
        if given := [name for name, value in named.items() if value is not None]:
            raise UserError(
                f"{source} says itself what it is and has all it needs: leave --{given[0]} out."
            )
        description, params = load_model(source)
    else:
        description, params = describe(assemble(source, base), family=family, task=task)
    for component, other in (("vae", vae), ("decoder", decoder)):
        if other is not None:
            description, params = _replace(description, params, component, os.fspath(other))
    return description, params


def assemble(source: str, base: Source | None, *, dtype: str | None = "float32") -> Checkpoint:
    """The parts a checkpoint has, completed from its base; dtype as in `diffusers.load`.

    Raises:
        UserError: parts are missing and no base is named, or the base lacks them too.
    """
    own = dataclasses.replace(load_parts(resolve(source), dtype=dtype), source=source)
    missing = [name for name in _NETWORKS if name not in own.configs]
    if not missing:
        return own
    if "unet" in missing:
        raise UserError(
            f"{source} holds no UNet: give a checkpoint's folder, or one that holds a UNet's "
            "config.json and weights."
        )
    if base is None:
        raise UserError(
            f"{source} holds no {' and no '.join(missing)}: name the text-to-image checkpoint it "
            "was trained from with --base."
        )
    other = load_parts(resolve(os.fspath(base)), components=missing, dtype=dtype)
    if still := [name for name in missing if name not in other.configs]:
        raise UserError(f"the base {base} holds no {' and no '.join(still)}: give a complete one.")
    return dataclasses.replace(
        own,
        configs=other.configs | own.configs,
        params=other.params | own.params,
        scheduler=own.scheduler or other.scheduler,
        tokenizer_dir=own.tokenizer_dir or other.tokenizer_dir,
    )


def describe(
    checkpoint: Checkpoint, *, family: str | None = None, task: str | None = None
) -> tuple[Description, Params]:
    """What a complete diffusers checkpoint predicts, and its weights with the encoded prompt.

    Raises:
        UserError: the task or the family must be named.
    """
    params = dict(checkpoint.params)
    description = Description(
        components=checkpoint.configs,
        scheduler=checkpoint.scheduler,
        model_index=checkpoint.model_index,
        base_checkpoint=checkpoint.source,
    )
    found = recognise(
        checkpoint.source,
        checkpoint.model_index,
        checkpoint.configs["unet"],
        checkpoint.scheduler,
        family=family,
        task=task,
        head="dpt" if "head" in checkpoint.configs else "vae",
    )
    padded = found is not None and Recipe.of(**found.recipe).padded_prompt
    params["prompt"] = {"embedding": encode_empty_prompt(checkpoint, padded=padded)}
    if found is not None:
        description = dataclasses.replace(
            description,
            recipe=found.recipe,
            task=found.task,
            task_options=found.task_options,
            resolution=found.resolution,
        )
    return description, params


def _replace(
    description: Description, params: Params, component: str, source: str
) -> tuple[Description, Params]:
    config, weights = load_autoencoder(source)
    own = description.components["vae"]
    if (config.latent_channels, config.downsampling) != (own.latent_channels, own.downsampling):
        raise UserError(
            f"the autoencoder {source} has {config.latent_channels} latent channels of "
            f"{config.downsampling} x {config.downsampling} pixels, the model wants "
            f"{own.latent_channels} of {own.downsampling} x {own.downsampling}: use one made for "
            "it."
        )
    components = {**description.components, component: config}
    return dataclasses.replace(description, components=components), {**params, component: weights}


def perception_of(
    description: Description,
    *,
    dtype: str,
    attention: str = "auto",
    vae_tile: int = 0,
    checkpoint: str = "",
) -> Perception:
    """How a described model predicts.

    Raises:
        UserError: the model was never fine-tuned for perception, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}.")
    if not description.task:
        raise _not_fine_tuned(checkpoint)
    factor = description.components["vae"].downsampling
    if vae_tile % (8 * factor) or vae_tile < 0:
        raise UserError(
            f"vae_tile {vae_tile} does not fit: give a multiple of {8 * factor}, or 0 for no tiles."
        )
    return build_perception(
        description, dtype=jnp.dtype(dtype), attention=attention, vae_tile=vae_tile
    )


def _not_fine_tuned(checkpoint: str) -> UserError:
    name = checkpoint or "the checkpoint"
    return UserError(
        f"{name} predicts no depth or other map yet: fine-tune it with "
        f"python -m jaxpercept.train --config=configs/depth.py --config.checkpoint={name}."
    )
