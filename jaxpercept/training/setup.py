"""From a config to a method and its weights."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxpercept.checkpoints.description import FILE_NAME, Description, architectures
from jaxpercept.checkpoints.load import describe, load_model, tokenizer_folder
from jaxpercept.checkpoints.tokenizer import Tokenize, padded_tokenizer
from jaxpercept.checkpoints.widen import widen_conv_in
from jaxpercept.config import check_resolution
from jaxpercept.diffusion.timesteps import resolve
from jaxpercept.errors import UserError
from jaxpercept.methods import PERCEPTION, Method, OneStep, build_method, components_of
from jaxpercept.models.config import AutoencoderTinyConfig, UNetConfig, VAEConfig
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.functional import functional
from jaxpercept.models.lora import LoraConfig, is_lora
from jaxpercept.tasks import get_task, reads_text
from jaxpercept.training.optim import Params, split_params


@dataclasses.dataclass(frozen=True)
class Setup:
    """A method without weights, and what to write beside them."""

    method: Method
    description: Description
    tokenize: Tokenize | None
    tokenizer_dir: Path | None = None
    """The files of the tokenizer of a model whose images each have a text."""


def set_up(config: Any, workdir: Path | None = None) -> Setup:
    """Build the method and the description of a run, reading no weights yet.

    Args:
        config: `jaxpercept.config.base_config()` with changes.
        workdir: where the run lies, if it is continued: it keeps what may be gone elsewhere.

    Raises:
        UserError: the checkpoint, the method or the resolution do not fit.
    """
    base = Description(components={}, scheduler={})
    if config.checkpoint:
        base = describe(config.checkpoint, components=_from_checkpoint(config))
    name = config.method.name
    task = config.task if name in PERCEPTION else ""
    options = plain(config.method)
    if "timesteps" in options:
        options["timesteps"] = _without_file(options["timesteps"], workdir)
    task_options = plain(config.task_options) if task else {}
    architecture = plain(config.architecture)
    head = {key: value for key, value in architecture.pop("head", {}).items() if value is not None}
    components = {**base.components, **architectures(architecture)}
    if options.get("decoder") == "dpt" and "unet" in components:
        channels = get_task(task, **task_options).head_channels
        beside = DPTConfig.beside(components["unet"], channels)
        given = components.get("head", beside).to_dict()
        components["head"] = DPTConfig.from_dict({**given, **head})
    if options.get("decoder") == "tiny" and isinstance(components.get("vae"), VAEConfig):
        components.setdefault("decoder", AutoencoderTinyConfig.beside(components["vae"]))
    if name == "denoising" and options.get("noise") != "image" and {"unet", "vae"} <= {*components}:
        components["unet"] = _beside_the_image(components["unet"], components["vae"])
    for expression in config.random_init:
        if expression.partition("/")[0] not in components:
            raise UserError(
                f"config.random_init names {expression!r}, which has no architecture: describe it "
                "in config.architecture."
            )
    tokenizer, folder = None, None
    if (name == "text_to_image" or reads_text(task)) and "text_encoder" in components:
        if config.tokenizer:
            folder = Path(config.tokenizer)
        elif config.checkpoint:
            folder = tokenizer_folder(config.checkpoint)
        tokenizer = padded_tokenizer(folder, components["text_encoder"])
    if name == "text_to_image" and tokenizer is not None:
        options["empty_ids"] = tokenizer([""])[0].tolist()
    description = Description(
        components={p: components[p] for p in components_of(options, task) if p in components},
        scheduler={**base.scheduler, **plain(config.scheduler)},
        method=options,
        task=task,
        task_options=task_options,
        resolution=tuple(config.resolution),
        base_checkpoint=config.checkpoint,
        config=plain(config),
        lora=_lora(config),
    )
    method = build_method(
        description,
        dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
        batch_size=config.batch_size,
    )
    check_resolution(config.resolution, method.model.downscale)
    fixed = method.timesteps.fixed if isinstance(method, OneStep) else None
    if fixed is not None and fixed != method.inference_timestep:
        logging.warning(
            "trained at timestep %d alone, the model is to predict at %d: set "
            "config.method.inference_timestep.",
            fixed,
            method.inference_timestep,
        )
    return Setup(method, description, tokenizer, folder if reads_text(task) else None)


def initial_weights(config: Any, setup: Setup) -> tuple[Params, Params]:
    """The trainable and the frozen weights a run starts from, as NumPy arrays.

    Raises:
        UserError: weights are missing or not finite, or an expression of `trainable` matches none.
    """
    params: Params = {}
    if config.checkpoint:
        params = _given_weights(config)
    for expression in config.random_init:
        _randomise(params, expression, setup, config.seed)
    wider = setup.description.components.get("unet")
    if wider is not None and "unet" in params:
        given = params["unet"]["conv_in.kernel"].shape[2]
        if wider.in_channels == 2 * given:  # the image's latent comes beside the target's
            params["unet"] = widen_conv_in(params["unet"])
    if setup.description.lora:
        network = setup.method.model.unet
        added = [path for path in network.shapes if is_lora(path)]
        seed = zlib.crc32(f"{config.seed}/lora".encode())
        params["unet"] = params["unet"] | network.init(seed, added)
    if "head" in params:  # it reads the features that the output convolution would
        network = setup.method.model.unet
        params["unet"] = {path: params["unet"][path] for path in network.shapes}
    needed = list(setup.description.components)
    if config.method.name in PERCEPTION:
        if "prompt" not in params:
            raise UserError(
                f"{config.checkpoint} has no text encoder to encode the empty prompt with: start "
                "from a complete text-to-image checkpoint."
            )
        needed.append("prompt")
    if missing := [part for part in needed if part not in params]:
        raise UserError(
            f"nothing gives the weights of {' and '.join(missing)}: name a checkpoint that holds "
            "them, or list them in config.random_init."
        )
    trainable, frozen = split_params({part: params[part] for part in needed}, config.trainable)
    _check_decoder(config, trainable)
    _check_random(config, trainable)
    return _cast(trainable, "float32"), _cast(frozen, config.frozen_dtype)


def _without_file(timesteps: str, workdir: Path | None) -> str:
    """The policy with its table, if that is in a file, written out: a model needs no such file.

    Nor does its run, once begun: where the file is gone, the table is that of the workdir.
    """
    name, _, table = timesteps.partition(":")
    gone = name == "file" and not Path(table).is_file()
    if gone and workdir is not None and (workdir / FILE_NAME).is_file():
        before = Description.load(workdir)
        if before.config.get("method", {}).get("timesteps") == timesteps:
            logging.info("%s is gone: going on with the table the run began with.", table)
            return before.method["timesteps"]
    return resolve(timesteps)


def _check_decoder(config: Any, trainable: Params) -> None:
    """Raises a UserError where the decoder is to be trained and no loss sees its images."""
    if config.method.name not in PERCEPTION:
        return
    replaced = config.method.get("decoder", "vae") != "vae"
    if any(config.method.get("pixel_weights", {}).values()) and not replaced:
        return
    for path in trainable.get("vae", {}):
        if path.startswith(("decoder.", "post_quant_conv.")):
            raise UserError(
                f"config.trainable names 'vae/{path}', which "
                + (
                    "no loss sees beside another decoder: leave it out."
                    if replaced
                    else "only losses of decoded images train: set config.method.pixel_weights, or "
                    "leave it out."
                )
            )


def _check_random(config: Any, trainable: Params) -> None:
    """Raises a UserError where something random would stay as it is."""
    names = [f"{component}/{path}" for component, paths in trainable.items() for path in paths]
    for expression in config.random_init:
        if not any(re.match(expression, name) for name in names):
            raise UserError(
                f"config.random_init names {expression!r}, of which config.trainable trains "
                "nothing: add it there, or start from the checkpoint's weights."
            )


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as JSON sees it: dicts, lists, numbers and strings."""
    return json.loads(config.to_json_best_effort())


def _from_checkpoint(config: Any) -> list[str]:
    """The components to read from the checkpoint."""
    name = config.method.name
    # Most tasks need the text encoder once, for the empty prompt; load_model encodes it.
    wanted = {*components_of(plain(config.method))}
    wanted |= {"text_encoder"} if name in PERCEPTION else set()
    unneeded = set(config.random_init) & {*config.architecture, "head", "decoder"}
    return sorted(wanted - unneeded)


def _given_weights(config: Any) -> Params:
    """Those of the checkpoint, and the encoded prompt."""
    description, params = load_model(
        config.checkpoint,
        components=_from_checkpoint(config),
        prompt=config.prompt,
        padded=reads_text(config.task),
    )
    if config.prompt and "text_encoder" not in description.components:
        raise UserError(
            f"{config.checkpoint} has no text encoder for config.prompt: start from a complete "
            "text-to-image checkpoint."
        )
    return params


def _lora(config: Any) -> dict[str, Any]:
    """The description's `lora`; alpha is the rank unless given, as in GenPercept."""
    if not config.lora.rank:
        return {}
    options = plain(config.lora)
    return LoraConfig.from_dict({**options, "alpha": options["alpha"] or options["rank"]}).to_dict()


def _beside_the_image(unet: UNetConfig, vae: VAEConfig) -> UNetConfig:
    """With input channels for the image's latent, too, if it has none."""
    if unet.in_channels != vae.latent_channels:
        return unet
    return dataclasses.replace(unet, in_channels=2 * vae.latent_channels)


def _randomise(params: Params, expression: str, setup: Setup, seed: int) -> None:
    """Give the weights whose names match, of a component or of a part of it, random values."""
    component = expression.partition("/")[0]
    # The component's name goes into the seed, so that two components do not share weights.
    seed = zlib.crc32(f"{seed}/{component}".encode())
    drawn = functional(setup.description.components[component]).init(seed)
    if "/" in expression:
        drawn = {p: w for p, w in drawn.items() if re.match(expression, f"{component}/{p}")}
    if not drawn:
        raise UserError(
            f"config.random_init {expression!r} matches no weight: weights are named like "
            "'vae/decoder.conv_in.kernel'."
        )
    params[component] = {**params.get(component, {}), **drawn}


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
