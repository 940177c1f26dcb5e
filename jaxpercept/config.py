"""Every key a training config has, with its default: the base the files in `configs/` change."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxpercept.data.augment import Augment
from jaxpercept.errors import UserError
from jaxpercept.methods import COMPONENTS
from jaxpercept.models.attention import IMPLEMENTATIONS
from jaxpercept.models.functional import REMATS
from jaxpercept.training.optim import SCHEDULES
from jaxpercept.training.trace import traced_steps


def base_config() -> ConfigDict:
    """The defaults: GenPercept's optimisation (recipes of the paper's repository) at any size."""
    c = ConfigDict()
    # What to start from: "sd-tiny" (built in), a diffusers folder, a hub id or a workdir.
    c.checkpoint = "sd-tiny"
    # Where the dataset lies; the procedural scenes need none.
    c.data_dir = ""
    c.steps = 30_000  # optimizer updates
    c.batch_size = 32  # images an update sees, over all devices and micro-batches
    c.accumulate = 1  # micro-batches a batch is cut into
    c.seed = 2024
    c.resolution = (480, 640)  # height, width

    c.task = "depth"
    c.task_options = ConfigDict()  # attributes of the task, see jaxpercept/tasks/
    c.method = ConfigDict({"name": "one_step"})
    c.prompt = ""  # what the UNet of a perception model reads, always the same
    # Regular expressions on "component/path": what is trained. The rest is frozen.
    c.trainable = ("unet/",)
    # Low-rank additions to the UNet's attention; train them with trainable = ("unet/.*lora_",).
    c.lora = ConfigDict({"rank": 0, "alpha": 0.0, "targets": ("to_q", "to_k", "to_v", "to_out.0")})
    # What starts from random weights instead of the checkpoint's: components, or regular
    # expressions on "component/path".
    c.random_init = ()
    # Architectures in diffusers' config.json format, for components no checkpoint gives, and the
    # scheduler_config.json and tokenizer folder to use instead of the checkpoint's.
    c.architecture = ConfigDict()
    c.scheduler = ConfigDict()
    c.tokenizer = ""

    c.data = ConfigDict()
    c.data.mixture = ConfigDict({"scenes": 1.0})  # dataset name -> probability
    c.data.num_workers = 0  # processes that decode; 0 decodes in threads
    # Seconds after which data workers that deliver nothing are replaced; 0: never.
    c.data.timeout = 600.0
    # dataset name -> its own options, e.g. {"folder": {"data_dir": "...", "depth_scale": 256.0}}
    c.data.options = ConfigDict()
    c.data.augment = ConfigDict(dataclasses.asdict(Augment()))

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-5
    c.optimizer.schedule = "iter_exponential"  # or "cosine", "constant"
    c.optimizer.warmup_steps = 100
    c.optimizer.decay_steps = 25_000
    c.optimizer.final_ratio = 0.01
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # 0: no clipping
    # (regex on "component/path", factor): the first that matches scales the learning rate.
    c.optimizer.rate_multipliers = ()
    c.ema_decay = 0.0  # 0: no averaged weights

    c.compute_dtype = "float32"  # or "bfloat16"; trained weights stay in float32
    c.frozen_dtype = "float32"  # how frozen weights are kept on the device
    c.remat = "none"  # or "block": recompute each block's activations, for memory
    c.attention = "auto"  # or "xla", "cudnn", "chunked"
    # Sizes of the axes, or a preset: "ddp", "fsdp", "fsdp_tensor", "hybrid"; see docs/scaling.md.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "preset": ""})

    c.log_every = 50
    c.save_every = 1000
    c.keep = 2  # checkpoints kept
    c.profile = ""  # steps to trace, such as "10:15"; see docs/reproduce.md
    c.wandb = ""  # a project at Weights & Biases to report to as well
    # A step whose loss or gradient is not finite is left out, `skips` of them in a row; after one
    # more the run goes back to its last checkpoint and on with other data, `rollbacks` times.
    c.recover = ConfigDict({"skips": 3, "rollbacks": 1})
    # Steps between evaluations (of a generative method: pictures); 0: at the end only.
    c.eval_every = 0
    c.evaluation = ConfigDict()
    c.evaluation.dataset = "scenes"  # "": no evaluation and no pictures
    c.evaluation.limit = 0  # images; 0: all
    c.evaluation.batch_size = 8
    # Long side in pixels the network works at; None: that of `resolution`, 0: the images' own.
    c.evaluation.processing_resolution = config_dict.placeholder(int)
    # Pad images to multiples of so many pixels, such as 64: those of many sizes then share few
    # compiled programs. 0: as little as possible.
    c.evaluation.pad_multiple = 0
    return c


def dataset_options(c: Any, name: str) -> dict[str, Any]:
    """What `open_dataset` is to be given for a dataset of a config; c may also be a plain dict.

    The folder is the config's where the dataset has none of its own; None leaves an option out.
    """
    own = c["data"]["options"].get(name, {})
    return {"data_dir": c["data_dir"], **{k: x for k, x in own.items() if x is not None}}


def check_config(c: Any, batch_devices: int) -> None:
    """Refuse values that cannot work, before anything is read or compiled.

    Args:
        c: a resolved config.
        batch_devices: how many ways the batch is split.

    Raises:
        UserError: one sentence naming the key and the remedy.
    """
    _at_least(c, 1, "steps", "batch_size", "accumulate", "log_every", "save_every", "keep")
    _at_least(
        c,
        0,
        "eval_every",
        "seed",
        "data.num_workers",
        "data.timeout",
        "recover.skips",
        "recover.rollbacks",
    )
    _at_least(c, 0, "evaluation.limit", "evaluation.pad_multiple")
    _at_least(c, 1, "evaluation.batch_size", "optimizer.decay_steps")
    _at_least(c, 0, "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm")
    traced_steps(c.profile)
    _one_of(c, "compute_dtype", ("float32", "bfloat16"))
    _one_of(c, "frozen_dtype", ("float32", "bfloat16", "float16"))
    _one_of(c, "remat", REMATS)
    _one_of(c, "attention", IMPLEMENTATIONS)
    _one_of(c, "optimizer.schedule", SCHEDULES)
    _one_of(c, "method.name", tuple(COMPONENTS))
    for key in ("ema_decay", "optimizer.b1", "optimizer.b2"):
        _check(0 <= _get(c, key) < 1, c, key, "give a value in [0, 1)")
    for key in ("optimizer.learning_rate", "optimizer.eps"):
        _check(_get(c, key) > 0, c, key, "give a value above 0")
    ratio = "optimizer.final_ratio"
    _check(0 < _get(c, ratio) <= 1, c, ratio, "give a value in (0, 1]")
    if c.batch_size % (c.accumulate * batch_devices):
        raise UserError(
            f"config.batch_size {c.batch_size} is not a multiple of accumulate x devices = "
            f"{c.accumulate} x {batch_devices}: change one of them."
        )
    _check_mixture(c)
    _check_patterns("trainable", c.trainable)
    if not c.trainable:
        raise UserError("config.trainable is empty: name what to train, such as ('unet/',).")
    for rule in c.optimizer.rate_multipliers:
        _check(len(rule) == 2, c, "optimizer.rate_multipliers", "give (expression, factor) pairs")
    _check_patterns("optimizer.rate_multipliers", [r for r, _ in c.optimizer.rate_multipliers])


def check_resolution(resolution: Sequence[int], downscale: int) -> None:
    """Refuse a resolution that the autoencoder cannot halve evenly.

    Args:
        resolution: height and width in pixels.
        downscale: pixels per latent cell.

    Raises:
        UserError: naming the nearest resolution that works.
    """
    if len(resolution) != 2:
        raise UserError(
            f"config.resolution is {tuple(resolution)}: give height and width in pixels."
        )
    nearest = tuple(max(downscale, round(size / downscale) * downscale) for size in resolution)
    if nearest != tuple(resolution):
        raise UserError(
            f"config.resolution {tuple(resolution)} is not divisible by {downscale}, the "
            f"autoencoder's factor: use {nearest}."
        )


def _get(c: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), c)


def _check(holds: bool, c: Any, key: str, remedy: str) -> None:
    if not holds:
        raise UserError(f"config.{key} is {_get(c, key)!r}: {remedy}.")


def _at_least(c: Any, least: int, *keys: str) -> None:
    for key in keys:
        _check(_get(c, key) >= least, c, key, f"give at least {least}")


def _one_of(c: Any, key: str, values: Sequence[str]) -> None:
    _check(_get(c, key) in values, c, key, f"use {', '.join(map(repr, values))}")


def _check_mixture(c: Any) -> None:
    weights = c.data.mixture.to_dict()
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"config.data.mixture.{name} is {weight}: give a probability, or 0.")
    if not any(weights.values()):
        raise UserError("config.data.mixture is empty: name a dataset with a positive weight.")
    used = [*weights, c.evaluation.dataset]
    for name in c.data.options:
        if name not in used:
            raise UserError(
                f"config.data.options.{name} is of no dataset in use, which are {', '.join(used)}: "
                "correct the name."
            )


def _check_patterns(key: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.{key} has {pattern!r}, which is no regular expression: {error}."
            ) from error
