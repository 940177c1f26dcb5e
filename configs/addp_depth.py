r"""ADDP's ingredients (arXiv 2504.11457) one by one, of depth by denoising, as presets of a table.

    python -m jaxpercept.ablate --config=configs/addp_depth.py --workdir=runs/addp_depth --seeds=0,1

trains `sd-tiny` on procedural scenes with Marigold's method, some minutes each on two CPU cores.

`uniform`               uniform timesteps
`addp`                  those of ADDP's published table
`ddim_noise`, `ddim`    by closed-form contribution factors of ten DDIM steps, ours
`p2`, `min_snr`         published weights of the loss
`importance`            ADDP's table, the loss weighed so that its expectation is the uniform one
`augmented`             uniform timesteps; the noisy input made of blurred depth
`augmented_consistent`  the same with the target that means clean depth
`augmented_constant`, `augmented_decreasing`    other intensities over time
`addp_augmented`        ADDP: its table and its augmentation

`nyuv2_uniform`, `nyuv2_addp`, `nyuv2_augmented`, `nyuv2_addp_augmented`    on real images: half
                        NYUv2's training set, half furnished rooms; named apart, since one table is
                        of one dataset:

    python -m jaxpercept.ablate --config=configs/addp_depth.py --workdir=runs/addp_nyuv2 \
        --presets=nyuv2_uniform,nyuv2_addp --set=data_dir=DIR

The blur has a fifth of ADDP's strength, as the pictures have a fifth of its size. What was measured
is in docs/results.md.
"""

import functools

from ml_collections import ConfigDict

from jaxpercept import presets


def get_config(preset: str = "uniform") -> ConfigDict:
    """The config of a preset."""
    config = presets.denoising(presets.tiny(presets.one_step("depth")), "multi_resolution")
    # The first step is where the noise is strongest, as in training.
    config.scheduler.update({"timestep_spacing": "trailing", "rescale_betas_zero_snr": True})
    return presets.choose("configs/addp_depth.py", preset, PRESETS | NYUV2, config)


_drawn = presets.contribution
_augmented = functools.partial(presets.corrupted, strength=0.2)

PRESETS = {
    "uniform": lambda config: config,
    "addp": functools.partial(_drawn, timesteps="addp_depth"),
    "ddim_noise": functools.partial(_drawn, timesteps="ddim_noise:10"),
    "ddim": functools.partial(_drawn, timesteps="ddim:10"),
    "p2": functools.partial(_drawn, timesteps="p2", use="loss"),
    "min_snr": functools.partial(_drawn, timesteps="min_snr", use="loss"),
    "importance": functools.partial(_drawn, timesteps="addp_depth", use="importance"),
    "augmented": _augmented,
    "augmented_consistent": functools.partial(_augmented, target="consistent"),
    "augmented_constant": functools.partial(_augmented, intensity="constant"),
    "augmented_decreasing": functools.partial(_augmented, intensity="decreasing"),
    "addp_augmented": lambda config: _augmented(_drawn(config, "addp_depth")),
}


def _on_nyuv2(preset: presets.Preset, config: ConfigDict) -> ConfigDict:
    config = presets.trained_on(
        presets.augmented(config), {"nyuv2": 0.5, "furnished": 0.5}, "nyuv2"
    )
    return preset(config)


NYUV2 = {
    f"nyuv2_{name}": functools.partial(_on_nyuv2, PRESETS[name])
    for name in ("uniform", "addp", "augmented", "addp_augmented")
}
