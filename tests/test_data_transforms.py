"""Augmentation keeps image and target together; resizing and quantiles follow their definitions."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept.data import transforms
from jaxpercept.data.transforms import NO_AUGMENT, Augment, prepare
from jaxpercept.errors import UserError

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=40, deadline=None)


def make_record(rng, size, invalid=0.2):
    """A record whose image encodes its depth: red is the depth in metres, green its validity."""
    depth = rng.integers(1, 256, (*size, 1)).astype(np.float32)
    valid = rng.random((*size, 1)) >= invalid
    rgb = np.concatenate([depth, valid * 255, 255 - depth], -1).astype(np.uint8)
    normals = rng.standard_normal((*size, 3)).astype(np.float32)
    return {"name": "a", "rgb": rgb, "depth": depth * valid, "valid": valid, "normals": normals}


def assert_aligned(record):
    assert record["valid"].dtype == bool
    np.testing.assert_array_equal(record["rgb"][..., 1:2] == 255, record["valid"])
    red = record["rgb"][..., :1].astype(np.float32)
    np.testing.assert_array_equal(np.where(record["valid"], red, 0), record["depth"])


# ---- geometry ------------------------------------------------------------------------------------


@quick
@given(sizes, seeds)
def test_flip_is_an_involution_and_negates_x(size, seed):
    record = make_record(np.random.default_rng(seed), size)
    once = transforms.flip_horizontal(record)
    assert_aligned(once)
    np.testing.assert_array_equal(once["rgb"], record["rgb"][:, ::-1])
    np.testing.assert_array_equal(once["normals"][..., 0], -record["normals"][:, ::-1, 0])
    np.testing.assert_array_equal(once["normals"][..., 1:], record["normals"][:, ::-1, 1:])
    twice = transforms.flip_horizontal(once)
    for field in transforms.RASTERS:
        if field in record:
            np.testing.assert_array_equal(twice[field], record[field])


@quick
@given(
    sizes,
    sizes,
    seeds,
    st.floats(0.05, 1.0),
    st.floats(1.0, 2.0),
    st.sampled_from(["crop", "center", "stretch"]),
)
def test_prepare_keeps_image_and_depth_aligned(size, resolution, seed, low, aspect, fit):
    rng = np.random.default_rng(seed)
    augment = Augment(
        scale=(low, 1.0), aspect=aspect, fit=fit, photometric=0.0, rgb_resize="nearest"
    )
    record = prepare(make_record(rng, size), rng, augment, resolution)
    for field in ("rgb", "depth", "valid", "normals"):
        assert record[field].shape[:2] == resolution
    assert_aligned(record)


@quick
@given(sizes, sizes, seeds, st.floats(0.01, 1.0), st.floats(1.0, 3.0))
def test_windows_lie_inside_the_image(size, resolution, seed, low, aspect):
    augment = Augment(scale=(low, 1.0), aspect=aspect)
    rng = np.random.default_rng(seed)
    for fit in ("crop", "center", "stretch"):
        window = transforms.random_window(
            size, rng, dataclasses.replace(augment, fit=fit), resolution
        )
        top, left, height, width = window
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        assert height > 0
        assert width > 0


def test_window_has_the_aspect_of_the_target(rng):
    for _ in range(50):
        _, _, height, width = transforms.random_window(
            (1000, 1500), rng, Augment(scale=(0.1, 0.9)), (96, 128)
        )
        assert abs(width / height - 128 / 96) < 0.01
    assert transforms.random_window((352, 1216), rng, NO_AUGMENT, (480, 640))[1:] == (374, 352, 469)
    whole = Augment(fit="stretch")
    assert transforms.random_window((352, 1216), rng, whole, (480, 640)) == (0, 0, 352, 1216)


@pytest.mark.parametrize("degrees", [-20.0, -3.0, 7.0, 45.0])
def test_rotation_turns_all_rasters_alike(degrees):
    rows, columns = 90, 120
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    level = 60 + 0.8 * x + 0.6 * y
    record = {
        "rgb": np.repeat(np.rint(level)[..., None], 3, -1).astype(np.uint8),
        "depth": level[..., None],
        "valid": np.ones((rows, columns, 1), bool),
        "instance": np.ones((rows, columns, 1), np.int32) * 70000,
        "normals": np.broadcast_to(np.array([1, 0, 0], np.float32), (rows, columns, 3)),
    }
    turned = transforms.rotate(record, degrees)
    assert turned["valid"].all()  # no corner without data is left
    assert (turned["instance"] == 70000).all()
    difference = turned["rgb"][..., 0].astype(np.float32) - turned["depth"][..., 0]
    assert np.abs(difference).max() < 2.0
    # The direction in which depth grows turns like a direction in the image, y down.
    gradient = np.array([0.8, 0.6])
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    expected = np.array([[c, s], [-s, c]]) @ gradient
    dy, dx = (np.polyfit(np.arange(n), line, 1)[0] for n, line in (
        (turned["depth"].shape[0], turned["depth"][..., 0].mean(1)),
        (turned["depth"].shape[1], turned["depth"][..., 0].mean(0)),
    ))  # fmt: skip
    np.testing.assert_allclose([dx, dy], expected, atol=0.02)
    np.testing.assert_allclose(turned["normals"][0, 0], [c, s, 0], atol=1e-6)


def test_intrinsics_follow_every_change(rng):
    """The principal point keeps pointing at the same bright pixel."""
    image = np.zeros((60, 80, 3), np.uint8)
    row, column = (int(v) for v in rng.integers(25, 35, 2))
    image[row - 3 : row + 4, column - 3 : column + 4] = 255
    centre = np.array([100, 100, column + 0.5, row + 0.5], np.float32)
    record = {"rgb": image, "intrinsics": centre}

    def brightest(record):
        weight = record["rgb"][..., 0].astype(np.float64)
        y, x = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
        return [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]

    for changed in (
        record,
        transforms.flip_horizontal(record),
        transforms.crop(record, 10, 12, 40, 50),
        transforms.resize(record, (120, 40)),
        transforms.rotate(record, 11.0),
    ):
        np.testing.assert_allclose(changed["intrinsics"][2:], brightest(changed), atol=0.2)
    np.testing.assert_array_equal(transforms.resize(record, (120, 40))["intrinsics"][:2], [50, 200])


def test_flip_exchanges_left_and_right_in_words(rng):
    record = make_record(rng, (4, 6)) | {
        "caption": "a bed on the left, a bright lamp on the right",
        "phrases": [("the bed on the left", 3)],
    }
    flipped = transforms.flip_horizontal(record)
    assert flipped["caption"] == "a bed on the right, a bright lamp on the left"
    assert flipped["phrases"] == [("the bed on the right", 3)]
    assert transforms.flip_horizontal(flipped)["caption"] == record["caption"]


# ---- resize --------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 60), st.integers(1, 60))
def test_nearest_takes_the_closest_centre(size, out):
    line = np.arange(size, dtype=np.float32)
    chosen = transforms.resize_nearest(line[None, :, None], (1, out))[0, :, 0]
    transposed = transforms.resize_nearest(line[:, None, None], (out, 1))[:, 0, 0]
    np.testing.assert_array_equal(transposed, chosen)
    centres = (np.arange(out) + 0.5) * size / out - 0.5
    distance = np.abs(centres[:, None] - line)
    np.testing.assert_allclose(
        distance[np.arange(out), chosen.astype(int)], distance.min(1), atol=1e-9
    )
    assert (np.diff(chosen) >= 0).all()


def test_nearest_is_that_of_jax(rng):
    raster = rng.random((20, 18, 2), np.float32)
    expected = jax.image.resize(raster, (13, 31, 2), "nearest")
    np.testing.assert_array_equal(transforms.resize_nearest(raster, (13, 31)), expected)


def test_rgb_resize_is_antialiased(rng):
    image = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    small = transforms.resize_rgb(image, (24, 32))
    expected = jax.image.resize(image.astype(np.float32), (24, 32, 3), "linear", antialias=True)
    np.testing.assert_allclose(small, expected, atol=1.01)
    np.testing.assert_array_equal(transforms.resize_rgb(image, (96, 128)), image)


# ---- quantiles -----------------------------------------------------------------------------------


@quick
@given(sizes, seeds)
def test_depth_range_is_the_linear_quantile_of_valid_pixels(size, seed):
    record = make_record(np.random.default_rng(seed), size)
    values = np.sort(record["depth"][record["valid"]].astype(np.float64))
    low, high = transforms.depth_range(record["depth"], record["valid"])
    if values.size == 0:
        assert (low, high) == (0, 1)
        return
    at = np.array([0.02, 0.98]) * (values.size - 1)
    expected = np.interp(at, np.arange(values.size), values)
    np.testing.assert_allclose(low, expected[0], rtol=1e-6)
    np.testing.assert_allclose(high, max(expected[1], expected[0] * (1 + 1e-4)), rtol=1e-6)
    assert high > low


def test_depth_range_is_taken_before_resizing(rng):
    record = make_record(rng, (64, 64), invalid=0.0)
    prepared = prepare(record, rng, NO_AUGMENT, (4, 4))
    np.testing.assert_array_equal(
        prepared["depth_range"], transforms.depth_range(record["depth"], record["valid"])
    )
    assert prepared["depth_range"].dtype == np.float32


# ---- photometric ---------------------------------------------------------------------------------

STRONG = Augment(
    photometric=1.0, brightness=0.4, contrast=0.4, saturation=0.5, hue=0.1, gamma=0.3, blur=1.5,
    noise=5.0,
)  # fmt: skip


def test_photometric_changes_the_image_only(rng):
    record = make_record(rng, (24, 32))
    seed = int(rng.integers(2**32))
    plain = dataclasses.replace(STRONG, photometric=0.0)
    strong = prepare(record, np.random.default_rng(seed), STRONG, (24, 32))
    calm = prepare(record, np.random.default_rng(seed), plain, (24, 32))
    assert strong["rgb"].dtype == np.uint8
    assert (strong["rgb"] != calm["rgb"]).mean() > 0.5
    for field in ("depth", "valid", "normals", "depth_range"):
        np.testing.assert_array_equal(strong[field], calm[field])


def test_photometric_without_strengths_is_the_identity(rng):
    image = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(transforms.photometric(image, rng, Augment()), image)


def test_photometric_follows_its_formulas(rng):
    image = rng.integers(60, 180, (9, 7, 3)).astype(np.uint8)
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)

    def draw(seed):
        return np.random.default_rng(seed).uniform(-1, 1, 6)

    seed = int(rng.integers(2**32))
    brightness, contrast, saturation, _, gamma, _ = draw(seed)

    def apply(**strengths):
        return transforms.photometric(image, np.random.default_rng(seed), Augment(**strengths))

    np.testing.assert_allclose(
        apply(brightness=0.3), np.clip(image * (1 + 0.3 * brightness), 0, 255), atol=0.51
    )
    expected = grey.mean() + (image - grey.mean()) * (1 + 0.3 * contrast)
    np.testing.assert_allclose(apply(contrast=0.3), np.clip(expected, 0, 255), atol=0.52)
    expected = grey[..., None] + (image - grey[..., None]) * (1 + 0.3 * saturation)
    np.testing.assert_allclose(apply(saturation=0.3), np.clip(expected, 0, 255), atol=0.6)
    expected = 255 * (image / 255) ** (1.5**gamma)
    np.testing.assert_allclose(apply(gamma=0.5), expected, atol=0.52)


def test_haze_fades_with_depth_into_white(rng):
    depth = rng.uniform(1, 9, (6, 8, 1)).astype(np.float32)
    valid = rng.random((6, 8, 1)) < 0.8
    valid[0, 0] = True
    rgb = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    hazy = transforms.haze({"rgb": rgb, "depth": depth, "valid": valid, "caption": "a room"})
    # Thickness 1 at the median depth, which is taken for the depth where it is unknown.
    clear = np.exp(-np.where(valid, depth / np.median(depth[valid]), 1))
    np.testing.assert_allclose(hazy["rgb"], 242 - clear * (242 - rgb.astype(float)), atol=0.51)
    assert hazy["caption"] == "fog, a room"
    assert "caption" not in transforms.haze({"rgb": rgb, "depth": depth, "valid": valid})
    blind = transforms.haze({"rgb": rgb, "depth": depth, "valid": np.zeros_like(valid)})
    expected = 242 - math.exp(-1) * (242 - rgb.astype(float))
    np.testing.assert_allclose(blind["rgb"], expected, atol=0.51)


def test_a_share_of_the_images_with_depth_is_hazy(rng):
    record = {
        "rgb": rng.integers(0, 200, (8, 8, 3)).astype(np.uint8),
        "depth": rng.uniform(1, 9, (8, 8, 1)).astype(np.float32),
        "valid": np.ones((8, 8, 1), bool),
    }
    augment = dataclasses.replace(NO_AUGMENT, haze=0.25)
    seeds = rng.integers(2**31, size=200).tolist()
    outputs = [prepare(record, np.random.default_rng(seed), augment, (8, 8)) for seed in seeds]
    hazy = [(out["rgb"] != record["rgb"]).any() for out in outputs]
    assert 20 < sum(hazy) < 80
    assert all((out["depth"] == record["depth"]).all() for out in outputs)
    assert all((out["source"] == record["rgb"]).all() for out in outputs)
    only_rgb = {"rgb": record["rgb"]}
    for seed in seeds[:20]:
        out = prepare(only_rgb, np.random.default_rng(seed), augment, (8, 8))
        np.testing.assert_array_equal(out["rgb"], record["rgb"])
        np.testing.assert_array_equal(out["source"], record["rgb"])


def test_hue_turns_grey_into_itself(rng):
    grey = np.repeat(rng.integers(0, 256, (6, 6, 1)), 3, -1).astype(np.uint8)
    np.testing.assert_array_equal(transforms.photometric(grey, rng, Augment(hue=0.5)), grey)


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"flipp": 0.5}, r"Unknown key augment\.flipp"),
        ({"flip": 1.5}, r"augment\.flip must be a probability"),
        ({"scale": (0.5, 0.2)}, r"augment\.scale must be"),
        ({"scale": [0, 1]}, r"augment\.scale must be"),
        ({"fit": "pad"}, r"augment\.fit must be"),
        ({"rotation": 90}, r"augment\.rotation must be"),
        ({"blur": "much"}, r"augment\.blur must be a number"),
        ({"hue": 1}, r"augment\.hue must be"),
    ],
)
def test_bad_configuration_is_named(config, message):
    with pytest.raises(UserError, match=message):
        Augment.from_dict(config)


def test_same_generator_same_result(rng):
    record = make_record(rng, (30, 40))
    augment = dataclasses.replace(STRONG, scale=(0.3, 0.9), rotation=10.0)
    first, second = (
        prepare(record, np.random.default_rng([3, 7]), augment, (15, 20)) for _ in range(2)
    )
    for field in ("rgb", "depth", "valid", "depth_range"):
        np.testing.assert_array_equal(first[field], second[field])
