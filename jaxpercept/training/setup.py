"""From a config to a method and its weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpercept.checkpoints.description import Description, architectures
from jaxpercept.checkpoints.load import load_model
from jaxpercept.checkpoints.tokenizer import load_tokenizer, tokenize
from jaxpercept.errors import UserError
from jaxpercept.methods import COMPONENTS, Method, build_method
from jaxpercept.models.functional import functional
from jaxpercept.training.optim import Params, split_params


@dataclasses.dataclass(frozen=True)
class Setup:
    """A method, its weights in host memory, and what to write beside them."""

    method: Method
    description: Description
    trainable: Params
    frozen: Params
    tokenize: Callable[[Sequence[str]], np.ndarray] | None


def set_up(config: Any) -> Setup:
    """Open the checkpoint, build the method, sort the weights into trained and frozen ones.

    Raises:
        UserError: the checkpoint, the method or the regular expressions do not fit.
    """
    name = config.method.get("name", "")
    if name not in COMPONENTS:
        raise UserError(f"config.method.name {name!r} is unknown: use {', '.join(COMPONENTS)}.")
    base, params = Description(components={}, scheduler={}), {}
    if config.checkpoint:
        # GenPercept needs the text encoder once, for the empty prompt; load_model encodes it.
        wanted = {*COMPONENTS[name], *(("text_encoder",) if name == "one_step" else ())}
        wanted -= set(config.random_init) & set(config.architecture)
        base, params = load_model(config.checkpoint, components=sorted(wanted))
    components = {**base.components, **architectures(_plain(config.architecture))}
    for component in config.random_init:
        if component not in components:
            raise UserError(
                f"config.random_init names {component!r}, which has no architecture: describe it "
                "in config.architecture."
            )
        params[component] = _random(components[component], config.seed, component)

    options = _plain(config.method)
    tokenizer = None
    if name == "text_to_image":
        length = components["text_encoder"].max_position_embeddings
        tokenizer = functools.partial(
            tokenize, load_tokenizer(config.tokenizer), max_length=length
        )
        options["empty_ids"] = tokenizer([""])[0].tolist()
    scheduler = _plain(config.scheduler) or base.scheduler
    description = Description(
        components={part: components[part] for part in COMPONENTS[name] if part in components},
        scheduler=scheduler,
        method=options,
        task=config.task if name == "one_step" else "",
        resolution=tuple(config.resolution),
        base_checkpoint=config.checkpoint,
        config=_plain(config),
    )
    method = build_method(
        description,
        dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
    )
    used = {part: params[part] for part in (*COMPONENTS[name], "prompt") if part in params}
    if name == "one_step" and "prompt" not in used:
        raise UserError(
            f"{config.checkpoint} has no text encoder to encode the empty prompt with: start "
            "from a complete text-to-image checkpoint."
        )
    trainable, frozen = split_params(used, config.trainable)
    frozen = jax.tree.map(lambda x: np.asarray(x, jax.numpy.dtype(config.frozen_dtype)), frozen)
    trainable = jax.tree.map(lambda x: np.asarray(x, np.float32), trainable)
    return Setup(method, description, trainable, frozen, tokenizer)


def _random(architecture: Any, seed: int, component: str) -> dict[str, np.ndarray]:
    # The component's name goes into the key, so that two components do not share weights.
    key = jax.random.fold_in(jax.random.key(seed), sum(component.encode()))
    return jax.tree.map(np.asarray, jax.jit(functional(architecture).init)(key))


def _plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as JSON sees it: dicts, lists, numbers and strings."""
    return json.loads(config.to_json_best_effort())
