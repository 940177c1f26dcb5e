"""What compares where heat maps have their peaks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpercept.losses.masked import masked, masked_mean

_NEVER = -1e30  # a logit of no weight; infinities would make NaN in the gradient


def location(
    pred: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w 1"],
    *,
    sharpness: float = 10.0,
) -> Float[Array, ""]:
    """KL divergence of where a heat map says its joint is; the mean over the joints that are there.

    Maps in [-1, 1] become distributions over the valid pixels, softmax(sharpness · map). Blobs
    cover less than a hundredth of the picture, so that squared errors are small for an empty map
    already, and larger for a vague guess of the right place: training stays there. Here an empty
    map is an even distribution, and any good guess costs less. A joint is there where its true map
    exceeds 0. The design is ours, close to the regularised heat maps of Nibali et al. (arXiv
    1801.07372).
    """
    q, p = (
        jax.nn.log_softmax(jnp.where(mask, sharpness * masked(x, mask), _NEVER), axis=(1, 2))
        for x in (pred, target)
    )
    divergence = jnp.where(mask, jnp.exp(p) * (p - q), 0).sum(axis=(1, 2))
    present = (jnp.where(mask, target, -1) > 0).any(axis=(1, 2))
    return masked_mean(divergence, present)
