"""Losses of masks, mattes and classes.

Masks and mattes are compared as probabilities of the foreground. Tasks and the VAE have them in
[−1, 1]: give (x + 1) / 2. A decoded image is not clamped, so that a predicted "probability" may lie
outside [0, 1]. Targets may lie anywhere within.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxpercept.losses.masked import image_sum, masked, masked_mean

# Below this probability the logarithm goes on as a straight line.
_LEAST = 0.01


def bce(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Mean −t·log q − (1 − t)·log(1 − q) of predicted and true probabilities q and t.

    For decoded images: below 0.01 the logarithm goes on as its tangent, and above 1 it is 0.
    Clipping there would take the gradient from exactly the pixels that are wrong. Gradients are at
    most 100 per element; taking background for foreground costs 5.6.
    """
    q, t = masked(pred, mask), masked(target, mask)
    return masked_mean(-t * _log(q) - (1 - t) * _log(1 - q), mask)


def soft_iou(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """1 − (Σ q·t + 1) / (Σ (q + t − q·t) + 1), the mean over images with a valid element.

    Predicted and true probabilities q and t; q is clipped to [0, 1] and has no gradient beyond:
    use it beside `mse` or `bce`. For logits give their sigmoid. The loss is BASNet's (Qin et al.,
    CVPR 2019), with 1 element added to intersection and union, without which an image of background
    alone would have no gradient. At equality it is zero for binary targets only. It is a mean of
    images because in one ratio of the batch large objects would count and small ones not.
    """
    mask = jnp.broadcast_to(mask, pred.shape)
    q, t = jnp.clip(masked(pred, mask), 0, 1), masked(target, mask)
    both = image_sum(q * t)
    loss = 1 - (both + 1) / (image_sum(q) + image_sum(t) - both + 1)
    return masked_mean(loss, mask.any(axis=(1, 2, 3)))


def cross_entropy(
    logits: Float[Array, "b h w k"], labels: Integer[Array, "b h w 1"], mask: Bool[Array, "b h w 1"]
) -> Float[Array, ""]:
    """Mean logsumexp(logits) − logits[label] over the valid pixels.

    Labels are 0 … k − 1 where the mask holds, elsewhere anything (255, say). Any other label under
    the mask makes the loss NaN, since nothing can be raised inside a compiled step.
    """
    labels = jnp.where(mask, labels.astype(jnp.int32), 0)
    logits = masked(logits, mask)
    classes = logits.shape[-1]
    chosen = labels == jnp.arange(classes)[None, None, None]
    logit = jnp.where(chosen, logits, 0).sum(axis=-1, keepdims=True)
    loss = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logit
    known = (labels >= 0) & (labels < classes)
    return masked_mean(jnp.where(known, loss, jnp.nan), mask)


def _log(q: Array) -> Array:
    return jnp.log(jnp.clip(q, _LEAST, 1)) + jnp.minimum(q - _LEAST, 0) / _LEAST
