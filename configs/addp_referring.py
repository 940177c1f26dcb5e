r"""ADDP's ingredients (arXiv 2504.11457) one by one, of referring segmentation, in a table.

    python -m jaxpercept.train --config=configs/referring.py
    python -m jaxpercept.ablate --config=configs/addp_referring.py --workdir=runs/addp_referring \
        --set=checkpoint=runs/referring --seeds=0,1

trains on procedural scenes with several things alike, and evaluates on 1,000 others, also with one
to three corrections. `sd-tiny` knows no words, and in some minutes none is learned: the runs start
from the referring model, as ADDP's start from InstructPix2Pix, which knows many. Presets:

`one_step`         the mask in one deterministic step, without noise; not in the paper
`uniform`          the image painted by denoising, in five steps, uniform timesteps
`addp`             timesteps of ADDP's published table
`ddim_noise`       by closed-form contribution factors of ten DDIM steps, ours
`augmented`        uniform timesteps; the noisy input made of masks that are moved, cut and faded
`addp_augmented`   ADDP: its table and its augmentation

`coco_one_step`, `coco_uniform`, `coco_addp`, `coco_addp_augmented`     on photographs: half of each
                   batch phrases of COCO, half scenes; named apart, since one table is of one
                   dataset:

    python -m jaxpercept.ablate --config=configs/addp_referring.py --workdir=runs/addp_coco \
        --presets=coco_uniform,coco_addp --set=checkpoint=runs/referring,data_dir=DIR

What was measured is in docs/results.md.
"""

import functools

from ml_collections import ConfigDict

from jaxpercept import presets

METRICS = ("oiou", "miou", "p@0.5")


def get_config(preset: str = "uniform") -> ConfigDict:
    """The config of a preset."""
    config = presets.tiny(presets.one_step("referring", paint=False))
    config = presets.trained_on(config, {"referring": 1.0}, "referring")
    config.data.augment.fit = "stretch"
    config = presets.learns_words(config)
    config.evaluation.limit = 0
    return presets.choose("configs/addp_referring.py", preset, PRESETS | COCO, config)


_drawn = presets.contribution
_painted = functools.partial(presets.painted, num_steps=5)

PRESETS = {
    "one_step": lambda config: config,
    "uniform": _painted,
    "addp": lambda config: _drawn(_painted(config), "addp_ris"),
    "ddim_noise": lambda config: _drawn(_painted(config), "ddim_noise:10"),
    "augmented": lambda config: presets.corrupted(_painted(config)),
    "addp_augmented": lambda config: presets.corrupted(_drawn(_painted(config), "addp_ris")),
}


def _on_coco(preset: presets.Preset, config: ConfigDict) -> ConfigDict:
    return preset(presets.trained_on_coco_phrases(config))


COCO = {
    f"coco_{name}": functools.partial(_on_coco, PRESETS[name])
    for name in ("one_step", "uniform", "addp", "addp_augmented")
}
