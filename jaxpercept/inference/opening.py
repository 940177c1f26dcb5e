"""Opening any checkpoint as a perception model: what it is, and all the weights it needs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp

from jaxpercept.checkpoints import load
from jaxpercept.checkpoints import lora as adapters
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.diffusers import Checkpoint, load_autoencoder, load_parts
from jaxpercept.checkpoints.fit import prompt_widths
from jaxpercept.checkpoints.load import readable, resolve
from jaxpercept.checkpoints.merging import merge
from jaxpercept.checkpoints.tokenizer import Tokenize, padded_tokenizer
from jaxpercept.checkpoints.values import in_short
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError
from jaxpercept.inference.outputs import target_names
from jaxpercept.inference.predictor import Params
from jaxpercept.methods import PERCEPTION, Perception, build_perception
from jaxpercept.methods.families import recognise
from jaxpercept.methods.recipe import Recipe
from jaxpercept.models.config import AutoencoderConfig
from jaxpercept.tasks import get_task, reads_text

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
    lora: Source | None = None,
    prompt: str = "",
) -> tuple[Description, Params]:
    """A checkpoint of any kind and family; arguments as `PerceptionPipeline.from_pretrained`.

    A model whose images each come with a text keeps the empty prompt beside it, whatever `prompt`.

    Returns:
        The description and the weights as NumPy arrays.

    Raises:
        UserError: nothing complete there, something must be named, the parts make no model, it is
            a text-to-image model that was never fine-tuned, or there is no text encoder for the
            prompt. All but the prompt's own faults are found before anything is compiled.
    """
    with readable(source):
        folder = Path(resolve(source))
        if (folder / FILE_NAME).is_file():
            named = {"family": family, "base": base}
            if given := [name for name, value in named.items() if value is not None]:
                raise _says_itself(source, given[0])
            if task is not None:
                description_of_part(load.describe(source), task, source)
            description, params = open_own(source, prompt=prompt, must_predict=True)
            if task is not None:
                description = description_of_part(description, task, source)
        else:
            checkpoint = assemble(source, base)
            description, params = describe(
                checkpoint, family=family, task=task, prompt=prompt, must_predict=True
            )
        for component, other in (("vae", vae), ("decoder", decoder)):
            if other is not None:
                description, params = _replace(description, params, component, os.fspath(other))
        if lora is not None:
            params = _adapt(description, params, lora)
    return description, params


def open_own(
    source: str,
    *,
    dtype: str | None = "float32",
    prompt: str = "",
    merge_lora: bool = True,
    must_predict: bool = False,
) -> tuple[Description, Params]:
    """A checkpoint with a jaxpercept.json; arguments as of `load.load_model`.

    Raises:
        UserError: it is not complete, its parts cannot work together, there is no text encoder for
            the prompt, or it is a text-to-image model, which `must_predict` refuses.
    """
    description = load.describe(source)
    if must_predict and not description.task:
        raise _not_fine_tuned(source)
    check_runs(description, source)
    prompt = "" if reads_text(description.task) else prompt
    if prompt and "text_encoder" not in description.components:
        raise no_text(source)
    padded = padded_prompt(description)
    return load.load_model(source, dtype=dtype, prompt=prompt, padded=padded, merge_lora=merge_lora)


def description_of_part(description: Description, task: str, source: str) -> Description:
    """What a generalist is when it is asked for one of its tasks.

    Raises:
        UserError: it was not trained for it, or it is no generalist.
    """
    parts = {}
    if description.task:
        parts = get_task(description.task, **description.task_options).parts
    if not parts:
        raise _says_itself(source, "task")
    if task not in parts:
        raise UserError(
            f"{source} was not trained for {task!r}: give --task one of {', '.join(parts)}."
        )
    return dataclasses.replace(description, task=parts[task].name, task_options={})


def _says_itself(source: str, flag: str) -> UserError:
    return UserError(f"{source} says itself what it is and has all it needs: leave --{flag} out.")


def open_tokenizer(
    source: str, description: Description, base: Source | None = None
) -> Tokenize | None:
    """What reads the texts of a model's images; None where they have none.

    Raises:
        UserError: neither the checkpoint nor its base has the tokenizer of its text encoder.
    """
    if not reads_text(description.task):
        return None
    folder = load.tokenizer_folder(source)
    if folder is None and base is not None:
        folder = load.tokenizer_folder(os.fspath(base))
    return padded_tokenizer(folder, description.components["text_encoder"])


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
    checkpoint: Checkpoint,
    *,
    family: str | None = None,
    task: str | None = None,
    prompt: str = "",
    must_predict: bool = False,
) -> tuple[Description, Params]:
    """What a complete diffusers checkpoint predicts, and its weights with the encoded prompt.

    The task is empty for a text-to-image model, which `must_predict` refuses.

    Raises:
        UserError: the task or the family must be named, or the parts make no model.
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
    if found is not None:
        description = dataclasses.replace(
            description,
            recipe=found.recipe,
            task=found.task,
            task_options=found.task_options,
            resolution=found.resolution,
        )
    elif must_predict:
        raise _not_fine_tuned(checkpoint.source)
    check_runs(description, checkpoint.source)
    padded = padded_prompt(description)
    prompt = "" if reads_text(description.task) else prompt
    params["prompt"] = {"embedding": load.encode_prompt(checkpoint, prompt, padded=padded)}
    return description, params


def padded_prompt(description: Description) -> bool:
    """Whether a model's prompt is padded to the text tower's length."""
    if description.recipe:
        return Recipe.of(**description.recipe).padded_prompt
    return reads_text(description.task)


def check_runs(description: Description, source: str) -> None:
    """Raises a UserError where the parts of a checkpoint cannot work together.

    It needs no weights and compiles nothing.
    """
    try:
        NoiseSchedule.from_config(description.scheduler)
        _check_widths(description)
        if description.task:
            _check_predicts(description)
    except UserError as error:
        raise UserError(f"{source}: {in_short(error, 1000)}") from None


def _check_widths(description: Description) -> None:
    """The networks, two by two."""
    parts = description.components
    if "text_encoder" in parts and "unet" in parts:
        own, widths = parts["text_encoder"].hidden_size, prompt_widths(parts["unet"])
        if widths != {own}:
            raise UserError(
                f"the text encoder puts out {own} channels, and the UNet takes "
                f"{' and '.join(map(str, sorted(widths)))}: use the one it was trained with."
            )
    for name in {"vae", "decoder"} & parts.keys():
        vae = parts[name]
        if (vae.in_channels, vae.out_channels) != (3, 3):
            raise UserError(
                f"the autoencoder {name!r} takes {vae.in_channels} channels and gives "
                f"{vae.out_channels}: images have 3."
            )
        _check_latents(vae, parts.get("vae", vae), repr(name))


def _check_predicts(description: Description) -> None:
    """The recipe, and that the networks and the schedule are its family's."""
    parts = description.components
    if not description.recipe and description.method.get("name") not in PERCEPTION:
        raise UserError(f"it names a task and no method that predicts: restore its {FILE_NAME}.")
    if missing := [name for name in ("unet", "vae") if name not in parts]:
        raise UserError(f"it holds no {' and no '.join(missing)}: give a complete checkpoint.")
    perception = build_perception(description)
    recipe = perception.recipe
    if not description.scheduler and "beta_start" not in dict(recipe.scheduler):
        raise UserError(
            "scheduler/scheduler_config.json is missing, which says the noise levels of a "
            f"{recipe.family} model: download it."
        )
    unet, gives = parts["unet"], len(recipe.task_vector or ())
    projects = unet.class_embed_type == "projection"
    takes = unet.projection_class_embeddings_input_dim if projects else 0
    if takes != gives:
        raise UserError(
            f"the UNet takes a task vector of {takes} values, and {recipe.family} models give "
            f"{gives}: it is of another family."
        )
    total = perception.solver.schedule.num_train_timesteps
    if max(recipe.timesteps or (0,)) >= total or len(recipe.timesteps or (0,)) != 1:
        raise UserError(
            f"its recipe takes the timesteps {', '.join(map(str, recipe.timesteps))}, and may take "
            f"one below {total}, the schedule's length: restore {FILE_NAME} or the scheduler."
        )
    if recipe.head == "dpt":
        if recipe.timesteps is None or "head" not in parts:
            raise UserError("it lacks the DPT head that its recipe names: restore it.")
    else:
        given = {} if recipe.timesteps is None else {"timesteps": recipe.timesteps}
        perception.solver.steps(recipe.num_steps, **given)  # raises where they do not fit
    targets = description.model_index.get("target_properties")
    if description.task == "intrinsics" and targets:
        target_names(targets)
        if len(targets["target_names"]) != perception.targets:
            raise UserError(
                f"target_properties names {len(targets['target_names'])} targets, and the UNet "
                f"predicts {perception.targets}: correct model_index.json."
            )


def _check_latents(config: AutoencoderConfig, own: AutoencoderConfig, source: str) -> None:
    """Raises a UserError where an autoencoder cannot stand in the place of the model's own."""
    if (config.latent_channels, config.downsampling) != (own.latent_channels, own.downsampling):
        raise UserError(
            f"the autoencoder {source} has {config.latent_channels} latent channels of "
            f"{config.downsampling} x {config.downsampling} pixels, the model wants "
            f"{own.latent_channels} of {own.downsampling} x {own.downsampling}: use one made for "
            "it."
        )


def _replace(
    description: Description, params: Params, component: str, source: str
) -> tuple[Description, Params]:
    config, weights = load_autoencoder(source)
    _check_latents(config, description.components["vae"], source)
    components = {**description.components, component: config}
    return dataclasses.replace(description, components=components), {**params, component: weights}


def _adapt(description: Description, params: Params, source: Source) -> Params:
    """The weights with an adapter's additions to the UNet."""
    config, factors = adapters.load(source, description.components["unet"])
    return merge({**params, "unet": {**params["unet"], **factors}}, config)


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


def no_text(source: str) -> UserError:
    """A prompt is given where nothing can encode it."""
    return UserError(
        f"{source or 'this model'} reads no text but the prompt it was trained with, having no "
        "text encoder: leave the prompt out."
    )


def _not_fine_tuned(checkpoint: str) -> UserError:
    name = checkpoint or "the checkpoint"
    return UserError(
        f"{name} predicts no depth or other map yet: fine-tune it with "
        f"python -m jaxpercept.train --config=configs/depth.py --config.checkpoint={name}."
    )
