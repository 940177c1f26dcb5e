"""Masked sums and means, and the losses that compare element by element."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped


def mse(
    pred: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w #c"],
    weights: Float[Array, "b"] | Float[Array, "b h w 1"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error over the masked elements.

    weights: factors of the examples' or cells' squared errors, 1 if None. The mean is still over
    the number of masked elements, not over the weights, so that it is linear in these.
    """
    squared = difference(pred, target, mask) ** 2
    if weights is not None:
        squared *= per_image(weights) if weights.ndim == 1 else weights
    return masked_mean(squared, mask)


def l1(
    pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b h w #c"]
) -> Float[Array, ""]:
    """Mean absolute error over the masked elements."""
    return masked_mean(absolute(difference(pred, target, mask)), mask)


def pool_mask(valid: Bool[Array, "b H W 1"], factor: int) -> Bool[Array, "b h w 1"]:
    """Latent cells all of whose factor x factor pixels are valid.

    h = H // factor and w = W // factor, as the VAE encoder rounds; the pixels left over at the
    bottom and right belong to no cell.
    """
    return cells(valid, factor).all(axis=(2, 4))[..., None]


def cells(
    pixels: Shaped[Array, "b H W 1"], factor: int
) -> Shaped[Array, "b h {factor} w {factor}"]:
    """The pixels of each latent cell, see `pool_mask`."""
    b, height, width, _ = pixels.shape
    h, w = height // factor, width // factor
    return pixels[:, : h * factor, : w * factor].reshape(b, h, factor, w, factor)


def masked(x: Array, mask: Array) -> Array:
    """x in float32, 0 outside the mask."""
    return jnp.where(mask, x.astype(jnp.float32), 0)


def difference(pred: Array, target: Array, mask: Array) -> Array:
    """pred − target inside the mask, 0 outside."""
    return masked(pred, mask) - masked(target, mask)


def absolute(x: Array) -> Array:
    """|x| with slope 0 at 0, as torch has it: JAX's own slope there is 1."""
    return x * jnp.sign(x)


def masked_mean(values: Array, mask: Array) -> Float[Array, ""]:
    """Mean over the masked elements. Values outside the mask are ignored but must be finite."""
    mask = jnp.broadcast_to(mask, values.shape)
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def image_sum(x: Array) -> Array:
    """Per-image sum: [b, h, w, c] -> [b]."""
    return x.sum(axis=(1, 2, 3))


def per_image(values: Array) -> Array:
    """[b] -> [b, 1, 1, 1]."""
    return values[:, None, None, None]
