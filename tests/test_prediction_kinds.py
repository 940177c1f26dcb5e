"""Classes and keypoints from the checkpoint to the files: plain, mirrored, tiled, in sequence."""

import json

import numpy as np
import pytest
import tiny_model
from PIL import Image
from tiny_model import one_device

from jaxpercept import PerceptionPipeline, predict
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.functional import functional

PALETTE = "camvid"
COUNT = len(PALETTES[PALETTE].names)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory):
    """Class numbers from painted colours."""
    folder = tmp_path_factory.mktemp("semantic") / "export"
    options = {"task": "semantic", "task_options": {"palette": PALETTE}}
    return tiny_model.save(folder, np.random.default_rng(), **options)


@pytest.fixture(scope="module")
def pipe(semantic):
    return PerceptionPipeline.from_pretrained(semantic, mesh=one_device())


@pytest.fixture(scope="module")
def pose(tmp_path_factory):
    """Heat maps from a DPT head of random weights."""
    folder, rng = tmp_path_factory.mktemp("pose") / "export", np.random.default_rng()
    head = DPTConfig.beside(tiny_model.COMPONENTS["unet"], len(KEYPOINTS))
    components = {**tiny_model.COMPONENTS, "head": head}
    method = {
        **{"name": "one_step", "decoder": "dpt", "latent_weight": 0.0},
        "pixel_weights": {"mse": 1.0},
    }
    params = tiny_model.params(rng)
    last = ("conv_norm_out.", "conv_out.")  # the head reads what comes before them
    params["unet"] = {k: x for k, x in params["unet"].items() if not k.startswith(last)}
    params["head"] = functional(head).init(int(rng.integers(2**31)))
    description = tiny_model.description(task="pose", components=components, method=method)
    save_export(folder, description, params)
    return folder


def photo(rng, height=32, width=48):
    coarse = (rng.random((4, 6, 3)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_classes_to_files(semantic, pipe, tmp_path, rng):
    image = photo(rng)
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in/a.png")
    predict.predict(str(semantic), tmp_path / "in", tmp_path / "out", panel=True)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["a.json", "a.npy", "a.png", "a_mask.png", "a_panel.png"]
    classes = np.load(tmp_path / "out/a.npy")
    out = pipe(image)
    assert out.kind == "classes"
    assert out.legend == {"palette": PALETTE}
    np.testing.assert_array_equal(out.prediction[0, ..., 0], classes)
    assert set(np.unique(classes)) <= set(range(COUNT))
    record = json.loads((tmp_path / "out/a.json").read_text())
    assert record["palette"] == PALETTE
    assert {entry["number"] for entry in record["classes"]} == set(np.unique(classes))
    colours = np.array(PALETTES[PALETTE].colours, np.uint8)
    drawn = np.asarray(Image.open(tmp_path / "out/a.png"))
    np.testing.assert_array_equal(drawn, colours[classes.astype(int)])


def test_classes_mirrored_tiled_and_in_sequence(pipe, rng):
    image = photo(rng)
    merged = pipe(image, flip=True).prediction
    again = pipe(image[:, ::-1], flip=True).prediction
    # The colours are merged, not the numbers.
    assert (merged == again[:, :, ::-1]).mean() > 0.99
    whole = pipe(image).prediction
    for frame in pipe.sequence([image, image]):
        np.testing.assert_array_equal(frame.prediction, whole)
    tiled = pipe.tiled(image, 24, processing_resolution=0).prediction
    assert tiled.shape == (1, 32, 48, 1)
    assert (tiled == np.rint(tiled)).all()
    # At a corner only one tile is there.
    corner = pipe(image[:24, :24], processing_resolution=0).prediction
    np.testing.assert_array_equal(tiled[:, :8, :8], corner[:, :8, :8])


def test_keypoints_to_files(pose, tmp_path, rng):
    image = photo(rng)
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in/a.png")
    predict.predict(str(pose), tmp_path / "in", tmp_path / "out", panel=True, flip=True)
    joints = np.load(tmp_path / "out/a.npy")
    assert joints.shape == (17, 3)
    assert (joints[:, 2] >= 0).all()
    assert (joints[:, 2] <= 1).all()
    record = json.loads((tmp_path / "out/a.json").read_text())
    assert [joint["name"] for joint in record["keypoints"]] == list(KEYPOINTS)
    assert np.load(tmp_path / "out/a_uncertainty.npy").shape == image.shape[:2]
    with Image.open(tmp_path / "out/a.png") as drawn:  # over the photograph
        assert (np.asarray(drawn) == image).all(axis=-1).any()
    pipe = PerceptionPipeline.from_pretrained(pose, mesh=one_device())
    out = pipe(image, flip=True)
    assert out.prediction.shape == (1, 32, 48, 17)
    assert list(out.legend["keypoint_names"]) == list(KEYPOINTS)
    x, y, score = joints[5]
    heat = out.prediction[0, ..., 5]
    assert heat.max() == pytest.approx(score, abs=1e-5)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(row + 0.5 - y) <= 0.25
    assert abs(column + 0.5 - x) <= 0.25


def test_point_clouds_are_not_for_classes(semantic, tmp_path, rng):
    Image.fromarray(photo(rng)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="this model predicts classes"):
        predict.predict(str(semantic), tmp_path / "a.png", tmp_path / "out", point_cloud=True)
