"""Frames of a video predicted one by one: less flicker, one scale.

    scale, latent = SharedScale(), None
    for frame in frames:
        out = pipe(frame, latents=next_latents(noise, latent))
        latent = out.latent
        aligned.append(scale(out.prediction[0]))
    depth = normalise(np.stack(aligned), scale.range)

Two causes of flicker are removed: noise drawn anew for each frame, and the scale and shift that an
affine-invariant prediction chooses anew for each frame. NumPy only; predictions are on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from jaxpercept.errors import UserError
from jaxpercept.inference.tiles import block_means, robust_weights

_TURNS = 10
# A mean deviation below this part of [0, 1] has no shape to align by: the frame is constant.
_CONSTANT = 2e-3
# Differences below this part of the spread are not worth calling outliers.
_NEGLIGIBLE = 1e-3
_TINY = float(np.finfo(np.float64).tiny)


def next_latents(
    noise: Float[np.ndarray, "n h w c"],
    previous: Float[np.ndarray, "n i j c"] | None,
    strength: float = 0.1,
    *,
    preserve_variance: bool = False,
) -> Float[np.ndarray, "n h w c"]:
    """What the network starts from: the same noise for all frames, warmed by the last prediction.

    (1 - strength) noise + strength previous, as in the video example of diffusers' Marigold
    documentation (`using-diffusers/marigold_usage.md`). With unit noise and an independent latent
    of variance v its variance is (1 - strength)^2 + strength^2 v: 0.82 for the default strength
    and v = 1, less than the 1 that networks are trained to start from.

    Args:
        noise: drawn once for the whole video.
        previous: the latent predicted for the last frame; None for the first one.
        strength: in [0, 1].
        preserve_variance: weigh the noise with sqrt(1 - strength^2) instead: variance 1 for v = 1.

    Raises:
        UserError: a strength outside [0, 1], or frames of different sizes.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the strength of the last latent is {strength}: give one in [0, 1].")
    if previous is None:
        return noise
    if previous.shape != noise.shape:
        raise UserError(
            f"the last latent is {previous.shape} and the noise {noise.shape}: all frames of a "
            "video must have one size."
        )
    keep = np.sqrt(1 - strength**2) if preserve_variance else 1 - strength
    return (keep * noise + strength * previous).astype(noise.dtype)


class _Line(NamedTuple):
    """scale * prediction + shift, and how badly it fits.

    Attributes:
        scale, shift: the line.
        misfit: mean absolute residual relative to the target's mean absolute deviation: about 1
            or more for unrelated maps.
    """

    scale: float
    shift: float
    misfit: float = 0.0


class SharedScale:
    """Brings the frames of a video, predicted up to scale and shift, to one scale.

    Each frame is fitted to the previous aligned one by a robust line on block means. A global
    motion of the picture of up to about one block is fitted along, so that a pan is not taken for
    a change of scale. The line's scale is the ratio of both maps' spreads around the fit: that of
    ordinary least squares is too small by the part of noise, and over hundreds of frames the
    errors would multiply to 0. What random error remains cannot add up either: median and spread
    are pulled slowly to those of the scene's first frame.

    The first frame of a scene stays as it is. A frame that no line brings near the previous one
    begins a new scene.

    Args:
        pull: the part of the way back to the first frame's median and spread that each frame goes;
            0: none. True changes of the scene are undone alike, with a time constant of 1 / pull
            frames.
        cut: a new scene begins where the mean residual exceeds this part of the mean deviation. Of
            pairs of unrelated rooms (NYUv2) 4 % stay below the default; of the consecutive frames
            of a moving camera (TUM) all do, and 90 % below a half of it.

    Attributes:
        range: least and largest aligned value so far, None before the first frame.
        cuts: numbers of the frames that began a new scene, the first frame's 0 not among them.
    """

    def __init__(self, *, pull: float = 0.002, cut: float = 0.6):
        if not 0 <= pull < 1 or cut <= 0:
            raise UserError(f"give pull in [0, 1) and cut > 0, not {pull} and {cut}.")
        self._pull, self._cut = pull, cut
        self.range: tuple[float, float] | None = None
        self.cuts: list[int] = []
        self._frames = 0

    def __call__(self, prediction: Float[np.ndarray, "h w 1"]) -> Float32[np.ndarray, "h w 1"]:
        """The next frame's prediction on the scene's scale, not clipped.

        Raises:
            UserError: the frame's size differs from the first one's.
        """
        blocks = block_means(prediction[..., 0])
        if self._frames == 0:
            self._size = prediction.shape
            line = self._restart(blocks)
        elif prediction.shape != self._size:
            raise UserError(
                f"frame {self._frames} is {prediction.shape}, the first {self._size}: all frames "
                "of a video must have one size."
            )
        else:
            line = self._fit(blocks)
            if line.misfit > self._cut:
                self.cuts.append(self._frames)
                line = self._restart(blocks)
            else:
                line = self._pulled(line, blocks)
        self._frames += 1
        self._last, self._scale = line.scale * blocks + line.shift, line.scale
        aligned = np.float32(line.scale) * prediction.astype(np.float32) + np.float32(line.shift)
        low, high = self.range or (np.inf, -np.inf)
        self.range = min(low, float(aligned.min())), max(high, float(aligned.max()))
        return aligned

    def _restart(self, blocks: Float[np.ndarray, "i j"]) -> _Line:
        self._first = _centre_and_spread(blocks)
        return _Line(1.0, 0.0)

    def _fit(self, blocks: Float[np.ndarray, "i j"]) -> _Line:
        constant = [_centre_and_spread(values)[1] < _CONSTANT for values in (blocks, self._last)]
        if all(constant):
            # Nothing says otherwise: the scale is still the last one.
            return _Line(self._scale, float(self._last.mean() - self._scale * blocks.mean()))
        if any(constant):
            return _Line(1.0, 0.0, np.inf)
        return _fit_line(blocks, self._last)

    def _pulled(self, line: _Line, blocks: Float[np.ndarray, "i j"]) -> _Line:
        """The line with the aligned frame's median and spread a step nearer to the first's."""
        centre, spread = _centre_and_spread(line.scale * blocks + line.shift)
        first_centre, first_spread = self._first
        factor = 1.0
        if min(spread, first_spread) > _CONSTANT:
            factor = (first_spread / spread) ** self._pull
        # Scaled around the centre, which then moves by itself.
        shift = (line.shift - centre) * factor + centre + self._pull * (first_centre - centre)
        return line._replace(scale=line.scale * factor, shift=shift)


def _centre_and_spread(values: Float[np.ndarray, "i j"]) -> tuple[float, float]:
    """Median, and mean absolute deviation from it."""
    centre = np.median(values)
    return float(centre), float(np.abs(values - centre).mean())


def _fit_line(source: Float[np.ndarray, "i j"], target: Float[np.ndarray, "i j"]) -> _Line:
    """Robust line from source to target, by turns with the motion of the picture.

    Each turn takes the motion from what the last line left, then scale and shift from the target
    without that motion, then Cauchy's weights. The first turn sees no motion: where only edges
    between flat parts move, it finds the parts unchanged and the edges outliers.
    """
    x, y = source.ravel(), target.ravel()
    spread = _centre_and_spread(target)[1]
    weights, scale, shift = np.ones_like(x), 1.0, 0.0
    for turn in range(_TURNS):
        moved = y
        if turn > 0:
            # A picture that moves by v differs by v times its gradient halfway, up to third order.
            slopes = _slopes((scale * source + target) / 2)
            root = np.sqrt(weights)[:, None]
            residual = (y - scale * x - shift)[:, None]
            velocity = np.linalg.lstsq(root * slopes, root * residual, rcond=None)[0]
            moved = y - (slopes @ velocity)[:, 0]
        mean_x, mean_y = (np.average(values, weights=weights) for values in (x, moved))
        energy_x, energy_y = weights @ (x - mean_x) ** 2, weights @ (moved - mean_y) ** 2
        scale = np.sqrt(energy_y / max(energy_x, _TINY))
        shift = mean_y - scale * mean_x
        residual = moved - scale * x - shift
        weights = robust_weights(residual, _NEGLIGIBLE * spread)
    return _Line(float(scale), float(shift), float(np.abs(residual).mean() / spread))


def _slopes(values: Float[np.ndarray, "i j"]) -> Float[np.ndarray, "k v"]:
    """Gradient of each element, along the axes that have one."""
    axes = [axis for axis in range(2) if values.shape[axis] > 1]
    return np.stack([np.gradient(values, axis=axis).ravel() for axis in axes], axis=1)


def normalise(
    frames: Float[np.ndarray, "n h w 1"], limits: tuple[float, float] | None = None
) -> Float32[np.ndarray, "n h w 1"]:
    """A whole sequence to [0, 1] by one affine map.

    Args:
        frames: aligned frames, all or some of them.
        limits: the sequence's least and largest value, `SharedScale.range`; None: those of
            `frames`. Values outside are clipped; a constant sequence becomes 0.
    """
    low, high = limits or (float(frames.min()), float(frames.max()))
    span = high - low if high > low else 1.0
    return np.clip((frames.astype(np.float32) - low) / span, 0, 1).astype(np.float32)


def flicker(
    frames: Float[np.ndarray, "n h w c"], truth: Float[np.ndarray, "n h w c"] | None = None
) -> float:
    """Mean absolute difference of consecutive frames that no true change explains.

    In the unit of the frames: compare sequences of one range.

    Args:
        frames: the predictions.
        truth: what they should show, up to one scale and shift for the whole sequence, which are
            fitted; None for a static scene.

    Raises:
        UserError: fewer than two frames.
    """
    if len(frames) < 2:
        raise UserError(f"flicker needs two frames, not {len(frames)}.")
    change = np.diff(frames.astype(np.float64), axis=0)
    if truth is not None:
        deviation = truth - truth.mean(dtype=np.float64)
        energy = (deviation**2).sum()
        scale = (deviation * frames).sum() / energy if energy > 0 else 0.0
        change -= scale * np.diff(truth.astype(np.float64), axis=0)
    return float(np.abs(change).mean())
