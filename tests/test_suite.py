"""The papers' tables: what is there is evaluated once, what is not is said to be absent."""

import csv
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tiny_model
from commands import door, restore_logging  # noqa: F401
from layout_cases import CASES, Case, dis, write_copy
from PIL import Image
from tiny_model import Mirror, one_device

from jaxpercept import evaluate
from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.errors import UserError
from jaxpercept.inference import evaluation
from jaxpercept.inference import suite as suites
from jaxpercept.inference.evaluator import EvalResult, Evaluator
from jaxpercept.inference.measures import MEASURES
from jaxpercept.inference.published import PUBLISHED, REPORTED
from jaxpercept.inference.report import kept_report, write_report
from jaxpercept.inference.suite import SUITES, run_suite
from jaxpercept.metrics.depth import METRICS
from jaxpercept.tasks import get_task

pytestmark = pytest.mark.usefixtures("restore_logging")


def copy(root, dataset, target, rng, *, split="test", count=2):
    """A miniature copy of a dataset below the root of all datasets."""
    of_dataset = [case for case in CASES if case.dataset == dataset and target in case.files]
    case = next((case for case in of_dataset if case.split == split), of_dataset[0])
    if dataset == "dis5k":
        case = dis(split, {"val": "DIS-VD"}.get(split, f"DIS-{split.upper()}"))
    elif case.split != split:
        case = dataclasses.replace(case, split=split, list_file=f"{split}.txt")
    write_copy(root / dataset, case, rng, count=count)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model") / "export", np.random.default_rng())


@pytest.fixture
def root(tmp_path, rng):
    """Two datasets of depth, one folder of something else, and no other."""
    for dataset in ("nyuv2", "scannet"):
        copy(tmp_path / "data", dataset, "depth", rng)
    (tmp_path / "data/diode/holiday").mkdir(parents=True)
    return tmp_path / "data"


@pytest.fixture
def evaluated(monkeypatch):
    """Names of the datasets that were really evaluated."""
    names = []

    class Counting(Evaluator):
        def run(self, *args, **options):
            names.append(self.protocol["dataset"])
            return super().run(*args, **options)

    monkeypatch.setattr(evaluation, "Evaluator", Counting)
    return names


@pytest.fixture
def quickly(monkeypatch):
    """Images are looked at, but nothing is predicted."""

    def run(self, params):
        means = dict.fromkeys(METRICS, 0.5)
        return EvalResult(means, means, [{"name": "a"}], [], self.protocol)

    monkeypatch.setattr(Evaluator, "run", run)


def arguments(checkpoint, root, *more):
    return [f"--checkpoint={checkpoint}", "--suite=depth", f"--data_root={root}", *more]


def contents(folder):
    with (folder / "suite.csv").open(newline="") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    return (folder / "suite.md").read_text(), rows


def test_the_table_of_depth(checkpoint, root, tmp_path, evaluated, capsys):
    output = tmp_path / "out"
    assert door(evaluate, *arguments(checkpoint, root, f"--output={output}")) == 0
    assert evaluated == ["nyuv2", "scannet"]
    text, rows = contents(output)
    assert text in capsys.readouterr().out
    # In the paper's order, present or not.
    assert list(rows) == ["kitti_eigen", "nyuv2", "scannet", "diode", "eth3d"]
    assert [row["status"] for row in rows.values()] == [
        *("absent", "evaluated", "evaluated", "absent", "absent")
    ]
    for name in evaluated:
        report = json.loads((output / name / "metrics.json").read_text())
        # At the papers' resolution, which is native here, not at that of the training.
        assert report["protocol"]["processing_resolution"] == 0
        assert float(rows[name]["abs_rel"]) == pytest.approx(report["metrics"]["abs_rel"])
        constant = report["best_constant"]["abs_rel"]
        assert float(rows[name]["constant_abs_rel"]) == pytest.approx(constant)
        assert rows[name]["images"] == "2"
        line = f"| {name} (test) | 2 | native | prediction | {report['metrics']['abs_rel']:.4f} |"
        assert line in text
        assert f"|  |  |  | best constant | {constant:.4f} |" in text
    assert f"kitti_eigen (test): no {root / 'kitti_eigen'}; expected there: eigen_test" in text
    assert f"diode (test): {root / 'diode'} holds no split 'test'" in text
    assert "Still to come" not in text
    published = "| GenPercept, depth | 0.094 / 0.923 | 0.052 / 0.967 | 0.056 / 0.965 |"
    assert published in text[text.index("Published, abs_rel / delta1") :]
    with Image.open(output / "suite.png") as image:
        assert image.width == 960
    # Two panels of two rows of images, each under its name.
    assert np.asarray(Image.open(output / "nyuv2/predictions.png")).ndim == 3


@pytest.mark.usefixtures("quickly")
def test_what_was_evaluated_is_not_evaluated_again(checkpoint, root, tmp_path, evaluated, rng):
    output = tmp_path / "out"
    scannet, case = root / "scannet", next(c for c in CASES if c.dataset == "scannet")
    damaged = scannet / case.files["depth"].format(i=1)
    before = damaged.read_bytes()
    damaged.write_bytes(b"no image")
    run = arguments(checkpoint, root, f"--output={output}")
    assert door(evaluate, *run) == 1
    assert evaluated == ["nyuv2"]
    text, rows = contents(output)
    assert rows["scannet"]["status"] == "failed"
    assert str(damaged) in rows["scannet"]["note"]
    assert f"Failed:\n\n- scannet (test): {rows['scannet']['note']}" in text
    assert rows["nyuv2"]["abs_rel"]

    damaged.write_bytes(before)
    assert door(evaluate, *run) == 0
    assert evaluated == ["nyuv2", "scannet"]
    text, rows = contents(output)
    assert rows["nyuv2"]["status"] == "kept"
    assert rows["nyuv2"]["abs_rel"]
    assert "| nyuv2 (test) | 2 |" in text

    # Another option, another example, other weights: each counts.
    assert door(evaluate, *run, "--limit=1") == 0
    assert evaluated[2:] == ["nyuv2", "scannet"]
    shutil.rmtree(root / "scannet")
    copy(root, "scannet", "depth", rng, count=3)
    assert door(evaluate, *run, "--limit=1") == 0
    assert evaluated[4:] == ["scannet"]
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    run[0] = f"--checkpoint={model}"
    assert door(evaluate, *run) == 0
    assert evaluated[5:] == ["nyuv2", "scannet"]
    tiny_model.save(model, rng)
    assert door(evaluate, *run) == 0
    assert evaluated[7:] == ["nyuv2", "scannet"]


@pytest.mark.usefixtures("quickly")
def test_a_broken_dataset_is_not_absent(checkpoint, root, tmp_path, evaluated):
    case = next(c for c in CASES if c.dataset == "nyuv2" and c.split == "test")
    lost = root / "nyuv2" / case.rgb.format(i=1)
    lost.unlink()
    run = [f"--checkpoint={checkpoint}", "--suite=depth", f"--output={tmp_path / 'out'}"]
    assert door(evaluate, *run, f"--data_dir={root}") == 1  # a root by the name of other commands
    assert evaluated == ["scannet"]
    text, rows = contents(tmp_path / "out")
    assert rows["nyuv2"]["status"] == "failed"
    assert f"names {case.rgb.format(i=1)}, which is not in {root / 'nyuv2'}" in text
    assert rows["diode"]["status"] == "absent"


def write_masks(folder, rng, *, count):
    for i in range(count):
        for part, channels in (("image", 3), ("mask", 1)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            pixels = rng.choice(np.array([0, 255], np.uint8), (16, 24, channels))
            Image.fromarray(pixels.squeeze()).save(folder / part / f"{i}.png")


@pytest.mark.usefixtures("quickly")
def test_images_that_were_trained_on_are_not_evaluated(tmp_path, rng, evaluated, capsys):
    write_masks(tmp_path / "data/sod", rng, count=30)
    trained = {"data": {"mixture": {"masks": 0.5}, "options": {"masks": {"held_out": 0.3}}}}
    model = tiny_model.save(tmp_path / "model", rng, task="dis", config=trained)
    run = [f"--checkpoint={model}", "--suite=dis", f"--data_root={tmp_path / 'data'}"]
    assert door(evaluate, *run) == 0
    kept = open_dataset("masks", data_dir=tmp_path / "data/sod", evaluation=True, held_out=0.3)
    assert 0 < len(kept) < 30
    report = json.loads((model / "evaluation/masks/metrics.json").read_text())
    assert report["protocol"]["images"] == len(kept)
    assert report["protocol"]["names_sha256"] == kept.names_sha256()
    assert f"| masks (all), held out | {len(kept)} |" in contents(model / "evaluation")[0]
    assert door(evaluate, *run) == 0
    assert evaluated == ["masks"]  # kept
    assert door(evaluate, *run, "--held_out=0.3") == 1
    assert "--held_out is of one dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "split", "target", "trained", "share"),
    [
        ("masks", "all", "alpha", ({"masks": 0.5}, {"masks": {"held_out": 0.1}}), 0.1),
        ("masks", "all", "alpha", ({"masks": 0.5}, {"masks": {"held_out": None}}), 0.0),
        ("masks", "all", "alpha", ({"masks": 0.0}, {"masks": {"held_out": 0.1}}), 0.0),
        ("masks", "all", "alpha", ({"folder": 0.5}, {"masks": {"held_out": 0.1}}), 0.0),
        # Trained on part of the training images, and on none of the test images.
        ("nyuv2", "test", "depth", ({"nyuv2": 1.0}, {"nyuv2": {"held_out": 0.1}}), 0.0),
        # Its first split with normals.
        ("nyuv2", "test", "normals", ({"nyuv2": 1.0}, {"nyuv2": {"held_out": 0.1}}), 0.1),
        ("nyuv2", "test", "depth",
         ({"nyuv2": 1.0}, {"nyuv2": {"held_out": 0.1, "split": "test"}}), 0.1),
    ],
)  # fmt: skip
def test_what_a_training_kept_apart(dataset, split, target, trained, share):
    entries = [entry for suite in SUITES.values() for entry in suite]
    entry = next(e for e in entries if (e.dataset, e.split) == (dataset, split))
    config = {"data": {"mixture": trained[0], "options": trained[1]}}
    assert suites._held_out(config, entry, target) == share
    assert suites._held_out({}, entry, target) == 0.0


def test_an_interrupted_suite_leaves_its_table(checkpoint, root, tmp_path, monkeypatch):
    class Interrupted(Evaluator):
        def run(self, *args, **options):
            if self.protocol["dataset"] == "scannet":
                raise KeyboardInterrupt
            return super().run(*args, **options)

    monkeypatch.setattr(evaluation, "Evaluator", Interrupted)
    run = arguments(checkpoint, root, f"--output={tmp_path / 'out'}")
    assert door(evaluate, *run) == 130
    text, rows = contents(tmp_path / "out")
    assert list(rows) == ["kitti_eigen", "nyuv2"]
    assert "Still to come: scannet (test), diode (test), eth3d (test)." in text


def test_flags_that_do_not_go_together(checkpoint, root, tmp_path, capsys):
    here = f"--data_root={root}"
    for flags, complaint in [
        ([], "--dataset is required, or --suite"),
        ([here], "--data_root is of a suite"),
        (["--suite=depth"], "--suite needs --data_root or --data_dir, the folder with a folder"),
        (["--suite=depth", here, f"--data_dir={root}"], "--data_dir is of one dataset"),
        (["--suite=depth", here, "--options=crop=none"], "--options is of one dataset"),
        (["--suite=depth", here, "--dataset=nyuv2"], "--dataset is of one dataset"),
        (["--suite=depth", here, "--max_depth=3"], "--max_depth is of one dataset"),
        (["--suite=speed", here], "suite"),
        (["--suite=normals", here], "for models of normals, and this one predicts affine_depth"),
        (["--suite=depth", f"--data_root={tmp_path / 'no'}"], "is no folder"),
    ]:
        assert door(evaluate, f"--checkpoint={checkpoint}", *flags) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert complaint in error
    assert evaluate.default_output(str(checkpoint)) == checkpoint / "evaluation"


@pytest.mark.usefixtures("quickly")
def test_another_list_of_kitti_is_evaluated_as_the_refusal_says(checkpoint, tmp_path, rng, capsys):
    case = Case("kitti_eigen", "test", "{i}.png", {"depth": "depth/{i}.png"}, "mine.txt",
                scale=256, size=(375, 1242))  # fmt: skip
    write_copy(tmp_path / "kitti", case, rng, count=1)
    of = [f"--checkpoint={checkpoint}", f"--data_dir={tmp_path / 'kitti'}"]
    assert door(evaluate, *of, "--dataset=kitti_eigen", "--options=list_file=mine.txt") == 1
    advice = re.search(r"evaluate yours with (.*)\.$", capsys.readouterr().err)[1]
    flags = advice.replace("FILE", "mine.txt").split()
    assert door(evaluate, *of, *flags, "--processing_resolution=32") == 0
    report = json.loads((checkpoint / "evaluation/list/metrics.json").read_text())["protocol"]
    assert report["crop"] == "kitti_benchmark"
    row = DATASETS["kitti_eigen"]
    assert (report["min_depth"], report["max_depth"]) == row.clip_range
    assert (report["depth_scale"], report["evaluation_crop"]) == (row.depth_scale, row.eval_crop)


def test_options_of_a_dataset_that_cannot_be(checkpoint, tmp_path, rng, capsys):
    write_copy(tmp_path, next(c for c in CASES if c.dataset == "folder"), rng)
    of = [f"--checkpoint={checkpoint}", "--dataset=folder", f"--data_dir={tmp_path}"]
    for flags, complaint in [
        (["--options=crop"], "--options 'crop' is no KEY=VALUE"),
        (["--options=split=all"], "--options does not take split"),
        (["--options=max_depth=3", "--max_depth=4"], "--options does not take max_depth"),
        (["--options=crop=round"], "Unknown crop 'round'"),
        (["--options=first_class=one"], "first_class of dataset folder must be int, got 'one'"),
        (["--options=list_file=a.txt"], "folder has no option 'list_file'; it takes crop"),
    ]:
        assert door(evaluate, *of, *flags) == 1
        assert complaint in capsys.readouterr().err


def test_only_reports_of_the_same_request_are_kept(tmp_path):
    path = tmp_path / "metrics.json"
    request = {"checkpoint": "runs/a", "step": 5, "vae": None, "merge": ()}
    assert kept_report(path, request) is None
    path.write_text(json.dumps({"request": request, "metrics": {"sad": 1.0}}))
    assert kept_report(path, request)["metrics"] == {"sad": 1.0}
    assert kept_report(path, request | {"step": 6}) is None
    path.write_text("{")
    assert kept_report(path, request) is None


TASKS = {
    "normals": get_task("normals"),
    "dis": get_task("dis"),
    "matting": get_task("matting"),
    "seg": get_task("semantic", palette="nyu40"),
}


@pytest.mark.parametrize("suite", TASKS)
def test_every_dataset_of_every_suite(tmp_path, rng, suite):
    """Each opens in a published layout and is measured by the suite's kind."""
    task, target = TASKS[suite], {"dis": "alpha", "matting": "alpha", "seg": "classes"}
    target = target.get(suite, suite)
    for entry in SUITES[suite]:
        copy(tmp_path / "data", entry.dataset, target, rng, split=entry.split)
    (tmp_path / "data/vkitti").mkdir(exist_ok=True)
    if suite == "dis":  # any of an entry's folders will do
        (tmp_path / "data/masks").rename(tmp_path / "data/sod")
    model = Mirror()
    model.task = task

    def run(entry, data_dir, held_out, facts):
        options = {"mesh": one_device(), "resolution": (16, 16), "progress": False}
        evaluator = Evaluator(
            model,
            entry.dataset,
            data_dir=data_dir,
            split=entry.split,
            processing_resolution=entry.resolution,
            pictures=1,
            **options,
        )
        result = evaluator.run({})
        write_report(tmp_path / "out" / entry.name, result, facts)
        return result

    options = {"data_root": tmp_path / "data", "folder": tmp_path / "out"}
    lines = run_suite(suite, task, request={"step": 1}, evaluate=run, **options)
    assert [line.entry for line in lines] == SUITES[suite]
    text = (tmp_path / "out/suite.md").read_text()
    for line in lines:
        fits = suite != "seg" or line.entry.dataset == "nyuv2"
        assert line.status == ("evaluated" if fits else "unfit"), line.note
        if fits:
            assert f"| {line.entry.title} | 2 |" in text
        else:
            assert f"- {line.entry.title}: the dataset" in text
    assert (tmp_path / "out/suite.png").is_file()
    assert ("no row here can reproduce it" in text) == (suite == "seg")
    # Nothing is evaluated again.
    again = run_suite(suite, task, request={"step": 1}, evaluate=pytest.fail, **options)
    assert {line.status for line in again} <= {"kept", "unfit"}
    assert (tmp_path / "out/suite.md").read_text() == text
    with pytest.raises(UserError, match="for models of"):
        run_suite("depth", task, request={}, evaluate=run, **options)


def test_the_suites_name_rows_and_splits_of_the_table():
    for suite, entries in SUITES.items():
        assert len({entry.name for entry in entries}) == len(entries), suite
        for entry in entries:
            assert entry.split in DATASETS[entry.dataset].splits
    depth = {entry.dataset: entry.resolution for entry in SUITES["depth"]}
    assert depth == {"kitti_eigen": 0, "nyuv2": 0, "scannet": 0, "diode": 640, "eth3d": 756}


@pytest.mark.parametrize("suite", SUITES)
def test_published_figures_have_the_suites_names_and_units(suite):
    """In the tables' own scale: shares below 1 (not per cent), angles in degrees."""
    names = {entry.name for entry in SUITES[suite]}
    kind = {"depth": "affine_depth", "dis": "mask", "matting": "alpha", "seg": "classes"}
    shown = list(MEASURES[kind.get(suite, suite)].columns.values())
    for measure in REPORTED[suite]:
        assert measure.removeprefix("pooled_") in shown
    for model in PUBLISHED[suite]:
        assert model.figures.keys() <= names
        for values in model.figures.values():
            assert len(values) == len(REPORTED[suite])
            for measure, value in zip(REPORTED[suite], values, strict=True):
                low, high = {"pooled_mean": (10, 50), "sad": (5, 100)}.get(measure, (0, 1))
                assert value is None or low < value < high
