"""Corrupted targets: what the noisy input of training is made of, so that it holds mistakes.

A diffusion model that predicts is given its own earlier, wrong predictions; one in training the
right answer under noise. ADDP (arXiv 2504.11457) makes x_t of a target changed the more, the
noisier x_t is, while what is to be predicted stays right: depth is blurred
[`src/trainer/marigold_trainer.py`], a mask is moved, cut and recoloured [`refseg_dataset.py`].

There this runs on the CPU (OpenCV, torchvision); here inside the train step. `draw_...` and what
they draw for are functions of one example. All randomness is that of the examples' own keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

INTENSITIES = ("increasing", "constant", "decreasing")
BLUR = 10.0
"""Pixels of the strongest blur's standard deviation."""
CHANGE = 0.2
"""The largest change of a mask's shape and colour: a share, and of 50 degrees."""

_TAPS = 31
_MAX_ROTATION = 50.0  # degrees
_ERASED, _LONGEST, _TRIES = 0.5, 2.0, 10
# Of red, green and blue, in what Pillow calls "L".
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def intensity(timesteps: Int[Array, " b"], total: int, kind: str) -> Float[Array, " b"]:
    """How strong the corruption is at each timestep, in (0, 1].

    Args:
      total: T, how many timesteps there are.
      kind: "increasing": (t + 1) / T, ADDP's (for masks it has t / T). For ablations: "decreasing":
        (T − t) / T, and "constant": (T + 1) / 2T, which all three are on average where timesteps
        are uniform; where they are not, the averages differ.
    """
    shares = {
        "increasing": (timesteps + 1) / total,
        "constant": jnp.full(timesteps.shape, (total + 1) / (2 * total)),
        "decreasing": (total - timesteps) / total,
    }
    return shares[kind].astype(jnp.float32)


# ---- blur ----------------------------------------------------------------------------------------


def gaussian_blur(
    image: Float[Array, "b h w c"], sigma: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Blurred with 31 x 31 taps, as `cv2.GaussianBlur(image, (31, 31), sigma)`.

    Beyond the border the image is mirrored without its edge (OpenCV's default). A sigma of 0 leaves
    the image as it is, where OpenCV takes 0 for "choose one". Above 5 pixels the taps cut the
    Gaussian off, at 1.5 sigma for 10.

    Args:
      sigma: in pixels, each image's own.
    """
    reach = _TAPS // 2
    offset = jnp.arange(-reach, reach + 1)[None]
    # At 0.001 pixels the neighbours' weights are 0 to the bit.
    taps = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)
    taps /= taps.sum(axis=1, keepdims=True)
    # Two products with banded matrices: as fast as adding up shifted images on a CPU, many times as
    # fast as grouped convolutions, and what accelerators do best.
    for axis, equation in ((1, "bij,bjwc->biwc"), (2, "bij,bhjc->bhic")):
        size = image.shape[axis]
        tap = np.arange(size + 2 * reach) - np.arange(size)[:, None]
        within = ((tap >= 0) & (tap < _TAPS))[None]
        band = jnp.where(within, taps[:, np.clip(tap, 0, _TAPS - 1)], 0)
        mirrored = jnp.take(image, _mirrored(size, reach), axis=axis)
        image = jnp.einsum(equation, band, mirrored, precision=jax.lax.Precision.HIGHEST)
    return image


def _mirrored(size: int, reach: int) -> Int[np.ndarray, " n"]:
    """The pixel at each of the places −reach, ..., size − 1 + reach."""
    if size == 1:
        return np.zeros(1 + 2 * reach, np.int64)
    period = 2 * (size - 1)
    place = np.arange(-reach, size + reach) % period
    return np.minimum(place, period - place)


def blur_depth(
    image: Float[Array, "b h w c"], strength: Float[Array, " b"], keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """A map in [-1, 1], blurred with sigma = 10 · strength · U(0, 1) pixels of this resolution.

    Pixels without truth are blurred along, as in the released code: what they hold bleeds into
    their neighbours.

    Args:
      strength: 0 is no blur; ADDP's is `intensity`.
    """
    sigma = BLUR * strength * jax.vmap(jax.random.uniform)(keys)
    # The released code goes to [0, 1] and back, which a blur does not notice.
    return gaussian_blur(jnp.clip(image, -1, 1), sigma)


# ---- masks ---------------------------------------------------------------------------------------


class Move(NamedTuple):
    """How one mask is moved, as torchvision's RandomAffine has it.

    Attributes:
      angle: degrees, clockwise as seen.
      right, down: whole pixels.
      scale: above 1 the mask grows.
    """

    angle: Float[Array, ""]
    right: Float[Array, ""]
    down: Float[Array, ""]
    scale: Float[Array, ""]


class Box(NamedTuple):
    """What is erased of one mask, in pixels; a height and width of 0: nothing."""

    top: Int[Array, ""]
    left: Int[Array, ""]
    height: Int[Array, ""]
    width: Int[Array, ""]


def draw_move(key: Key[Array, ""], change: Float[Array, ""], size: tuple[int, int]) -> Move:
    """RandomAffine(degrees=50 i, translate=(i, i), scale=(1 − i, 1 + i)) with i = change < 1.

    Args:
      size: (height, width).
    """
    height, width = size
    angle, right, down, scale = change * jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    return Move(
        _MAX_ROTATION * angle, jnp.round(right * width), jnp.round(down * height), 1 + scale
    )


def move(mask: Float[Array, "h w 1"], by: Move) -> Float[Array, "h w 1"]:
    """Rotated and scaled about its middle, then shifted; nearest pixels, 0 from outside.

    A pixel takes the value at R⁻¹ (p − shift) / scale, p counted from the middle of the image.
    """
    height, width = mask.shape[:2]
    angle = jnp.deg2rad(by.angle)
    sine, cosine = jnp.sin(angle) / by.scale, jnp.cos(angle) / by.scale
    x = (jnp.arange(width) + 0.5 - width / 2 - by.right)[None, :]
    y = (jnp.arange(height) + 0.5 - height / 2 - by.down)[:, None]
    column = jnp.round(cosine * x + sine * y + (width / 2 - 0.5)).astype(jnp.int32)
    row = jnp.round(cosine * y - sine * x + (height / 2 - 0.5)).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside[..., None], mask[row.clip(0, height - 1), column.clip(0, width - 1)], 0)


def draw_box(key: Key[Array, ""], change: Float[Array, ""], size: tuple[int, int]) -> Box:
    """RandomErasing(p=0.5, scale=(0, i), ratio=(0.5, 2)) with i = change.

    Of ten boxes the first that is smaller than the image along both sides; nothing if none is.

    Args:
      size: (height, width).
    """
    height, width = size
    keys = jax.random.split(key, 5)
    area = height * width * change * jax.random.uniform(keys[0], (_TRIES,))
    bound = np.log(_LONGEST)
    ratio = jnp.exp(jax.random.uniform(keys[1], (_TRIES,), minval=-bound, maxval=bound))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio]))).astype(jnp.int32)
    fits = (sides < jnp.array([[height], [width]])).all(axis=0)
    erased = fits.any() & (jax.random.uniform(keys[2]) < _ERASED)
    rows, columns = jnp.where(erased, sides[:, fits.argmax()], 0)
    top = jax.random.randint(keys[3], (), 0, height - rows + 1)
    left = jax.random.randint(keys[4], (), 0, width - columns + 1)
    return Box(top, left, rows, columns)


def erase(mask: Float[Array, "h w 1"], box: Box) -> Float[Array, "h w 1"]:
    """0 inside the box."""
    row, column = (jnp.arange(n) for n in mask.shape[:2])
    in_rows = (row >= box.top) & (row < box.top + box.height)
    in_columns = (column >= box.left) & (column < box.left + box.width)
    return jnp.where((in_rows[:, None] & in_columns[None, :])[..., None], 0, mask)


def corrupt_mask(
    mask: Float[Array, "b h w 1"], strength: Float[Array, " b"], keys: Key[Array, " b"]
) -> Float[Array, "b h w 1"]:
    """Masks moved, then cut, by 0.2 · strength; strength is below 5, ADDP's is `intensity`."""
    size = mask.shape[1:3]

    def one(
        mask: Float[Array, "h w 1"], strength: Float[Array, ""], key: Key[Array, ""]
    ) -> Float[Array, "h w 1"]:
        key_move, key_box = jax.random.split(key)
        moved = move(mask, draw_move(key_move, CHANGE * strength, size))
        return erase(moved, draw_box(key_box, CHANGE * strength, size))

    return jax.vmap(one)(mask, strength, keys)


# ---- colours -------------------------------------------------------------------------------------


class Jitter(NamedTuple):
    """How one colour is changed, as torchvision's ColorJitter has it.

    Attributes:
      factors: of brightness, contrast and saturation; 1 changes nothing.
      order: which of them comes first, second, third.
    """

    factors: Float[Array, " 3"]
    order: Int[Array, " 3"]


def draw_jitter(key: Key[Array, ""], change: Float[Array, ""]) -> Jitter:
    """ColorJitter(brightness=i, contrast=i, saturation=i) with i = change."""
    key_factors, key_order = jax.random.split(key)
    step = jax.random.uniform(key_factors, (3,), minval=-1.0, maxval=1.0)
    return Jitter(1 + change * step, jax.random.permutation(key_order, 3))


def jitter(colour: Float[Array, " 3"], by: Jitter) -> Float[Array, " 3"]:
    """A colour in [0, 1], which a whole canvas has: contrast is towards the canvas's mean grey.

    On a canvas of one colour that is the colour's own grey, so contrast and saturation do the same.
    The released code rounds to eight bits after each change, which is not done here.
    """
    for step in range(3):
        which = by.order[step]
        grey = jnp.dot(jnp.asarray(_GREY), colour, precision=jax.lax.Precision.HIGHEST)
        towards, factor = jnp.where(which == 0, 0, grey), by.factors[which]
        colour = jnp.clip(factor * colour + (1 - factor) * towards, 0, 1)
    return colour


def corrupt_colour(
    colour: Float[np.ndarray, " 3"], strength: Float[Array, " b"], keys: Key[Array, " b"]
) -> Float[Array, "b 3"]:
    """The colour in [0, 1], changed by 0.2 · strength for each example."""

    def one(strength: Float[Array, ""], key: Key[Array, ""]) -> Float[Array, " 3"]:
        return jitter(jnp.asarray(colour), draw_jitter(key, CHANGE * strength))

    return jax.vmap(one)(strength, keys)
