"""RefCOCO in every layout: what a phrase names, which sentences there are, and hostile pickles."""

import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from refcoco_copies import (
    CATEGORIES,
    file_name,
    mask_of,
    write_cris,
    write_refer,
    write_tfds,
)
from refcoco_copies import world as make_world

from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.layouts import NoLayoutError
from jaxpercept.data.plain_pickle import load_plain
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.data.references import shared_images
from jaxpercept.errors import UserError


@pytest.fixture
def world(rng):
    return make_world(rng)


@pytest.fixture(params=["refer", "cris", "tfds"])
def copy(request, tmp_path, world, monkeypatch):
    """RefCOCO in one of its layouts."""
    if request.param == "refer":
        write_refer(tmp_path, world)
    elif request.param == "cris":
        write_cris(tmp_path, world)
    else:
        write_tfds(tmp_path, world, monkeypatch)
    return tmp_path


def sentences(ref):
    return [s["sent"].strip() for s in ref["sentences"]]


def expected(world, split):
    """(image, mask, own sentences, other sentences of the image) of a split's objects."""
    refs = [ref for ref in world["refs"] if ref["split"] == split]
    return [
        (
            world["pixels"][ref["image_id"]],
            mask_of(world, ref["ann_id"]),
            sentences(ref),
            [
                s
                for other in sorted(refs, key=lambda o: o["category_id"] != ref["category_id"])
                if other is not ref and other["image_id"] == ref["image_id"]
                for s in sentences(other)
            ],
        )
        for ref in sorted(refs, key=lambda ref: ref["ann_id"])
    ]


@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
def test_every_layout_gives_the_same(copy, world, split):
    wanted = expected(world, split)
    flat = [(rgb, mask, s, other) for rgb, mask, own, other in wanted for s in own]
    records = open_dataset("refcoco", split=split, data_dir=copy, evaluation=True)
    found = {
        (r["rgb"].tobytes(), r["caption"]): r for r in map(records.__getitem__, range(len(records)))
    }
    assert len(records) == len(found) == len(flat)
    assert len(set(records.source.names)) == len(records)
    for rgb, mask, sentence, others in flat:
        record = found[rgb.tobytes(), sentence]
        np.testing.assert_array_equal(record["referred"][..., 0], mask)
        assert record["referred"].dtype == np.float32
        assert record["valid"].all()
        assert record["distractors"] == others
        assert "phrases" not in record

    records = pickle.loads(pickle.dumps(open_dataset("refcoco", split=split, data_dir=copy)))
    assert len(records) == len(wanted)
    for record, (rgb, mask, own, _) in zip(
        sorted((records[i] for i in range(len(records))), key=lambda r: str(r["phrases"][0])),
        sorted(wanted, key=lambda w: str((w[2][0], 1))),
        strict=True,
    ):
        np.testing.assert_array_equal(record["rgb"], rgb)
        np.testing.assert_array_equal(record["instance"][..., 0], mask)
        assert [text for text, target in record["phrases"] if target == 1] == own
        assert record["caption"] in own
        assert len(record["kinds"]) == max(target for _, target in record["phrases"])


def test_nothing_needs_tensorflow(tmp_path, world, monkeypatch):
    write_tfds(tmp_path, world, monkeypatch)
    code = (
        "import sys\n"
        "from jaxpercept.data.datasets import open_dataset\n"
        f"records = open_dataset('refcoco', split='testA', data_dir={str(tmp_path)!r})\n"
        "records[0]\n"
        "print('tensorflow' in sys.modules, len(records))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "1"]


def test_kinds_are_the_categories(tmp_path, world):
    write_refer(tmp_path, world)
    records = open_dataset("refcoco", data_dir=tmp_path)
    for number in range(len(records)):
        record, ref = records[number], [r for r in world["refs"] if r["split"] == "train"][number]
        assert record["kinds"][0] == CATEGORIES[ref["category_id"]]


@pytest.mark.parametrize("images", ["images/train2014", "train2014", "images/mscoco/train2014"])
def test_images_may_lie_elsewhere(tmp_path, world, images):
    write_refer(tmp_path, world, images=images)
    assert len(open_dataset("refcoco", data_dir=tmp_path)) == 4


def test_releases_and_their_folders(tmp_path, world, caplog):
    write_refer(tmp_path / "a", world, "refcocog", "umd")
    write_refer(tmp_path / "a", world, "refcocog", "google")
    write_refer(tmp_path / "a", world, "refcoco+")
    write_cris(tmp_path / "b", world, "refcocog", "refcocog_u")
    write_cris(tmp_path / "b", world, "refcocog", "refcocog_g")
    write_cris(tmp_path / "b", world, "refcoco+", "refcoco+")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert len(open_dataset("refcoco+", split="testB", data_dir=folder)) == 1
        assert len(open_dataset("refcocog", split="test", data_dir=folder)) == 2
        google = open_dataset("refcocog", split="val", data_dir=folder, split_by="google",
                              evaluation=True)  # fmt: skip
        assert len(google) == 6
        assert "6 examples here and 9536 as published" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match="refcocog as split by google has no test, only train, val"):
        open_dataset("refcocog", split="test", data_dir=tmp_path / "a", split_by="google")
    with pytest.raises(UserError, match="split_by of dataset refcoco must be unc, got 'google'"):
        open_dataset("refcoco", data_dir=tmp_path / "a", split_by="google")


def test_the_layout_can_be_forced(tmp_path, world):
    write_refer(tmp_path, world)
    write_cris(tmp_path, world)
    for path in (tmp_path / "masks/refcoco").iterdir():
        path.write_bytes(b"")
    open_dataset("refcoco", data_dir=tmp_path)[0]
    with pytest.raises(UnreadableFileError, match=r"masks/refcoco/\d+\.png"):
        open_dataset("refcoco", data_dir=tmp_path, layout="cris")[0]
    with pytest.raises(NoLayoutError, match="holds no split 'train' of refcoco with referred"):
        open_dataset("refcoco", data_dir=tmp_path, layout="tfds")
    with pytest.raises(UserError, match="layout of dataset refcoco must be one of refer, cris"):
        open_dataset("refcoco", data_dir=tmp_path, layout="coco")


# ---- leaks ---------------------------------------------------------------------------------------


def test_images_that_training_has_seen_are_counted(copy, caplog):
    with caplog.at_level(logging.WARNING):
        open_dataset("refcoco", split="testA", data_dir=copy, evaluation=True)
        open_dataset("refcoco", split="train", data_dir=copy, evaluation=True)
    assert "training split" not in caplog.text
    with caplog.at_level(logging.WARNING):
        open_dataset("refcoco", split="val", data_dir=copy, evaluation=True)
    assert "1 of the 2 images of the split val of refcoco by unc are images of its training" in (
        caplog.text
    )


def test_images_shared_across_datasets(tmp_path, world):
    write_refer(tmp_path, world)
    # RefCOCOg splits the same images otherwise.
    other = {"train": "val", "val": "train"}
    swapped = [ref | {"split": other.get(ref["split"], ref["split"])} for ref in world["refs"]]
    write_cris(tmp_path, world | {"refs": swapped}, "refcocog", "refcocog_u")
    trained = open_dataset("refcoco", data_dir=tmp_path)
    evaluated = open_dataset("refcocog", split="val", data_dir=tmp_path, evaluation=True)
    assert shared_images(trained, evaluated) == {581857, 3333}
    tested = open_dataset("refcocog", split="test", data_dir=tmp_path, evaluation=True)
    assert shared_images(trained, tested) == set()
    with pytest.raises(UserError, match="Dataset scenes is not made of COCO's images"):
        shared_images(trained, open_dataset("scenes", size=1))


# ---- what is wrong -------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path, world, monkeypatch):
    write_refer(tmp_path, world)
    image = tmp_path / "images/mscoco/images/train2014" / file_name(11)
    image.unlink()
    open_dataset("refcoco", data_dir=tmp_path)  # not of this split
    with pytest.raises(UserError, match=rf"names .*{file_name(11)}, which is not in"):
        open_dataset("refcoco", split="val", data_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pycocotools", None)
        with pytest.raises(UserError, match=r"pip install 'jaxpercept\[coco\]'"):
            open_dataset("refcoco", data_dir=tmp_path)
    (tmp_path / "refcoco/instances.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=r"instances\.json is not an annotation file of COCO"):
        open_dataset("refcoco", data_dir=tmp_path)
    write_refer(tmp_path, world | {"images": {}})
    with pytest.raises(UserError, match=r"refs\(unc\)\.p is not a list of REFER that fits instan"):
        open_dataset("refcoco", data_dir=tmp_path)
    write_refer(tmp_path, world | {"refs": world["refs"][:1]})
    with pytest.raises(UserError, match="refers to nothing in this split"):
        open_dataset("refcoco", split="val", data_dir=tmp_path)


def test_bad_lists_of_cris_are_named(tmp_path, world):
    write_cris(tmp_path, world)
    (tmp_path / "masks/refcoco/0.png").unlink()
    with pytest.raises(UserError, match=r"names masks/refcoco/0\.png, which is not in"):
        open_dataset("refcoco", data_dir=tmp_path)
    path = tmp_path / "anns/refcoco/val.json"
    for text in ("[", '[{"img_name": "a.jpg"}]', '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"val\.json is not a list of CRIS"):
            open_dataset("refcoco", split="val", data_dir=tmp_path)


def test_masks_of_another_size_are_named(tmp_path, world):
    write_cris(tmp_path, world)
    Image.new("L", (9, 9)).save(tmp_path / "masks/refcoco/0.png")
    with pytest.raises(
        UnreadableFileError, match=r"has size \(9, 9\) but its image has \(40, 60\)"
    ):
        open_dataset("refcoco", data_dir=tmp_path)[0]
    write_refer(tmp_path, world)
    instances = tmp_path / "refcoco/instances.json"
    data = json.loads(instances.read_text())
    for broken in (
        [],
        [[1.0, 2.0]],
        [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]],
        [[1.0, 2.0, 3.0, 4.0, 5.0, 1e12]],
        [[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]],
        {"size": [40, 60], "counts": "zzzz"},
        {"size": [40, 60], "counts": [-5, 2405]},
        {"size": [40, 60], "counts": [5]},
        {"size": [60, 40], "counts": [2400]},
        {"counts": "abc"},
        "abc",
        None,
    ):
        data["annotations"][0]["segmentation"] = broken
        instances.write_text(json.dumps(data))
        records = open_dataset("refcoco", data_dir=tmp_path, layout="refer")
        with pytest.raises(UnreadableFileError, match="is no COCO segmentation of 40 x 60 pixels"):
            records[0]


def test_tfds_without_masks_is_named(tmp_path, world, monkeypatch):
    from jaxpercept.data import refcoco_tfds

    write_tfds(tmp_path, world, monkeypatch)
    whole = refcoco_tfds.TFDSRows.__getitem__
    monkeypatch.setattr(
        refcoco_tfds.TFDSRows,
        "__getitem__",
        lambda rows, i: whole(rows, i).replace(b"mask", b"musk"),
    )
    with pytest.raises(UserError, match=r"prepare version 1\.1\.0, the first with masks"):
        open_dataset("refcoco", data_dir=tmp_path)
    (tmp_path / "ref_coco/refcocoplus_unc").mkdir()
    with pytest.raises(UserError, match=r"ref_coco/refcocoplus_unc'"):
        open_dataset("refcoco+", data_dir=tmp_path)


# ---- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2_are_read(tmp_path, world, protocol):
    write_refer(tmp_path, world, protocol=protocol)
    assert load_plain(tmp_path / "refcoco/refs(unc).p") == world["refs"]


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_a_pickle_that_runs_commands_is_refused(tmp_path, world, protocol, deep):
    write_refer(tmp_path, world)
    flag = tmp_path / "ran"
    attack = Attack(flag)
    refs = [*world["refs"], world["refs"][0] | {"split": attack}] if deep else attack
    path = tmp_path / "refcoco/refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol))
    with pytest.raises(UserError, match=r"would import (posix|nt|os)\.system, which plain data"):
        open_dataset("refcoco", data_dir=tmp_path)
    assert not flag.exists()
    pickle.loads(path.read_bytes())  # the attack is a real one
    assert flag.exists()


def test_other_ways_out_of_a_pickle_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    for instruction in (b"P7\n.", b"\x80\x02K\x07Q."):  # persistent identifiers
        path.write_bytes(instruction)
        with pytest.raises(UserError, match="refers to objects outside of itself"):
            load_plain(path)
    for harmless in (np.float64(1), {1}.__class__, complex, Exception("a")):
        path.write_bytes(pickle.dumps([harmless], 2))
        with pytest.raises(UserError, match="would import"):
            load_plain(path)
    for instruction in (b"", b"(lp0\nS'a'", b"\x82\x01.", b"garbage", b"(i__builtin__\neval\n."):
        path.write_bytes(instruction)
        with pytest.raises(UserError, match=r"Cannot read .*refs\.p|would import"):
            load_plain(path)
    with pytest.raises(UserError, match=r"nowhere\.p as a pickle"):
        load_plain(tmp_path / "nowhere.p")


def test_rows_say_what_was_published():
    objects = {"refcoco": 42404, "refcoco+": 42278, "refcocog": 42226}
    totals = {"refcoco": 142210, "refcoco+": 141564, "refcocog": 95010}
    training = {"refcoco": 120624, "refcoco+": 120191, "refcocog": 80512}
    for name, count in objects.items():
        row = DATASETS[name]
        assert row.expected["train"] == count
        held_out = sum(row.expected[split] for split in row.splits if split != "train")
        assert training[name] + held_out == totals[name]
