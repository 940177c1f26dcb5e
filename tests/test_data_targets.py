"""Targets follow the picture through every change, and mean the same whatever the files say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxpercept.data import transforms
from jaxpercept.data.datasets import DATASETS, EmptyMaskError, Records, open_dataset
from jaxpercept.data.joints import FLIP_PAIRS
from jaxpercept.data.sources import SceneExamples
from jaxpercept.data.transforms import NO_AUGMENT, Augment, prepare
from jaxpercept.errors import UserError

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(48, 90), st.integers(48, 90))


def dotted(rng, size, count=1):
    """A record with a round dot at every keypoint, one colour channel per dot, all in one box."""
    rows, columns = size
    y, x = np.mgrid[:rows, :columns] + 0.5
    points = np.stack([rng.uniform(18, columns - 18, count), rng.uniform(18, rows - 18, count)], -1)
    distance = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    dots = np.zeros((rows, columns, 3))
    dots[..., :count] = np.clip(5.0 - distance, 0, 1) * 255
    keypoints = np.concatenate([points, np.full((count, 1), 2)], -1).astype(np.float32)
    box = np.concatenate([points.min(0) - 5, points.max(0) + 5]).astype(np.float32)
    return {"name": "dot", "rgb": dots.astype(np.uint8), "keypoints": keypoints, "box": box,
            "valid": np.ones((*size, 1), bool)}  # fmt: skip


def centres(rgb, count):
    weight = rgb[..., :count].astype(np.float64)
    y, x = (np.mgrid[: rgb.shape[0], : rgb.shape[1]] + 0.5)[..., None]
    total = np.maximum(weight.sum((0, 1)), 1e-9)  # 0 for a dot outside of the picture
    return np.stack([(x * weight).sum((0, 1)) / total, (y * weight).sum((0, 1)) / total], -1)


def extent(rgb):
    rows, columns = (np.flatnonzero((rgb > 20).any(axes)) for axes in ((1, 2), (0, 2)))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


# ---- keypoints and boxes -------------------------------------------------------------------------


@quick
@given(sizes, seeds, st.floats(-45, 45), st.tuples(st.integers(30, 99), st.integers(30, 99)))
def test_keypoints_follow_a_drawn_dot(size, seed, degrees, resolution):
    record = dotted(np.random.default_rng(seed), size, 2)
    middle = record["keypoints"][:, :2].mean(0)
    window = (max(0, int(middle[1]) - 40), max(0, int(middle[0]) - 40), 80, 80)
    scale = np.array(resolution[::-1]) / np.array(size[::-1])
    for changed, tolerance in (
        (record, 0.05),
        (transforms.flip_horizontal(record), 0.05),
        (transforms.crop(record, *window), 0.05),
        (transforms.resize(record, resolution), 0.25 * scale.max() + 0.05),
    ):
        found = centres(changed["rgb"], 2)
        whole = changed["rgb"].astype(float).sum((0, 1))[:2] > 0
        np.testing.assert_allclose(changed["keypoints"][whole, :2], found[whole], atol=tolerance)
    turned = transforms.rotate(record, degrees)
    for number in np.flatnonzero(turned["keypoints"][:, 2]):
        place = turned["keypoints"][number, :2]
        if (place > 7).all() and (place < np.array(turned["rgb"].shape[1::-1]) - 7).all():
            np.testing.assert_allclose(centres(turned["rgb"], 2)[number], place, atol=0.2)


@quick
@given(sizes, seeds)
def test_boxes_follow_what_they_enclose(size, seed):
    record = dotted(np.random.default_rng(seed), size, 3)
    for changed, tolerance in (
        (record, 1.1),
        (transforms.flip_horizontal(record), 1.1),
        (transforms.crop(record, 3, 5, size[0] - 6, size[1] - 9), 1.1),
        (transforms.resize(record, (2 * size[0], 3 * size[1])), 4.0),
    ):
        np.testing.assert_allclose(changed["box"], extent(changed["rgb"]), atol=tolerance)
    right = transforms.rotate(record, 45.0)
    left, top, right, bottom = right["box"]
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]


def test_a_turned_box_encloses_the_turned_one():
    box = np.array([40, 45, 60, 55], np.float32)
    turned = transforms.rotate({"rgb": np.zeros((100, 100, 3), np.uint8), "box": box}, 30.0)
    cosine, sine = math.cos(math.pi / 6), math.sin(math.pi / 6)
    size = turned["box"][2:] - turned["box"][:2]
    expected = (20 * cosine + 10 * sine, 20 * sine + 10 * cosine)
    np.testing.assert_allclose(size, expected, atol=1e-4)
    centre = turned["box"].reshape(2, 2).mean(0)
    np.testing.assert_allclose(centre, np.array(turned["rgb"].shape[1::-1]) / 2, atol=0.51)


@quick
@given(sizes, seeds)
def test_flip_twice_is_the_identity(size, seed):
    rng = np.random.default_rng(seed)
    record = dotted(rng, size) | {
        "keypoints": person(rng, size),
        "flip_pairs": FLIP_PAIRS,
        "alpha": rng.random((*size, 1), np.float32),
        "classes": rng.integers(0, 256, (*size, 1)).astype(np.int32),
        "trimap": rng.choice(np.array([0, 128, 255], np.uint8), (*size, 1)),
    }
    once = transforms.flip_horizontal(record)
    for field in ("alpha", "classes", "trimap"):
        np.testing.assert_array_equal(once[field], record[field][:, ::-1])
    twice = transforms.flip_horizontal(once)
    for field in ("rgb", "alpha", "classes", "trimap"):
        np.testing.assert_array_equal(twice[field], record[field])
    for field in ("keypoints", "box"):
        np.testing.assert_allclose(twice[field], record[field], atol=1e-4)


def person(rng, size):
    points = np.stack([rng.uniform(1, size[1] - 1, 17), rng.uniform(1, size[0] - 1, 17)], -1)
    visible = rng.integers(0, 3, (17, 1))
    return np.where(visible > 0, np.concatenate([points, visible], -1), 0).astype(np.float32)


def test_flip_exchanges_left_and_right_keypoints(rng):
    record = {"rgb": np.zeros((40, 60, 3), np.uint8), "keypoints": person(rng, (40, 60))}
    flipped = transforms.flip_horizontal(record | {"flip_pairs": FLIP_PAIRS})["keypoints"]
    names = DATASETS["coco_keypoints"].keypoint_names
    for number, name in enumerate(names):
        swap = {"left": "right", "right": "left"}
        other = names.index("_".join(swap.get(word, word) for word in name.split("_")))
        x, y, visible = record["keypoints"][other]
        expected = (60 - x, y, visible) if visible else (0, 0, 0)
        np.testing.assert_allclose(flipped[number], expected, atol=1e-5)
    plain = transforms.flip_horizontal(record)["keypoints"]
    np.testing.assert_array_equal(plain[:, 2], record["keypoints"][:, 2])


def test_keypoints_outside_of_the_window_become_absent(rng):
    points = np.array([[5, 5, 2], [25, 5, 1], [5, 35, 2], [12.5, 9.5, 2], [0, 0, 0]], np.float32)
    record = {"rgb": np.zeros((40, 60, 3), np.uint8), "keypoints": points,
              "box": np.array([2, 3, 30, 38], np.float32)}  # fmt: skip
    cropped = transforms.crop(record, 4, 3, 20, 20)
    expected = [[2, 1, 2], [0, 0, 0], [0, 0, 0], [9.5, 5.5, 2], [0, 0, 0]]
    np.testing.assert_array_equal(cropped["keypoints"], expected)
    np.testing.assert_array_equal(cropped["box"], [0, 0, 20, 20])
    assert cropped["keypoints"].dtype == cropped["box"].dtype == np.float32


# ---- normals -------------------------------------------------------------------------------------


def radial(size):
    """Normals that point away from the middle of the picture, like those of a ball."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    x, y = (x - size[1] / 2) / 100, (size[0] / 2 - y) / 100  # y up
    return np.stack([x, y, np.sqrt(1 - x**2 - y**2)], -1).astype(np.float32)


@pytest.mark.parametrize("degrees", [-33.0, 5.0, 44.0])
def test_normals_turn_with_the_image(degrees):
    """A ball looks the same after any rotation; its normals did if they turned with it."""
    record = {"rgb": np.zeros((81, 101, 3), np.uint8), "normals": radial((81, 101))}
    turned = transforms.rotate(record, degrees)["normals"]
    np.testing.assert_allclose(turned, radial(turned.shape[:2]), atol=0.015)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), 1, atol=1e-5)
    mirrored = transforms.flip_horizontal(record)["normals"]
    np.testing.assert_allclose(mirrored, record["normals"], atol=1e-6)


@quick
@given(sizes, seeds, st.floats(0, 45))
def test_normals_stay_unit_vectors_or_zero(size, seed, rotation):
    rng = np.random.default_rng(seed)
    normals = rng.standard_normal((*size, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[rng.random(size) < 0.3] = 0
    record = {"name": "a", "rgb": np.zeros((*size, 3), np.uint8), "normals": normals,
              "valid": normals.any(-1, keepdims=True)}  # fmt: skip
    out = prepare(record, rng, Augment(rotation=rotation, scale=(0.3, 1.0)), (40, 30))
    length = np.linalg.norm(out["normals"], axis=-1, keepdims=True)
    np.testing.assert_allclose(length, out["valid"], atol=1e-5)


# ---- mattes and classes --------------------------------------------------------------------------


@quick
@given(st.integers(2, 9), seeds)
def test_mattes_are_antialiased(factor, seed):
    rng = np.random.default_rng(seed)
    alpha = (rng.random((8 * factor, 6 * factor, 1)) < 0.5).astype(np.float32)
    record = {"rgb": np.zeros((*alpha.shape[:2], 3), np.uint8), "alpha": alpha}
    small = transforms.resize(record, (8, 6))["alpha"]
    assert small.dtype == np.float32
    assert 0 <= small.min() <= small.max() <= 1
    assert abs(small.mean() - alpha.mean()) < 0.06
    if factor > 4:
        assert (small == np.round(small)).mean() < 0.2
    nearest = transforms.resize(record, (8, 6), alpha_resize="nearest")["alpha"]
    np.testing.assert_array_equal(nearest, transforms.resize_nearest(alpha, (8, 6)))


def test_a_flat_matte_stays_flat(rng):
    for value in (0.0, 0.3, 1.0):
        alpha = np.full((40, 50, 1), value, np.float32)
        record = {"name": "a", "rgb": np.zeros((40, 50, 3), np.uint8), "alpha": alpha,
                  "valid": np.ones((40, 50, 1), bool)}  # fmt: skip
        out = prepare(record, rng, Augment(rotation=20.0, scale=(0.4, 0.9)), (17, 23))
        np.testing.assert_allclose(out["alpha"], value, atol=1e-6)


def test_alpha_resize_is_an_option_of_augment(rng):
    alpha = rng.random((24, 32, 1), np.float32)
    record = {"name": "a", "rgb": np.zeros((24, 32, 3), np.uint8), "alpha": alpha,
              "valid": np.ones((24, 32, 1), bool)}  # fmt: skip
    nearest = Augment.from_dict({"flip": 0, "photometric": 0, "alpha_resize": "nearest"})
    out = prepare(record, rng, nearest, (12, 16))
    assert set(out["alpha"].ravel()) <= set(alpha.ravel())
    smooth = prepare(record, rng, NO_AUGMENT, (12, 16))
    assert not set(smooth["alpha"].ravel()) <= set(alpha.ravel())
    with pytest.raises(UserError, match=r"augment\.alpha_resize must be 'antialias' or 'nearest'"):
        Augment(alpha_resize="bicubic")


@quick
@given(sizes, seeds)
def test_no_class_is_invented(size, seed):
    rng = np.random.default_rng(seed)
    classes = rng.choice(np.array([3, 17, 255], np.int32), (*size, 1))
    record = {"name": "a", "rgb": np.zeros((*size, 3), np.uint8), "classes": classes,
              "valid": classes != 255}  # fmt: skip
    out = prepare(record, rng, Augment(rotation=30.0, scale=(0.3, 1.0)), (33, 44))
    assert set(np.unique(out["classes"])) <= {3, 17, 255}
    np.testing.assert_array_equal(out["valid"], out["classes"] != 255)
    assert out["classes"].dtype == np.int32


# ---- disparity -----------------------------------------------------------------------------------


def genpercept_disparity(depth, valid):
    """`scale_shift_disparity` of GenPercept as the fact sheet states it, in float64."""
    depth, valid = depth.astype(np.float64), valid & (depth > 0)
    near, far = np.quantile(depth[valid], (0.02, 0.98))
    with np.errstate(divide="ignore"):
        disparity = (1 / depth - 1 / far) / (1 / near - 1 / far)
    disparity[~valid] = disparity.min()
    low, high = disparity.min(), disparity.max()
    scaled = (disparity - low) / (high - low) * 2 - 1
    scaled[~valid] = -1
    return np.clip(scaled, -1, 1)


def disparity_range(depth, valid, unmasked):
    quantiles = transforms.depth_range(depth, valid)
    return transforms.disparity_range(depth, valid, unmasked, quantiles)


@quick
@given(sizes, seeds, st.booleans())
def test_disparity_limits_reproduce_genpercept(size, seed, sky):
    rng = np.random.default_rng(seed)
    unmasked = rng.uniform(1, 79, (*size, 1)).astype(np.float32)
    unmasked[rng.random(size) < 0.1] = 0
    if sky:
        unmasked[: size[0] // 3] = 655.35
    valid = (unmasked > 1e-5) & (unmasked < 80)
    depth = np.where(valid, unmasked, 0)
    near, far, least, largest = 1 / disparity_range(depth, valid, unmasked)[[1, 0, 2, 3]]
    np.testing.assert_allclose([near, far], transforms.depth_range(depth, valid), rtol=1e-6)
    assert (largest < near) == (least > far)
    with np.errstate(divide="ignore"):
        scaled = (1 / depth - 1 / least) / (1 / largest - 1 / least) * 2 - 1
    ours = np.where(valid, np.clip(scaled, -1, 1), -1)
    np.testing.assert_allclose(ours, genpercept_disparity(unmasked, valid), atol=1e-5)
    assert abs(least - (655.35 if sky else depth.max())) < 1e-2


def test_disparity_limits_are_always_finite():
    empty = np.zeros((3, 4, 1), np.float32)
    nowhere = np.zeros((3, 4, 1), bool)
    found = disparity_range(empty, nowhere, empty)
    np.testing.assert_array_equal(found, [0, 1, 0, 1])
    flat = np.full((3, 4, 1), 2, np.float32)
    found = disparity_range(flat, ~nowhere, flat)
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5, 0.5], rtol=2e-4)
    beyond = flat.copy()
    beyond[0] = [[np.nan], [np.inf], [-1], [0]]
    found = disparity_range(np.where(beyond == 2, flat, 0), beyond == 2, beyond)
    assert found[2] == 0  # nothing is farther than infinity
    assert np.isfinite(found).all()


# ---- records -------------------------------------------------------------------------------------


class Fake:
    """A source of one example."""

    names = ("one",)

    def __init__(self, **example):
        self.example = {"name": "one", "rgb": np.zeros((4, 6, 3), np.uint8)} | example

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return dict(self.example)


def records(row, targets, *, evaluation=False, **example):
    return Records(
        DATASETS[row], Fake(**example), split="x", targets=targets, evaluation=evaluation
    )


def test_valid_is_where_all_targets_are(rng):
    depth = rng.choice(np.array([0, 3000, 9000], np.float32), (4, 6, 1))
    classes = rng.choice(np.array([1, 255], np.int32), (4, 6, 1))
    normals = np.array([0, 0, 1], np.float32) * rng.integers(0, 2, (4, 6, 1)).astype(np.float32)
    depth[0, 0], classes[0, 0], normals[0, 0] = 3000, 1, (0, 0, 1)
    everything = {"depth": depth, "classes": classes, "normals": normals}
    there = {
        "depth": depth > 0,
        "classes": classes != 255,
        "normals": normals.any(-1, keepdims=True),
    }
    for targets in (
        ("depth",),
        ("classes",),
        ("depth", "normals"),
        ("depth", "normals", "classes"),
    ):
        given_ = {target: everything[target] for target in targets}
        record = records("nyuv2", targets, **given_)[0]
        np.testing.assert_array_equal(
            record["valid"], np.logical_and.reduce([there[target] for target in targets])
        )
        assert record.keys() - {"unmasked_depth", "labels"} == {"name", "rgb", "valid", *targets}
    for targets in (("alpha",), ("keypoints",), ()):
        example = {
            "alpha": np.zeros((4, 6, 1), np.float32),
            "keypoints": np.zeros((17, 3), np.float32),
        }
        record = records("masks", targets, **{t: example[t] for t in targets})[0]
        assert record["valid"].all()
        assert record["valid"].shape == (4, 6, 1)


def test_depth_masks_normals_where_the_row_says_so(rng):
    depth = rng.choice(np.array([0, 3000, 70000], np.float32), (4, 6, 1))
    depth[0, 0] = 3000
    normals = np.broadcast_to(np.array([0, 0, 1], np.float32), (4, 6, 3))
    seen = depth == 3000
    record = records("hypersim", ("normals",), depth=depth, normals=normals)[0]
    np.testing.assert_array_equal(record["normals"], normals * seen)
    np.testing.assert_array_equal(record["valid"], seen)
    assert "depth" not in record
    assert "unmasked_depth" not in record
    record = records("diode", ("normals",), depth=depth, normals=normals)[0]
    np.testing.assert_array_equal(record["normals"], normals)
    assert record["valid"].all()
    record = records("hypersim", ("depth", "normals"), depth=depth, normals=normals)[0]
    np.testing.assert_array_equal(record["unmasked_depth"], depth / np.float32(1000))
    np.testing.assert_array_equal(record["depth"], np.where(seen, 3, 0).astype(np.float32))
    record = records("hypersim", ("normals",), normals=normals)[0]  # Marigold's lists of normals
    assert record["valid"].all()


def test_the_evaluation_crop_is_one_of_depth():
    size = (24, 32)
    example = {"rgb": np.zeros((*size, 3), np.uint8), "classes": np.zeros((*size, 1), np.int32),
               "depth": np.full((*size, 1), 3000, np.float32)}  # fmt: skip
    valid = {
        targets: records("nyuv2", targets, evaluation=True, **example)[0]["valid"].mean()
        for targets in (("depth",), ("classes",), ("depth", "classes"))
    }
    assert valid["classes",] == 1
    assert valid["depth",] == valid["depth", "classes"] < 0.9


def test_records_without_a_valid_pixel_are_named():
    void = np.full((4, 6, 1), 255, np.int32)
    with pytest.raises(EmptyMaskError, match="No pixel of one has valid classes"):
        records("camvid", ("classes",), classes=void)[0]
    nothing = np.zeros((4, 6, 3), np.float32)
    with pytest.raises(EmptyMaskError, match="No pixel of one has valid normals"):
        records("diode", ("normals",), normals=nothing)[0]
    depth = np.full((4, 6, 1), 3000, np.float32)
    with pytest.raises(EmptyMaskError, match="No pixel of one has valid classes"):
        records("nyuv2", ("depth", "classes"), depth=depth, classes=void)[0]
    with pytest.raises(EmptyMaskError, match=r"No depth of one lies between 0\.001 and 10\.0 m"):
        records("nyuv2", ("depth", "classes"), depth=0 * depth, classes=void)[0]
    depth[:, :3], void[:, :3] = 0, 1
    with pytest.raises(EmptyMaskError, match="No pixel of one has valid depth and classes"):
        records("nyuv2", ("depth", "classes"), depth=depth, classes=void)[0]


def test_targets_follow_the_crop_of_the_dataset(rng):
    size = (375, 1242)
    classes = rng.integers(0, 14, (*size, 1)).astype(np.int32)
    record = records(
        "vkitti", ("classes",), rgb=np.zeros((*size, 3), np.uint8), classes=classes
    )[0]  # fmt: skip
    np.testing.assert_array_equal(record["classes"], classes[23:, 13:1229])


def test_scenes_pass_on_what_they_have(rng):
    scene = {
        "index": 7, "rgb": np.zeros((8, 9, 3), np.uint8), "valid": np.ones((8, 9, 1), bool),
        "depth": np.ones((8, 9, 1), np.float32), "instance": np.zeros((8, 9), np.int32),
        "classes": np.zeros((8, 9), np.int32), "alpha": rng.random((8, 9), np.float32),
        "trimap": np.zeros((8, 9, 1), np.uint8), "keypoints": person(rng, (8, 9)),
        "box": np.zeros(4, np.float32), "caption": "a room",
    }  # fmt: skip
    example = SceneExamples([scene])[0]
    assert example["name"] == "scene_0000000007"
    for field in ("instance", "classes", "alpha", "trimap", "depth", "mask"):
        assert example[field].shape == (8, 9, 1)
    assert example["keypoints"] is scene["keypoints"]
    record = Records(
        DATASETS["people"], SceneExamples([scene]), split="x", targets=("keypoints",),
        evaluation=False,
    )[0]  # fmt: skip
    assert record["flip_pairs"] == FLIP_PAIRS
    assert record["valid"].all()
    assert "mask" not in record


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("scenes", ["depth", "normals", "classes"]),
        ("furnished", ["classes"]),
        ("objects", ["alpha"]),
        ("mattes", ["alpha"]),
        ("people", ["keypoints"]),
    ],
)
def test_rendered_rows_have_what_they_promise(name, targets, rng):
    opened = open_dataset(name, resolution=(48, 64), targets=targets)
    row = opened.dataset
    for index in rng.integers(0, len(opened), 3).tolist():
        record = opened[index]
        assert set(targets) <= record.keys()
        assert record["classes"].max() < len(row.class_names)
        np.testing.assert_allclose(np.linalg.norm(record["normals"], axis=-1), 1, atol=1e-5)
        if "alpha" in targets:
            assert record["alpha"].dtype == np.float32
            assert 0 <= record["alpha"].min() < record["alpha"].max() <= 1
        if "keypoints" in targets:
            assert record["keypoints"].shape == (len(row.keypoint_names), 3)
            left, top, right, bottom = record["box"]
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 48
        assert record["valid"].all()


def test_a_picture_that_is_no_map_is_named(tmp_path):
    for folder in ("rgb", "classes"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / folder / "a.png")
    with pytest.raises(UserError, match=r"classes/a\.png: expected one class number per pixel"):
        open_dataset("folder", data_dir=tmp_path, targets="classes")[0]
