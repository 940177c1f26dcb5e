"""A UNet with more input channels, as models that see an image beside the noise begin."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float


def widen_conv_in(params_unet: Mapping[str, Any]) -> dict[str, Any]:
    """The UNet's parameters with twice the input channels.

    The first kernel is repeated over the new channels and halved, so that an input repeated gives
    the same activations [Marigold `_replace_unet_conv_in`; GenPercept the same]. E2E-FT halves the
    bias as well [E2E training/util/unet_prep.py], which gives others; its training is not here.
    """
    kernel: Float[np.ndarray, "kh kw c_in c_out"] = np.asarray(params_unet["conv_in.kernel"])
    doubled = np.tile(kernel, (1, 1, 2, 1)) / kernel.dtype.type(2)
    return {**params_unet, "conv_in.kernel": doubled}
