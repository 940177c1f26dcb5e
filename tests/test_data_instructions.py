"""Records made into examples of one of several tasks, and batches of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.instructions import (
    INSTRUCTIONS,
    TRUTHS,
    box_around,
    choose_class,
    choose_kind,
    draw_boxes,
    frame_width,
    instruct,
)
from jaxpercept.data.palettes import PALETTES
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.readers import EmptyMaskError
from jaxpercept.errors import UserError

SIZE = (48, 64)
FIELDS = ("rgb", "truth", "subtask", "depth_range", "valid", "input_ids", "index")


@pytest.fixture(scope="module")
def record():
    return open_dataset(
        "scenes", targets=("depth", "normals", "classes", "instances", "referred"), resolution=SIZE
    )[int(np.random.default_rng().integers(1000))]


class Read:
    """Captions by the numbers that stand for them."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        return np.arange(len(self.texts) - len(texts), len(self.texts), dtype=np.int32)[:, None]


def batch_of(mixture, tasks, batch_size=24, **options):
    read = Read()
    options = {"resolution": SIZE, "seed": int(np.random.default_rng().integers(2**31)), **options}
    data = make_train_dataset(
        mixture,
        batch_size=batch_size,
        augment={"fit": "stretch"},
        fields=FIELDS,
        tokenize=read,
        instructions=tasks,
        **options,
    )
    first = len(read.texts)
    batch = next(iter(data))
    return batch, read.texts[first:]


def test_the_class_that_is_asked_for(record):
    names = PALETTES["scenes"].names
    asked = {choose_class(record, place)["caption"] for place in np.linspace(0, 0.999, 60)}
    counts = {name: (record["classes"] == n).mean() for n, name in enumerate(names)}
    assert asked == {name for name, share in counts.items() if share > 0.004}
    one = choose_class(record, 0.4)
    np.testing.assert_array_equal(
        one["referred"] > 0, record["classes"] == names.index(one["caption"])
    )
    assert {one["caption"], *one["distractors"]} == asked
    nothing = record | {"classes": np.full_like(record["classes"], 255)}
    with pytest.raises(EmptyMaskError, match="large enough"):
        choose_class(nothing, 0.0)


def test_the_kind_that_is_asked_for(rng):
    instance = np.zeros((40, 60, 1), np.int32)
    places = {1: (2, 3, 12, 20), 2: (20, 10, 38, 18), 3: (5, 40, 25, 55), 4: (30, 50, 31, 51)}
    for number, (top, left, bottom, right) in places.items():
        instance[top:bottom, left:right] = number
    record = {"name": "a", "instance": instance, "kinds": ("ball", "box", "ball", "cone")}
    one = choose_kind(record, float(rng.uniform(0, 0.5)))
    assert (one["caption"], one["distractors"]) == ("ball", ["box"])  # the cone is too small
    np.testing.assert_array_equal(one["boxes"], [(3, 2, 20, 12), (40, 5, 55, 25)])
    other = choose_kind(record, float(rng.uniform(0.5, 1)))
    assert other["caption"] == "box"
    np.testing.assert_array_equal(other["boxes"], [(10, 20, 18, 38)])
    with pytest.raises(EmptyMaskError, match="a"):
        choose_kind(record | {"instance": np.zeros_like(instance)}, 0.0)


@given(st.data())
def test_drawn_boxes(data):
    height, width = data.draw(st.integers(20, 200)), data.draw(st.integers(20, 200))
    left = data.draw(st.integers(0, width - 2))
    top = data.draw(st.integers(0, height - 2))
    box = (
        left,
        top,
        data.draw(st.integers(left + 1, width)),
        data.draw(st.integers(top + 1, height)),
    )
    drawn = draw_boxes(np.array([box], np.float32), (height, width))[..., 0]
    assert box_around(drawn != 0) == box
    assert (drawn == 1).any()
    frame = frame_width(height)
    if min(box[2] - left, box[3] - top) > 4 * frame:
        inner = box_around(drawn == 1)
        assert inner == (left + frame, top + frame, box[2] - frame, box[3] - frame)


def test_small_boxes_lie_over_large_ones():
    boxes = np.array([(10, 10, 20, 20), (0, 0, 60, 40)], np.float32)
    drawn = draw_boxes(boxes, (40, 60))[..., 0]
    assert drawn[10, 15] == -1
    assert drawn[15, 15] == 1
    assert drawn[30, 30] == 1


@pytest.mark.parametrize("task", TRUTHS)
def test_examples(record, rng, task):
    record = record | {"source": record["rgb"], "depth_range": np.float32([1, 4])}
    one = instruct(record, task, rng)
    assert one["truth"].shape == (*SIZE, 3)
    assert one["truth"].dtype == np.float32
    assert list(TRUTHS)[one["subtask"]] == task
    starts = {wording.partition("{}")[0] for wording in INSTRUCTIONS[task]}
    assert any(one["caption"].startswith(start) for start in starts)
    if task in ("depth", "normals"):
        channels = record[task].shape[-1]
        np.testing.assert_array_equal(one["truth"][..., :channels], record[task])
    elif task == "referring":
        assert record["caption"] in one["caption"]
        np.testing.assert_array_equal(one["truth"][..., :1], record["referred"])
    else:
        assert set(np.unique(one["truth"][..., 0])) <= {-1, 0, 1}
        assert (one["truth"][..., 0] == 1).any()


def test_a_batch_has_all_tasks_in_equal_parts():
    batch, captions = batch_of([("scenes", 0.7, {}), ("referring", 0.3, {})], tuple(TRUTHS), 60)
    counts = np.bincount(batch["subtask"], minlength=5)
    assert counts.min() >= 11
    assert counts.max() <= 13
    assert batch["truth"].shape == (60, *SIZE, 3)
    texts = [captions[int(i)] for i in batch["input_ids"][:, 0] - batch["input_ids"][0, 0]]
    for task, text in zip(batch["subtask"], texts, strict=True):
        wordings = INSTRUCTIONS[list(TRUTHS)[task]]
        assert any(text.startswith(w.partition("{}")[0]) for w in wordings)
    depth = batch["subtask"] == 0
    assert (batch["depth_range"][depth, 1] > batch["depth_range"][depth, 0]).all()
    assert (batch["truth"][depth][..., 0] > 0.1).all()  # metres


def test_datasets_give_what_they_have():
    batch, _ = batch_of([("scenes", 1.0, {})], ("normals", "detect"), 12)
    assert sorted(np.unique(batch["subtask"])) == [1, 3]
    with pytest.raises(UserError, match=r"mattes has the truth of none of referring"):
        batch_of([("mattes", 1.0, {})], ("referring",))


def test_examples_do_not_depend_on_who_makes_them():
    mixture = [("scenes", 1.0, {}), ("referring", 1.0, {})]
    whole, _ = batch_of(mixture, tuple(TRUTHS), 12, seed=3)
    for process in (0, 1):
        half, _ = batch_of(
            mixture, tuple(TRUTHS), 12, seed=3, process_index=process, process_count=2
        )
        for name in ("rgb", "truth", "subtask"):
            np.testing.assert_array_equal(half[name], whole[name][process::2])
