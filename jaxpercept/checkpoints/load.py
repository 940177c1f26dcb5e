"""One way to open any checkpoint: workdir, Orbax export, diffusers folder, hub id, built-in."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jax
import numpy as np

from jaxpercept.checkpoints import diffusers, orbax
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.tokenizer import load_tokenizer, tokenize
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional

Params = orbax.Params
EMBEDDED = "sd-tiny"
FROZEN = "frozen"
STEPS = "checkpoints"


def resolve(source: str) -> str:
    """The name of the embedded checkpoint becomes its folder; anything else stays as it is."""
    if source == EMBEDDED and not Path(source).exists():
        return str(resources.files("jaxpercept") / "assets" / EMBEDDED)
    return source


def describe(
    source: str, *, components: Sequence[str] = ("unet", "vae", "text_encoder")
) -> Description:
    """What a checkpoint of any kind is, without reading its weights; arguments of `load_model`.

    Raises:
        UserError: nothing there, or not complete.
    """
    folder = Path(resolve(source))
    if (folder / FILE_NAME).is_file():
        return Description.load(folder)
    return _description(diffusers.read_configs(str(folder), components=tuple(components)))


def load_model(
    source: str,
    *,
    components: Sequence[str] = ("unet", "vae", "text_encoder"),
    dtype: str | None = "float32",
) -> tuple[Description, Params]:
    """Open a checkpoint of any kind.

    Args:
        source: a training workdir, an Orbax export, a diffusers folder, a hub id or "sd-tiny".
        components: the networks wanted of a diffusers checkpoint; a jaxpercept checkpoint gives
            what it holds.
        dtype: of a diffusers checkpoint's weights, None for the type they are stored in; others
            are as they were saved.

    Returns:
        The description and the weights as NumPy arrays. The component "prompt" holds the encoded
        empty prompt where the checkpoint has a text encoder or was trained with one.

    Raises:
        UserError: nothing there, or not complete.
    """
    folder = Path(resolve(source))
    if not (folder / FILE_NAME).is_file():
        checkpoint, params = _load_diffusers(str(folder), components, dtype)
        return _description(checkpoint), params
    description = Description.load(folder)
    if (folder / orbax.WEIGHTS).is_dir():
        return description, orbax.load_params(folder / orbax.WEIGHTS)
    if (folder / "model_index.json").is_file():
        networks = [name for name in description.components if name in diffusers.COMPONENTS]
        return description, _load_diffusers(str(folder), networks, dtype)[1]
    step = latest_step(folder)
    if step is None:
        raise UserError(
            f"{folder} holds no finished checkpoint yet: let the training reach its first save."
        )
    return description, merge_params(
        load_frozen(folder), orbax.load_params(folder / STEPS / str(step) / "params")
    )


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


def _load_diffusers(
    source: str, components: Sequence[str], dtype: str | None
) -> tuple[diffusers.Checkpoint, Params]:
    checkpoint = diffusers.load(source, components=tuple(components), dtype=dtype)
    params = checkpoint.params
    if "text_encoder" in checkpoint.configs:
        params["prompt"] = {"embedding": encode_empty_prompt(checkpoint)}
    return checkpoint, params


def _description(checkpoint: diffusers.Checkpoint) -> Description:
    return Description(
        components=checkpoint.configs,
        scheduler=checkpoint.scheduler,
        model_index=checkpoint.model_index,
        base_checkpoint=checkpoint.source,
    )


def encode_empty_prompt(checkpoint: diffusers.Checkpoint, *, padded: bool = False) -> np.ndarray:
    """The text encoder's output for "": float32 [1, 2, d], or [1, length, d] padded.

    GenPercept and Marigold tokenise the empty prompt without padding, which leaves the start and
    the end token [GenPercept `genpercept_trainer.py`]; Lotus pads it to the text tower's length.

    Raises:
        UserError: padding is asked for, and there is no tokenizer to say with what.
    """
    config = checkpoint.configs["text_encoder"]
    ids = np.asarray([[config.bos_token_id, config.eos_token_id]], np.int32)
    if checkpoint.tokenizer_dir is not None:
        tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
        length = min(tokenizer.model_max_length, config.max_position_embeddings)
        ids = tokenize(tokenizer, [""], length if padded else None)
    elif padded:
        raise UserError(f"{checkpoint.source} has no tokenizer, which padding its prompt needs.")
    encoder = functional(config)
    encode = jax.jit(lambda params, ids: encoder.bind(params)(ids))
    return np.asarray(encode(checkpoint.params["text_encoder"], ids))
