"""Evaluation of referred objects from the evaluator to the report, of records made by hand."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_evaluator_kinds import ONE_DEVICE, OPTIONS, Oracle, evaluated

from jaxpercept.data.datasets import DATASETS
from jaxpercept.errors import UserError
from jaxpercept.inference import evaluator
from jaxpercept.inference.options import Options
from jaxpercept.inference.report import table, write_report
from jaxpercept.metrics.protocol import add
from jaxpercept.metrics.referring import ReferringProtocol, ReleasedProtocol
from jaxpercept.resize import resize
from jaxpercept.tasks import get_task
from jaxpercept.training.sharding import make_mesh

SIZE, COUNT = (40, 56), 3
PAINTED, MASK = get_task("referring"), get_task("referring", paint=False)


class Opened:
    """Like `data.datasets.Records`."""

    split = "val"
    dataset = dataclasses.replace(DATASETS["objects"], provides=frozenset({"referred", "caption"}))

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return dict(self.records[index])


@pytest.fixture
def records(rng, monkeypatch):
    """Images without anything reddish, each with a rectangle that is referred to."""
    made = []
    for number in range(COUNT):
        referred = np.zeros((*SIZE, 1), np.float32)
        top, left = rng.integers(2, 20, 2)
        referred[top : top + 16, left : left + 20] = 1
        rgb = rng.integers(0, 150, (*SIZE, 3)).astype(np.uint8)
        rgb[..., 2] |= 64
        made.append(
            {"rgb": rgb, "referred": referred, "valid": np.ones((*SIZE, 1), bool)}
            | {"caption": "the rectangle", "name": f"image {number}"}
            | {"distractors": ["the box", "the ball", "the cone"][: 2 * number]}
        )

    def opened(name, *, targets, **options):
        assert (name, targets) == ("rectangles", ("referred",))
        return Opened(made)

    monkeypatch.setattr(evaluator, "open_dataset", opened)
    return made


def decoded_of(task, records):
    batch = {k: jnp.stack([r[k] for r in records]) for k in ("rgb", "referred", "valid")}
    return task.encode_target(batch).image


def tokenize(texts):
    return np.array([[len(text)] for text in texts], np.int32)


def run(task, records, decoded, mesh=ONE_DEVICE, **options):
    options = {"overrides": None, "tokenize": tokenize, **options}
    return evaluated(Oracle(task, records, decoded), "rectangles", mesh, **options)


@pytest.mark.parametrize("task", [PAINTED, MASK], ids=["painted", "mask"])
def test_a_right_prediction_is_perfect(records, tmp_path, task):
    result = run(task, records, decoded_of(task, records))
    assert {name: result.means[name] for name in ("oiou", "miou", "p@0.5", "p@0.9")} == {
        **{"oiou": 1, "miou": 1, "p@0.5": 1, "p@0.9": 1}
    }
    assert 0 < result.baseline["miou"] < 0.9
    assert result.means.keys() == result.baseline.keys()
    assert ("addp_miou" in result.means) == task.paint
    if task.paint:  # what Lanczos makes of the object's edge is not red
        assert 0.85 < result.means["addp_miou"] < 1
        assert abs(result.baseline["addp_miou"] - result.baseline["miou"]) < 0.1
    assert (result.protocol["kind"], result.protocol["measure"]) == ("mask", "referring")
    text = table(result)
    for word in ("oIoU", "mIoU", "P@0.5", "centred ellipse"):
        assert word in text
    shown = result.pictures[0].pictures()
    np.testing.assert_array_equal(shown["truth"], shown["prediction"])
    paths = write_report(tmp_path, result, {"checkpoint": "oracle"})
    content = json.loads(paths[0].read_text())
    assert content["metrics"]["oiou"] == 1
    assert result.rows[0].keys() >= {"miou", "p@0.5", "constant_miou", "name"}


@pytest.mark.parametrize("where", ["one device", "eight devices", "an ensemble"])
def test_both_protocols_get_what_they_measure(records, rng, where):
    """The released one what the network painted at its own size, the other what is handed out."""
    small = (20, 28)
    clean = resize(decoded_of(PAINTED, records), small, "area")
    wrong = clean + jnp.asarray(rng.normal(size=clean.shape) * 0.4, jnp.float32)

    class Small(Oracle):
        """Knows the images at the size it works at."""

        def __init__(self, task, records, decoded):
            super().__init__(task, records, decoded)
            self.images = resize(self.images, small, "bilinear", antialias=True)

    options = {**OPTIONS, "overrides": None, "processing_resolution": 28, "tokenize": tokenize}
    if where == "an ensemble":
        options["options"] = Options(flip=True)
    mesh = make_mesh(data=8) if where == "eight devices" else ONE_DEVICE
    perception = Small(PAINTED, records, wrong)
    if where == "an ensemble":  # the mirrored image is unknown: both members are the right row's
        perception.predict = lambda params, image, noise=None, **_: (wrong, image)
        options["batch_size"] = COUNT
    result = evaluator.Evaluator(perception, "rectangles", mesh=mesh, **options).run({})

    colours = np.asarray(PAINTED.to_prediction(wrong))
    if where == "an ensemble":
        colours = (colours + colours[:, :, ::-1]) / 2
    scores = PAINTED.finish(resize(jnp.asarray(colours), SIZE, "bilinear"))
    for title, protocol, maps in (
        ("", ReferringProtocol(), np.asarray(scores)),
        ("addp_", ReleasedProtocol(), colours),
    ):
        rows = [protocol.per_image(x, r) for x, r in zip(maps, records, strict=True)]
        for name, value in protocol.summarise(add(rows)).items():
            assert result.means[title + name] == pytest.approx(value, abs=2e-3), name
    assert result.means["miou"] < 0.99


class Corrected(Oracle):
    """Is right where it is told what `expected` says, by the length of the text, in each image."""

    expected: tuple[str, ...]

    def predict(self, params, image, noise=None, *, text, **options):
        decoded, latent = super().predict(params, image)
        told = text.wanted if text.unwanted is None else text.unwanted
        lengths = jnp.asarray([len(words) for words in self.expected])
        number = jnp.abs(image[:, None] - self.images[None]).sum(axis=(2, 3, 4)).argmin(axis=1)
        right = told[:, 0, 0] == lengths[number]
        return jnp.where(right[:, None, None, None], decoded, -1), latent


@pytest.mark.parametrize(
    ("corrections", "expected"),
    [
        (0, ("the rectangle",) * 3),
        (1, ("the rectangle", "the box", "the box")),
        (3, ("the rectangle", "the box and the ball", "the box and the ball and the cone")),
    ],
)
def test_corrections_name_what_else_there_is(records, corrections, expected):
    perception = Corrected(MASK, records, decoded_of(MASK, records))
    perception.expected = expected
    given = {"overrides": None, "tokenize": tokenize, "corrections": corrections}
    result = evaluated(perception, "rectangles", **given)
    assert result.means["miou"] == 1
    perception.expected = ("something else",) * 3
    assert evaluated(perception, "rectangles", **given).means["miou"] == 0


def test_what_cannot_be_corrected_is_refused(records):
    perception = Oracle(MASK, records, decoded_of(MASK, records))
    for options, words in (
        ({"corrections": -1}, "--corrections of 0 or more"),
        ({"corrections": 1, "resume": 1.0}, r"--resume in \[0, 1\)"),
        ({"corrections": 1, "options": Options(flip=True)}, "leave the ensemble out"),
    ):
        with pytest.raises(UserError, match=words):
            evaluated(perception, "rectangles", overrides=None, tokenize=tokenize, **options)
    depth = Oracle(get_task("depth"), records, None)
    with pytest.raises(UserError, match="leave --corrections out"):
        evaluator._texts_of(depth.task, tokenize, 1)


def test_a_dataset_without_referred_objects_is_refused():
    with pytest.raises(UserError, match="'objects' has no referred to evaluate against"):
        evaluator.Evaluator(
            Oracle(PAINTED, [{"rgb": np.zeros((*SIZE, 3), np.uint8)}], None),
            "objects",
            mesh=ONE_DEVICE,
            **OPTIONS,
        )
