"""A UNet with more input channels, as models that see an image beside the noise begin."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpercept.checkpoints.diffusers import Checkpoint


def widen(checkpoint: Checkpoint, factor: int = 2, halve_bias: bool = False) -> Checkpoint:
    """The checkpoint with `widen_conv_in` done on its UNet and written into its config."""
    config = checkpoint.configs["unet"]
    widened = dataclasses.replace(config, in_channels=config.in_channels * factor)
    unet = widen_conv_in(checkpoint.params["unet"], factor, halve_bias)
    return dataclasses.replace(
        checkpoint,
        configs={**checkpoint.configs, "unet": widened},
        params={**checkpoint.params, "unet": unet},
    )


def widen_conv_in(
    params_unet: Mapping[str, Any], factor: int = 2, halve_bias: bool = False
) -> dict[str, Any]:
    """The UNet's parameters with `factor` times the input channels.

    The first kernel is repeated over the new channel groups and divided by `factor`, so that an
    input repeated `factor` times gives the same activations [Marigold `_replace_unet_conv_in`;
    GenPercept the same]. E2E-FT also divides the bias [E2E training/util/unet_prep.py]:
    `halve_bias`, which gives different activations and is there to repeat its runs.
    """
    params = dict(params_unet)
    kernel: Float[np.ndarray, "kh kw c_in c_out"] = np.asarray(params["conv_in.kernel"])
    params["conv_in.kernel"] = np.tile(kernel, (1, 1, factor, 1)) / kernel.dtype.type(factor)
    if halve_bias:
        bias = np.asarray(params["conv_in.bias"])
        params["conv_in.bias"] = bias / bias.dtype.type(factor)
    return params
