r"""Referring segmentation: the mask of what a phrase names.

    python -m jaxpercept.train --config=configs/referring.py
    python -m jaxpercept.predict --checkpoint=runs/referring --input=photos --output=masks \
        --prompt="the red ball on the left"

trains `sd-tiny` on procedural scenes with several things alike, offline, in one deterministic step
that paints the mask (the paper has no such model). On two CPU cores it takes 34 minutes: mIoU 0.44;
of the three or so things that could be meant it marks the right one most in 58 % of the cases.
Presets, after a colon:

`referring.py:painted`   by denoising: the image with what is named painted red, in ten steps with
                         guidance, from uniform timesteps (InstructPix2Pix, arXiv 2211.09800).
`referring.py:addp`      the same with ADDP's timesteps and augmentation (arXiv 2504.11457).
`referring.py:coco`      one step on real photographs: `--config.data_dir=DIR` with refs.json,
                         instances.json and images/ (docs/data.md), and as many scenes.
`referring.py:refcoco`   ADDP's recipe at full size, from an InstructPix2Pix checkpoint:

    python -m jaxpercept.train --config=configs/referring.py:refcoco --config.data_dir=DIR \
        --config.checkpoint=timbrooks/instruct-pix2pix

Its authors' hardware and figures are not known to us. Not run by us. What was measured is in
docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {
        "": _scenes,
        "painted": _painted,
        "addp": _addp,
        "coco": _coco,
        "refcoco": _refcoco,
    }
    config = presets.one_step("referring", paint=False)
    return presets.choose("configs/referring.py", preset, choices, config)


def _scenes(config: ConfigDict) -> ConfigDict:
    config = presets.trained_on(presets.tiny(config), {"referring": 1.0}, "referring")
    config.steps = 4000
    # A window of a picture may leave out what the phrase speaks of.
    config.data.augment.fit = "stretch"
    return presets.learns_words(config)


def _painted(config: ConfigDict) -> ConfigDict:
    return presets.painted(_scenes(config))


def _addp(config: ConfigDict) -> ConfigDict:
    return presets.corrupted(presets.contribution(_painted(config), "addp_ris"))


def _coco(config: ConfigDict) -> ConfigDict:
    return presets.trained_on_coco_phrases(presets.learns_words(presets.tiny_real(config)))


def _refcoco(config: ConfigDict) -> ConfigDict:
    config = presets.contribution(presets.instruct_pix2pix(config), "addp_ris")
    return presets.trained_on(presets.corrupted(config), {"refcoco": 1.0}, "refcoco")
