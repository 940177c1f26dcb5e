r"""Human pose: COCO's 17 joints as heat maps of a DPT head, in one deterministic step.

    python -m jaxpercept.train --config=configs/pose.py

trains `sd-tiny` on procedural scenes with one person, offline: 7 minutes on two CPU cores to 64 %
of the joints within a tenth of the person (PCK@0.1; their mean place: 4 %). Presets, after a colon:

`pose.py:sd21`   Stable Diffusion 2.1 on COCO 2017; needs an accelerator such as one H100:

    python -m jaxpercept.train --config=configs/pose.py:sd21 --config.checkpoint=DIR_OR_HUB_ID \
        --config.data_dir=DIR_OF_COCO

The first version of GenPercept's paper names the task; no code and no figure was released, so the
design is ours (jaxpercept/tasks/pose.py). `sd21` has not been run by us. What was measured is in
docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _people, "sd21": _sd21}
    return presets.choose("configs/pose.py", preset, choices, presets.one_step("pose"))


def _heat_maps(config: ConfigDict) -> ConfigDict:
    return presets.dpt_head(presets.losses(config, mse=1.0, location=0.02))


def _people(config: ConfigDict) -> ConfigDict:
    config = _heat_maps(presets.tiny(config))
    config.data.augment.flip = 0.0  # the figures' clothes tell left from right
    return presets.trained_on(config, {"people": 1.0}, "people")


def _sd21(config: ConfigDict) -> ConfigDict:
    config = _heat_maps(presets.paper(config, (512, 384), fit="crop"))
    return presets.trained_on(config, {"coco_keypoints": 1.0}, "coco_keypoints")
