"""Kinds of predictions: their files and pictures."""

import json

import numpy as np
import pytest
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from PIL import Image

from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.inference.outputs import (
    ENDINGS,
    KINDS,
    Options,
    atomic,
    picture,
    pictures,
    save_json,
    save_prediction,
    target_names,
)
from jaxpercept.inference.panel import panel, spectral, uncertainty_picture
from jaxpercept.metrics.detection import boxes_of

PROPERTIES = {
    "target_names": ["albedo", "material"],
    "albedo": {"prediction_space": "linear", "up_to_scale": True},
    "material": {
        "prediction_space": "stack",
        "sub_target_names": ["roughness", "metallicity", None],
    },
}
CHANNELS = {kind: meaning.channels or 6 for kind, meaning in KINDS.items()}


def predicted(rng, kind, size=(12, 17)):
    values = rng.random((*size, CHANNELS[kind]), np.float32)
    if kind == "classes":
        return rng.integers(0, 40, values.shape).astype(np.float32)
    if kind == "normals":
        values = rng.normal(size=values.shape).astype(np.float32)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    return values * 8 if kind == "metric_depth" else values


def options_of(kind):
    options = {"intrinsics": {"target_properties": PROPERTIES}, "classes": {"palette": "nyu40"}}
    return options.get(kind, {})


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_files_of_a_depth_prediction(tmp_path, rng):
    prediction = rng.random((12, 17, 1), np.float32)
    prediction[0, 0], prediction[0, 1] = 0, 1
    facts = {"seed": 3, "checkpoint": "runs/x"}
    paths = save_prediction(tmp_path, "sub/photo", "affine_depth", prediction, facts)
    names = ["photo.json", "photo.npy", "photo.png", "photo_16bit.png"]
    assert sorted(path.name for path in paths) == names
    # Nothing temporary is left.
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == names

    array = np.load(tmp_path / "sub/photo.npy")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, prediction[..., 0])
    sixteen = opened(tmp_path / "sub/photo_16bit.png")
    assert sixteen.dtype == np.uint16
    np.testing.assert_allclose(sixteen / 65535, prediction[..., 0], atol=0.51 / 65535)
    assert sixteen[0, :2].tolist() == [0, 65535]
    coloured = opened(tmp_path / "sub/photo.png")
    np.testing.assert_array_equal(coloured, spectral(prediction[..., 0]))

    record = json.loads((tmp_path / "sub/photo.json").read_text())
    assert record["kind"] == "affine_depth"
    assert record["range"] == [0, 1]
    assert record["convention"].startswith("0 = near, 1 = far")
    assert (record["height"], record["width"]) == (12, 17)
    assert (record["seed"], record["checkpoint"]) == (3, "runs/x")
    assert record["files"] == ["photo.npy", "photo.png", "photo_16bit.png"]
    assert record["units_per_value"] == {"photo_16bit.png": 65535}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(tmp_path, rng, kind):
    prediction = predicted(rng, kind)
    options = options_of(kind)
    image = rng.integers(0, 256, (24, 34, 3)).astype(np.uint8)
    channels = {"intrinsics": 6, "classes": 40, "keypoints": 17}
    uncertainty = rng.random((12, 17, channels.get(kind, 1)), np.float32)
    paths = save_prediction(
        tmp_path,
        "a",
        kind,
        prediction,
        {},
        uncertainty=uncertainty,
        image=image,
        panelled=True,
        **options,
    )
    assert sorted(paths) == sorted(tmp_path.iterdir())
    # No other image's outputs may be called like one of these.
    assert {path.name.removeprefix("a") for path in paths} <= set(ENDINGS)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["kind"] == kind
    assert record["convention"] == KINDS[kind].convention
    assert {*record["files"], "a.json"} == {path.name for path in paths}

    values = np.load(tmp_path / "a.npy")
    assert values.dtype == np.float32
    if kind == "intrinsics":
        assert values.shape == (2, 12, 17, 3)
        np.testing.assert_array_equal(np.concatenate(list(values), axis=-1), prediction)
    elif kind == "keypoints":
        assert values.shape == (17, 3)
    elif kind == "boxes":
        np.testing.assert_array_equal(values, boxes_of(prediction[..., 0]))
        written = np.array([list(box.values()) for box in record["boxes"]], np.float32)
        np.testing.assert_array_equal(written.reshape(-1, 5), values)
    else:
        expected = prediction[..., 0] if CHANNELS[kind] == 1 else prediction
        np.testing.assert_array_equal(values, expected)
        low, high = KINDS[kind].range
        assert low <= values.min() <= values.max() <= high
    if kind in ("keypoints", "boxes"):
        options["image"] = image
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), picture(kind, prediction, **options))
    columns = {"image": image, **pictures(kind, prediction, **options)}
    if kind in ("classes", "keypoints"):  # one map for all channels
        uncertainty = uncertainty.max(axis=-1, keepdims=True)
    columns["uncertainty"] = uncertainty_picture(uncertainty)
    np.testing.assert_array_equal(opened(tmp_path / "a_panel.png"), panel([columns]))
    np.testing.assert_array_equal(opened(tmp_path / "a_uncertainty.png"), columns["uncertainty"])
    if kind == "intrinsics":
        split = np.stack([uncertainty[..., :3], uncertainty[..., 3:]])
        np.testing.assert_array_equal(np.load(tmp_path / "a_uncertainty.npy"), split)
    else:
        saved = np.load(tmp_path / "a_uncertainty.npy")
        np.testing.assert_array_equal(saved, uncertainty[..., 0])


def test_disparity_is_drawn_like_depth_and_written_as_it_is(tmp_path, rng):
    prediction = predicted(rng, "affine_disparity")
    prediction[0, :2, 0] = 0, 1
    drawn = picture("affine_disparity", prediction)
    # Near, 1, is red; far, 0, is violet.
    assert drawn[0, :2].tolist() == [[94, 79, 162], [158, 1, 66]]
    np.testing.assert_array_equal(drawn, picture("affine_depth", 1 - prediction))
    save_prediction(tmp_path, "a", "affine_disparity", prediction, {})
    sixteen = opened(tmp_path / "a_16bit.png")
    np.testing.assert_allclose(sixteen / 65535, prediction[..., 0], atol=0.51 / 65535)


def test_metric_depth_in_millimetres(tmp_path, rng):
    prediction = rng.uniform(0.5, 8, (12, 17, 1)).astype(np.float32)
    prediction[0, :4, 0] = np.nan, 0, 70, np.inf
    save_prediction(tmp_path, "a", "metric_depth", prediction, {})
    millimetres = opened(tmp_path / "a_16bit.png")
    # What does not fit is no measurement, rather than a wrong one.
    assert millimetres[0, :4].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(millimetres[1:], prediction[1:, :, 0] * 1000, atol=0.501)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["range"] == [0, None]
    assert record["units_per_value"] == {"a_16bit.png": 1000}
    drawn = opened(tmp_path / "a.png")
    assert (drawn[0, [0, 1, 3]] == 40).all()
    assert drawn[0, 2].tolist() == [94, 79, 162]
    # Fixed limits do not depend on the image.
    fixed = picture("metric_depth", prediction, limits=(0.0, 10.0))
    np.testing.assert_array_equal(fixed[1:], spectral(prediction[1:, :, 0] / 10))
    with pytest.raises(UserError, match="no range"):
        Options(limits=(5.0, 1.0))


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_normals_in_both_conventions(tmp_path, rng, convention):
    prediction = predicted(rng, "normals")
    save_prediction(tmp_path, "a", "normals", prediction, {}, normals_convention=convention)
    values = np.load(tmp_path / "a.npy")
    signs = (1, 1, 1) if convention == "opengl" else (1, -1, -1)
    np.testing.assert_array_equal(values, prediction * np.float32(signs))
    flip = convention == "opencv"
    (reference,) = MarigoldImageProcessor.visualize_normals(prediction, flip_y=flip, flip_z=flip)
    drawn = opened(tmp_path / "a.png")
    assert np.abs(drawn.astype(int) - np.asarray(reference).astype(int)).max() <= 1
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["normals_convention"] == convention
    y, z = ("up", "towards") if convention == "opengl" else ("down", "away from")
    assert f"+x right, +y {y}, +z {z} the viewer" in record["convention"]


def test_masks_as_bytes(tmp_path, rng):
    for kind in ("mask", "alpha"):
        prediction = predicted(rng, kind)
        prediction[0, :2, 0] = 0, 1
        save_prediction(tmp_path, kind, kind, prediction, {})
        mask = opened(tmp_path / f"{kind}_mask.png")
        assert mask.dtype == np.uint8
        assert mask[0, :2].tolist() == [0, 255]
        np.testing.assert_allclose(mask / 255, prediction[..., 0], atol=0.501 / 255)
        np.testing.assert_array_equal(
            opened(tmp_path / f"{kind}.png"), mask[..., None].repeat(3, -1)
        )


def test_classes_in_their_colours_and_by_name(tmp_path, rng):
    prediction = np.full((12, 17, 1), 3, np.float32)
    prediction[:3] = 0
    save_prediction(tmp_path, "a", "classes", prediction, {}, palette="camvid")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), prediction[..., 0])
    numbers = opened(tmp_path / "a_mask.png")
    assert numbers.dtype == np.uint8
    np.testing.assert_array_equal(numbers, prediction[..., 0])
    names, colours = PALETTES["camvid"]
    drawn = opened(tmp_path / "a.png")
    assert (drawn[:3] == colours[0]).all()
    assert (drawn[3:] == colours[3]).all()
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["palette"] == "camvid"
    assert record["class_names"] == list(names)
    assert record["classes"] == [
        {"number": 3, "name": names[3], "share": 0.75},
        {"number": 0, "name": names[0], "share": 0.25},
    ]
    with pytest.raises(UserError, match="name of their palette"):
        picture("classes", prediction)
    with pytest.raises(UserError, match="'rainbow' is unknown"):
        picture("classes", prediction, palette="rainbow")
    # What is no class is black.
    assert not picture("classes", prediction + 200, palette="camvid").any()


def test_joints_as_places_and_by_name(tmp_path, rng):
    height, width = 48, 64
    places = rng.uniform((6, 6), (width - 6, height - 6), (17, 2))
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    x, y = columns[None, :, None] - places[:, 0], rows[:, None, None] - places[:, 1]
    heat = np.exp(-(x**2 + y**2) / (2 * 2.0**2)).astype(np.float32)
    heat[..., 4] *= 0.1
    save_prediction(tmp_path, "a", "keypoints", heat, {})
    joints = np.load(tmp_path / "a.npy")
    assert joints.shape == (17, 3)
    # A quarter pixel towards the higher neighbour leaves a quarter.
    np.testing.assert_allclose(joints[:, :2], places, atol=0.2501)
    assert 0.09 < joints[4, 2] <= 0.1
    assert (np.delete(joints[:, 2], 4) > 0.9).all()
    record = json.loads((tmp_path / "a.json").read_text())
    assert [joint["name"] for joint in record["keypoints"]] == list(KEYPOINTS)
    assert record["keypoints"][2]["x"] == pytest.approx(joints[2, 0])
    assert "0.5" in record["convention"]
    drawn = opened(tmp_path / "a.png")
    assert drawn.shape == (height, width, 3)
    for number, (x, y, _) in enumerate(joints):
        assert drawn[int(y), int(x)].any() or number == 4
    # Over an image twice as large, places are twice as far.
    image = np.zeros((2 * height, 2 * width, 3), np.uint8)
    larger = picture("keypoints", heat, image=image)
    assert larger.shape == image.shape
    x, y, _ = joints[0]
    assert larger[int(2 * y), int(2 * x)].any()


def test_colours_are_shown_as_they_are(rng):
    prediction = predicted(rng, "colors")
    np.testing.assert_allclose(picture("colors", prediction) / 255, prediction, atol=0.501 / 255)


def test_intrinsics_are_drawn_by_target(tmp_path, rng):
    prediction = predicted(rng, "intrinsics")
    save_prediction(tmp_path, "a", "intrinsics", prediction, {}, target_properties=PROPERTIES)
    targets = prediction.reshape(12, 17, 2, 3).transpose(2, 0, 1, 3)
    # diffusers wants an entry for the channels, even an empty one.
    entries = {"roughness": {}, "metallicity": {}}
    (reference,) = MarigoldImageProcessor.visualize_intrinsics(targets, PROPERTIES | entries)
    assert set(reference) == {"albedo", "material", "roughness", "metallicity"}
    for name, image in reference.items():
        drawn = opened(tmp_path / f"a_{name}.png")
        # Two levels: see the test of `draw_targets`.
        assert np.abs(drawn.astype(int) - np.asarray(image).astype(int)).max() <= 2, name
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["target_properties"] == PROPERTIES
    assert opened(tmp_path / "a.png").shape == (12, 4 * 17, 3)


def test_what_does_not_fit_is_refused(tmp_path, rng):
    wrong = {
        "need target_properties": (6, None),
        "has 3 channels": (3, PROPERTIES),
        "cannot name a file": (3, {"target_names": ["../albedo"]}),
        "none of 16bit, mask": (3, {"target_names": ["mask"]}),
        "each name once": (6, {"target_names": ["albedo", "albedo"]}),
        "three sub_target_names": (
            3,
            {"target_names": ["a"], "a": {"prediction_space": "stack", "sub_target_names": ["b"]}},
        ),
    }
    for message, (channels, properties) in wrong.items():
        prediction = rng.random((4, 5, channels), np.float32)
        with pytest.raises(UserError, match=message):
            save_prediction(
                tmp_path, "a", "intrinsics", prediction, {}, target_properties=properties
            )
    assert target_names(PROPERTIES) == ["albedo", "roughness", "metallicity", "material"]
    with pytest.raises(UserError, match="opengl or opencv"):
        picture("normals", predicted(rng, "normals"), normals_convention="omnidata")
    with pytest.raises(ValueError, match="3 channels"):
        picture("normals", predicted(rng, "mask"))
    with pytest.raises(TypeError, match="colour"):
        picture("normals", predicted(rng, "normals"), colour="red")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "facts.json"
    save_json(path, {"a": 1})

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half a fi")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(ValueError, match="JSON"):
        save_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
