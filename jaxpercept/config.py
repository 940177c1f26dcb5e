"""Every key a training config has, with its default: the base the files in `configs/` change."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxpercept.errors import UserError


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
    c.method = ConfigDict({"name": "one_step"})
    # Regular expressions on "component/path": what is trained. The rest is frozen.
    c.trainable = ("unet/",)
    # Components to start from random weights instead of the checkpoint's.
    c.random_init = ()
    # Architectures in diffusers' config.json format, for components no checkpoint gives, and the
    # scheduler_config.json and tokenizer folder to use instead of the checkpoint's.
    c.architecture = ConfigDict()
    c.scheduler = ConfigDict()
    c.tokenizer = ""

    c.data = ConfigDict()
    c.data.mixture = ConfigDict({"scenes": 1.0})  # dataset name -> probability
    c.data.num_workers = 0  # processes that decode; 0 decodes in threads
    # dataset name -> its own options, e.g. {"folder": {"data_dir": "...", "depth_scale": 256.0}}
    c.data.options = ConfigDict()
    c.data.augment = ConfigDict({"flip": 0.5})

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
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    c.log_every = 50
    c.save_every = 1000
    c.keep = 2  # checkpoints kept
    c.eval_every = 0  # 0: at the end only
    c.picture_every = 0  # 0: at the end only
    c.evaluation = ConfigDict()
    c.evaluation.dataset = "scenes"
    c.evaluation.limit = 0  # images; 0: all
    c.evaluation.batch_size = 8
    return c


def check_config(c: Any, device_count: int, downscale: int) -> None:
    """Refuse values that cannot work, before anything is compiled.

    Args:
        c: a resolved config.
        device_count: how many ways the batch is split.
        downscale: pixels per latent cell.

    Raises:
        UserError: one sentence naming the key and the remedy.
    """
    for key in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
        if getattr(c, key) < 1:
            raise UserError(f"config.{key} is {getattr(c, key)}: give at least 1.")
    if len(c.resolution) != 2:
        raise UserError(f"config.resolution is {c.resolution}: give height and width in pixels.")
    for size in c.resolution:
        if size < downscale or size % downscale:
            raise UserError(
                f"config.resolution {tuple(c.resolution)} is not divisible by {downscale}, the "
                f"autoencoder's factor: {max(downscale, round(size / downscale) * downscale)} "
                f"is the nearest to {size}."
            )
    if c.batch_size % (c.accumulate * device_count):
        raise UserError(
            f"config.batch_size {c.batch_size} is not a multiple of accumulate x devices = "
            f"{c.accumulate} x {device_count}: change one of them."
        )
    if not c.data.mixture or sum(c.data.mixture.values()) <= 0:
        raise UserError("config.data.mixture is empty: name a dataset with a positive weight.")
    if c.compute_dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.compute_dtype {c.compute_dtype!r}: use 'float32' or 'bfloat16'.")
    if not 0 <= c.ema_decay < 1:
        raise UserError(f"config.ema_decay is {c.ema_decay}: give a value in [0, 1).")
