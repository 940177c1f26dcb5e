r"""One model for depth, normals, classes, boxes and phrases, told by an instruction which.

    python -m jaxpercept.train --config=configs/generalist.py
    python -m jaxpercept.evaluate --checkpoint=runs/generalist --dataset=scenes --limit=64
    python -m jaxpercept.predict --checkpoint=runs/generalist --task=detect --prompt=chair \
        --input=photos --output=boxes

trains `sd-tiny` on procedural scenes, offline, in one deterministic step. On two CPU cores it takes
40 minutes: depth AbsRel 0.07, normals 40 degrees, class mIoU 0.19, boxes F1 0.25, phrase mIoU 0.12.
Every dataset of the mixture gives examples of all tasks it has the truth of;
--config.task_options.detect=False learns one less. Presets, after a colon:

`generalist.py:painted`  by denoising: ten steps with guidance from an image and its instruction
                         (InstructPix2Pix, arXiv 2211.09800), as InstructCV (arXiv 2310.00390) does.
`generalist.py:sd15`     the same at full size, from an InstructPix2Pix checkpoint, on NYUv2 (depth,
                         normals, classes), RefCOCO's phrases and rendered scenes (boxes):

    python -m jaxpercept.train --config=configs/generalist.py:sd15 \
        --config.checkpoint=timbrooks/instruct-pix2pix \
        --config.data.options.nyuv2.data_dir=DIR --config.data.options.refcoco.data_dir=DIR

Not run by us at full size. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {"": _scenes, "painted": _painted, "sd15": _sd15}
    return presets.choose("configs/generalist.py", preset, choices, presets.one_step("generalist"))


def _scenes(config: ConfigDict) -> ConfigDict:
    mixture = {"scenes": 0.7, "referring": 0.3}
    config = presets.trained_on(presets.tiny(config), mixture, "scenes")
    config.steps = 4000
    # A window of a picture may leave out what the phrase speaks of.
    config.data.augment.fit = "stretch"
    return presets.learns_words(config)


def _painted(config: ConfigDict) -> ConfigDict:
    return presets.painted(_scenes(config))


def _sd15(config: ConfigDict) -> ConfigDict:
    mixture = {"nyuv2": 0.5, "refcoco": 0.3, "scenes": 0.2}
    return presets.trained_on(presets.instruct_pix2pix(config), mixture, "nyuv2")
