"""Every task that can be trained is evaluated on its way, with a report and a picture."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import one_device
from tiny_run import base_of_module  # noqa: F401

from jaxpercept.data.datasets import open_dataset
from jaxpercept.inference import observers
from jaxpercept.inference.observers import evaluation_observer
from jaxpercept.training.metric_writer import MetricWriter
from jaxpercept.training.setup import initial_weights, set_up


@pytest.mark.parametrize(
    ("task", "options", "dataset", "score"),
    [
        ("disparity", {}, "scenes", "abs_rel"),
        ("normals", {}, "scenes", "pooled_mean"),
        ("dis", {}, "objects", "max_f"),
        ("matting", {}, "mattes", "sad"),
        ("semantic", {"palette": "scenes"}, "scenes", "miou"),
        ("pose", {}, "people", "pck@0.1"),
    ],
)
def test_every_task_is_evaluated_during_training(base, tmp_path, task, options, dataset, score):
    changes = {"data__mixture": {dataset: 1.0}, "evaluation__dataset": dataset}
    config = tiny_run.config(base, task=task, evaluation__limit=2, **changes)
    config.task_options = options
    if task == "pose":
        config.method.decoder, config.random_init = "dpt", ("head",)
        config.trainable, config.method.latent_weight = ("unet/", "head/"), 0.0
        config.method.pixel_weights = {"mse": 1.0}
    setup = set_up(config)
    trained, frozen = initial_weights(config, setup)
    weights = {k: {**trained.get(k, {}), **frozen.get(k, {})} for k in {*trained, *frozen}}
    writer = MetricWriter(tmp_path)
    observe = evaluation_observer(setup, one_device(), workdir=tmp_path)
    scores = observe(7, jax.tree.map(jnp.asarray, weights), writer)
    writer.close()
    assert np.isfinite(scores[f"{dataset}/{score}"])
    assert np.isfinite(scores[f"{dataset}/constant_{score}"])
    assert not any("iou/" in name for name in scores)
    assert (tmp_path / f"pictures/{dataset}_000007.png").is_file()
    report = json.loads((tmp_path / f"evaluation/{dataset}/metrics.json").read_text())
    assert report["step"] == 7
    assert report["protocol"]["images"] == 2


def test_the_evaluation_reads_files_as_the_training_does(base, tmp_path, monkeypatch):
    """Options that say how files are read go along, those that choose examples do not."""
    given = {}

    def evaluator(perception, dataset, **options):
        given.update(options, dataset=dataset)

    monkeypatch.setattr(observers, "Evaluator", evaluator)
    own = {"data_dir": "mine", "depth_scale": 500.0, "normals_axes": "left_up_back"}
    own |= {"held_out": 0.1, "columns": None}
    changes = {
        "data__mixture": {"folder": 1.0},
        "data__options": {"folder": {**own, "max_depth": 3.0}},
        "evaluation__dataset": "folder",
        "evaluation__alignment": "least_square_disparity",
        "evaluation__overrides": {"eval_crop": "nyu"},
        "evaluation__split": None,
    }
    config = tiny_run.config(base)
    config.unlock()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    evaluation_observer(set_up(config), one_device(), workdir=tmp_path)
    assert "split" not in given
    assert given["dataset"] == "folder"
    assert given["data_dir"] == "mine"
    assert given["alignment"] == "least_square_disparity"
    assert given["overrides"] == {
        "depth_scale": 500.0,
        "normals_axes": "left_up_back",
        "held_out": 0.1,
        "eval_crop": "nyu",
    }


def test_pictures_are_of_images_that_were_held_out(tmp_path):
    folder = tiny_run.dataset(tmp_path / "data", images=40)
    own = {"data_dir": str(folder), "held_out": 0.5, "max_depth": None}
    config = {"data_dir": "", "resolution": [16, 24], "data": {"options": {"folder": own}}}
    kept = open_dataset("folder", data_dir=folder, held_out=0.5, evaluation=True).source.names
    shown = observers._held_out("folder", config, count=4)
    assert len(shown) == 4
    assert {record["name"] for record in shown} <= set(kept)
    assert len(kept) < 40
