r"""Semantic segmentation in one deterministic step, painted in colours or as class logits.

    python -m jaxpercept.train --config=configs/seg.py

trains `sd-tiny` to paint the classes of procedural scenes, offline: 10 minutes on two CPU cores to
83 % of the pixels (the commonest class: 56 %). Presets, after a colon:

`seg.py:dpt`         class logits of a DPT head instead: 7 minutes, 92 % of the pixels, mIoU 0.32
                     (the commonest class: 0.08).
`seg.py:nyuv2`       NYUv2's 40 classes, painted: `--config.data_dir=DIR` with train.txt, test.txt.
                     On two CPU cores `--config.steps=450` takes 12 minutes: 25 % of the pixels.
`seg.py:nyuv2_dpt`   the same as class logits: `--config.steps=900`, 19 minutes, 41 %.
`seg.py:camvid`      CamVid's 11 classes, as class logits: `--config.data_dir=DIR`.
`seg.py:sd21`        the paper's recipe on Stable Diffusion 2.1, painted, at 768 px, with pictures
                     and painted classes that GenPercept's jsonl lists name; NYUv2's test split.

    python -m jaxpercept.train --config=configs/seg.py:sd21 --config.checkpoint=DIR_OR_HUB_ID \
        --config.data.options.genpercept.data_dir=DIR --config.data.options.nyuv2.data_dir=DIR

The authors trained on one H100, with a palette that was not released (ours are in
jaxpercept/data/palettes.py), and report mIoU 52.9 % on Hypersim and 38.3 % on ADE20K; for NYUv2
nothing is published. Not run by us. What was measured is in docs/results.md.
"""

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "") -> ConfigDict:
    """The config of a preset."""
    choices = {
        "": _scenes,
        "dpt": _scenes_dpt,
        "nyuv2": _nyuv2,
        "nyuv2_dpt": _nyuv2_dpt,
        "camvid": _camvid,
        "sd21": _sd21,
    }
    config = presets.one_step("semantic", palette="", logits=False)
    return presets.choose("configs/seg.py", preset, choices, config)


def _classes(config: ConfigDict, dataset: str, palette: str) -> ConfigDict:
    config.task_options.palette = palette
    return presets.trained_on(config, {dataset: 1.0}, dataset)


def _logits(config: ConfigDict) -> ConfigDict:
    config.task_options.logits = True
    return presets.losses(presets.dpt_head(config), cross_entropy=1.0)


def _painted(config: ConfigDict, **weights: float) -> ConfigDict:
    # sd-tiny's decoder blurs borders and mixes colours, so that it is trained, too.
    return presets.trained_decoder(presets.losses(config, **weights), rate=0.5)


def _scenes(config: ConfigDict) -> ConfigDict:
    return _painted(_classes(presets.tiny(config), "scenes", "scenes"), mse=1.0)


def _scenes_dpt(config: ConfigDict) -> ConfigDict:
    return _logits(_classes(presets.tiny(config), "scenes", "scenes"))


def _real(config: ConfigDict, dataset: str, palette: str) -> ConfigDict:
    return _classes(presets.tiny_real(config), dataset, palette)


def _nyuv2(config: ConfigDict) -> ConfigDict:
    # Unsure of most classes, squared errors paint mean colours, which are those of others.
    return _painted(_real(config, "nyuv2", "nyu40"), l1=1.0)


def _nyuv2_dpt(config: ConfigDict) -> ConfigDict:
    return _logits(_real(config, "nyuv2", "nyu40"))


def _camvid(config: ConfigDict) -> ConfigDict:
    return _logits(_real(config, "camvid", "camvid"))


def _sd21(config: ConfigDict) -> ConfigDict:
    config = _classes(presets.losses(presets.paper(config), mse=1.0), "nyuv2", "nyu40")
    return presets.trained_on(config, {"genpercept": 1.0}, "nyuv2")
