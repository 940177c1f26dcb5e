"""From a config to a method and its weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxpercept.checkpoints.description import Description, architectures
from jaxpercept.checkpoints.load import describe, load_model
from jaxpercept.checkpoints.tokenizer import load_tokenizer, tokenize
from jaxpercept.config import check_resolution
from jaxpercept.errors import UserError
from jaxpercept.methods import COMPONENTS, Method, build_method
from jaxpercept.models.functional import functional
from jaxpercept.training.optim import Params, split_params

Tokenize = Callable[[Sequence[str]], Int32[np.ndarray, "n l"]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A method without weights, and what to write beside them."""

    method: Method
    description: Description
    tokenize: Tokenize | None


def set_up(config: Any) -> Setup:
    """Build the method and the description of a run, reading no weights yet.

    Raises:
        UserError: the checkpoint, the method or the resolution do not fit.
    """
    base = Description(components={}, scheduler={})
    if config.checkpoint:
        base = describe(config.checkpoint, components=_from_checkpoint(config))
    components = {**base.components, **architectures(plain(config.architecture))}
    for component in config.random_init:
        if component not in components:
            raise UserError(
                f"config.random_init names {component!r}, which has no architecture: describe it "
                "in config.architecture."
            )
    name = config.method.name
    options, tokenizer = plain(config.method), None
    if name == "text_to_image" and "text_encoder" in components:
        length = components["text_encoder"].max_position_embeddings
        tokenizer = functools.partial(tokenize, load_tokenizer(config.tokenizer), max_length=length)
        options["empty_ids"] = tokenizer([""])[0].tolist()
    description = Description(
        components={part: components[part] for part in COMPONENTS[name] if part in components},
        scheduler=plain(config.scheduler) or base.scheduler,
        method=options,
        task=config.task if name == "one_step" else "",
        resolution=tuple(config.resolution),
        base_checkpoint=config.checkpoint,
        config=plain(config),
    )
    method = build_method(
        description, dtype=config.compute_dtype, remat=config.remat, attention=config.attention
    )
    check_resolution(config.resolution, method.model.downscale)
    return Setup(method, description, tokenizer)


def initial_weights(config: Any, setup: Setup) -> tuple[Params, Params]:
    """The trainable and the frozen weights a run starts from, as NumPy arrays.

    Raises:
        UserError: weights are missing or not finite, or an expression of `trainable` matches none.
    """
    params: Params = {}
    if config.checkpoint:
        params = load_model(config.checkpoint, components=_from_checkpoint(config))[1]
    for component in config.random_init:
        # The component's name goes into the seed, so that two components do not share weights.
        seed = zlib.crc32(f"{config.seed}/{component}".encode())
        params[component] = functional(setup.description.components[component]).init(seed)
    needed = list(setup.description.components)
    if config.method.name == "one_step":
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
    return _cast(trainable, "float32"), _cast(frozen, config.frozen_dtype)


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as JSON sees it: dicts, lists, numbers and strings."""
    return json.loads(config.to_json_best_effort())


def _from_checkpoint(config: Any) -> list[str]:
    """The components to read from the checkpoint."""
    name = config.method.name
    # GenPercept needs the text encoder once, for the empty prompt; load_model encodes it.
    wanted = {*COMPONENTS[name], *(("text_encoder",) if name == "one_step" else ())}
    return sorted(wanted - (set(config.random_init) & set(config.architecture)))


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
