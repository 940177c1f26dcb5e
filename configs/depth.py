"""Affine-invariant depth in one deterministic step (GenPercept, arXiv 2403.06090).

    python -m jaxpercept.train --config=configs/depth.py

Without a preset: the built-in checkpoint on procedural scenes, offline, on two CPU cores.
Presets: `sd21`, the paper's recipe; `nyuv2`, a real NYUv2 folder. docs/results.md has the figures.
"""

from jaxpercept.config import base_config


def get_config(preset: str = ""):
    """The config of a preset."""
    config = base_config()
    config.task = "depth"
    config.method.update({"timesteps": "uniform", "inference_timestep": 1})
    return {"": tiny, "nyuv2": nyuv2, "sd21": sd21}[preset](config)


def tiny(config):
    config.checkpoint = "sd-tiny"
    config.resolution = (96, 128)
    config.steps = 300
    config.batch_size = 16
    config.method.latent_weight = 1.0
    config.method.pixel_weights = {}
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.decay_steps = config.get_ref("steps")
    config.log_every = 20
    config.save_every = 100
    config.evaluation.limit = 64
    return config


def nyuv2(config):
    config = tiny(config)
    config.steps = 1000
    config.data.mixture = {"nyuv2": 1.0}
    config.evaluation.dataset = "nyuv2"
    config.evaluation.limit = 0
    return config


def sd21(config):
    return config
