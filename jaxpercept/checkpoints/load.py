"""One way to open any checkpoint: workdir, Orbax export, diffusers folder, hub id, built-in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpercept.checkpoints import diffusers, orbax
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.fit import check_fit
from jaxpercept.checkpoints.merging import merge
from jaxpercept.checkpoints.tokenizer import (
    load_tokenizer,
    missing_tokenizer_files,
    text_length,
    tokenize,
)
from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional
from jaxpercept.models.lora import LoraConfig

Params = orbax.Params
EMBEDDED = "sd-tiny"
FROZEN = "frozen"
STEPS = "checkpoints"


def resolve(source: str) -> str:
    """The name of the embedded checkpoint becomes its folder, `~` the home folder."""
    if source == EMBEDDED and not Path(source).exists():
        return str(resources.files("jaxpercept") / "assets" / EMBEDDED)
    return os.path.expanduser(source)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """What the operating system says against reading a checkpoint, as one sentence."""
    try:
        yield
    except OSError as error:
        file = "" if error.filename in (None, source) else f" ({in_short(error.filename)})"
        raise UserError(
            f"{in_short(source)}{file} cannot be read: {error.strerror or in_short(error)}."
        ) from error


def describe(
    source: str, *, components: Sequence[str] = ("unet", "vae", "text_encoder")
) -> Description:
    """What a checkpoint of any kind is, without reading its weights; arguments of `load_model`.

    Raises:
        UserError: nothing there, or not complete.
    """
    with readable(source):
        folder = Path(resolve(source))
        if (folder / FILE_NAME).is_file():
            return _describe_own(folder)[0]
        return _description(diffusers.read_configs(str(folder), components=tuple(components)))


def load_model(
    source: str,
    *,
    components: Sequence[str] = ("unet", "vae", "text_encoder"),
    dtype: str | None = "float32",
    prompt: str = "",
    padded: bool = False,
    merge_lora: bool = True,
) -> tuple[Description, Params]:
    """Open a checkpoint of any kind.

    Args:
        source: a training workdir, an Orbax export, a diffusers folder, a hub id or "sd-tiny".
        components: the networks wanted of a diffusers checkpoint; a jaxpercept checkpoint gives
            what it holds.
        dtype: of a diffusers checkpoint's weights, None for the type they are stored in; others
            are as they were saved.
        prompt: what to encode; "" is the prompt that a jaxpercept checkpoint was trained with. One
            without text encoder keeps that in any case.
        padded: whether a prompt is padded to the text tower's length, as Lotus's is, and wherever
            each image has a text of its own.
        merge_lora: add the low-rank factors of a training run to the weights they belong to; False
            keeps them beside, and `lora` in the description.

    Returns:
        The description and the weights as NumPy arrays. The component "prompt" holds the encoded
        prompt where the checkpoint has a text encoder or was trained with one.

    Raises:
        UserError: nothing there, not complete, or the weights do not fit the description.
    """
    with readable(source):
        folder = Path(resolve(source))
        if (folder / FILE_NAME).is_file():
            description, params = _load_own(folder, dtype, prompt, padded)
            if description.lora and merge_lora:
                params = merge(params, LoraConfig.from_dict(description.lora))
                description = dataclasses.replace(description, lora={})
            return description, params
        checkpoint = diffusers.load(str(folder), components=tuple(components), dtype=dtype)
        return _description(checkpoint), _with_prompt(checkpoint, prompt, padded)


def _describe_own(folder: Path) -> tuple[Description, dict[Path, Any]]:
    """What a folder with a jaxpercept.json is, and its Orbax weights' shapes, by their folders.

    There are none in a folder of diffusers' layout.

    Raises:
        UserError: it is not complete, or the weights do not fit the description.
    """
    description = Description.load(folder)
    stores = [folder / orbax.WEIGHTS]
    if not stores[0].is_dir():
        if (folder / "model_index.json").is_file():
            _check_configs(description, folder)
            return description, {}
        step = latest_step(folder)
        if step is None:
            raise UserError(
                f"{folder} holds no finished checkpoint yet: let the training reach its first save."
            )
        stores = [folder / FROZEN] if (folder / FROZEN).is_dir() else []
        stores.append(folder / STEPS / str(step) / "params")
    shapes = {store: orbax.load_shapes(store) for store in stores}
    lora = LoraConfig.from_dict(description.lora) if description.lora else None
    check_fit(description.components, merge_params(*shapes.values()), stores[-1], lora)
    return description, shapes


def _load_own(
    folder: Path, dtype: str | None, prompt: str, padded: bool
) -> tuple[Description, Params]:
    description, stores = _describe_own(folder)
    components = description.components
    if not stores:
        checkpoint = diffusers.load(folder, components=tuple(components), dtype=dtype)
        # What the UNet read in training is not stored beside the text encoder that gives it.
        prompt = prompt or description.config.get("prompt", "")
        return description, _with_prompt(checkpoint, prompt, padded)
    params = merge_params(*(orbax.load_params(store, shapes) for store, shapes in stores.items()))
    if prompt and "text_encoder" in components:
        tokenizer, source = folder / "tokenizer", str(folder)
        checkpoint = diffusers.Checkpoint(
            components, params, tokenizer_dir=tokenizer, source=source
        )
        params = _with_prompt(checkpoint, prompt, padded)
    return description, params


def _check_configs(description: Description, folder: Path) -> None:
    """Raises a UserError where a folder in diffusers' layout describes its networks in two ways."""
    networks = [name for name in description.components if name in diffusers.COMPONENTS]
    own = diffusers.read_configs(folder, components=networks).configs
    for name, config in description.components.items():
        if own.get(name) != config:
            raise UserError(
                f"{folder / name / 'config.json'} and {folder / FILE_NAME} describe different "
                "networks: restore both from the same export."
            )


def tokenizer_folder(source: str) -> Path | None:
    """Where a checkpoint's tokenizer lies; None if it has none.

    Raises:
        UserError: nothing there, or not complete.
    """
    with readable(source):
        folder = Path(resolve(source))
        if (folder / FILE_NAME).is_file():
            tokenizer = folder / "tokenizer"
            return None if missing_tokenizer_files(tokenizer) else tokenizer
        return diffusers.read_configs(str(folder), components=("text_encoder",)).tokenizer_dir


def load_frozen(workdir: Path) -> Params:
    """The weights that a run does not train, as NumPy arrays."""
    folder = workdir / FROZEN
    return orbax.load_params(folder) if folder.is_dir() else {}


def merge_params(*parts: Params) -> Params:
    """Weights of several trees in one; later parts win."""
    merged: Params = {}
    for part in parts:
        for component, weights in part.items():
            merged[component] = {**merged.get(component, {}), **weights}
    return merged


def latest_step(workdir: Path) -> int | None:
    """The newest complete checkpoint of a training workdir."""
    steps = [
        int(path.name)
        for path in (workdir / STEPS).glob("*")
        if path.name.isdigit() and (path / "params").is_dir()
    ]
    return max(steps, default=None)


def _with_prompt(checkpoint: diffusers.Checkpoint, prompt: str, padded: bool) -> Params:
    """The weights, and the encoded prompt where there is a text encoder."""
    if "text_encoder" not in checkpoint.configs:
        return checkpoint.params
    embedding = encode_prompt(checkpoint, prompt, padded=padded)
    return {**checkpoint.params, "prompt": {"embedding": embedding}}


def _description(checkpoint: diffusers.Checkpoint) -> Description:
    return Description(
        components=checkpoint.configs,
        scheduler=checkpoint.scheduler,
        model_index=checkpoint.model_index,
        base_checkpoint=checkpoint.source,
    )


def encode_prompt(
    checkpoint: diffusers.Checkpoint, prompt: str = "", *, padded: bool = False
) -> np.ndarray:
    """The text encoder's output: float32 [1, tokens, d], 2 tokens for ""; [1, length, d] padded.

    GenPercept and Marigold tokenise the prompt without padding, which leaves the start and the end
    token of an empty one [GenPercept `genpercept_trainer.py`]; Lotus pads it to the text tower's
    length.

    Raises:
        UserError: there is no tokenizer, it does not fit the text encoder, or the encoder's output
            is not finite.
    """
    config = checkpoint.configs["text_encoder"]
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    length = text_length(tokenizer, config) if padded else None
    ids = tokenize(tokenizer, [prompt], length, config.vocab_size)
    encoder = functional(config)
    encode = jax.jit(lambda params, ids: encoder.bind(params)(ids))
    embedding = np.asarray(encode(checkpoint.params["text_encoder"], ids))
    if not np.isfinite(embedding).all():
        raise UserError(
            f"The text encoder of {checkpoint.source} gives values that are not finite: its "
            "weights are damaged, download or export them again."
        )
    return embedding
