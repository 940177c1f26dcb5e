"""Files of a prediction, colours and panels."""

import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from PIL import Image

from jaxpercept.inference.outputs import atomic, save_json, save_prediction, spectral
from jaxpercept.inference.panel import PanelRow, panel


def test_colours_are_those_of_marigold(rng):
    values = rng.random((20, 30))
    values[0, :3] = 0, 1, 0.5
    reference = MarigoldImageProcessor.visualize_depth(torch.from_numpy(values))[0]
    # Marigold cuts fractions of a colour level off; they are rounded here.
    difference = np.abs(spectral(values).astype(int) - np.asarray(reference).astype(int))
    assert difference.max() <= 1
    assert spectral(values)[0, 0].tolist() == [158, 1, 66]
    assert spectral(values)[0, 1].tolist() == [94, 79, 162]


def test_colours_of_what_is_outside():
    colours = spectral(np.array([[-1.0, 0.0, 1.0, 2.0, np.nan, np.inf]]))[0]
    assert (colours[0] == colours[1]).all()
    assert (colours[2] == colours[3]).all()
    assert colours[4:].tolist() == [[40] * 3] * 2


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
    sixteen = np.asarray(Image.open(tmp_path / "sub/photo_16bit.png"))
    assert sixteen.dtype == np.uint16
    np.testing.assert_allclose(sixteen / 65535, prediction[..., 0], atol=0.51 / 65535)
    assert sixteen[0, :2].tolist() == [0, 65535]
    coloured = np.asarray(Image.open(tmp_path / "sub/photo.png"))
    np.testing.assert_array_equal(coloured, spectral(prediction[..., 0]))

    record = json.loads((tmp_path / "sub/photo.json").read_text())
    assert record["kind"] == "affine_depth"
    assert record["range"] == [0, 1]
    assert record["convention"].startswith("0 = near, 1 = far")
    assert (record["height"], record["width"]) == (12, 17)
    assert (record["seed"], record["checkpoint"]) == (3, "runs/x")
    assert record["files"] == ["photo.npy", "photo.png", "photo_16bit.png"]


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


def _row(rng, height, width) -> PanelRow:
    truth = rng.uniform(1, 5, (height, width, 1)).astype(np.float32)
    return PanelRow(
        rgb=rng.integers(0, 256, (height, width, 3)).astype(np.uint8),
        truth=truth,
        valid=np.ones((height, width, 1), bool),
        prediction=truth.copy(),
    )


def test_panel_shows_truth_and_prediction_in_one_range(rng):
    row = _row(rng, 200, 300)
    row.valid[:50] = False
    row.truth[:50] = 0
    picture = panel([row])
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 3 * 300 + 2 * 4
    cells = picture[-200:]
    truth, prediction = cells[:, 304:604], cells[:, 608:908]
    np.testing.assert_array_equal(cells[:, :300], row.rgb)
    # Equal depths have equal colours, and what is not measured is grey.
    np.testing.assert_array_equal(truth[50:], prediction[50:])
    assert (truth[:50] == 40).all()
    assert not (prediction[:50] == 40).all(axis=-1).any()


def test_panel_of_different_and_of_small_images(rng):
    picture = panel([_row(rng, 24, 32), _row(rng, 64, 32)])
    assert picture.shape[1] == 3 * 256 + 8
    assert picture.shape[0] > 192 + 512
    empty = _row(rng, 24, 32)
    empty.valid[:] = False
    assert panel([empty]).shape[1] == 3 * 256 + 8
