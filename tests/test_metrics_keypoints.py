"""Heat-map decoding on peaks of known place; PCK against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept.errors import UserError
from jaxpercept.metrics import keypoints as metrics
from jaxpercept.metrics.keypoints import KeypointsProtocol
from jaxpercept.metrics.protocol import add

H, W, K = 40, 56, 6
locate = jax.jit(metrics.locate_keypoints, static_argnames=("refinement", "radius"))
pck_counts = jax.jit(metrics.pck_counts, static_argnames="thresholds")


def gaussians(places, sigma=2.0):
    """Heat-maps [b, H, W, k] with peaks of 1 at places [b, k, 2]."""
    y, x = np.mgrid[:H, :W]
    dx = x[..., None] - places[:, None, None, :, 0]
    dy = y[..., None] - places[:, None, None, :, 1]
    return np.exp(-(dx**2 + dy**2) / (2 * sigma**2)).astype(np.float32)


def inner_places(rng, b=4):
    return rng.uniform([8, 8], [W - 9, H - 9], (b, K, 2))


def test_refinements_come_closer_than_the_maximum(rng):
    places = inner_places(rng, b=20)
    error = {
        name: np.abs(np.asarray(locate(gaussians(places), name)[0]) - places)
        for name in ("none", "quarter", "soft")
    }
    assert error["none"].max() <= 0.5 + 1e-5
    assert error["quarter"].max() <= 0.25 + 1e-5
    assert error["soft"].max() < 0.1
    assert error["none"].mean() > 1.5 * error["quarter"].mean() > 3 * error["soft"].mean()


@pytest.mark.parametrize("refinement", ["none", "quarter", "soft"])
def test_a_peak_on_a_pixel_stays_there(rng, refinement):
    places = np.round(inner_places(rng))
    found, peak = locate(gaussians(places), refinement)
    np.testing.assert_allclose(found, places, atol=1e-4)
    np.testing.assert_allclose(peak, 1, rtol=1e-6)


def test_quarter_steps_towards_the_higher_neighbour():
    heat = np.zeros((1, H, W, 3), np.float32)
    heat[0, 10, 20] = 1
    heat[0, 10, 21, 0] = heat[0, 9, 20, 0] = 0.5  # right and up
    heat[0, 10, 19, 1] = heat[0, 11, 20, 1] = 0.5  # left and down
    heat[0, 10, 19, 2] = heat[0, 10, 21, 2] = 0.5  # neither
    found, _ = locate(heat, "quarter")
    np.testing.assert_array_equal(found[0], [[20.25, 9.75], [19.75, 10.25], [20, 10]])


@pytest.mark.parametrize("refinement", ["none", "quarter", "soft"])
def test_borders(refinement):
    corners = np.array([[[0, 0], [W - 1, 0], [0, H - 1], [W - 1, H - 1]]], float)
    found, _ = locate(gaussians(corners), refinement)
    assert np.all(np.isfinite(found))
    # Half of the window of the soft maximum is missing there.
    np.testing.assert_allclose(found, corners, atol=0.7 if refinement == "soft" else 0)


def test_the_first_of_equal_maxima_and_empty_maps():
    heat = np.zeros((1, H, W, 2), np.float32)
    heat[0, 5, 7, 0] = heat[0, 30, 40, 0] = 1
    found, peak = locate(heat, "none")
    np.testing.assert_array_equal(found[0], [[7, 5], [0, 0]])
    np.testing.assert_array_equal(peak[0], [1, 0])


def test_a_far_second_peak_does_not_pull_the_soft_maximum():
    heat = gaussians(np.array([[[12.0, 12.0]]])) + 0.9 * gaussians(np.array([[[40.0, 30.0]]]))
    found, _ = locate(heat, "soft")
    np.testing.assert_allclose(found[0, 0], [12, 12], atol=1e-3)


def reference_pck(pred, target, visible, size, thresholds):
    right = np.zeros((*visible.shape, len(thresholds)), int)
    for i, k in np.argwhere(visible):
        distance = np.hypot(*(pred[i, k] - target[i, k]))
        right[i, k] = [distance <= t * size[i] for t in thresholds]
    return right


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.5))
def test_pck_equals_loops(seed, threshold):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0, 50, (5, K, 2)).astype(np.float32)
    pred = (target + rng.normal(size=target.shape) * 6).astype(np.float32)
    visible = rng.random((5, K)) > 0.3
    size = rng.uniform(10, 40, 5).astype(np.float32)
    target[~visible] = np.nan
    limits = size[:, None] * np.float32(threshold)
    distance = np.linalg.norm(pred - target, axis=-1)
    decided = ~(np.abs(distance - limits) < 1e-4).any()  # not within rounding of the limit
    right, counted = pck_counts(pred, target, visible, size, thresholds=(threshold, 0.25))
    if decided:
        expected = reference_pck(pred, target, visible, size, (threshold,))
        np.testing.assert_array_equal(right[..., :1], expected)
    np.testing.assert_array_equal(counted, visible)
    assert not np.any(np.asarray(right)[~visible])


def test_a_keypoint_at_the_limit_is_right():
    target = np.zeros((1, 2, 2), np.float32)
    pred = np.array([[[3.0, 4.0], [3.0, 4.01]]], np.float32)
    right, _ = pck_counts(pred, target, np.ones((1, 2), bool), np.array([10.0]), thresholds=(0.5,))
    np.testing.assert_array_equal(right[0, :, 0], [1, 0])


def test_sizes():
    box = jnp.array([[10.0, 20.0, 40.0, 60.0]])
    np.testing.assert_allclose(metrics.box_size(box), [40])
    np.testing.assert_allclose(metrics.head_size(box), [30])


def record_of(rng, visible=0.7):
    return {
        "rgb": np.zeros((H, W, 3), np.uint8),
        "keypoints": inner_places(rng, b=1)[0].astype(np.float32),
        "visible": rng.random(K) < visible,
        "box": np.array([5, 5, 45, 35], np.float32),
        "head_box": np.array([5, 5, 11, 13], np.float32),
    }


@pytest.mark.parametrize(("size", "pixels"), [("box", 40), ("head", 6)])
def test_protocol_counts_visible_keypoints_of_all_images(rng, size, pixels):
    names = tuple("abcdef")
    protocol = KeypointsProtocol(thresholds=(0.1, 0.3), size=size, keypoint_names=names)
    records = [record_of(rng, visible) for visible in (0.9, 0.3, 0.6)]
    records[0]["visible"][:] = [True] * 5 + [False]
    rows, right, seen = [], np.zeros((K, 2)), np.zeros(K)
    for record in records:
        shifted = record["keypoints"] + rng.choice([0, 1, 5], (K, 1)) * [0.6, 0.8]
        rows.append(protocol.per_image(gaussians(shifted[None])[0], record))
        found = np.asarray(locate(gaussians(shifted[None]), "quarter")[0])[0]
        distance = np.linalg.norm(found - record["keypoints"], axis=-1)
        hit = (distance[:, None] <= pixels * np.array([0.1, 0.3])) & record["visible"][:, None]
        right, seen = right + hit, seen + record["visible"]
    result = protocol.summarise(add(rows))
    prefix = "pckh" if size == "head" else "pck"
    assert tuple(result) == protocol.names
    for i, title in enumerate([f"{prefix}@0.1", f"{prefix}@0.3"]):
        assert result[title] == pytest.approx(100 * right[:, i].sum() / seen.sum())
        for k, name in enumerate(names):
            expected = 100 * right[k, i] / seen[k] if seen[k] else np.nan
            assert result[f"{title}/{name}"] == pytest.approx(expected, nan_ok=True)


def test_a_perfect_prediction_an_unseen_person_and_the_trivial_one(rng):
    protocol = KeypointsProtocol()
    record = record_of(rng, visible=1.0)
    perfect = protocol.per_image(gaussians(record["keypoints"][None])[0], record)
    assert protocol.summarise(add([perfect])) == {"pck@0.05": 100, "pck@0.1": 100, "pck@0.2": 100}
    unseen = record | {"visible": np.zeros(K, bool)}
    empty = protocol.per_image(gaussians(record["keypoints"][None])[0], unseen)
    assert protocol.summarise(add([perfect, empty])) == protocol.summarise(add([perfect]))
    found = np.asarray(locate(protocol.trivial(record)[None], "none")[0])
    np.testing.assert_allclose(found[0], np.tile(record["keypoints"].mean(0), (K, 1)), atol=0.51)
    assert protocol.trivial(unseen).sum() == K


def test_mistakes_are_named(rng):
    record = record_of(rng) | {"name": "man.jpg", "box": np.array([5, 5, 5, 9], np.float32)}
    with pytest.raises(UserError, match=r"the box of man\.jpg is empty"):
        KeypointsProtocol().per_image(np.zeros((H, W, K), np.float32), record)
    with pytest.raises(UserError, match="refinement 'fine' is unknown"):
        metrics.locate_keypoints(jnp.zeros((1, H, W, K)), "fine")
    with pytest.raises(UserError, match="size 'leg' is unknown"):
        KeypointsProtocol(size="leg")
