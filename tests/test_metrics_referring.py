"""Overlap of referred objects: by sets of pixels, by hand, and by ADDP's rule step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxpercept.errors import UserError
from jaxpercept.metrics.protocol import add
from jaxpercept.metrics.referring import (
    METRICS,
    ReferringProtocol,
    ReleasedProtocol,
    image_scores,
    overlap,
    released_mask,
    released_truth,
)

PROTOCOL = ReferringProtocol()


def blob(rng, size=(14, 19)):
    """A rectangle."""
    mask = np.zeros((*size, 1), np.float32)
    top, left = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
    height, width = rng.integers(2, 9, 2)
    mask[top : top + height, left : left + width] = 1
    return mask


def example(rng, size=(14, 19)):
    """A score, and a record with pixels that do not count."""
    score = (0.7 * blob(rng, size) + 0.3 * rng.random((*size, 1))).astype(np.float32)
    valid = rng.random((*size, 1)) > 0.1
    return score, {"referred": blob(rng, size), "valid": valid, "name": "a"}


def pixels(mask, record):
    return {tuple(p) for p in np.argwhere(np.asarray(mask) & record["valid"])}


def reference(pairs):
    """From sets of pixels."""
    found = [(pixels(s > 0.5, r), pixels(r["referred"] > 0.5, r)) for s, r in pairs]
    ious = [len(p & t) / len(p | t) if p | t else 0.0 for p, t in found]
    result = {
        "oiou": sum(len(p & t) for p, t in found) / sum(len(p | t) for p, t in found),
        "miou": np.mean(ious),
    }
    return result | {f"p@0.{k}": np.mean([iou > k / 10 for iou in ious]) for k in range(5, 10)}


def summary(protocol, pairs):
    return protocol.summarise(add(protocol.per_image(*pair) for pair in pairs))


def test_scores_equal_sets_of_pixels(rng):
    pairs = [example(rng, rng.integers(6, 20, 2)) for _ in range(12)]
    for score, record in pairs[:6]:  # some that are nearly right
        score[...] = np.where(rng.random(score.shape) < 0.05, 1 - record["referred"], score / 2)
        score[...] = np.maximum(score, 0.9 * record["referred"])
    result = summary(PROTOCOL, pairs)
    assert tuple(result) == PROTOCOL.names == METRICS
    assert result == pytest.approx(reference(pairs))
    assert result["p@0.5"] > 0
    halves = add([add(PROTOCOL.per_image(*p) for p in part) for part in (pairs[5:], pairs[:5])])
    assert PROTOCOL.summarise(halves) == pytest.approx(result, rel=1e-15)
    for pair in pairs:
        row = PROTOCOL.per_image(*pair)
        alone = reference([pair])
        assert {k: row[k] for k in METRICS[1:]} == pytest.approx({k: alone[k] for k in METRICS[1:]})
        assert "oiou" not in row  # an image has one IoU


def test_by_hand():
    """Large objects weigh most in oIoU; P is of IoUs above the limit."""
    rows = []
    for hits, missed, wrong in ((7, 2, 1), (1, 0, 1), (90, 5, 5)):
        truth = np.zeros((1, 120, 1), np.float32)
        truth[0, : hits + missed] = 1
        score = np.zeros_like(truth)
        score[0, missed : hits + missed + wrong] = 0.6
        record = {"referred": truth, "valid": np.ones(truth.shape, bool)}
        rows.append(PROTOCOL.per_image(score, record))
    assert [row["intersection"] for row in rows] == [7, 1, 90]
    assert [row["union"] for row in rows] == [10, 2, 100]
    result = PROTOCOL.summarise(add(rows))
    assert result["oiou"] == pytest.approx(98 / 112)
    assert result["miou"] == pytest.approx((0.7 + 0.5 + 0.9) / 3)
    shares = [result[f"p@0.{k}"] for k in range(5, 10)]
    assert shares == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])


def test_empty_masks(rng):
    """Nothing where nothing is has no overlap; an image without valid pixels weighs nothing."""
    score, record = example(rng)
    nothing = np.zeros_like(score)
    row = PROTOCOL.per_image(nothing, record | {"referred": nothing})
    assert row == {"intersection": 0, "union": 0, "images": 1} | {
        "valid_pixels": int(record["valid"].sum()),
        **dict.fromkeys(METRICS[1:], 0.0),
    }
    assert PROTOCOL.summarise(add([row])) == dict.fromkeys(METRICS, 0.0)
    unknown = PROTOCOL.per_image(score, record | {"valid": np.zeros(score.shape, bool)})
    one = PROTOCOL.per_image(score, record)
    assert PROTOCOL.summarise(add([one, unknown])) == PROTOCOL.summarise(add([one]))
    with pytest.raises(UserError, match="no image has a valid pixel"):
        PROTOCOL.summarise(add([unknown]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_iou_s_properties(seed):
    """Symmetric, in [0, 1], 1 for equal masks, and never lower for one hit more."""
    rng = np.random.default_rng(seed)
    one, other = rng.random((2, 9, 11, 1)) < rng.random((2, 1, 1, 1))
    valid = rng.random((9, 11, 1)) < 0.9

    def iou(pred, target):
        counts = overlap(pred[None], target[None], valid[None])
        return image_scores(counts["intersection"].item(), counts["union"].item())["miou"]

    assert 0 <= iou(one, other) <= 1
    assert iou(one, other) == iou(other, one)
    if (one & valid).any():
        assert iou(one, one) == 1
    missed = np.argwhere(other & ~one)
    if len(missed):
        better = one.copy()
        better[tuple(missed[rng.integers(len(missed))])] = True
        assert iou(better, other) >= iou(one, other)
    scores = image_scores(*sorted(rng.integers(1, 50, 2).tolist()))
    above = [scores[f"p@0.{k}"] for k in range(5, 10)]
    assert above == sorted(above, reverse=True)


def test_the_device_counts_each_image_alone(rng):
    pairs = [example(rng) for _ in range(4)]
    batch = {k: jnp.stack([r[k] for _, r in pairs]) for k in ("referred", "valid")}
    run = jax.jit(PROTOCOL.batched)
    rows = PROTOCOL.rows(run(jnp.stack([s for s, _ in pairs]), batch))
    assert rows == [PROTOCOL.per_image(*pair) for pair in pairs]
    turned = run(jnp.stack([s for s, _ in pairs[::-1]]), {k: x[::-1] for k, x in batch.items()})
    assert PROTOCOL.rows(turned) == rows[::-1]


def test_the_trivial_prediction_knows_the_area_alone(rng):
    _, record = example(rng)
    trivial = PROTOCOL.trivial(record)
    assert trivial.sum() == record["referred"].sum()
    moved = np.roll(record["referred"], 5, axis=1)
    np.testing.assert_array_equal(PROTOCOL.trivial(record | {"referred": moved}), trivial)
    painted = ReleasedProtocol().trivial(record)
    np.testing.assert_array_equal(painted[..., 0], trivial[..., 0])
    assert not painted[..., 1:].any()


# ---- the released rule ---------------------------------------------------------------------------


def lanczos(image, size, axes):
    """Pillow's filter written out: three lobes, widened when shrinking, two passes of 8 bits."""
    for axis in axes:
        before = image.shape[axis]
        scale = before / size
        wide = max(scale, 1.0)
        middle = (np.arange(size)[:, None] + 0.5) * scale
        first = np.maximum((middle - 3 * wide + 0.5).astype(int), 0)
        last = np.minimum((middle + 3 * wide + 0.5).astype(int), before)
        source = np.arange(before)
        x = (source - middle + 0.5) / wide
        weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        weights = np.where((source >= first) & (source < last), weights, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image.astype(np.float64), (1, axis)), 0, axis)
        image = np.clip(np.floor(image + 0.5), 0, 255)
    return image


@pytest.mark.parametrize("size", [(32, 48), (256, 256), (700, 600)])
def test_the_released_rule_step_by_step(rng, size):
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    image[size[0] // 4 :, : size[1] // 2] = 255, 0, 0
    image[::7, ::5] = 230, 30, 10
    ours = released_mask(image)
    assert (ours.shape, ours.dtype) == ((512, 512), bool)
    wrong = []
    for axes in ((1, 0), (0, 1)):  # Pillow's versions differ in which pass comes first
        distance = np.linalg.norm(lanczos(image, 512, axes) - [255, 0, 0], axis=-1)
        sure = np.abs(distance - 50) > 4  # of rounding, in each pass and channel
        assert sure.mean() > 0.9
        wrong.append((ours != (distance < 50))[sure].sum())
    assert min(wrong) == 0
    assert 0.2 < ours.mean() < 0.8
    # Exactly, by the library that it was released with.
    theirs = Image.fromarray(image).resize((512, 512), Image.Resampling.LANCZOS)
    squares = ((np.asarray(theirs).astype(int) - [255, 0, 0]) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(ours, squares < 2500)
    # Fractions are cut off to 8 bits.
    floats = ((image + rng.uniform(0.01, 0.99, image.shape)) / 255).astype(np.float32)
    np.testing.assert_array_equal(released_mask(floats), ours)


def test_fifty_is_too_far():
    for colour, near in (((255, 30, 40), False), ((255, 30, 39), True), ((206, 0, 0), True)):
        assert released_mask(np.full((8, 8, 3), colour, np.uint8)).all() == near


@pytest.mark.parametrize("size", [(30, 40), (1500, 700)])
def test_the_truth_takes_nearest_pixels(rng, size):
    """Of each of the 512 places, the pixel in which its middle lies."""
    mask = rng.random(size) < 0.5
    rows, columns = (((np.arange(512) + 0.5) * n / 512).astype(int) for n in size)
    np.testing.assert_array_equal(released_truth(mask), mask[rows][:, columns])


def test_the_released_protocol(rng):
    """A small painted image against a truth of another size and shape, both at 512."""
    protocol, pairs, expected = ReleasedProtocol(), [], []
    for _ in range(3):
        truth = blob(rng, (30, 40))
        valid = np.ones(truth.shape, bool)
        valid[:, :4] = False
        painted = rng.random((16, 24, 3)).astype(np.float32)
        small = np.asarray(Image.fromarray(truth[..., 0]).resize((24, 16))) > 0.3
        painted[small] = 1, 0.05, 0
        pairs.append((painted, {"referred": truth, "valid": valid}))
        true, used = (released_truth(x[..., 0] > 0) for x in (truth, valid))
        found = released_mask(painted)
        expected.append(((found & true & used).sum(), ((found | true) & used).sum()))
    result = summary(protocol, pairs)
    hits, union = np.array(expected).T
    assert result["oiou"] == pytest.approx(hits.sum() / union.sum())
    assert result["miou"] == pytest.approx((hits / union).mean())
    assert 0.2 < result["miou"] < 1
    assert tuple(result) == METRICS
    assert protocol.raw
    assert not PROTOCOL.raw
