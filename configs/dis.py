r"""Dichotomous segmentation: the salient object's mask, in one deterministic step (GenPercept).

    python -m jaxpercept.train --config=configs/dis.py

trains `sd-tiny` on procedural scenes with one salient object, offline: 11 minutes on two CPU cores
to a max F of 0.58 (an ellipse in the middle: 0.27).
Presets, after a colon:

`dis.py:masks`   your images, and as many scenes: `--config.data_dir=DIR` with image/ and mask/. A
                 tenth of them is held out and evaluated (`--config.data.options.masks.held_out`).
`dis.py:sd21`    the paper's recipe on Stable Diffusion 2.1, at 768 px, the loss on decoded masks:

    python -m jaxpercept.train --config=configs/dis.py:sd21 --config.checkpoint=DIR_OR_HUB_ID \
        --config.data_dir=DIR_OF_DIS5K

The authors trained on one H100; expected max F on DIS-VD: 0.857 (one copy of the paper's table).
Not run by us. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _objects, "masks": _masks, "sd21": _sd21}
    return presets.choose("configs/dis.py", preset, choices, presets.one_step("dis"))


def _objects(config: ConfigDict) -> ConfigDict:
    return presets.trained_on(_thin(presets.tiny(config)), {"objects": 1.0}, "objects")


def _masks(config: ConfigDict) -> ConfigDict:
    return _thin(presets.of_ones_own(config, "masks", beside="objects"))


def _thin(config: ConfigDict) -> ConfigDict:
    # Latent cells are too coarse for thin structures: the decoder is trained on them, too.
    config = presets.losses(config, mse=1.0, bce=0.2, iou=0.2)
    return presets.trained_decoder(config, rate=0.5)


def _sd21(config: ConfigDict) -> ConfigDict:
    config = presets.losses(presets.paper(config), mse=1.0)
    return presets.trained_on(config, {"dis5k": 1.0}, "dis5k")
