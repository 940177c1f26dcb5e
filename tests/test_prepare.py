"""Prepared datasets: the records of the files, whatever happens on the way."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import refcoco_copies
from commands import door, restore_logging  # noqa: F401
from layout_cases import CASES, write_copy
from PIL import Image
from preparing import assert_same, assert_same_records, folder_of

from jaxpercept import prepare as prepare_door
from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.prepared import read_header
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.errors import UserError
from jaxpercept.preparation import pipeline
from jaxpercept.preparation.pipeline import prepare

# ---- what is written is what was there -----------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout(tmp_path, rng, case):
    write_copy(tmp_path / "raw", case, rng)
    prepare(
        case.dataset, tmp_path / "raw", tmp_path / "to", splits=[case.split],
        targets=case.targets, options=case.options, shard_size=2,
    )  # fmt: skip
    for targets in {case.targets, case.targets[:1], case.targets[-1:]}:
        opened = {"split": case.split, "targets": targets}
        raw = open_dataset(case.dataset, data_dir=tmp_path / "raw", **opened, **case.options)
        found = open_dataset(case.dataset, data_dir=tmp_path / "to", **opened)
        assert_same_records(found, raw)


@pytest.mark.parametrize("write", ["refer", "cris"])
def test_phrases(tmp_path, rng, write):
    world = refcoco_copies.world(rng)
    (tmp_path / "raw").mkdir()
    getattr(refcoco_copies, f"write_{write}")(tmp_path / "raw", world)
    prepare("refcoco", tmp_path / "raw", tmp_path / "to", shard_size=2)
    for split in ("train", "val", "testA", "testB"):
        opened = {"split": split, "evaluation": split != "train"}
        raw = open_dataset("refcoco", data_dir=tmp_path / "raw", **opened)
        assert_same_records(open_dataset("refcoco", data_dir=tmp_path / "to", **opened), raw)
        opened["evaluation"] = split == "train"
        with pytest.raises(UserError, match="each, not"):
            open_dataset("refcoco", data_dir=tmp_path / "to", **opened)


@pytest.mark.parametrize("dataset", ["scenes", "mattes", "people", "referring"])
def test_rendered_scenes(tmp_path, dataset):
    prepare(dataset, None, tmp_path, splits=["test"], limit=3, resolution=(24, 32))
    for target in read_header(tmp_path / dataset / "1.0.0")["targets"]:
        opened = {"split": "test", "targets": [target], "evaluation": target == "referred"}
        raw = open_dataset(dataset, resolution=(24, 32), **opened)
        found = open_dataset(dataset, data_dir=tmp_path, **opened)
        assert len(found) == 3
        for index in range(3):
            record, expected = found[index], raw[index]
            assert_same(record, {key: expected[key] for key in record})


def test_training_batches_are_those_of_the_files(tmp_path, rng):
    folder_of(tmp_path / "raw", rng)
    prepare("folder", tmp_path / "raw", tmp_path / "to", shard_size=3, name="mine")
    batches = []
    for data_dir in (tmp_path / "raw", tmp_path / "to" / "mine"):
        data = make_train_dataset(
            [("folder", 1.0, {"data_dir": data_dir, "held_out": 0.3})],
            resolution=(8, 8), batch_size=2, seed=int(rng.integers(1)),
        )  # fmt: skip
        iterator = iter(data)
        batches.append([next(iterator) for _ in range(5)])
        iterator.close()
    for found, expected in zip(*batches, strict=True):
        assert_same(found, expected)


def test_jpeg_files_stay_as_they_are(tmp_path, rng):
    folder_of(tmp_path / "raw", rng, count=2, size=(64, 64))
    prepare("folder", tmp_path / "raw", tmp_path / "to")
    (shard,) = (tmp_path / "to/folder/1.0.0").glob("*array_record*")
    data = shard.read_bytes()
    assert (tmp_path / "raw/rgb/1.jpg").read_bytes()[100:400] in data
    with Image.open(tmp_path / "raw/rgb/1.jpg") as picture:
        exif, pixels = picture.getexif(), np.asarray(picture)
    exif[0x0112] = 6  # to be turned, a quarter
    Image.fromarray(pixels).save(tmp_path / "raw/rgb/1.jpg", exif=exif)
    prepare("folder", tmp_path / "raw", tmp_path / "turned")
    raw = open_dataset("folder", data_dir=tmp_path / "raw")
    assert_same_records(open_dataset("folder", data_dir=tmp_path / "turned"), raw)


def test_splits_are_added(tmp_path, rng):
    cases = [case for case in CASES if str(case) == "dis5k-train-alpha-DIS-TR"]
    cases += [case for case in CASES if str(case) == "dis5k-te1-alpha-DIS-TE1"]
    for case in cases:
        write_copy(tmp_path / "raw", case, rng)
    prepare("dis5k", tmp_path / "raw", tmp_path / "to", splits=["train"])
    with pytest.raises(UserError, match="holds no split 'te1', only train"):
        open_dataset("dis5k", split="te1", data_dir=tmp_path / "to")
    prepare("dis5k", tmp_path / "raw", tmp_path / "to")
    header = read_header(tmp_path / "to/dis5k/1.0.0")
    assert list(header["splits"]) == ["train", "te1", "test"]
    for split in header["splits"]:
        raw = open_dataset("dis5k", split=split, data_dir=tmp_path / "raw")
        assert_same_records(open_dataset("dis5k", split=split, data_dir=tmp_path / "to"), raw)


# ---- what is not taken ---------------------------------------------------------------------------


def test_what_is_rejected_is_reported(tmp_path, rng):
    raw = folder_of(tmp_path / "raw", rng, count=8)
    (raw / "rgb/2.png").write_bytes((raw / "rgb/2.png").read_bytes()[:60])
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(raw / "depth/3.png")
    Image.new("RGB", (16, 12), "white").save(raw / "rgb/5.jpg")
    Image.fromarray(np.ones((5, 5), np.uint16)).save(raw / "depth/6.png")
    folder = prepare("folder", raw, tmp_path / "to", shard_size=4)
    found = open_dataset("folder", data_dir=tmp_path / "to")
    assert [found[i]["name"] for i in range(4)] == ["0", "1", "4", "7"]
    assert len(found) == 4
    with open(folder / "report/rejected-all.csv", newline="") as file:
        rejected = list(csv.DictReader(file))
    assert [(row["index"], row["name"]) for row in rejected] == [
        ("2", "2"), ("3", "3"), ("5", "5"), ("6", "6"),
    ]  # fmt: skip
    reasons = ["Cannot read", "No depth of 3 lies between", "one colour", "has size"]
    for row, reason in zip(rejected, reasons, strict=True):
        assert reason in row["reason"]
    pictures = [row["picture"] for row in rejected]
    assert [bool(picture) for picture in pictures] == [False, True, True, False]
    for picture in filter(None, pictures):
        with Image.open(folder / picture) as thumbnail:
            assert thumbnail.size == (16, 12)
    page = (folder / "report/index.html").read_text()
    assert "4 rejected" in page
    assert page.count("<figure>") == 2
    with open(folder / "report/records-all.csv", newline="") as file:
        records = list(csv.DictReader(file))
    for row, index in zip(records, range(4), strict=True):
        record = found[index]
        assert row["name"] == record["name"]
        assert float(row["farthest"]) == pytest.approx(record["depth"].max())
    assert read_header(folder)["splits"]["all"]["rejected"] == 4


def test_nothing_is_left(tmp_path, rng):
    raw = folder_of(tmp_path / "raw", rng, count=2)
    for number in range(2):
        Image.fromarray(np.zeros((12, 16), np.uint16)).save(raw / f"depth/{number}.png")
    with pytest.raises(UserError, match="All 2 examples of split all of folder were rejected"):
        prepare("folder", raw, tmp_path / "to")


def test_a_field_that_does_not_fit_is_named(tmp_path, rng, monkeypatch):
    raw = folder_of(tmp_path / "raw", rng, count=3)
    monkeypatch.setattr(pipeline, "_PROBES", 1)
    alpha = tmp_path / "raw/alpha"
    alpha.mkdir()
    for number, kind in enumerate((np.uint8, np.uint16, np.uint8)):
        Image.fromarray(rng.integers(0, 250, (12, 16)).astype(kind)).save(alpha / f"{number}.png")
    with pytest.raises(UserError, match="alpha of 1 does not fit the storage unit8"):
        prepare("folder", raw, tmp_path / "to", targets=["alpha"])
    monkeypatch.undo()
    prepare("folder", raw, tmp_path / "other", targets=["alpha"])
    found = open_dataset("folder", data_dir=tmp_path / "other", targets=["alpha"])
    assert_same_records(found, open_dataset("folder", data_dir=raw, targets=["alpha"]))


def test_half_precision_is_asked_for(tmp_path, rng):
    (case,) = [c for c in CASES if str(c) == "hypersim-train-normals-val" and c.list_file]
    write_copy(tmp_path / "raw", case, rng)
    options = {"splits": ["train"], "targets": ["normals"]}
    for name, store in (("exact", {}), ("half", {"normals": "vectors16"})):
        prepare("hypersim", tmp_path / "raw", tmp_path / name, store=store, **options)
    exact, half = (
        open_dataset("hypersim", split="train", targets=["normals"], data_dir=tmp_path / name)
        for name in ("exact", "half")
    )
    difference = np.abs(exact[0]["normals"] - half[0]["normals"]).max()
    assert 0 < difference < 5e-4
    with pytest.raises(UserError, match="cannot be stored as 'whole16'"):
        prepare("hypersim", tmp_path / "raw", tmp_path / "x", store={"normals": "whole16"})
    with pytest.raises(UserError, match="no field depth"):
        prepare("hypersim", tmp_path / "raw", tmp_path / "x", store={"depth": "float32"}, **options)


# ---- damage and bad input ------------------------------------------------------------------------


def test_damaged_shards(tmp_path, rng):
    raw = folder_of(tmp_path / "raw", rng, count=4)
    folder = prepare("folder", raw, tmp_path / "to", shard_size=2)
    (first, second) = sorted(folder.glob("*array_record*"))
    data = bytearray(second.read_bytes())
    middle = data.find(b"\x89PNG")
    data[middle + 4 : middle + 90] = os.urandom(86)
    second.write_bytes(data)
    found = open_dataset("folder", data_dir=tmp_path / "to")
    found[0]
    with pytest.raises((UnreadableFileError, UserError), match=r"of .*to/folder/1\.0\.0"):
        [found[index] for index in (2, 3)]
    first.unlink()
    with pytest.raises(UserError, match="prepare it again"):
        open_dataset("folder", data_dir=tmp_path / "to")[0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"split": "test"}, "holds no split 'test', only all"),
        ({"targets": ["normals"]}, "holds no normals, only depth; prepare it with --targets"),
        ({"normals_axes": "right_down_front"}, "is prepared: leave normals_axes away"),
        ({"depth_scale": 0}, "depth_scale must be positive"),
    ],
)
def test_what_a_prepared_dataset_has_not(tmp_path, rng, options, complaint):
    prepare("folder", folder_of(tmp_path / "raw", rng, count=2), tmp_path / "to")
    with pytest.raises(UserError, match=complaint):
        open_dataset("folder", data_dir=tmp_path / "to", **options)


def test_the_row_may_still_be_changed(tmp_path, rng):
    raw = folder_of(tmp_path / "raw", rng, count=2)
    prepare("folder", raw, tmp_path / "to", options={"depth_scale": 500, "max_depth": 12})
    for changes in ({}, {"depth_scale": 250}, {"min_depth": 3.0}, {"first_class": 0}):
        expected = open_dataset(
            "folder", data_dir=raw, **{"depth_scale": 500, "max_depth": 12} | changes
        )
        assert_same_records(open_dataset("folder", data_dir=tmp_path / "to", **changes), expected)


def test_the_newest_version_is_read(tmp_path, rng):
    raw = folder_of(tmp_path / "raw", rng)
    for limit, version in enumerate(("1.9.0", "1.10.0", "1.2.0"), start=2):
        prepare("folder", raw, tmp_path / "to", limit=limit, version=version)
    assert len(open_dataset("folder", data_dir=tmp_path / "to")) == 3
    assert len(open_dataset("folder", data_dir=tmp_path / "to/folder/1.2.0")) == 4


def test_other_datasets_are_not_taken_for_it(tmp_path, rng):
    folder = prepare("folder", folder_of(tmp_path / "raw", rng, count=2), tmp_path / "to")
    with pytest.raises(UserError, match="holds folder, prepared, not nyuv2"):
        open_dataset("nyuv2", data_dir=folder)
    header = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(header | {"format": "jaxpercept 99"}))
    with pytest.raises(UserError, match="not written by this version"):
        open_dataset("folder", data_dir=folder)
    del header["row"]
    (folder / "metadata.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="not written by this version"):
        open_dataset("folder", data_dir=folder)
    (folder / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset("folder", data_dir=folder)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"dataset": "nyu"}, "Unknown dataset 'nyu'; known are"),
        ({"from": "nowhere"}, "nowhere does not exist"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"limit": -1}, "limit must not be negative"),
        ({"dataset": "scenes"}, "say with --limit how many"),
        ({"splits": "test"}, "no split 'test'"),
        ({"targets": "depths"}, "Unknown target 'depths'"),
        ({"options": "crop"}, "no KEY=VALUE"),
        ({"options": "colour=1"}, "no option 'colour'"),
        ({"name": "my data"}, "letters, digits and underscores"),
        ({"resolution": "480"}, "HEIGHTxWIDTH"),
        ({"beam": "--runner=NoSuchRunner"}, "NoSuchRunner"),
        ({"to": ""}, "--to is required"),
    ],
)
@pytest.mark.usefixtures("restore_logging")
def test_bad_flags_are_one_sentence(tmp_path, rng, capsys, flags, complaint):
    raw = folder_of(tmp_path / "raw", rng, count=2)
    flags = {"dataset": "folder", "from": raw, "to": tmp_path / "to"} | flags
    assert door(prepare_door, *(f"--{key}={value}" for key, value in flags.items())) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert complaint in error
    assert "\n" not in error


@pytest.mark.usefixtures("restore_logging")
def test_the_command(tmp_path, rng, capsys):
    raw = folder_of(tmp_path / "raw", rng)
    flags = (f"--from={raw}", f"--to={tmp_path / 'to'}", "--limit=3", "--name=Mine-1")
    assert door(prepare_door, "--dataset=folder", *flags) == 0
    folder = tmp_path / "to/mine_1/1.0.0"
    assert str(folder / "report/index.html") in capsys.readouterr().out
    assert len(open_dataset("folder", data_dir=folder)) == 3
    with Image.open(folder / "report/examples-all.png") as picture:
        assert picture.size[0] > 512
    assert door(prepare_door, "--help") == 0
    text = capsys.readouterr().out
    for name in prepare_door.OWN_FLAGS:
        assert f"--{name}: " in text
    assert Path(folder / "dataset_info.json").exists()
