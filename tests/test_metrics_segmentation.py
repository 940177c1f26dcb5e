"""Checked against sets of pixels, and by two processes that each saw half of the images."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpercept
from jaxpercept.errors import UserError
from jaxpercept.metrics import segmentation as metrics
from jaxpercept.metrics.protocol import add
from jaxpercept.metrics.segmentation import SegmentationProtocol

H, W, K = 12, 17, 6
confusion = jax.jit(metrics.confusion_matrix, static_argnames=("classes", "ignore_label"))


def labels(rng, classes=K - 1, wrong=0.3):
    """A prediction and a record with void and invalid pixels; the last class never occurs."""
    truth = rng.integers(0, classes, (H, W, 1))
    pred = np.where(rng.random(truth.shape) < wrong, rng.integers(0, classes, truth.shape), truth)
    truth[rng.random(truth.shape) < 0.1] = 255
    record = {"classes": truth.astype(np.uint8), "valid": rng.random(truth.shape) > 0.1}
    return pred.astype(np.int32), record


def reference(pairs, classes=K, ignore=255):
    """Scores from the set of pixels of each class, all images together."""
    truth, pred = {c: set() for c in range(classes)}, {c: set() for c in range(classes)}
    pixels = right = 0
    for i, (p, record) in enumerate(pairs):
        for place in map(tuple, np.argwhere(record["valid"])):
            label, guess = int(record["classes"][place]), int(p[place])
            if label == ignore:
                continue
            pixels += 1
            right += label == guess
            truth[label].add((i, place))
            if 0 <= guess < classes:
                pred[guess].add((i, place))
    union = {c: truth[c] | pred[c] for c in truth}
    iou = {c: len(truth[c] & pred[c]) / len(union[c]) for c in truth if union[c]}
    accuracy = [len(truth[c] & pred[c]) / len(truth[c]) for c in truth if truth[c]]
    return {
        "miou": np.mean(list(iou.values())),
        "pixel_accuracy": right / pixels,
        "mean_accuracy": np.mean(accuracy),
        **{f"iou/{c}": iou.get(c, np.nan) for c in range(classes)},
    }


def test_scores_equal_sets_of_pixels(rng):
    pairs = [labels(rng, wrong=w) for w in (0.1, 0.5, 0.9)]
    pairs[0][0][0, :5] = K - 1  # predicted but never true: counts as a class with IoU 0
    protocol = SegmentationProtocol(K)
    rows = [protocol.per_image(*pair) for pair in pairs]
    result = protocol.summarise(add(rows))
    assert tuple(result) == protocol.names
    assert result == pytest.approx(reference(pairs), nan_ok=True)
    assert result["iou/5"] == 0
    for row, pair in zip(rows, pairs, strict=True):
        alone = reference([pair])
        assert {name: row[name] for name in metrics.METRICS} == pytest.approx(
            {name: alone[name] for name in metrics.METRICS}
        )
    halves = add([add(rows[2:]), add(rows[:2])])
    assert protocol.summarise(halves) == pytest.approx(result, rel=1e-15, nan_ok=True)


def test_classes_that_do_not_occur_are_left_out(rng):
    pred, record = labels(rng)
    result = SegmentationProtocol(K).summarise(
        add([SegmentationProtocol(K).per_image(pred, record)])
    )
    assert np.isnan(result[f"iou/{K - 1}"])
    there = [result[f"iou/{c}"] for c in range(K - 1)]
    assert result["miou"] == pytest.approx(np.mean(there))


def test_a_perfect_prediction_and_class_names(rng):
    _, record = labels(rng)
    names = ("wall", "floor", "bed", "lamp", "door", "sink")
    protocol = SegmentationProtocol(K, class_names=names)
    row = protocol.per_image(record["classes"].astype(np.int32), record)
    result = protocol.summarise(add([row]))
    assert result["miou"] == result["pixel_accuracy"] == result["iou/bed"] == 1
    with pytest.raises(UserError, match="6 names, not 2"):
        SegmentationProtocol(K, class_names=("wall", "floor"))


def test_a_prediction_of_no_class_is_wrong(rng):
    """Void predicted on labelled pixels is a miss, not a pixel to leave out."""
    pred, record = labels(rng)
    pred[:4] = rng.choice([255, -1, K], pred[:4].shape)
    protocol = SegmentationProtocol(K)
    result = protocol.summarise(add([protocol.per_image(pred, record)]))
    assert result == pytest.approx(reference([(pred, record)]), nan_ok=True)
    assert result["pixel_accuracy"] < 0.8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.int32]), st.booleans())
def test_confusion_matrix_counts_pairs(seed, dtype, ignore):
    rng = np.random.default_rng(seed)
    pred = rng.choice([0, 1, 2, 3, 4, 5, 200], (2, H, W, 1)).astype(dtype)
    target = rng.choice([0, 1, 2, 3, 4, 5, 255], (2, H, W, 1)).astype(dtype)
    valid = rng.random(target.shape) > 0.2
    label = 3 if ignore else None
    counts, missed = confusion(pred, target, valid, classes=K, ignore_label=label)
    expected = np.zeros((2, K, 7), int)
    used = valid & (target < K) & (target != 3 if ignore else True)
    for i, y, x, _ in np.argwhere(used):
        expected[i, target[i, y, x, 0], min(pred[i, y, x, 0], K)] += 1
    np.testing.assert_array_equal(counts, expected[..., :K])
    np.testing.assert_array_equal(missed, expected[..., K])


def test_many_classes_in_8_bits(rng):
    """NYUv2's 40 classes: 39 * 41 is more than a byte holds."""
    truth = rng.integers(0, 40, (1, H, W, 1)).astype(np.uint8)
    counts, _ = confusion(truth, truth, np.ones(truth.shape, bool), classes=40)
    np.testing.assert_array_equal(counts[0], np.diag(np.bincount(truth.ravel(), minlength=40)))


def test_an_image_without_labels_weighs_nothing(rng):
    protocol = SegmentationProtocol(K)
    pred, record = labels(rng)
    row = protocol.per_image(pred, record)
    empty = protocol.per_image(pred, record | {"valid": np.zeros((H, W, 1), bool)})
    assert protocol.summarise(add([row, empty])) == pytest.approx(
        protocol.summarise(add([row])), nan_ok=True
    )
    with pytest.raises(UserError, match="no image has a valid pixel"):
        protocol.summarise(add([empty]))


def test_a_strange_label_is_named(rng):
    pred, record = labels(rng)
    record |= {"name": "room.png", "valid": np.ones((H, W, 1), bool)}
    record["classes"][2, 3] = 77
    with pytest.raises(UserError, match=r"room\.png has the label 77.*0 to 5"):
        SegmentationProtocol(K).per_image(pred, record)
    record["valid"][2, 3] = False
    SegmentationProtocol(K).per_image(pred, record)


def test_trivial_prediction_is_the_most_frequent_class(rng):
    _, record = labels(rng)
    record["classes"][:7] = 2
    record["classes"][7:9] = 255
    trivial = SegmentationProtocol(K).trivial(record)
    assert trivial.shape == (H, W, 1)
    assert np.unique(trivial) == [2]


ONE_PROCESS = """
import json, sys
import jax
rank, port, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
sys.path.insert(0, tests)
import test_metrics_segmentation as test
from jaxpercept.metrics.protocol import add, over_hosts
pairs = test.fixed_pairs()
protocol = test.SegmentationProtocol(test.K)
rows = [protocol.per_image(*pair) | {"exact": 2.0**-60 * (1 + 2.0**-40)} for pair in pairs[rank::2]]
total = over_hosts(add(rows))
print(json.dumps(protocol.summarise(total) | {"exact": float(total["exact"])}))
"""


def fixed_pairs():
    rng = np.random.default_rng(7)
    return [labels(rng, wrong=w) for w in (0.1, 0.2, 0.4, 0.6, 0.8)]


def test_two_processes_agree_with_one():
    """Each sums its own images; both end with the result of all, to the last digit."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    paths = [str(Path(jaxpercept.__file__).parents[1]), str(Path(__file__).parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, str(rank), str(port), paths[1]],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    protocol = SegmentationProtocol(K)
    expected = protocol.summarise(add(protocol.per_image(*pair) for pair in fixed_pairs()))
    for result in printed:
        assert result.pop("exact") == 5 * 2.0**-60 * (1 + 2.0**-40)
        assert result == pytest.approx(expected, rel=1e-15, nan_ok=True)
