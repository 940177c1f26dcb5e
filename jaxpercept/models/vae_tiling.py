"""Encoding and decoding of images too large for the autoencoder's memory, tile by tile.

Tiles and blending are those of diffusers' AutoencoderKL (tiled_encode and tiled_decode), for either
autoencoder: tiles start every `tile - overlap` pixels, those at the right and bottom border end
with the image, and each fades into the next across the overlap. A tile is normalised by its own
statistics, so the result differs from that of the image in one piece.

Like `encode_mean` and `decode_latents`, both functions are made to be called while tracing.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxpercept.errors import UserError
from jaxpercept.models.functional import Functional
from jaxpercept.models.vae import decode_latents, encode_mean


def encode_tiled(
    vae: Functional,
    params: Mapping[str, Any],
    x: Float[Array, "b H W i"],
    *,
    tile: int = 512,
    overlap: int | float = 0.25,
) -> Float[Array, "b h w c"]:
    """`encode_mean` in tiles of `tile` x `tile` pixels; the same where the image is no larger.

    Args:
      x: image in [-1, 1]; where it is larger than a tile, sides are multiples of the downsampling.
      tile: side in pixels, a multiple of the downsampling.
      overlap: share of a tile that it has in common with the next, at most a half, and a whole
        number of latent pixels.

    Raises:
      UserError: a size that does not fit.
    """
    factor = vae.config.downsampling
    side, common = _tile_in_latents(factor, tile, overlap)
    height, width = x.shape[1:3]
    if height <= tile and width <= tile:
        return encode_mean(vae, params, x)
    if height % factor or width % factor:
        raise UserError(
            f"an image of {height} x {width} pixels cannot be encoded in tiles; resize it to "
            f"multiples of {factor}."
        )
    rows, columns = (_spans(size // factor, side, common) for size in (height, width))
    return _run_in_tiles(
        lambda tile: encode_mean(vae, params, tile),
        x,
        rows,
        columns,
        scales=(factor, 1),
        channels=vae.config.latent_channels,
    )


def decode_tiled(
    vae: Functional,
    params: Mapping[str, Any],
    z: Float[Array, "b h w c"],
    *,
    tile: int = 512,
    overlap: int | float = 0.25,
) -> Float[Array, "b H W o"]:
    """`decode_latents` in tiles of `tile` x `tile` pixels; the same where the image is no larger.

    Args:
      z: scaled latent.
      tile, overlap: as in `encode_tiled`, in pixels of the image.

    Raises:
      UserError: a size that does not fit.
    """
    factor = vae.config.downsampling
    side, common = _tile_in_latents(factor, tile, overlap)
    if z.shape[1] <= side and z.shape[2] <= side:
        return decode_latents(vae, params, z)
    rows, columns = (_spans(size, side, common) for size in z.shape[1:3])
    return _run_in_tiles(
        lambda tile: decode_latents(vae, params, tile),
        z,
        rows,
        columns,
        scales=(1, factor),
        channels=vae.config.out_channels,
    )


def _tile_in_latents(factor: int, tile: int, overlap: int | float) -> tuple[int, int]:
    """Side of a tile and overlap, in latent pixels."""
    if tile <= 0 or tile % factor:
        raise UserError(f"tile must be a positive multiple of {factor} pixels, not {tile}.")
    side = tile // factor
    common = round(side * overlap)
    if not 0 <= overlap <= 0.5 or abs(common - side * overlap) > 1e-6:
        raise UserError(
            f"overlap must lie between 0 and 0.5 and, times tile={tile}, be a multiple of {factor} "
            f"pixels, not {overlap}."
        )
    return side, common


class _Span(NamedTuple):
    """A tile's place along one axis, in latent pixels."""

    start: int
    length: int
    rise: int  # how many it shares with the tile before
    fall: int  # and with the tile after

    @property
    def end(self) -> int:
        return self.start + self.length


def _spans(size: int, side: int, common: int) -> list[_Span]:
    """diffusers' tiles along an axis of `size` latent pixels."""
    starts = range(0, size, side - common)
    ends = [min(start + side, size) for start in starts]
    shared = [0, *(end - start for start, end in zip(starts[1:], ends, strict=False)), 0]
    return [
        _Span(start, end - start, rise, fall)
        for start, end, rise, fall in zip(starts, ends, shared, shared[1:], strict=False)
    ]


def _run_in_tiles(
    network: Callable[[Float[Array, "b th tw i"]], Float[Array, "b oh ow o"]],
    x: Float[Array, "b h w i"],
    rows: Sequence[_Span],
    columns: Sequence[_Span],
    *,
    scales: tuple[int, int],
    channels: int,
) -> Float[Array, "b H W o"]:
    """The network's outputs on all tiles, blended; `scales`: pixels per latent pixel, in and out.

    The tiles, times weights that fade, are added to the result one after the other, so that beside
    it there is memory for one tile only. Each shape of tiles is compiled once: full ones, those at
    the right, at the bottom and in the corner. Where a last tile ends within the overlap, the one
    before it is cut short as well; where that is so on both axes, there are nine shapes.
    """
    scale_in, scale_out = scales
    # Tiles that are cut short end with the image. Together with what is before them they are as
    # large as the first, so that all can be read and written alike.
    longest = (rows[0].length, columns[0].length)
    heights, widths = ([*dict.fromkeys(s.length for s in spans)] for spans in (rows, columns))

    def on_tile(
        height: int, width: int
    ) -> Callable[[Float[Array, "b th tw i"]], Float[Array, "b oh ow o"]]:
        """The network on the last `height` x `width` latent pixels; zeros before them."""
        before = [n - m for n, m in zip(longest, (height, width), strict=True)]

        def run(x: Float[Array, "b th tw i"]) -> Float[Array, "b oh ow o"]:
            y = network(x[:, before[0] * scale_in :, before[1] * scale_in :])
            top, left = (n * scale_out for n in before)
            return jnp.pad(y, ((0, 0), (top, 0), (left, 0), (0, 0)))

        return run

    networks = [on_tile(*size) for size in itertools.product(heights, widths)]
    size_in = [n * scale_in for n in longest]

    def add_tile(result: Float[Array, "b H W o"], place: tuple) -> tuple:
        index, row, column, row_weights, column_weights = place
        corner = (0, row * scale_in, column * scale_in, 0)
        tile = lax.dynamic_slice(x, corner, (x.shape[0], *size_in, x.shape[3]))
        weight = jnp.sum(row_weights[:, :, None] * column_weights[:, None, :], axis=0)
        tile = weight[None, :, :, None] * lax.switch(index, networks, tile)
        corner = (0, row * scale_out, column * scale_out, 0)
        tile += lax.dynamic_slice(result, corner, tile.shape)
        return lax.dynamic_update_slice(result, tile, corner), None

    places = [
        (
            heights.index(row.length) * len(widths) + widths.index(column.length),
            row.end - longest[0],
            column.end - longest[1],
            _row_weights(row, longest[0], scale_out),
            _column_weights(column, longest[1], scale_out),
        )
        for row, column in itertools.product(rows, columns)
    ]
    shape = (x.shape[0], rows[-1].end * scale_out, columns[-1].end * scale_out, channels)
    stacked = tuple(jnp.asarray(np.stack(values)) for values in zip(*places, strict=True))
    return lax.scan(add_tile, jnp.zeros(shape, jnp.float32), stacked)[0]


# diffusers blends a tile first with the one above, which has been blended with its left neighbour
# by then, and afterwards with its own left neighbour. So, where four tiles meet, the two above fade
# into each other twice: with the square of the ramp. A tile's weight at (y, x) is then the sum over
# its two parts, that above the bottom overlap and the bottom overlap, of row weight times column
# weight. Where a tile is shorter than `longest`, zeros come first.


def _row_weights(span: _Span, longest: int, scale: int) -> Float[np.ndarray, "2 n"]:
    """Weights of the rows, above the bottom overlap and in it."""
    fade = _fade(span, longest, scale, 1)
    above = np.arange(longest * scale) < (longest - span.fall) * scale
    return np.stack([fade * above, fade * ~above])


def _column_weights(span: _Span, longest: int, scale: int) -> Float[np.ndarray, "2 n"]:
    """Weights of the columns, above the bottom overlap and in it."""
    return np.stack([_fade(span, longest, scale, 1), _fade(span, longest, scale, 2)])


def _fade(span: _Span, longest: int, scale: int, power: int) -> Float[np.ndarray, " n"]:
    """Rising from 0 over the overlap at the start, falling from 1 over that at the end."""

    def ramp(length: int) -> Float[np.ndarray, " n"]:
        return (np.arange(length * scale, dtype=np.float32) / max(length * scale, 1)) ** power

    nothing = np.zeros((longest - span.length) * scale, np.float32)
    middle = np.ones((span.length - span.rise - span.fall) * scale, np.float32)
    return np.concatenate([nothing, ramp(span.rise), middle, 1 - ramp(span.fall)])
