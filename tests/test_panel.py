"""Colours, and pictures beside each other."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor

from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.palettes import PALETTES
from jaxpercept.inference.comparison import Comparison
from jaxpercept.inference.panel import (
    colour_limits,
    draw_targets,
    panel,
    spectral,
    uncertainty_picture,
)
from jaxpercept.inference.skeleton import draw_skeleton


def difference(mine, reference):
    """Largest difference in colour levels; the reference cuts fractions off, here one rounds."""
    return np.abs(mine.astype(int) - np.asarray(reference).astype(int)).max()


# ---- Colours -------------------------------------------------------------------------------------


def test_colours_are_those_of_marigold(rng):
    values = rng.random((20, 30))
    values[0, :3] = 0, 1, 0.5
    reference = MarigoldImageProcessor.visualize_depth(torch.from_numpy(values))[0]
    assert difference(spectral(values), reference) <= 1
    assert spectral(values)[0, 0].tolist() == [158, 1, 66]
    assert spectral(values)[0, 1].tolist() == [94, 79, 162]


def test_colours_are_those_of_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 256)[None]
    reference = matplotlib.colormaps["Spectral"](values, bytes=True)[..., :3]
    assert difference(spectral(values), reference) <= 1


def test_colours_of_what_is_outside():
    colours = spectral(np.array([[-1.0, 0.0, 1.0, 2.0, np.nan, np.inf]]))[0]
    assert (colours[0] == colours[1]).all()
    assert (colours[2] == colours[3]).all()
    assert colours[4:].tolist() == [[40] * 3] * 2


def test_colours_between_limits(rng):
    values = rng.uniform(2, 5, (7, 9))
    reference = MarigoldImageProcessor.visualize_depth(torch.from_numpy(values), 2.5, 4.0)[0]
    assert difference(spectral(values, (2.5, 4.0)), reference) <= 1
    # A flat map has no limits; its colour is that of the nearest.
    assert (spectral(np.full((2, 2), 3.0), (3.0, 3.0)) == spectral(np.zeros((1, 1)))).all()


def test_limits_leave_out_what_is_not_measured(rng):
    values = rng.uniform(1, 2, (50, 40))
    valid = rng.random((50, 40)) < 0.5
    low, high = colour_limits(np.where(valid, values, 1e6), valid)
    assert (low, high) == pytest.approx((1.02, 1.98), abs=0.03)
    assert colour_limits(values, np.zeros_like(valid)) == (0, 1)


# ---- Intrinsics and uncertainty ------------------------------------------------------------------

PROPERTIES = {
    "target_names": ["albedo", "material", "shading", "residual"],
    "albedo": {"prediction_space": "srgb"},
    "material": {
        "prediction_space": "stack",
        "sub_target_names": ["roughness", "metallicity", None],
    },
    "roughness": {"prediction_space": "srgb"},
    "metallicity": {"prediction_space": "linear", "up_to_scale": True},
    "shading": {"prediction_space": "linear", "up_to_scale": True},
    "residual": {"prediction_space": "linear", "up_to_scale": False},
}


def test_targets_are_drawn_as_diffusers_does(rng):
    targets = (rng.random((4, 11, 14, 3)) * 0.8).astype(np.float32)
    mine = draw_targets(targets, PROPERTIES)
    (reference,) = MarigoldImageProcessor.visualize_intrinsics(targets, PROPERTIES)
    assert list(mine) == list(reference)
    assert set(mine) == {*PROPERTIES} - {"target_names"}
    for name, image in mine.items():
        # diffusers draws channels from matplotlib's table of 256 greys, two levels beside its own.
        tolerance = 2 if name in ("roughness", "metallicity") else 1
        assert difference(image, reference[name]) <= tolerance, name
    exact = MarigoldImageProcessor.colormap(
        targets[1, ..., 0], "binary", bytes=True, _force_method="custom"
    )
    assert difference(mine["roughness"], exact) <= 1


def test_a_black_target_stays_black():
    drawn = draw_targets(np.zeros((4, 2, 3, 3), np.float32), PROPERTIES)
    assert not drawn["shading"].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_uncertainty_is_drawn_as_diffusers_does(rng, channels):
    uncertainty = rng.gamma(1.0, 0.1, (30, 40, channels)).astype(np.float32)
    reference = np.asarray(MarigoldImageProcessor.visualize_uncertainty(uncertainty)[0])
    mine = uncertainty_picture(uncertainty)
    assert mine.shape == (30, 40, 3)
    assert difference(mine, reference.reshape(30, 40, channels)) <= 1
    assert 0.045 < (mine == 255).mean() < 0.07


def test_uncertainty_of_several_targets_and_of_certain_pixels(rng):
    uncertainty = rng.random((8, 9, 6)).astype(np.float32)
    parts = [uncertainty_picture(uncertainty[..., i : i + 3]) for i in (0, 3)]
    np.testing.assert_array_equal(uncertainty_picture(uncertainty), np.concatenate(parts, axis=1))
    assert not uncertainty_picture(np.zeros((4, 5, 1), np.float32)).any()
    with pytest.raises(ValueError, match="negative"):
        uncertainty_picture(-uncertainty)


# ---- Panels --------------------------------------------------------------------------------------


def _row(rng, height, width) -> Comparison:
    truth = rng.uniform(1, 5, (height, width, 1)).astype(np.float32)
    return Comparison(
        kind="affine_depth",
        rgb=rng.integers(0, 256, (height, width, 3)).astype(np.uint8),
        truth=truth,
        valid=np.ones((height, width, 1), bool),
        prediction=truth.copy(),
    )


def test_panel_shows_truth_and_prediction_in_one_range(rng):
    row = _row(rng, 200, 300)
    row.valid[:50] = False
    row.truth[:50] = 0
    picture = panel([row.pictures()])
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 3 * 300 + 2 * 4
    cells = picture[-200:]
    truth, prediction = cells[:, 304:604], cells[:, 608:908]
    np.testing.assert_array_equal(cells[:, :300], row.rgb)
    # Equal depths have equal colours, and what is not measured is grey.
    np.testing.assert_array_equal(truth[50:], prediction[50:])
    assert (truth[:50] == 40).all()
    assert not (prediction[:50] == 40).all(axis=-1).any()
    near, far = np.quantile(row.truth[row.valid], (0.02, 0.98))
    reference = MarigoldImageProcessor.visualize_depth(row.prediction[..., 0], near, far)[0]
    assert difference(prediction, reference) <= 1


def test_panel_of_different_and_of_small_images(rng):
    picture = panel([_row(rng, 24, 32).pictures(), _row(rng, 64, 32).pictures()])
    assert picture.shape[1] == 3 * 256 + 8
    assert picture.shape[0] > 192 + 512
    empty = _row(rng, 24, 32)
    empty.valid[:] = False
    assert panel([empty.pictures()]).shape[1] == 3 * 256 + 8


def test_panel_of_any_columns(rng):
    image, flat = (
        rng.integers(0, 200, (*size, 3)).astype(np.uint8) for size in ((300, 400), (100, 400))
    )
    row = {"image": image, "normals": flat, "mask": image, "alpha": image}
    picture = panel([row, row])
    assert picture.shape[1] == 4 * 400 + 3 * 4
    last = picture[-300:]
    np.testing.assert_array_equal(last[:, :400], image)
    np.testing.assert_array_equal(last[:100, 404:804], flat)
    assert (last[100:, 404:804] == 255).all()
    np.testing.assert_array_equal(last[:, -400:], image)
    # Between the rows is white; each title stands above its column.
    np.testing.assert_array_equal(picture[-304:-300], np.full((4, 1612, 3), 255))
    for column in range(4):
        assert (picture[:22, column * 404 : column * 404 + 400] < 100).any()
    with pytest.raises(ValueError, match="titles differ"):
        panel([row, _row(rng, 4, 4).pictures()])


# ---- Truth beside prediction ---------------------------------------------------------------------


def test_normals_and_masks_show_what_is_not_measured_in_grey(rng):
    normals = rng.normal(size=(6, 8, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    valid = rng.random((6, 8, 1)) < 0.5
    valid[0, 0] = False
    rgb = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    shown = Comparison("normals", rgb, normals, valid, normals).pictures()
    assert list(shown) == ["input", "truth", "prediction"]
    np.testing.assert_array_equal(shown["input"], rgb)
    expected = np.rint((normals + 1) / 2 * 255)
    np.testing.assert_array_equal(shown["prediction"], expected)
    np.testing.assert_array_equal(shown["truth"], np.where(valid, expected, 40))


def test_classes_have_the_colours_of_their_palette(rng):
    colours = np.array(PALETTES["camvid"].colours, np.uint8)
    classes = rng.integers(0, len(colours), (6, 8, 1)).astype(np.int32)
    classes[0, 0] = 255
    valid = classes != 255
    predicted = rng.integers(0, len(colours), (6, 8, 1)).astype(np.float32)
    rgb = np.zeros((6, 8, 3), np.uint8)
    row = Comparison("classes", rgb, classes, valid, predicted, {"palette": "camvid"})
    shown = row.pictures()
    expected = colours[predicted[..., 0].astype(int)]
    np.testing.assert_array_equal(shown["prediction"], expected)
    np.testing.assert_array_equal(shown["truth"][1:], colours[classes[1:, :, 0]])
    assert (shown["truth"][0, 0] == 40).all()


def joints_at(places, names):
    joints = np.zeros((len(KEYPOINTS), 3), np.float32)
    for name, place in zip(names, places, strict=True):
        joints[KEYPOINTS.index(name)] = [*place, 1]
    return joints


def test_a_limb_joins_its_joints_and_absent_ones_are_left_out():
    black = np.zeros((60, 80, 3), np.uint8)
    joints = joints_at([(10.5, 20.5), (50.5, 20.5)], ["left_elbow", "left_wrist"])
    drawn = draw_skeleton(joints, black)
    assert (drawn[20, 10:51] == (255, 150, 40)).all()
    assert not drawn[25:].any()
    assert not black.any()
    joints[KEYPOINTS.index("left_wrist"), 2] = 0.1
    drawn = draw_skeleton(joints, black)
    assert drawn[20, 10].any()
    assert not drawn[:, 20:].any()
    # Of other names there are dots alone.
    assert draw_skeleton(joints[:2], black, ["tip", "root"], least=0.0).any()


def test_keypoints_lie_over_the_image(rng):
    rgb = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    joints = joints_at([(12.5, 30.5)], ["nose"])
    heat = np.zeros((40, 50, len(KEYPOINTS)), np.float32)
    heat[30, 12, 0] = 1
    row = Comparison("keypoints", rgb, joints, np.ones((40, 50, 1), bool), heat)
    shown = row.pictures()
    for title in ("truth", "prediction"):
        changed = (shown[title] != rgb).any(axis=-1)
        assert changed[30, 12]
        assert not changed[:25].any()
    np.testing.assert_array_equal(shown["truth"], shown["prediction"])
