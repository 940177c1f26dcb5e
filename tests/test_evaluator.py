"""Evaluation: known answers, masks, crops, sizes, devices, and what is refused."""

import csv
import dataclasses
import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from tiny_model import Mirror

from jaxpercept.data.datasets import DATASETS
from jaxpercept.errors import UserError
from jaxpercept.inference import scoring
from jaxpercept.inference.evaluator import EvalResult, Evaluator
from jaxpercept.inference.report import table, write_report
from jaxpercept.inference.scoring import Tally
from jaxpercept.metrics.depth import METRICS, constant_depth_metrics
from jaxpercept.training.sharding import make_mesh

NATIVE = {"processing_resolution": 0, "resolution": (16, 24), "progress": False}


ONE_DEVICE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


def write_example(folder, name, rgb, depth) -> None:
    """An image and its depth in metres, 0 where there is none, as 16-bit millimetres."""
    for part, image in (
        ("rgb", Image.fromarray(rgb)),
        ("depth", Image.fromarray(np.rint(depth * 1000).astype(np.uint16))),
    ):
        path = folder / part / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def grey(rng, *size) -> np.ndarray:
    """A grey image, which the mirror predicts to be depth grey / 255."""
    return np.repeat(rng.integers(0, 256, (*size, 1)), 3, axis=-1).astype(np.uint8)


def affine_example(folder, name, rng, *size) -> tuple[np.ndarray, np.ndarray]:
    """Depth is an affine function of the grey level; where there is none, the grey is noise."""
    rgb = grey(rng, *size)
    scale, shift = rng.integers(5, 30), rng.integers(500, 3000)
    depth = (scale * rgb[..., 0].astype(np.float64) + shift) / 1000
    hole = rng.random(size) < 0.3
    depth[hole] = 0
    rgb[hole] = rng.integers(0, 256, (hole.sum(), 1))
    write_example(folder, name, rgb, depth)
    return rgb, depth


def evaluator(folder, **options) -> Evaluator:
    options = {"data_dir": folder, "mesh": ONE_DEVICE, **NATIVE, **options}
    return Evaluator(Mirror(), "folder", **options)


def reference(rgb: np.ndarray, depth: np.ndarray, low=1e-6, high=np.inf) -> dict[str, float]:
    """The protocol in double precision, for a prediction at the truth's size."""
    p, d = rgb[..., 0][depth > 0] / 255, np.rint(depth * 1000)[depth > 0] / 1000
    (scale, shift), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), d, rcond=None)
    p = np.clip(scale * p + shift, low, high)
    e = np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d),
        "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
        "silog": 100 * np.sqrt(np.mean(e**2) - np.mean(e) ** 2),
        "i_rmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Five images of two sizes whose grey level says little about depth."""
    rng, folder = np.random.default_rng(), tmp_path_factory.mktemp("mixed")
    examples = {}
    for i, size in enumerate([(16, 24), (24, 16), (16, 24), (16, 24), (24, 16)]):
        rgb = grey(rng, *size)
        depth = rng.uniform(0.5, 5, size) + rgb[..., 0] / 255
        depth[rng.random(size) < 0.2] = 0
        write_example(folder, f"room/{i}", rgb, depth)
        examples[f"room/{i}"] = (rgb, depth)
    return folder, examples


def test_an_affine_oracle_makes_no_error_whatever_the_size_and_mask(tmp_path, rng):
    depths = {
        name: affine_example(tmp_path, name, rng, *size)[1]
        for name, size in {"a": (16, 24), "b/c": (24, 16), "d": (16, 24), "e": (32, 40)}.items()
    }
    result = evaluator(tmp_path, batch_size=2).run({})
    assert [row["name"] for row in result.rows] == ["a", "b/c", "d", "e"]
    assert result.means["abs_rel"] < 2e-6
    assert result.means["delta1"] == 1
    for row in result.rows:
        depth = depths[row["name"]]
        assert (row["height"], row["width"]) == depth.shape
        assert row["valid_pixels"] == (depth > 0).sum()
        d = depth[depth > 0]
        constant = np.mean(np.abs(d.mean() - d) / d)
        assert row["constant_abs_rel"] == pytest.approx(constant, rel=1e-5)
    assert result.baseline["abs_rel"] > 0.05
    # The pictures hold the aligned prediction: here, the truth.
    for picture in result.pictures:
        np.testing.assert_allclose(
            picture.prediction[picture.valid], picture.truth[picture.valid], rtol=1e-5
        )


def test_scores_are_those_of_the_protocol(mixed):
    folder, examples = mixed
    result = evaluator(folder, batch_size=3).run({})
    assert len(result.rows) == len(examples)
    for row in result.rows:
        expected = reference(*examples[row["name"]])
        for name in METRICS:
            assert row[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-6), name
    for name in METRICS:
        mean = np.mean([reference(*example)[name] for example in examples.values()])
        assert result.means[name] == pytest.approx(mean, rel=2e-4, abs=2e-6)


def test_devices_and_padding_change_nothing(mixed):
    folder, _ = mixed
    alone = evaluator(folder, batch_size=2).run({})
    # Four ways to split a batch: 3 and 2 images of the two sizes are padded to 4.
    spread = evaluator(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2)).run({})
    assert [row["name"] for row in alone.rows] == [row["name"] for row in spread.rows]
    for a, b in zip(alone.rows, spread.rows, strict=True):
        for name in METRICS:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6)
    for a, b in zip(alone.pictures, spread.pictures, strict=True):
        np.testing.assert_array_equal(a.rgb, b.rgb)
        np.testing.assert_allclose(a.prediction, b.prediction, rtol=1e-5)


def test_a_second_run_compiles_nothing_and_repeats_the_first(mixed):
    test = evaluator(mixed[0], batch_size=2)
    first = test.run({})
    caches = test._scorer._score, test._predictor._network, test._predictor._prepare
    sizes = [function._cache_size() for function in caches]
    assert test.run({}).means == first.means
    assert [function._cache_size() for function in caches] == sizes == [2, 2, 2]


def test_predictions_at_another_resolution_return_to_the_size_of_the_truth(tmp_path, rng):
    ramp = np.linspace(0, 255, 48).astype(np.uint8)
    rgb = np.broadcast_to(ramp[None, :, None], (32, 48, 3)).copy()
    write_example(tmp_path, "ramp", rgb, 1 + rgb[..., 0] / 100)
    for resolution in (24, 96):
        result = evaluator(tmp_path, processing_resolution=resolution).run({})
        assert result.protocol["processing_resolution"] == resolution
        # The borders of a ramp are flattened a little by resizing.
        assert result.means["abs_rel"] < 0.01
        assert result.means["delta1"] == 1


def test_the_crop_and_the_caps_decide_what_counts(tmp_path, rng):
    rgb = grey(rng, 48, 64)
    depth = 1 + rgb[..., 0] / 100
    inside = np.zeros((48, 64), bool)
    inside[45 * 48 // 480 : 471 * 48 // 480, 41 * 64 // 640 : 601 * 64 // 640] = True
    depth[~inside] = rng.uniform(1, 3, (~inside).sum())
    write_example(tmp_path, "x", rgb, depth)
    whole = evaluator(tmp_path).run({})
    assert whole.means["abs_rel"] > 0.005
    cropped = evaluator(tmp_path, overrides={"eval_crop": "nyu"}).run({})
    assert cropped.means["abs_rel"] < 1e-5
    assert cropped.rows[0]["valid_pixels"] == inside.sum()
    assert cropped.protocol["evaluation_crop"] == "nyu"
    capped = evaluator(tmp_path, overrides={"max_depth": 2.0}).run({})
    assert capped.rows[0]["valid_pixels"] == (np.rint(depth * 1000) < 2000).sum()


def test_depth_scale_converts_to_metres(tmp_path, rng):
    affine_example(tmp_path, "x", rng, 16, 24)
    metres = evaluator(tmp_path).run({}).baseline
    halves = evaluator(tmp_path, overrides={"depth_scale": 2000.0}).run({}).baseline
    assert halves["rmse"] == pytest.approx(metres["rmse"] / 2, rel=1e-5)
    assert halves["abs_rel"] == pytest.approx(metres["abs_rel"], rel=1e-5)


def test_disparity_is_fitted_in_disparity(tmp_path, rng):
    rgb = grey(rng, 16, 24)
    write_example(tmp_path, "x", rgb, 1 / (0.1 + rgb[..., 0] / 1000))
    assert evaluator(tmp_path).run({}).means["abs_rel"] > 0.02
    fitted = evaluator(tmp_path, alignment="least_square_disparity").run({})
    assert fitted.means["abs_rel"] < 5e-4  # depth files hold whole millimetres
    assert fitted.protocol["alignment"] == "least_square_disparity"


@pytest.mark.parametrize("alignment", ["least_square", "least_square_disparity"])
def test_the_constant_is_that_of_least_squares_whatever_the_alignment(mixed, alignment):
    folder, examples = mixed
    result = evaluator(folder, alignment=alignment).run({})
    for row in result.rows:
        _, depth = examples[row["name"]]
        depth = jnp.asarray(np.rint(depth * 1000) / 1000, jnp.float32)[None, ..., None]
        limits = {"min_depth": 1e-6, "max_depth": 1e3}
        expected = constant_depth_metrics(depth, depth > 0, **limits)
        for name in METRICS:
            assert row[f"constant_{name}"] == pytest.approx(float(expected[name][0]), rel=1e-5)


def test_the_papers_resolution_need_not_be_a_multiple(tmp_path, rng, monkeypatch):
    affine_example(tmp_path, "x", rng, 16, 24)
    row = dataclasses.replace(DATASETS["folder"], eval_resolution=20)
    monkeypatch.setitem(DATASETS, "folder", row)
    result = evaluator(tmp_path, processing_resolution=20).run({})
    assert result.protocol["processing_resolution"] == 20
    with pytest.raises(UserError, match="22 is not a multiple of 8"):
        evaluator(tmp_path, processing_resolution=22)


def test_a_process_without_images_adds_nothing(mixed, monkeypatch):
    """It must bring arrays of the same names, types and shapes to the sum over processes."""
    test = evaluator(mixed[0])
    record = test._images.load(0)
    sums = []
    monkeypatch.setattr(scoring.jax, "process_count", lambda: 2)
    monkeypatch.setattr(scoring, "over_hosts", lambda total: sums.append(total) or total)
    for items in (range(len(test._images)), ()):
        tally = Tally(test._scorer, len(test._images))
        for item in items:
            tally.add(item, test._scorer.trivial(test._images.load(item)))
        if items:
            tally.result(lambda: record)
        else:
            with pytest.raises(UserError, match="no image has a valid pixel"):
                tally.result(lambda: record)
    (full, columns), (empty, no_columns) = sums[:2], sums[2:]
    for some, none in ((full, empty), (columns, no_columns)):
        assert some.keys() == none.keys()
        for name, value in some.items():
            assert np.asarray(value).dtype == np.asarray(none[name]).dtype, name
            assert np.shape(value) == np.shape(none[name]), name
            assert not np.any(none[name])


def test_limit_spreads_over_the_dataset(mixed):
    limited = evaluator(mixed[0], limit=3, pictures=2)
    result = limited.run({})
    assert [row["name"] for row in result.rows] == ["room/0", "room/1", "room/3"]
    assert result.protocol["images"] == 3
    assert len(result.pictures) == 2
    assert limited.protocol["names_sha256"] != evaluator(mixed[0]).protocol["names_sha256"]
    assert evaluator(mixed[0], pictures=0).run({}).pictures == []


def test_procedural_scenes_need_no_folder():
    scenes = Evaluator(
        Mirror(), "scenes", mesh=ONE_DEVICE, resolution=(16, 24), limit=3, progress=False
    )
    result = scenes.run({})
    assert [(row["height"], row["width"]) for row in result.rows] == [(16, 24)] * 3
    assert 0 < result.means["abs_rel"] < 1


def test_what_cannot_be_evaluated_is_named_before_anything_is_compiled(tmp_path, rng):
    affine_example(tmp_path, "good", rng, 16, 24)
    for options, complaint in [
        ({"alignment": "ruler"}, "'ruler' is unknown"),
        ({"batch_size": 0}, "batch_size"),
        ({"processing_resolution": 20}, "multiple of 8"),
        ({"data_dir": tmp_path / "missing"}, "missing"),
        ({"overrides": {"depth_scale": 1.0}}, "set depth_scale to the units"),
    ]:
        with pytest.raises(UserError, match=complaint):
            evaluator(tmp_path, **options)
    data = tmp_path / "tiny"
    write_zip(data, rng)
    with pytest.raises(UserError, match="no depth to evaluate"):
        Evaluator(Mirror(), "tiny_imagenet", mesh=ONE_DEVICE, data_dir=data, **NATIVE)
    write_example(tmp_path, "void", grey(rng, 16, 24), np.zeros((16, 24)))
    with pytest.raises(UserError, match="void"):
        evaluator(tmp_path)
    (tmp_path / "depth/void.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"void\.png"):
        evaluator(tmp_path)


def write_zip(folder, rng) -> None:
    folder.mkdir()
    (folder / "classes.json").write_text(json.dumps({"n1": "cat"}))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(25):
            buffer = io.BytesIO()
            Image.fromarray(grey(rng, 8, 8)).save(buffer, "JPEG")
            archive.writestr(f"n1/{i:02d}.JPEG", buffer.getvalue())


def test_predictions_that_are_not_finite_are_named(mixed):
    class Broken(Mirror):
        def predict(self, params, image, noise=None, **options):
            return image * np.nan, image

    test = Evaluator(Broken(), "folder", data_dir=mixed[0], mesh=ONE_DEVICE, **NATIVE)
    with pytest.raises(UserError, match="room/0 is not finite"):
        test.run({})


def test_report_files_and_table(mixed, tmp_path):
    result: EvalResult = evaluator(mixed[0]).run({})
    paths = write_report(tmp_path / "a/b", result, {"checkpoint": "runs/x"})
    assert [path.name for path in paths] == ["metrics.json", "per_image.csv", "predictions.png"]
    content = json.loads(paths[0].read_text())
    assert content["metrics"] == pytest.approx(result.means)
    assert set(content["best_constant"]) == set(METRICS)
    assert content["protocol"]["images"] == 5
    assert content["checkpoint"] == "runs/x"
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in result.rows]
    mean = np.mean([float(row["abs_rel"]) for row in rows])
    assert mean == pytest.approx(content["metrics"]["abs_rel"])
    assert np.asarray(Image.open(paths[2])).ndim == 3
    text = table(result)
    assert f"{result.means['abs_rel']:.4f}" in text
    assert f"{result.baseline['abs_rel']:.4f}" in text
    assert "5 images" in text
