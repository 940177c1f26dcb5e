"""Batches of every kind of target: what is read for them, what they hold, what is refused."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
from layout_cases import CASES, write_copy
from PIL import Image

from jaxpercept.data import pipeline
from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.transforms import NO_AUGMENT, Augment, prepare
from jaxpercept.errors import UserError

RESOLUTION = (6, 8)
SHAPES = {
    "rgb": ((*RESOLUTION, 3), np.uint8),
    "source": ((*RESOLUTION, 3), np.uint8),
    "valid": ((*RESOLUTION, 1), np.bool_),
    "depth": ((*RESOLUTION, 1), np.float32),
    "depth_range": ((2,), np.float32),
    "disparity_range": ((4,), np.float32),
    "normals": ((*RESOLUTION, 3), np.float32),
    "alpha": ((*RESOLUTION, 1), np.float32),
    "classes": ((*RESOLUTION, 1), np.int32),
    "keypoints": ((17, 3), np.float32),
    "box": ((4,), np.float32),
    "referred": ((*RESOLUTION, 1), np.float32),
    "index": ((), np.int32),
}


def case(dataset, *targets):
    """A miniature copy of the dataset with at least these targets."""
    return next(c for c in CASES if c.dataset == dataset and set(targets) <= set(c.targets))


def make(mixture, fields, **changes):
    defaults = {"resolution": RESOLUTION, "batch_size": 4, "seed": 3, "augment": NO_AUGMENT}
    if isinstance(mixture, str):
        mixture = [(mixture, 1.0, {})]
    return make_train_dataset(mixture, fields=fields, **(defaults | changes))


def take(dataset, count=1):
    iterator = iter(dataset)
    batches = list(itertools.islice(iterator, count))
    skipped = dict(iterator.skipped)
    iterator.close()
    return batches, skipped


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [
        ("scenes", ("rgb", "depth", "normals", "classes", "valid", "disparity_range", "index")),
        ("scenes", ("rgb", "source", "depth_range")),
        ("objects", ("rgb", "alpha", "valid")),
        ("people", ("rgb", "keypoints", "box")),
        ("scenes", ("rgb", "valid", "index")),
        ("referring", ("rgb", "referred", "valid")),
    ],
)
def test_batches_hold_what_was_asked_for(dataset, fields):
    resolution = (48, 64) if dataset != "scenes" else RESOLUTION
    options = {"resolution": (48, 64)}
    mixture = [(dataset, 1.0, options)]
    (batch,), _ = take(make(mixture, fields, resolution=resolution))
    assert batch.keys() == set(fields)
    for field in fields:
        shape, dtype = SHAPES[field]
        shape = tuple(dict(zip(RESOLUTION, resolution, strict=True)).get(n, n) for n in shape)
        assert batch[field].shape == (4, *shape), field
        assert batch[field].dtype == dtype, field


def test_every_field_is_documented_and_tested():
    instructed = {"truth", "subtask"}  # in test_data_instructions.py
    assert set(SHAPES) | {"input_ids"} | instructed == set(pipeline._NEEDS)
    for field in pipeline._NEEDS:
        assert f"`{field}`" in make_train_dataset.__doc__


def test_a_batch_is_its_records_prepared(tmp_path, rng):
    layout = case("folder", "depth", "normals", "alpha", "classes")
    write_copy(tmp_path, layout, rng, count=4)
    targets = ["depth", "normals", "alpha", "classes"]
    options = {"data_dir": str(tmp_path)}
    fields = ("rgb", "valid", "disparity_range", *targets)
    (batch,), _ = take(make([("folder", 1.0, options)], fields))
    records = open_dataset("folder", targets=targets, **options)
    prepared = [prepare(record, rng, NO_AUGMENT, RESOLUTION) for record in records]
    by_image = {example["rgb"].tobytes(): example for example in prepared}
    for row in range(4):
        example = by_image[batch["rgb"][row].tobytes()]
        for field in fields:
            np.testing.assert_array_equal(batch[field][row], example[field], err_msg=field)


def test_only_the_targets_of_the_fields_are_read(tmp_path, rng):
    write_copy(tmp_path, case("nyuv2", "depth", "classes"), rng)
    for path in (tmp_path / "depth").iterdir():
        path.write_bytes(b"")
    mixture = [("nyuv2", 1.0, {"data_dir": str(tmp_path)})]
    (batch,), skipped = take(make(mixture, ("rgb", "classes", "valid")))
    assert not skipped
    np.testing.assert_array_equal(batch["valid"], batch["classes"] != 255)
    take(make(mixture, ("rgb", "index")))
    with pytest.raises(UserError, match="None of 3 records"):
        make(mixture, ("rgb", "depth"))


def test_validity_of_one_target_does_not_touch_another(tmp_path, rng):
    """Where the depth is unknown, classes count."""
    layout = case("nyuv2", "depth", "classes")
    write_copy(tmp_path, layout, rng)
    for path in (tmp_path / "depth").iterdir():
        Image.fromarray(np.zeros((10, 14), np.uint16)).save(path)
    mixture = [("nyuv2", 1.0, {"data_dir": str(tmp_path)})]
    (batch,), _ = take(make(mixture, ("classes", "valid")))
    assert batch["valid"].mean() > 0.5
    with pytest.raises(UserError, match=r"No depth of rgb/000\d\.jpg lies between"):
        make(mixture, ("classes", "depth", "valid"))


def test_fog_needs_depth_that_nobody_asked_for(tmp_path, rng):
    write_copy(tmp_path, case("folder", "depth"), rng)
    hazy = dataclasses.replace(NO_AUGMENT, haze=1.0)
    for mixture in ("scenes", [("folder", 1.0, {"data_dir": str(tmp_path)})]):
        options = {"resolution": (12, 16)}
        (clear,), _ = take(make(mixture, ("rgb", "source"), **options))
        (foggy,), _ = take(make(mixture, ("rgb", "source"), augment=hazy, **options))
        assert foggy.keys() == {"rgb", "source"}
        np.testing.assert_array_equal(foggy["source"], clear["source"])
        assert (foggy["rgb"] != clear["rgb"]).mean() > 0.3


def test_a_sky_beyond_the_valid_range_is_the_end_of_disparity(tmp_path, rng):
    (tmp_path / "rgb").mkdir()
    (tmp_path / "depth").mkdir()
    depth = rng.integers(300, 6000, (12, 16)).astype(np.uint16)
    depth[:4] = 65535
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "rgb/a.png")
    Image.fromarray(depth).save(tmp_path / "depth/a.png")
    options = {"data_dir": str(tmp_path), "depth_scale": 100, "max_depth": 80}
    fields = ("depth", "valid", "disparity_range")
    (batch,), _ = take(make([("folder", 1.0, options)], fields, batch_size=1))
    _, _, least, largest = batch["disparity_range"][0]
    np.testing.assert_allclose([least, largest], [1 / 655.35, 100 / depth.min()], rtol=1e-6)
    assert not batch["valid"][0, :2].any()


# ---- people --------------------------------------------------------------------------------------


def test_people_who_left_the_picture_are_skipped(caplog):
    mixture = [("people", 1.0, {"resolution": (48, 64), "size": 50})]
    small = Augment(flip=0.5, scale=(0.05, 0.2))
    with caplog.at_level(logging.WARNING):
        batches, skipped = take(make(mixture, ("rgb", "keypoints", "index"), augment=small), 6)
    for batch in batches:
        assert (batch["keypoints"][..., 2] > 0).any(axis=1).all()
        there = batch["keypoints"][..., 2:] > 0
        inside = (batch["keypoints"][..., :2] >= 0) & (batch["keypoints"][..., :2] <= (8, 6))
        assert (inside | ~there).all()
    assert skipped
    assert "No keypoint of scene_" in caplog.text


# ---- mixtures ------------------------------------------------------------------------------------


def test_mixtures_combine_datasets_of_a_target(tmp_path, rng):
    parts = {"dis5k": "alpha", "p3m10k": "alpha", "hypersim": "normals", "genpercept": "normals"}
    folders = {}
    for name, target in parts.items():
        folders[name] = {"data_dir": str(tmp_path / name)}
        write_copy(tmp_path / name, case(name, target), rng)
    for names, fields in (
        (("dis5k", "p3m10k"), ("rgb", "alpha", "valid")),
        (("hypersim", "genpercept"), ("rgb", "normals", "valid")),
    ):
        mixture = [(name, 0.5, folders[name]) for name in names]
        (batch,), _ = take(make(mixture, fields, batch_size=8))
        assert batch[fields[1]].shape[0] == 8
        assert batch["valid"].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("rgb", "normals"), "Dataset camvid has no normals; leave it out of this mixture"),
        (("rgb", "disparity_range"), "Dataset camvid has no depth"),
        (("rgb", "box"), "Dataset camvid has no keypoints"),
        (("rgb", "flow"), "Unknown batch field 'flow'; known are rgb"),
        (("classes",), "classes of dataset nyuv2 are not those of camvid; leave one out"),
    ],
)
def test_mixtures_that_cannot_be_are_named(tmp_path, rng, fields, message):
    mixture = []
    for name in ("nyuv2", "camvid"):
        write_copy(tmp_path / name, case(name, "classes"), rng)
        options = {"data_dir": str(tmp_path / name)}
        mixture.append((name, 1.0, options | ({"split": "test"} if name == "camvid" else {})))
    if "classes" not in fields:
        mixture = mixture[1:]
    with pytest.raises(UserError, match=message):
        make(mixture, fields)


def test_people_of_different_skeletons_do_not_mix(monkeypatch):
    class Fake:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return 1

        def __getitem__(self, index):
            points = np.full((self.count, 3), 2, np.float32)
            return {"name": "a", "rgb": np.zeros((8, 8, 3), np.uint8), "keypoints": points}

    for name, count in (("a", 17), ("b", 16)):
        row = dataclasses.replace(
            DATASETS["people"], name=name, open_source=lambda request, count=count: Fake(count)
        )
        monkeypatch.setitem(DATASETS, name, row)
    make([("a", 1, {}), ("a", 1, {})], ("rgb", "keypoints"))
    with pytest.raises(UserError, match="Dataset a has 17 keypoints and b 16; leave one out"):
        make([("a", 1, {}), ("b", 1, {})], ("rgb", "keypoints"))
