"""Boxes read off maps, and how they are counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpercept.data.instructions import draw_boxes
from jaxpercept.metrics.detection import DetectionProtocol, box_iou, boxes_of, match
from jaxpercept.metrics.protocol import add

PROTOCOL = DetectionProtocol()
SIZE = (80, 120)


def apart(rng, count):
    """Boxes in cells of a grid, which none of them leaves."""
    cells = rng.choice(12, count, replace=False)
    boxes = []
    for row, column in zip(*np.divmod(cells, 4), strict=True):
        top, left = 26 * row + rng.integers(0, 5), 30 * column + rng.integers(0, 5)
        boxes.append((left, top, left + rng.integers(10, 25), top + rng.integers(10, 21)))
    return np.array(boxes, np.float32)


def score_of(boxes):
    return (draw_boxes(boxes, SIZE) > 0).astype(np.float32)


def record_of(boxes):
    return {"boxes": boxes, "rgb": np.zeros((*SIZE, 3), np.uint8)}


@given(st.integers(0, 2**32 - 1))
def test_drawn_boxes_are_read_as_they_are(seed):
    rng = np.random.default_rng(seed)
    boxes = apart(rng, int(rng.integers(1, 8)))
    found = boxes_of(score_of(boxes)[..., 0])
    assert {tuple(box) for box in found[:, :4].tolist()} == {tuple(box) for box in boxes.tolist()}
    np.testing.assert_array_equal(found[:, 4], 1)
    row = PROTOCOL.per_image(score_of(boxes), record_of(boxes))
    assert row["f1"] == row["iou"] == 1
    assert row["right"] == len(boxes)


def test_boxes_that_touch_stay_apart_and_noise_is_left_out(rng):
    boxes = np.array([(10, 10, 40, 40), (40, 10, 70, 40)], np.float32)
    score = score_of(boxes)
    score[70, 100] = 1
    found = boxes_of(score[..., 0])
    assert {tuple(box) for box in found[:, :4].tolist()} == {tuple(box) for box in boxes.tolist()}
    assert boxes_of(np.zeros(SIZE, np.float32)).shape == (0, 5)
    score = np.where(score > 0, rng.uniform(0.51, 1, score.shape), 0).astype(np.float32)
    inside = score[12:38, 12:38, 0]
    assert boxes_of(score[..., 0])[0, 4] == pytest.approx(inside.mean(), rel=1e-5)


def test_iou_of_boxes_is_that_of_their_pixels(rng):
    boxes = np.sort(rng.integers(0, 30, (6, 2, 2)), axis=1).reshape(6, 4)[:, [0, 1, 2, 3]]
    boxes[:, 2:] += 1
    masks = np.zeros((6, 40, 40), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    expected = [[(a & b).sum() / (a | b).sum() for b in masks] for a in masks]
    np.testing.assert_allclose(box_iou(boxes.astype(float), boxes.astype(float)), expected)


def test_a_true_box_is_found_once():
    iou = np.array([[0.9, 0.6], [0.8, 0.55], [0.1, 0.49]])
    np.testing.assert_array_equal(match(iou), [0.9, 0.55])
    assert len(match(np.zeros((0, 3)))) == 0


def test_counts_of_a_dataset(rng):
    one, two = apart(rng, 4), apart(rng, 3)
    rows = [
        PROTOCOL.per_image(score_of(one[:3]), record_of(one)),
        PROTOCOL.per_image(
            score_of(np.concatenate([two, np.float32([(0, 78, 120, 80)])])), record_of(two)
        ),
        PROTOCOL.per_image(np.zeros((*SIZE, 1), np.float32), record_of(two)),
    ]
    total = PROTOCOL.summarise(add(rows))
    assert total["recall"] == pytest.approx(6 / 10)
    assert total["precision"] == pytest.approx(6 / 7)
    assert total["f1"] == pytest.approx(12 / 17)
    assert total["iou"] == 1


def test_the_trivial_box_has_the_mean_size():
    boxes = np.array([(0, 0, 20, 30), (50, 20, 90, 60)], np.float32)
    (box,) = boxes_of(PROTOCOL.trivial(record_of(boxes))[..., 0])
    width, height = box[2] - box[0] - 4, box[3] - box[1] - 4  # it has no frame
    assert (width, height) == (30, 35) or (abs(width - 30) <= 1 and abs(height - 35) <= 1)
    assert PROTOCOL.trivial_row(record_of(boxes))["true"] == 2
