"""One model for several tasks: its targets, and the way from the config to what each task shows."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from commands import door, restore_logging  # noqa: F401
from PIL import Image
from test_data_instructions import FIELDS, batch_of
from test_presets import MODULES

from jaxpercept import PerceptionPipeline, evaluate, predict
from jaxpercept.data.instructions import TRUTHS
from jaxpercept.errors import UserError
from jaxpercept.inference.observers import evaluation_observer
from jaxpercept.inference.opening import open_perception
from jaxpercept.metrics.detection import boxes_of
from jaxpercept.tasks import get_task
from jaxpercept.training import loop
from jaxpercept.webpage.models import open_models

pytestmark = pytest.mark.usefixtures("restore_logging")

RED, AZURE = (1, -1, -1), (-1, 0, 1)


@pytest.fixture(scope="module")
def examples():
    batch, _ = batch_of([("scenes", 1.0, {}), ("referring", 1.0, {})], tuple(TRUTHS), 20)
    return {name: jnp.asarray(batch[name]) for name in FIELDS}


def test_every_example_has_the_target_of_its_task(examples):
    target = get_task("generalist").encode_target(examples)
    image, truth = np.asarray(target.image), np.asarray(examples["truth"])
    rgb = np.asarray(examples["rgb"]) / 127.5 - 1
    seen = set()
    for row, number in enumerate(np.asarray(examples["subtask"])):
        name = list(TRUTHS)[number]
        seen.add(name)
        if name == "depth":
            near, far = np.asarray(examples["depth_range"][row])
            grey = np.clip((truth[row, ..., :1] - near) / (far - near), 0, 1) * 2 - 1
            expected = np.repeat(grey, 3, axis=-1)
        elif name == "normals":
            expected = truth[row]
        elif name == "detect":
            boxed = truth[row, ..., :1]
            expected = np.where(boxed > 0, AZURE, np.where(boxed < 0, 1, rgb[row]))
        else:
            expected = np.where(truth[row, ..., :1] > 0, RED, rgb[row])
        np.testing.assert_allclose(image[row], expected, atol=1e-5)
        assert np.asarray(target.mask[row]).all()
    assert seen == set(TRUTHS)
    # Whatever it was not trained for, it leaves as it is.
    alone = get_task("generalist", **{**dict.fromkeys(TRUTHS, False), "depth": True}).encode_target(
        examples
    )
    others = np.asarray(examples["subtask"]) != 0
    np.testing.assert_allclose(np.asarray(alone.image)[others], rgb[others], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(alone.image)[~others], image[~others])


def test_what_is_painted_is_read_again(examples):
    task = get_task("generalist")
    image = task.encode_target(examples).image
    for number, (name, part) in enumerate(task.parts.items()):
        if name not in ("segment", "detect", "referring"):
            continue
        rows = np.asarray(examples["subtask"]) == number
        score = np.asarray(part.finish(part.to_prediction(image[rows])))
        truth = np.asarray(examples["truth"])[rows, ..., :1]
        missed = (truth > 0) & (score <= 0.5)
        assert not missed.any()
        if name == "detect":
            assert all(len(boxes_of(s[..., 0])) for s in score)


def test_what_is_painted_weighs_more(examples):
    assert get_task("generalist").cell_weights(examples, 8) is None
    weights = np.asarray(get_task("generalist", emphasis=3.0).cell_weights(examples, 8))
    assert weights.shape == (20, 6, 8, 1)
    truth, subtask = np.asarray(examples["truth"]), np.asarray(examples["subtask"])
    for row, number in enumerate(subtask):
        share = (truth[row, ..., 0] != 0).reshape(6, 8, 8, 8).mean(axis=(1, 3))
        expected = 1 + 3 * share if number >= 2 else np.ones((6, 8))
        np.testing.assert_allclose(weights[row, ..., 0], expected, atol=1e-6)
    # A referring model's are the same.
    rows = subtask == list(TRUTHS).index("referring")
    batch = {name: examples[name][rows] for name in ("rgb", "valid")}
    batch["referred"] = examples["truth"][rows][..., :1]
    alone = get_task("referring", emphasis=3.0).cell_weights(batch, 8)
    np.testing.assert_allclose(alone, weights[rows], atol=1e-6)


def test_its_tasks_are_chosen():
    others = {"depth": False, "segment": False, "referring": False}
    assert list(get_task("generalist", **others).parts) == ["normals", "detect"]
    with pytest.raises(UserError, match="no task"):
        get_task("generalist", **dict.fromkeys(TRUTHS, False))
    for name, part in get_task("generalist").parts.items():
        assert part.needs_prompt == (name not in ("depth", "normals"))
        assert part.name == f"generalist:{name}"
        assert part == get_task(part.name)


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generalist") / "model"
    options = {"task": "generalist", "task_options": {}}
    return tiny_model.save_referring(folder, np.random.default_rng(), **options)


def test_it_is_asked_for_one_task_at_a_time(model, rng):
    pipe = PerceptionPipeline.from_pretrained(str(model), task="depth")
    rgb = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    depth = pipe(rgb).prediction
    assert depth.shape == (1, 32, 48, 1)
    assert pipe.perception.task.kind == "affine_depth"
    assert depth.std() > 0
    other = PerceptionPipeline.from_pretrained(str(model))
    part = other.part("depth")
    np.testing.assert_array_equal(part(rgb).prediction, depth)
    assert part.params is other.params
    # Without a task it edits the picture as any text says.
    edited = other(rgb, prompt="show the depth").prediction
    inside = ((edited > 0) & (edited < 1)).all(
        axis=-1
    )  # what is cut off is not the mean of colours
    assert inside.any()
    np.testing.assert_allclose(edited.mean(axis=-1)[inside], depth[inside, 0], atol=1e-5)
    with pytest.raises(UserError, match="give a prompt"):
        other.part("segment")(rgb)
    with pytest.raises(UserError, match=r"not trained for 'pose': give --task one of depth"):
        open_perception(str(model), task="pose")


def test_the_page_has_a_model_for_each_task(model):
    models = open_models([str(model)])
    assert [m.label for m in models] == list(TRUTHS)
    assert [m.reads_text for m in models] == [False, False, True, True, True]


def test_training_and_evaluation_go_task_by_task(tmp_path, capsys, rng):
    workdir = tmp_path / "run"
    config = MODULES["generalist"].get_config("painted")
    unet = {"unet": tiny_model.COMPONENTS["unet"]}
    base = {"task": "", "recipe": {}, "components": unet}
    config.checkpoint = str(tiny_model.save_referring(tmp_path / "base", rng, **base))
    config.task_options.update({"depth": False, "normals": False, "segment": False})
    config.update({"resolution": (32, 48), "steps": 2, "batch_size": 8, "log_every": 1})
    config.evaluation.limit, config.method.num_steps = 2, 2
    config.method.update({"text_guidance": 1.0, "image_guidance": 1.0})
    loop.train(config, workdir, observer=functools.partial(evaluation_observer, workdir=workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    measured = {key for line in lines for key in line if key.startswith("scenes/")}
    assert {"scenes/detect/f1", "scenes/referring/oiou"} <= measured

    command = [f"--checkpoint={workdir}", "--dataset=scenes", "--limit=2", "--batch_size=8"]
    assert door(evaluate, *command, f"--output={tmp_path / 'again'}") == 0
    printed = capsys.readouterr().out
    for task in ("detect", "referring"):
        assert f"{task}:" in printed
        trained, again = (
            json.loads((folder / task / "metrics.json").read_text())["metrics"]
            for folder in (workdir / "evaluation" / "scenes", tmp_path / "again")
        )
        assert again == pytest.approx(trained, abs=1e-3, nan_ok=True)

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng().integers(0, 256, (40, 60, 3), np.uint8)).save(photo)
    out = tmp_path / "boxes"
    asked = [f"--checkpoint={workdir}", f"--input={photo}", f"--output={out}"]
    assert door(predict, *asked, "--task=detect", "--prompt=chair") == 0
    said = json.loads((out / "photo.json").read_text())
    assert len(said["boxes"]) == len(np.load(out / "photo.npy"))
    with Image.open(out / "photo.png") as picture:
        assert picture.size == (60, 40)
