"""Referring segmentation: the mask of what a phrase names.

python -m jaxpercept.train --config=configs/referring.py
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _scenes}
    config = presets.one_step("referring", paint=False)
    return presets.choose("configs/referring.py", preset, choices, config)


def _scenes(config: ConfigDict) -> ConfigDict:
    config = presets.trained_on(presets.tiny(config), {"referring": 1.0}, "referring")
    config.data.augment.fit = "stretch"
    return config
