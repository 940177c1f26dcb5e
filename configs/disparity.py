r"""Affine-invariant disparity (inverse depth) in one deterministic step (GenPercept).

    python -m jaxpercept.train --config=configs/disparity.py

trains `sd-tiny` on procedural scenes, offline: 4 minutes on two CPU cores to an AbsRel of 0.079
(the mean: 0.348). Presets, after a colon:

`disparity.py:nyuv2`    real images: `--config.data_dir=DIR` of NYUv2 with train.txt and test.txt.
`disparity.py:sd21`     the paper's recipe on Stable Diffusion 2.1, at 768 px.
`disparity.py:sd21_dpt` with a DPT head in the place of the autoencoder's decoder.

    python -m jaxpercept.train --config=configs/disparity.py:sd21 \
        --config.checkpoint=DIR_OR_HUB_ID --config.data.options.hypersim.data_dir=DIR \
        --config.data.options.vkitti.data_dir=DIR --config.data.options.nyuv2.data_dir=DIR

The authors trained on one H100; expected AbsRel on NYUv2: 5.8 %, with the head 5.9 % (one copy of
the paper's table). Not run by us. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": presets.tiny, "nyuv2": _nyuv2, "sd21": _sd21, "sd21_dpt": _sd21_dpt}
    return presets.choose("configs/disparity.py", preset, choices, presets.one_step("disparity"))


def _nyuv2(config: ConfigDict) -> ConfigDict:
    config = presets.tiny_real(config)
    return presets.trained_on(config, {"nyuv2": 0.5, "furnished": 0.5}, "nyuv2")


def _sd21(config: ConfigDict) -> ConfigDict:
    config = presets.losses(presets.paper(config, fit="crop"), mse=1.0, ssi=0.5, grad=2.0)
    # As released: between the least and the largest disparity.
    config.task_options.min_max = True
    return presets.trained_on(config, {"hypersim": 0.9, "vkitti": 0.1}, "nyuv2")


def _sd21_dpt(config: ConfigDict) -> ConfigDict:
    return presets.dpt_head(_sd21(config))
