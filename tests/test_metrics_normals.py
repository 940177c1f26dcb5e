"""Checked against NumPy in float64: arccos of the cosine, statistics of plain lists of errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpercept.errors import UserError
from jaxpercept.metrics import normals as metrics
from jaxpercept.metrics.normals import METRICS, NormalsProtocol
from jaxpercept.metrics.protocol import add

angular_error = jax.jit(metrics.angular_error)
normals_metrics = jax.jit(metrics.normals_metrics)
H, W = 24, 31  # one shape, so that everything compiles once


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scene(rng, invalid=0.3, spread=0.4):
    """A prediction and a record: loosely related normals, zeros where there is no truth."""
    target = unit(rng.normal(size=(H, W, 3)))
    pred = unit(target + spread * rng.random((H, W, 1)) * rng.normal(size=(H, W, 3)))
    missing = rng.random((H, W, 1)) < invalid / 2
    record = {
        "normals": np.where(missing, 0, target).astype(np.float32),
        "valid": rng.random((H, W, 1)) > invalid / 2,
    }
    return pred.astype(np.float32), record


def reference_errors(pred, record):
    """Degrees, of the pixels with truth."""
    target = record["normals"].astype(np.float64)
    mask = record["valid"][..., 0] & (np.linalg.norm(target, axis=-1) > 0)
    p, t = pred.astype(np.float64)[mask], target[mask]
    cosine = (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def reference_metrics(errors):
    return {
        "mean": np.mean(errors),
        "median": np.median(errors),
        "rmse": np.sqrt(np.mean(errors**2)),
        **{f"a{t:g}": 100 * np.mean(errors < t) for t in (5, 7.5, 11.25, 22.5, 30)},
    }


def assert_metrics(ours, expected, rtol=1e-5, **tolerance):
    assert tuple(ours) == METRICS
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, err_msg=name, **tolerance)


def test_errors_equal_arccos_of_the_cosine(rng):
    pred = rng.normal(size=(2, H, W, 3)) * np.exp(rng.normal(size=(2, H, W, 1)))
    target = rng.normal(size=(2, H, W, 3)) * np.exp(rng.normal(size=(2, H, W, 1)))
    pred[0, 0], target[0, 0] = 3 * target[1, 0], target[1, 0]
    pred[0, 1], target[0, 1] = -3 * target[1, 1], target[1, 1]
    pred, target = pred.astype(np.float32), target.astype(np.float32)
    errors = angular_error(pred, target)
    for i in range(2):
        record = {"normals": target[i], "valid": np.ones((H, W, 1), bool)}
        expected = reference_errors(pred[i], record)
        np.testing.assert_allclose(errors[i].ravel(), expected, atol=3e-5)
    np.testing.assert_allclose(errors[0, 0], 0, atol=2e-5)
    np.testing.assert_allclose(errors[0, 1], 180, atol=2e-5)


def test_small_angles_keep_their_digits():
    """In float32, the arccos of the cosine gives 0 or 0.02 here."""
    degrees = np.linspace(1e-3, 0.1, H * W).reshape(1, H, W)
    angle = np.radians(degrees)
    pred = np.stack([np.sin(angle), np.zeros_like(angle), np.cos(angle)], axis=-1)
    target = np.broadcast_to(np.array([0.0, 0.0, 1.0], np.float32), pred.shape)
    errors = angular_error(pred.astype(np.float32), target)
    np.testing.assert_allclose(errors[..., 0], degrees, rtol=1e-5)


def test_a_vector_without_direction_is_at_a_right_angle(rng):
    pred, record = scene(rng)
    pred[:] = 0
    assert np.all(np.asarray(angular_error(pred[None], record["normals"][None])) == 90)


def test_thresholds_are_strict():
    """An error of exactly 5 degrees is not below 5 degrees."""
    errors = np.full((5, H, W, 1), 200, np.float32)
    for i, threshold in enumerate(metrics.THRESHOLDS):
        errors[i, 0, :2, 0] = threshold, np.nextafter(np.float32(threshold), np.float32(0))
    ours = normals_metrics(errors, errors < 200)
    for i, threshold in enumerate(metrics.THRESHOLDS):
        assert ours[f"a{threshold:g}"][i] == 50
    sums = jax.jit(metrics.angular_sums)(errors, errors < 200)
    np.testing.assert_array_equal(sums["below"].diagonal(), 1)


@pytest.mark.parametrize("pixels", [1, 2, 5, 6])
def test_median_is_the_middle_or_the_mean_of_the_middle_two(rng, pixels):
    errors = rng.uniform(0, 180, (1, H, W, 1)).astype(np.float32)
    mask = np.zeros(errors.shape, bool)
    mask.ravel()[rng.permutation(mask.size)[:pixels]] = True
    median = normals_metrics(errors, mask)["median"][0]
    np.testing.assert_allclose(median, np.median(errors[mask]), rtol=1e-6)
    pooled = metrics.pooled_metrics(add(rows_of(jax.jit(metrics.angular_sums)(errors, mask))))
    np.testing.assert_allclose(pooled["median"], np.median(errors[mask]), atol=6e-4)


def rows_of(batched):
    return [{name: np.asarray(x[i]) for name, x in batched.items()} for i in range(1)]


def test_per_image_is_the_mean_over_images(rng):
    scenes = [scene(rng, spread=s) for s in (0.1, 0.5, 2.0)]
    protocol = NormalsProtocol("per_image")
    rows = [protocol.per_image(*pair) for pair in scenes]
    expected = [reference_metrics(reference_errors(*pair)) for pair in scenes]
    for row, one in zip(rows, expected, strict=True):
        assert_metrics({name: row[name] for name in METRICS}, one)
    means = {name: np.mean([one[name] for one in expected]) for name in METRICS}
    assert_metrics(protocol.summarise(add(rows)), means)


def test_pooled_is_of_all_pixels(rng):
    scenes = [scene(rng, spread=s, invalid=i) for s, i in ((0.1, 0.1), (0.5, 0.9), (2.0, 0.4))]
    protocol = NormalsProtocol("pooled")
    rows = [protocol.per_image(*pair) for pair in scenes]
    pooled = protocol.summarise(add(rows))
    expected = reference_metrics(np.concatenate([reference_errors(*pair) for pair in scenes]))
    median = expected.pop("median")
    assert_metrics(pooled, expected)
    # Half a bin, and rounding at its edges.
    assert abs(pooled["median"] - median) < metrics.BIN / 2 + 5e-5
    per_image = NormalsProtocol("per_image").summarise(add(rows))
    assert abs(per_image["median"] - median) > 0.1  # the two protocols are not interchangeable
    # Neither the order nor the split over hosts matters.
    split = add([add(rows[:1]), add(rows[:0:-1])])
    assert protocol.summarise(split) == pytest.approx(pooled, rel=1e-12)


def test_compat_rounds_each_image_first(rng):
    scenes = [scene(rng) for _ in range(3)]
    protocol = NormalsProtocol("per_image", compat=True)
    rows = [protocol.per_image(*pair) for pair in scenes]
    plain = [NormalsProtocol("per_image").per_image(*pair) for pair in scenes]
    for name in METRICS:
        assert [row[name] for row in rows] == [round(row[name], 4) for row in plain]
        mean = np.mean([round(row[name], 4) for row in plain])
        assert protocol.summarise(add(rows))[name] == pytest.approx(mean, rel=1e-12)
    assert any(row[name] != one[name] for row, one in zip(rows, plain, strict=True) for name in row)


@pytest.mark.parametrize("average", ["per_image", "pooled"])
def test_an_image_without_truth_weighs_nothing(rng, average):
    protocol = NormalsProtocol(average)
    row = protocol.per_image(*scene(rng))
    pred, record = scene(rng)
    empty = protocol.per_image(pred, record | {"normals": np.zeros((H, W, 3), np.float32)})
    assert all(np.all(np.asarray(value) == 0) for value in empty.values())
    assert protocol.summarise(add([row, empty])) == protocol.summarise(add([row]))
    with pytest.raises(UserError, match="no image has a valid pixel"):
        protocol.summarise(add([empty]))


@pytest.mark.parametrize("average", ["per_image", "pooled"])
def test_a_damaged_prediction_is_seen(rng, average):
    pred, record = scene(rng, invalid=0)
    pred[3, 4] = np.nan
    protocol = NormalsProtocol(average)
    assert np.isnan(protocol.summarise(add([protocol.per_image(pred, record)]))["mean"])


def test_trivial_prediction_has_the_greatest_mean_cosine(rng):
    _, record = scene(rng)
    record["normals"] += (record["normals"] != 0) * np.array([0, 0.3, 0.8], np.float32)
    constant = NormalsProtocol().trivial(record)
    assert constant.shape == (H, W, 3)
    assert np.ptp(constant, axis=(0, 1)).max() == 0
    mask = record["valid"][..., 0] & (record["normals"] != 0).any(-1)
    truth = record["normals"][mask].astype(np.float64)
    best = (truth @ constant[0, 0]).mean()
    others = unit(rng.normal(size=(500, 3)))
    assert np.linalg.norm(constant[0, 0]) == pytest.approx(1, rel=1e-6)
    assert (truth @ others.T).mean(axis=0).max() <= best + 1e-6


def test_opposite_normals_have_a_constant_too():
    target = jnp.array([[[[1.0, 0, 0], [-1.0, 0, 0]]]])
    constant = metrics.mean_normal(target, jnp.ones((1, 1, 2, 1), bool))
    np.testing.assert_array_equal(constant[0, 0, 0], [0, 0, 1])


def test_unknown_protocols_are_refused():
    with pytest.raises(UserError, match="'both' is unknown: use per_image or pooled"):
        NormalsProtocol("both")
    with pytest.raises(UserError, match="compat"):
        NormalsProtocol("pooled", compat=True)
