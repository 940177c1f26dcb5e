"""Sequences of frames: one scale, no drift, and what flicker means."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpercept.errors import UserError
from jaxpercept.inference.sequence import SharedScale, flicker, next_latents, normalise


def bumps(size):
    y, x = np.mgrid[: size[0], : size[1]] / 100.0
    return np.sin(3 * x) * np.cos(4 * y) + 0.5 * np.sin(9 * x + 2 * y) + 0.7 * x


def rooms(rng, size):
    """Flat parts of random depth with sharp edges."""
    cells = rng.uniform(0, 1, (size[0] // 30 + 1, size[1] // 25 + 1))
    return np.kron(cells, np.ones((30, 25)))[: size[0], : size[1]]


def unit_range(values):
    return (values - values.min()) / np.ptp(values)


def predicted(rng, frames, noise=0.0):
    """Frames [n, h, w] each on a scale of its own, with noise."""
    scales, shifts = rng.uniform(0.5, 1.5, (2, len(frames), 1, 1))
    errors = noise * rng.normal(size=frames.shape)
    return (scales * (frames + errors) + shifts - 1)[..., None].astype(np.float32)


def aligned(frames, **options):
    scale = SharedScale(**options)
    return np.stack([scale(frame) for frame in frames]), scale


def to_spread(frames):
    """One affine map of the sequence, so that a smaller scale is not taken for less flicker."""
    return (frames - frames.mean()) / frames.std()


def slopes(frames, truth):
    """Scale and shift of each frame against its truth."""
    return np.array(
        [np.polyfit(t.ravel(), f.ravel(), 1) for f, t in zip(frames, truth, strict=True)]
    )


def worst_error(frames, truth):
    """Largest of the frames' mean errors after one affine map of all, relative to the spread."""
    frames, truth = to_spread(frames)[..., 0], to_spread(truth)
    line = np.polyfit(frames.ravel(), truth.ravel(), 1)
    return np.abs(np.polyval(line, frames) - truth).mean(axis=(1, 2)).max()


def one_by_one(frames):
    """The usual remedy: each frame to its own range."""
    return np.stack([unit_range(frame) for frame in frames])


def test_latents_are_those_of_the_documentation(rng):
    noise, last = rng.normal(size=(2, 1, 8, 6, 4)).astype(np.float32)
    np.testing.assert_array_equal(next_latents(noise, None), noise)
    warm = next_latents(noise, last)
    assert warm.dtype == np.float32
    np.testing.assert_allclose(warm, 0.9 * noise + 0.1 * last, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(next_latents(noise, last, 0.0), noise)
    np.testing.assert_allclose(next_latents(noise, last, 1.0), last)


@pytest.mark.parametrize("strength", [0.1, 0.6])
def test_variance_of_latents(rng, strength):
    noise, last = rng.normal(size=(2, 1, 256, 256, 4)).astype(np.float32)
    plain = next_latents(noise, last, strength)
    np.testing.assert_allclose(plain.var(), (1 - strength) ** 2 + strength**2, rtol=0.02)
    kept = next_latents(noise, last, strength, preserve_variance=True)
    np.testing.assert_allclose(kept.var(), 1, rtol=0.02)
    # The last prediction counts as much.
    np.testing.assert_allclose(np.mean(kept * last), strength, atol=0.02)


def test_latents_refused(rng):
    noise = np.zeros((1, 4, 4, 4), np.float32)
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        next_latents(noise, noise, 1.1)
    with pytest.raises(UserError, match="one size"):
        next_latents(noise, np.zeros((1, 4, 5, 4), np.float32))


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_static_scene_stops_flickering(rng, noise):
    scene = unit_range(bumps((97, 131)) + rooms(rng, (97, 131)))
    truth = np.repeat(scene[None], 40, axis=0)
    frames = predicted(rng, truth, noise)
    result, scale = aligned(frames)
    assert scale.cuts == []
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result[0], frames[0])
    assert scale.range == (result.min(), result.max())
    before, after = flicker(to_spread(frames)), flicker(to_spread(result))
    # What remains is the noise; 0.03 of before.
    assert after < (0.08 if noise else 1e-3) * before
    # And the sequence is on the first frame's scale.
    line = slopes(result, truth)
    np.testing.assert_allclose(line, np.broadcast_to(line[0], line.shape), atol=0.01)


def test_a_moving_object_does_not_change_the_scale(rng):
    truth = np.repeat(unit_range(rooms(rng, (120, 160)) + bumps((120, 160)))[None], 30, axis=0)
    for i, frame in enumerate(truth):
        frame[30:80, 3 * i : 3 * i + 50] = 0.1
    result, scale = aligned(predicted(rng, truth, 0.003))
    assert scale.cuts == []
    line = slopes(result, truth)
    np.testing.assert_allclose(line[:, 0], line[0, 0], rtol=0.04)
    assert flicker(to_spread(result), truth[..., None]) < 0.5 * flicker(to_spread(result))


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("kind", ["bumps", "rooms"])
def test_a_slow_pan(rng, kind, step):
    height, width, count = 120, 160, 60
    size = (height, width + step * count)
    scene = unit_range(bumps(size) if kind == "bumps" else rooms(rng, size))
    truth = np.stack([scene[:, step * i : step * i + width] for i in range(count)])
    frames = predicted(rng, truth, 0.002)
    result, scale = aligned(frames, pull=0.0)
    assert scale.cuts == []
    # 0.003 to 0.02; frames in their own ranges have 0.1 and more, as their content changes.
    assert worst_error(result, truth) < 0.05
    if kind == "bumps":
        assert worst_error(one_by_one(frames), truth) > 0.08
    # The pull undoes a part of true changes, slowly.
    gentle = aligned(frames)[0]
    assert worst_error(gentle, truth) < 0.15
    assert flicker(to_spread(gentle), truth[..., None]) < 0.1 * flicker(
        to_spread(frames), truth[..., None]
    )


def test_a_cut_starts_a_new_scale(rng):
    size = (96, 128)
    first = unit_range(bumps(size))
    second = 1 - unit_range(rooms(rng, size) + 0.3 * bumps(size)[::-1])
    truth = np.stack([first] * 12 + [second] * 12)
    frames = predicted(rng, truth, 0.003)
    result, scale = aligned(frames)
    assert scale.cuts == [12]
    np.testing.assert_array_equal(result[12], frames[12])
    for scene in (np.s_[:12], np.s_[12:]):
        line = slopes(result[scene], truth[scene])
        np.testing.assert_allclose(line, np.broadcast_to(line[0], line.shape), atol=0.02)


def test_constant_frames(rng):
    scene = unit_range(bumps((40, 50)))[..., None].astype(np.float32)
    flat = np.full_like(scene, 0.4)
    noisy = (0.7 + 1e-3 * rng.normal(size=flat.shape)).astype(np.float32)
    frames = np.stack([flat, flat + 0.2, noisy, scene, 0.5 * scene, flat, scene])
    result, scale = aligned(frames)
    assert np.isfinite(result).all()
    # The constant frames of one scene stay one constant.
    np.testing.assert_allclose(result[:3], 0.4, atol=0.02)
    np.testing.assert_allclose(result[4], result[3], atol=0.01)
    assert scale.cuts == [3, 5, 6]


def test_saturated_sky(rng):
    """More than half of all pixels have one value, before scale and shift."""
    scene = bumps((90, 120)) / 4
    scene[:60] = 1
    truth = np.repeat(scene[None], 20, axis=0)
    result, scale = aligned(predicted(rng, truth))
    assert scale.cuts == []
    line = slopes(result, truth)
    np.testing.assert_allclose(line, np.broadcast_to(line[0], line.shape), atol=0.01)


def test_no_drift_over_500_frames(rng):
    scene = unit_range(bumps((33, 41)))
    truth = np.repeat(scene[None], 500, axis=0)
    # Noise of 2 % of the range, on blocks of one pixel: nothing averages it.
    frames = predicted(rng, truth, 0.02)
    result, scale = aligned(frames)
    assert scale.cuts == []
    line = slopes(result, truth)
    # About 0.03; a least-squares scale, too small by the noise's part, goes on shrinking.
    np.testing.assert_allclose(line[:, 0] / line[0, 0], 1, atol=0.1)
    np.testing.assert_allclose(line[:, 1] - line[0, 1], 0, atol=0.1)


def test_the_pull_brings_a_wrong_scale_back(rng):
    scene = unit_range(bumps((40, 50)))[..., None].astype(np.float32)
    results = {}
    for pull in (0.0, 0.03):
        scale = SharedScale(pull=pull)
        scale(scene)
        # A change in small steps, which no single fit can tell from a true one.
        scale._last = 0.7 * scale._last + 0.2
        results[pull] = np.stack([scale(scene) for _ in range(200)])
    np.testing.assert_allclose(
        results[0.0], np.broadcast_to(0.7 * scene + 0.2, (200, 40, 50, 1)), atol=1e-3
    )
    np.testing.assert_allclose(results[0.03][-1], scene, atol=5e-3)
    # Not at once.
    assert np.abs(np.diff(results[0.03], axis=0)).max() < 0.01


def test_scale_refuses(rng):
    for options in ({"pull": 1.0}, {"pull": -0.1}, {"cut": 0.0}):
        with pytest.raises(UserError, match="pull"):
            SharedScale(**options)
    scale = SharedScale()
    assert scale.range is None
    scale(np.zeros((4, 5, 1), np.float32))
    with pytest.raises(UserError, match=r"frame 1 is .*one size"):
        scale(np.zeros((5, 5, 1), np.float32))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (40, 1)])
def test_tiny_frames(rng, size):
    result, _ = aligned(predicted(rng, np.repeat(rng.uniform(0, 1, (1, *size)), 3, axis=0)))
    assert np.isfinite(result).all()
    assert flicker(result) < 1e-5


def test_normalise_is_one_affine_map(rng):
    frames = rng.uniform(-3, 5, (4, 6, 7, 1)).astype(np.float32)
    result = normalise(frames)
    assert result.dtype == np.float32
    assert (result.min(), result.max()) == (0, 1)
    np.testing.assert_allclose(
        np.diff(result.ravel()), np.diff(frames.ravel()) / np.ptp(frames), atol=1e-6
    )
    # With the limits of the sequence, frame by frame.
    limits = float(frames.min()), float(frames.max())
    np.testing.assert_array_equal(normalise(frames[1:2], limits), result[1:2])
    assert (normalise(np.full_like(frames, 7)) == 0).all()


def test_flicker(rng):
    frames = np.zeros((3, 4, 5, 1), np.float32)
    assert flicker(frames) == 0
    frames[1] = 0.5
    assert flicker(frames) == pytest.approx(0.5)
    # True changes do not count, in any unit.
    truth = rng.uniform(1, 9, (6, 4, 5, 1))
    assert flicker(3 * truth + 2, truth) == pytest.approx(0, abs=1e-9)
    assert flicker(truth, np.ones_like(truth)) == pytest.approx(flicker(truth))
    with pytest.raises(UserError, match="two frames"):
        flicker(frames[:1])


@pytest.mark.skipif("JAXPERCEPT_DATA" not in os.environ, reason="no real data on this machine")
def test_a_pan_over_a_real_room(rng):
    folder = Path(os.environ["JAXPERCEPT_DATA"]) / "nyuv2" / "depth"
    figures = []
    for number in rng.integers(1, 1400, 5):
        scene = unit_range(np.asarray(Image.open(folder / f"{number:04d}.png"), np.float32))
        truth = np.stack([scene[:, 2 * i : 2 * i + 220] for i in range(50)])
        frames = predicted(rng, truth, 0.005)
        result, scale = aligned(frames)
        assert scale.cuts == []
        after, before = (flicker(to_spread(x), truth[..., None]) for x in (result, frames))
        figures.append([after / before, worst_error(result, truth), worst_error(frames, truth)])
    print(np.round(figures, 4))
    ratio, error, error_before = np.median(figures, axis=0)
    # About 0.03 and 0.03, mostly the noise.
    assert ratio < 0.1
    assert error < 0.1 * error_before
