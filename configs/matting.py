r"""Image matting without a trimap: the foreground's opacity in one deterministic step (GenPercept).

    python -m jaxpercept.train --config=configs/matting.py

trains `sd-tiny` on procedural scenes with hair, fur and glass in front, offline: 11 minutes on two
CPU cores to a SAD of 0.90 (the mean opacity: 2.04). Presets, after a colon:

`matting.py:folder`   your images, and scenes: `--config.data_dir=DIR` with rgb/NAME.* and
                      alpha/NAME.*. A tenth of them is held out and evaluated
                      (`--config.data.options.folder.held_out`).
`matting.py:sd21`     the paper's recipe on Stable Diffusion 2.1 with P3M-10k, at 768 px, the loss
                      on decoded mattes:

    python -m jaxpercept.train --config=configs/matting.py:sd21 --config.checkpoint=DIR_OR_HUB_ID \
        --config.data_dir=DIR_OF_P3M10K

The authors trained on one H100; expected SAD on P3M-500-NP: 12.77 (one copy of the paper's table).
Not run by us. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _mattes, "folder": _folder, "sd21": _sd21}
    return presets.choose("configs/matting.py", preset, choices, presets.one_step("matting"))


def _mattes(config: ConfigDict) -> ConfigDict:
    return presets.trained_on(_fine(presets.tiny(config)), {"mattes": 1.0}, "mattes")


def _folder(config: ConfigDict) -> ConfigDict:
    return _fine(presets.of_ones_own(config, "folder", beside="mattes"))


def _fine(config: ConfigDict) -> ConfigDict:
    # Latent cells are too coarse for hair: the decoder is trained, too.
    config = presets.losses(config, mse=1.0, l1=0.5)
    return presets.trained_decoder(config, rate=0.5)


def _sd21(config: ConfigDict) -> ConfigDict:
    config = presets.losses(presets.paper(config), mse=1.0)
    return presets.trained_on(config, {"p3m10k": 1.0}, "p3m10k")
