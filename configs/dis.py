"""Dichotomous segmentation: the salient object's mask, in one deterministic step (GenPercept).

    python -m jaxpercept.train --config=configs/dis.py

trains `sd-tiny` on procedural scenes with one salient object, offline: 11 minutes on two CPU cores
to a max F of 0.58 (an ellipse in the middle: 0.27).
Presets, after a colon:

`dis.py:masks`   your images: `--config.data_dir=DIR` with image/ and mask/. All of them are trained
                 on, and evaluated: keep some apart for `evaluate --dataset=masks`.
`dis.py:sd21`    the paper's recipe on Stable Diffusion 2.1 with DIS5K, at 768 px, the loss on
                 decoded masks; needs an accelerator and `--config.data_dir=DIR` of DIS5K.

What was measured is in docs/results.md; `sd21` has not been run by us.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _objects, "masks": _masks, "sd21": _sd21}
    return presets.choose("configs/dis.py", preset, choices, presets.one_step("dis"))


def _objects(config: ConfigDict) -> ConfigDict:
    # Latent cells are too coarse for thin structures: the decoder is trained on them, too.
    config = presets.losses(presets.tiny(config), mse=1.0, bce=0.2, iou=0.2)
    config = presets.trained_decoder(config, rate=0.5)
    return presets.trained_on(config, {"objects": 1.0}, "objects")


def _masks(config: ConfigDict) -> ConfigDict:
    config = presets.augmented(presets.tiny(config))
    config.steps = 1800
    return presets.trained_on(config, {"masks": 0.5, "objects": 0.5}, "masks")


def _sd21(config: ConfigDict) -> ConfigDict:
    config = presets.losses(presets.paper(config), mse=1.0)
    return presets.trained_on(config, {"dis5k": 1.0}, "dis5k")
