"""Evaluation of every kind of prediction: a right prediction is perfect, and what is refused."""

import csv
import dataclasses
import json
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluator import Evaluator
from jaxpercept.inference.report import table, write_report
from jaxpercept.metrics.normals import NormalsProtocol
from jaxpercept.metrics.protocol import add
from jaxpercept.tasks import TASKS, Task, get_task
from jaxpercept.training.sharding import make_mesh

SIZE, COUNT = (48, 64), 3
ONE_DEVICE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
OPTIONS = {
    "resolution": SIZE,
    "processing_resolution": 0,
    "overrides": {"size": COUNT},
    "progress": False,
}

CASES = {
    "depth": (get_task("depth"), "scenes", "depth"),
    "disparity": (get_task("disparity", min_max=True), "scenes", "depth"),
    "normals": (get_task("normals"), "scenes", "normals"),
    "half normals": (get_task("normals", full_z_range=False), "scenes", "normals"),
    "dis": (get_task("dis"), "objects", "alpha"),
    "matting": (get_task("matting"), "mattes", "alpha"),
    "painted": (get_task("semantic", palette="scenes"), "scenes", "classes"),
    "logits": (get_task("semantic", palette="scenes", logits=True), "scenes", "classes"),
    "pose": (get_task("pose"), "people", "keypoints"),
}


@pytest.fixture(scope="module")
def scenes():
    """Records and encoded targets of a case, each rendered once."""
    known = {}

    def of(case):
        task, dataset, target = CASES[case]
        if (dataset, target) not in known:
            opened = open_dataset(
                dataset, resolution=SIZE, size=COUNT, evaluation=True, targets=[target]
            )
            known[dataset, target] = [opened[i] for i in range(COUNT)]
        records = known[dataset, target]
        return task, dataset, records, encoded(task, records)

    return of


def encoded(task, records):
    """What a right prediction decodes to."""
    batch = {}
    for field in ("rgb", "depth", "valid", "normals", "alpha", "classes", "keypoints"):
        if field in records[0]:
            batch[field] = jnp.stack([record[field] for record in records])
    if "depth" in batch:  # of the whole range: nothing is cut off
        depth = batch["depth"].reshape(COUNT, -1)
        batch["depth_range"] = jnp.stack([depth.min(1), depth.max(1)], axis=1)
        limits = jnp.stack([1 / depth.max(1), 1 / depth.min(1)], axis=1)
        batch["disparity_range"] = jnp.concatenate([limits, limits], axis=1)
    target = task.encode_target(batch)
    if getattr(task, "logits", False):
        return 20 * jax.nn.one_hot(target.values[..., 0], task.num_classes)
    return target.image if target.values is None or task.name == "semantic" else target.values


class Oracle:
    """Knows what each image decodes to."""

    recipe = types.SimpleNamespace(draws_noise=False, num_steps=1, guidance=(1.0, 1.0))
    model = types.SimpleNamespace(downscale=2)
    targets = 1

    def __init__(self, task, records, decoded):
        self.task, self.decoded = task, decoded
        self.images = jnp.stack([record["rgb"] for record in records]) / 127.5 - 1

    def encode(self, params, rgb):
        return rgb

    def embed(self, params, input_ids):
        return input_ids[..., None].astype(jnp.float32)

    def predict(self, params, image, noise=None, **options):
        differences = jnp.abs(image[:, None] - self.images[None]).sum(axis=(2, 3, 4))
        return self.decoded[differences.argmin(axis=1)], image

    def to_prediction(self, decoded):
        return self.task.to_prediction(decoded)


def evaluated(perception, dataset, mesh=ONE_DEVICE, **options):
    evaluator = Evaluator(perception, dataset, mesh=mesh, **{**OPTIONS, **options})
    return evaluator.run({})


def damaged(decoded, rng):
    """A prediction that is wrong everywhere."""
    return decoded * 0.7 + jnp.asarray(rng.normal(size=decoded.shape) * 0.3, jnp.float32)


# Metrics of a perfect prediction, and how far the trivial one is from them at least.
PERFECT = {
    "depth": {"abs_rel": (0, 0.05), "delta1": (1, -0.05), "rmse": (0, 0.1)},
    "disparity": {"abs_rel": (0, 0.05), "delta1": (1, -0.05)},
    "normals": {
        **{f"{p}_mean": (0, 10) for p in ("pooled", "per_image")},
        **{f"{p}_a5": (100, -20) for p in ("pooled", "per_image")},
    },
    "dis": {
        **{"max_f": (1, -0.1), "weighted_f": (1, -0.1), "mae": (0, 0.02), "s": (1, -0.1)},
        **{"max_e": (1, -0.1), "isnet_max_f": (1, -0.1), "isnet_mae": (0, 0.02)},
    },
    "matting": {
        **{"sad": (0, 0.02), "mse": (0, 0.001), "mad": (0, 0.001), "grad": (0, 0.01)},
        **{"unknown_sad": (0, 0.001), "unknown_mse": (0, 0.001), "filled_mse": (0, 0.001)},
    },
    "painted": {"miou": (1, -0.5), "pixel_accuracy": (1, -0.2), "mean_accuracy": (1, -0.5)},
    "pose": {"pck@0.05": (100, -20), "pck@0.2": (100, -20)},
}
PERFECT |= {"half normals": PERFECT["normals"], "logits": PERFECT["painted"]}
# At the edge of a wide picture some surfaces face away from the optical axis: z < 0.
TOLERANCE = {"half normals": 8.0}


@pytest.mark.parametrize("case", CASES)
def test_a_right_prediction_is_perfect(scenes, tmp_path, case):
    task, dataset, records, decoded = scenes(case)
    result = evaluated(Oracle(task, records, decoded), dataset, batch_size=2)
    for name, (best, margin) in PERFECT[case].items():
        tolerance = TOLERANCE.get(case, 1e-3)
        assert result.means[name] == pytest.approx(best, abs=tolerance), name
        # The trivial prediction is worse, and what it scores is said beside it.
        trivial = result.baseline[name] - best
        assert trivial > margin if margin > 0 else trivial < margin, (name, trivial)
    assert result.means.keys() == result.baseline.keys()
    assert result.protocol["kind"] == task.kind
    assert [row["name"] for row in result.rows] == [record["name"] for record in records]
    for row in result.rows:
        assert all(np.isscalar(value) for value in row.values())
        own = {name for name in row if name in result.means}
        assert own
        assert {f"constant_{name}" for name in own} <= row.keys()

    # Truth and prediction look alike.
    assert len(result.pictures) == COUNT
    for picture, record in zip(result.pictures, records, strict=True):
        shown = picture.pictures()
        np.testing.assert_array_equal(shown["input"], record["rgb"])
        different = np.abs(shown["truth"].astype(int) - shown["prediction"])
        # Joints move by less than a pixel, and what is hidden is drawn alike.
        assert (different.max(axis=-1) > 2).mean() < (0.2 if case == "half normals" else 0.02)

    paths = write_report(tmp_path, result, {"checkpoint": "oracle"})
    assert [path.name for path in paths] == ["metrics.json", "per_image.csv", "predictions.png"]
    content = json.loads(paths[0].read_text())
    assert not any("/" in name for name in content["metrics"])
    for name in PERFECT[case]:
        assert content["metrics"][name] == result.means[name]
        assert content["best_constant"][name] == result.baseline[name]
    with paths[1].open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [r["name"] for r in result.rows]
    text = table(result)
    assert f"{dataset} (test): {COUNT} images" in text
    for label in ("prediction", result.protocol["baseline"]):
        assert label in text


def test_normals_have_both_protocols(scenes, rng):
    task, dataset, records, decoded = scenes("normals")
    wrong = damaged(decoded, rng)
    result = evaluated(Oracle(task, records, wrong), dataset)
    predictions = np.asarray(task.to_prediction(wrong))
    for average in ("pooled", "per_image"):
        protocol = NormalsProtocol(average)
        rows = [protocol.per_image(p, r) for p, r in zip(predictions, records, strict=True)]
        for name, value in protocol.summarise(add(rows)).items():
            assert result.means[f"{average}_{name}"] == pytest.approx(value, rel=1e-4), name
    assert result.means["pooled_median"] != pytest.approx(result.means["per_image_median"], 1e-6)
    # An image has one median.
    assert "per_image_median" in result.rows[0]
    assert "pooled_median" not in result.rows[0]


@pytest.mark.parametrize("case", ["normals", "dis", "logits", "pose"])
def test_devices_and_second_runs_change_nothing(scenes, rng, monkeypatch, case):
    task, dataset, records, decoded = scenes(case)
    oracle = Oracle(task, records, damaged(decoded, rng))
    alone = evaluated(oracle, dataset, batch_size=2)
    # Three images on four ways to split a batch: one row has none.
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    evaluator = Evaluator(oracle, dataset, mesh=mesh, **OPTIONS)
    for _ in range(2):
        spread = evaluator.run({})
        assert spread.means == pytest.approx(alone.means, rel=1e-5, abs=1e-6, nan_ok=True)
        assert spread.baseline == pytest.approx(alone.baseline, rel=1e-5, abs=1e-6, nan_ok=True)
        for one, two in zip(alone.rows, spread.rows, strict=True):
            assert one["name"] == two["name"]
            numbers = {k: x for k, x in one.items() if k != "name"}
            assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-6)
        for one, two in zip(alone.pictures, spread.pictures, strict=True):
            np.testing.assert_allclose(one.prediction, two.prediction, atol=1e-5)
        # What does not depend on the weights is not measured again.
        monkeypatch.setattr(evaluator._scorer, "trivial", None)


@pytest.mark.parametrize(
    ("case", "name"),
    [("dis", "mae"), ("matting", "sad"), ("painted", "miou"), ("pose", "pck@0.05")],
)
def test_a_worse_prediction_scores_worse(scenes, rng, case, name):
    task, dataset, records, decoded = scenes(case)
    wrong = jnp.roll(decoded, 9, axis=2) if case == "pose" else damaged(decoded, rng)
    result = evaluated(Oracle(task, records, wrong), dataset)
    for metric, (best, margin) in PERFECT[case].items():
        worse = result.means[metric] - best if margin > 0 else best - result.means[metric]
        assert worse > (1e-3 if metric == name else -1e-3), metric


def test_classes_are_reported_one_by_one(scenes):
    task, dataset, records, decoded = scenes("painted")
    result = evaluated(Oracle(task, records, decoded), dataset)
    names = PALETTES["scenes"].names
    present = {names[k] for record in records for k in np.unique(record["classes"])}
    for name in names:
        value = result.means[f"iou/{name}"]
        assert value == 1 if name in present else np.isnan(value)
    assert "iou/floor 1" in table(result)


def test_details_of_what_does_not_occur_are_null(scenes, tmp_path):
    task, dataset, records, decoded = scenes("painted")
    result = evaluated(Oracle(task, records, decoded), dataset)
    content = json.loads(write_report(tmp_path, result, {})[0].read_text())
    assert set(content["details"].values()) == {None, 1.0}


def test_own_folders_of_every_target(scenes, tmp_path):
    """Classes without a palette of their own are taken to be the model's."""
    task, _, records, decoded = scenes("logits")
    for record in records:
        for field, array in (("rgb", record["rgb"]), ("classes", record["classes"][..., 0])):
            path = tmp_path / field / f"{record['name']}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    options = {"data_dir": tmp_path, "overrides": None}
    result = evaluated(Oracle(task, records, decoded), "folder", **options)
    assert result.means["pixel_accuracy"] == 1
    few = get_task("semantic", palette="camvid", logits=True)
    with pytest.raises(UserError, match=r"label .* but classes go from 0 to 10"):
        evaluated(Oracle(few, records, decoded), "folder", **options)


# ---- what is refused -----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_sentence():
    def refused(task, dataset, words, **options):
        records = [{"rgb": np.zeros((*SIZE, 3), np.uint8)}]
        with pytest.raises(UserError, match=words):
            evaluated(Oracle(task, records, None), dataset, **options)

    semantic = get_task("semantic", palette="camvid")
    refused(semantic, "scenes", "classes of 'scenes' and the model predicts those of 'camvid'")
    refused(get_task("dis"), "scenes", "no alpha to evaluate against")
    refused(get_task("pose"), "scenes", "no keypoints to evaluate against")
    refused(get_task("normals"), "scenes", "has no option 'alignment'", alignment="least_square")
    refused(get_task("dis"), "objects", "'alignment': it has hce", alignment="least_square")
    refused(get_task("seg"), "scenes", "a model of colors cannot be evaluated")
    refused(get_task("depth"), "nowhere", "Unknown dataset 'nowhere'")
    refused(get_task("depth"), "scenes", "no option 'depth_skale'", depth_skale=1.0)

    @dataclasses.dataclass(frozen=True)
    class Edges(Task):
        """Of a known kind, with a truth of its own."""

        name: ClassVar[str] = "edges"
        kind: ClassVar[str] = "mask"
        fields: ClassVar[tuple[str, ...]] = ("depth", "valid")

    refused(Edges(), "objects", "no metric compares its mask with depth, valid")


def test_predictions_that_are_not_finite_are_named(scenes):
    task, dataset, records, decoded = scenes("dis")
    with pytest.raises(UserError, match=f"prediction for {records[1]['name']} is not finite"):
        evaluated(Oracle(task, records, decoded.at[1, 3, 3].set(jnp.nan)), dataset)


def test_every_kind_that_is_trained_is_tested():
    """Here, in test_evaluator_referring, or in test_generalist."""
    assert {"referring", *(task.name for task, _, _ in CASES.values())} == {
        name for name, task in TASKS.items() if task.fields and not name.startswith("generalist")
    }
