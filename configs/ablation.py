"""The ablations of GenPercept's paper (arXiv 2403.06090) as presets: depth, one change each.

    python -m jaxpercept.train --config=configs/ablation.py:pixel_mse
    python -m jaxpercept.ablate --seeds=0,1

trains `sd-tiny` on procedural scenes, some minutes each on two CPU cores; the second command runs
all of them and makes the table. `sd21_NAME` is the same at the paper's scale: Stable Diffusion 2.1,
Hypersim and Virtual KITTI 2, 480 x 640, 30,000 updates of 32 images, one H100; not run by us.

`baseline`                        one step, latent MSE
`pixel_mse`, `pixel_all`          decoded MSE; with SSI and gradient losses, too
`dpt`, `dpt_frozen`               DPT head, decoded MSE; the UNet frozen
`decoder`, `decoder_scratch`      the autoencoder's decoder trained, too; from scratch
`unet_scratch`                    the UNet from random weights
`lora_4`, `_16`, `_64`, `_256`, `_1024`    low-rank additions instead of full fine-tuning
`time_1`, `_500`, `_900`          the timestep in training and prediction
`prompt_text`, `prompt_random`    what the UNet reads
`poor_truth`                      smeared, drifting depth; at scale Taskonomy and Cityscapes
`blend_00002125`, `_000425`, `_00085`, `_0034`, `_01360`, `_05440`, `_10`    RGB blending in ten
                                  steps by its beta_start; the last is the one-step method
`marigold`                        the image's latent beside the noised one, multi-resolution noise,
                                  ten steps: beta_start 0.00085
`marigold_00002125` ... `_10`     the same with the other betas
`noise_00002125` ... `_10`        with Gaussian noise

What the paper reports, as far as known, stands beside each row of the table, which is in
docs/results.md.
"""

import functools

from ml_collections import ConfigDict

from jaxpercept import presets

# beta_start -> beta_end, as released: the two before the last have ten times the beta_start that
# the progression would give.
BETAS = {
    "00002125": (0.0002125, 0.003),
    "000425": (0.000425, 0.006),
    "00085": (0.00085, 0.012),
    "0034": (0.0034, 0.048),
    "01360": (0.1360, 0.192),
    "05440": (0.5440, 0.768),
    "10": (1.0, 1.0),
}
RANKS = (4, 16, 64, 256, 1024)
PROMPTS = {"text": "A high quality RGB image", "random": "F3@qV!k2*#Zp^n%1Lz"}


def get_config(preset: str = "baseline") -> ConfigDict:
    """The config of a preset."""
    choices = {**PRESETS, **{f"sd21_{name}": _at_scale(change) for name, change in PRESETS.items()}}
    config = presets.tiny(presets.one_step("depth"))
    return presets.choose("configs/ablation.py", preset, choices, config)


def _pixel(config: ConfigDict, **weights: float) -> ConfigDict:
    return presets.losses(config, mse=1.0, **weights)


def _scratch(config: ConfigDict) -> ConfigDict:
    config.random_init = ("unet",)
    return config


def _time(config: ConfigDict, timestep: int) -> ConfigDict:
    config.method.timesteps = f"fixed:{timestep}"
    config.method.inference_timestep = timestep
    return config


def _prompt(config: ConfigDict, prompt: str) -> ConfigDict:
    config.prompt = prompt
    return config


def _poor_truth(config: ConfigDict) -> ConfigDict:
    if "hypersim" in config.data.mixture:
        return presets.trained_on(config, {"taskonomy": 0.9, "cityscapes": 0.1}, "nyuv2")
    config.data.augment.update({"depth_blur": 2.0, "depth_error": 0.1})
    return config


def _denoising(config: ConfigDict, noise: str, beta: str = "00085") -> ConfigDict:
    return presets.denoising(config, noise, *BETAS[beta])


def _at_scale(change: presets.Preset) -> presets.Preset:
    def config(tiny: ConfigDict) -> ConfigDict:
        config = presets.paper(presets.one_step("depth"), (480, 640), 8, fit="crop")
        mixture = {"hypersim": 0.9, "vkitti": 0.1}
        return change(presets.trained_on(config, mixture, "nyuv2"))

    return config


PRESETS = {
    "baseline": lambda config: config,
    "pixel_mse": _pixel,
    "pixel_all": functools.partial(_pixel, ssi=0.5, grad=2.0),
    "dpt": lambda config: presets.dpt_head(_pixel(config)),
    "dpt_frozen": lambda config: presets.frozen_unet(presets.dpt_head(_pixel(config))),
    "decoder": lambda config: presets.trained_decoder(_pixel(config)),
    "decoder_scratch": lambda config: presets.trained_decoder(_pixel(config), scratch=True),
    "unet_scratch": _scratch,
    **{f"lora_{rank}": functools.partial(presets.lora, rank=rank) for rank in RANKS},
    **{f"time_{t}": functools.partial(_time, timestep=t) for t in (1, 500, 900)},
    **{f"prompt_{k}": functools.partial(_prompt, prompt=text) for k, text in PROMPTS.items()},
    "poor_truth": _poor_truth,
    **{f"blend_{b}": functools.partial(_denoising, noise="image", beta=b) for b in BETAS},
    "marigold": functools.partial(_denoising, noise="multi_resolution"),
    **{
        f"marigold_{b}": functools.partial(_denoising, noise="multi_resolution", beta=b)
        for b in BETAS
        if b != "00085"
    },
    **{f"noise_{b}": functools.partial(_denoising, noise="gaussian", beta=b) for b in BETAS},
}

PAPER = {
    "baseline": "5.3",
    "pixel_all": "a little better: 5.2",
    "dpt": "about as good: 5.5",
    "dpt_frozen": "worse: 8.6",
    "unet_scratch": "far worse: 18.6",
    "lora_4": "worse: 9.5",
    "lora_16": "worse: 8.5",
    "lora_64": "between 8.5 and 6.7",
    "lora_256": "between 8.5 and 6.7",
    "lora_1024": "worse: 6.7",
    "poor_truth": "a little worse: 5.5",
    **{f"blend_{b}": "better the larger beta is" for b in BETAS},
    "blend_10": "the best beta, and it needs one step",
    "marigold": "a little worse, and ten steps: 6.0 (Marigold's own)",
    **{f"marigold, ensemble of {n}": "better: 5.5 with 10 (Marigold's own)" for n in (2, 4, 8)},
}
"""What is known of the paper's tables: AbsRel on NYUv2 in %, by copies in later papers; of betas
the direction only. Of the other rows nothing is known to us."""
