"""Image resizing that agrees with torch's `F.interpolate`, which the ported pipelines use."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

Method = Literal["bilinear", "bicubic", "nearest", "nearest-exact", "area"]


def resize(
    x: Shaped[Array, "b h w c"],
    size: tuple[int, int],
    method: Method = "bilinear",
    *,
    antialias: bool = False,
    align_corners: bool = False,
) -> Shaped[Array, "b H W c"]:
    """Resizes to `size` = (H, W), as `F.interpolate(x, size, mode=method, ...)`.

    Args:
      method: `nearest` takes pixel floor(i·in/out); `nearest-exact` the pixel whose centre is
        nearest, which is jax.image.resize's "nearest"; `area` averages the covered pixels.
      antialias: widen the kernel when shrinking; bilinear and bicubic only.
      align_corners: corner pixels keep their place; bilinear and bicubic without antialias only.

    Returns:
      Same dtype as x. The two nearest methods take any dtype; the others compute in float32.
    """
    if (antialias or align_corners) and method not in ("bilinear", "bicubic"):
        raise ValueError(f"resize: {method!r} has neither antialias nor align_corners.")
    if antialias and align_corners:
        raise ValueError("resize: antialias and align_corners exclude each other.")
    if method in ("nearest", "nearest-exact"):
        for axis, out in zip((1, 2), size, strict=True):
            if x.shape[axis] != out:
                x = jnp.take(x, nearest_index(x.shape[axis], out, method), axis=axis)
        return x
    y = x.astype(jnp.float32)
    for axis, out in zip((1, 2), size, strict=True):
        if x.shape[axis] != out:
            weights = _weights(x.shape[axis], out, method, antialias, align_corners)
            equation = ("oi,biwc->bowc", "oi,bhic->bhoc")[axis - 1]
            y = jnp.einsum(equation, weights, y, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def nearest_index(
    size_in: int,
    size_out: int,
    method: Literal["nearest", "nearest-exact"] = "nearest",
    scale: float | None = None,
) -> Int[np.ndarray, "out"]:
    """Source pixel of each output pixel; `scale` is input pixels per output pixel if not in/out."""
    scale = np.float32(size_in / size_out if scale is None else scale)
    index = np.arange(size_out)
    # Single roundings to float32 where torch has them; they decide ties.
    if method == "nearest-exact":
        centre = (np.float64(scale) * (index + 0.5) - 0.5).astype(np.float32)
        position = np.maximum(centre, 0) + np.float32(0.5)
    else:
        position = (np.float64(scale) * index).astype(np.float32)
    return np.minimum(position.astype(np.int32), size_in - 1)


def _weights(
    size_in: int, size_out: int, method: Method, antialias: bool, align_corners: bool
) -> Float[np.ndarray, "out in"]:
    """The linear map along one axis, float32; positions are rounded to float32 as in torch."""
    index = np.arange(size_out)
    if method == "area":
        start = index * size_in // size_out
        stop = -(-(index + 1) * size_in // size_out)
        source = np.arange(size_in)
        covered = (source >= start[:, None]) & (source < stop[:, None])
        return (covered / covered.sum(1, keepdims=True)).astype(np.float32)
    if antialias:
        return _antialiased(size_in, size_out, method)
    # One rounding to float32, as with torch's fused multiply-add.
    if align_corners:
        scale = np.float32((size_in - 1) / (size_out - 1) if size_out > 1 else 0)
        position = (np.float64(scale) * index).astype(np.float32)
    else:
        scale = np.float32(size_in / size_out)
        position = (np.float64(scale) * (index + 0.5) - 0.5).astype(np.float32)
    radius, kernel = _KERNELS[method]
    if method == "bilinear":
        position = np.maximum(position, 0)
    base = np.floor(position).astype(np.int64)
    weights = np.zeros((size_out, size_in))
    for tap in range(1 - radius, 1 + radius):
        # Taps beyond the border repeat the edge pixel.
        source = np.clip(base + tap, 0, size_in - 1)
        weights[index, source] += kernel(position - (base + tap), -0.75)
    return weights.astype(np.float32)


def _antialiased(size_in: int, size_out: int, method: Method) -> Float[np.ndarray, "out in"]:
    """Kernel stretched over the pixels it shrinks; taps beyond the border are dropped."""
    scale = np.float32(size_in / size_out)
    radius, kernel = _KERNELS[method]
    stretch = np.maximum(scale, np.float32(1))
    half = np.float32(0.5)
    centre = scale * (np.arange(size_out, dtype=np.float32)[:, None] + half)
    start = np.maximum((centre - radius * stretch + half).astype(np.int64), 0)
    stop = np.minimum((centre + radius * stretch + half).astype(np.int64), size_in)
    source = np.arange(size_in)
    offset = (source - start).astype(np.float32) + (start.astype(np.float32) - centre) + half
    weights = kernel(offset * (np.float32(1) / stretch), -0.5)
    weights = np.where((source >= start) & (source < stop), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _triangle(x: np.ndarray, _: float) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution; torch takes a = −0.75, and −0.5 when antialiasing like PIL."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


_KERNELS = {"bilinear": (1, _triangle), "bicubic": (2, _cubic)}
