"""Phrases about a folder of COCO images: what they name, which images they test, what is wrong."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image
from refcoco_copies import coco, decode, polygon, run_lengths
from test_data_referring import batches

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.layouts import NoLayoutError
from jaxpercept.errors import UserError

SIZE = (48, 64)


def write_phrases(folder, rng, images=40):
    """Every image has two dogs, a person and a crowd; and four phrases."""
    (folder / "images").mkdir()
    entries, annotations, refs = [], [], []
    for n in range(images):
        name = f"{n:012}.jpg"
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name, "png")
        entries.append({"id": n, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        masks = [[polygon(rng, SIZE)], run_lengths(rng, SIZE, True), [polygon(rng, SIZE)],
                 run_lengths(rng, SIZE, False)]  # fmt: skip
        for k, (segmentation, category) in enumerate(zip(masks, (18, 18, 1, 1), strict=True)):
            annotations.append({"id": 10 * n + k, "image_id": n, "category_id": category,
                                "iscrowd": int(k == 3), "segmentation": segmentation})  # fmt: skip
        for phrase, kind, ids in (
            ("all dogs", "all", [0, 1]), ("the left dog", "human", [0]), ("a man", "human", [2]),
            ("everybody", "all", [2, 3]),
        ):  # fmt: skip
            refs.append({"image": name, "image_id": n, "phrase": phrase, "kind": kind,
                         "ann_ids": [10 * n + k for k in ids]})  # fmt: skip
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    data = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    (folder / "refs.json").write_text(json.dumps(refs))
    return {a["id"]: a["segmentation"] for a in annotations}


def union(segmentations):
    runs = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            runs += coco.frPyObjects(segmentation, *SIZE)
        elif isinstance(segmentation["counts"], list):
            runs.append(coco.frPyObjects(segmentation, *SIZE))
        else:
            runs.append(segmentation)
    return decode(coco.merge(runs))[..., None] > 0


def test_phrases_of_several_annotations(tmp_path, rng):
    masks = write_phrases(tmp_path, rng)
    train = open_dataset("coco_phrases", data_dir=tmp_path)
    test = open_dataset("coco_phrases", data_dir=tmp_path, evaluation=True)
    assert (train.split, test.split) == ("train", "test")
    assert not train.source.images & test.source.images
    assert len(train.source.images | test.source.images) == 40
    assert len(train) + len(test) == 160
    assert 1 <= len(test.source.images) <= 18
    assert len({*train.source.names, *test.source.names}) == 160
    for records in (train, test):
        for one in (records[i] for i in range(8)):
            number = int(one["name"].split(".")[0])
            segments = [masks[10 * number + k] for k in range(4)]
            mask = {"all dogs": union(segments[:2]), "the left dog": union(segments[:1]),
                    "a man": union(segments[2:3]), "everybody": union(segments[2:])}  # fmt: skip
            np.testing.assert_array_equal(one["referred"] > 0, mask[one["caption"]])
            crowd = union(segments[3:])
            unknown = crowd & ~mask["a man"] if one["caption"] == "a man" else np.zeros_like(crowd)
            np.testing.assert_array_equal(one["valid"], ~unknown)
            # Not those that share an annotation with it.
            dogs = one["caption"] in ("all dogs", "the left dog")
            others = ["a man", "everybody"] if dogs else ["all dogs", "the left dog"]
            assert one["distractors"] == others
            assert ("phrases" in one) == (records is train)
    moved = write_more(tmp_path, rng)
    assert test.source.images <= moved
    assert not train.source.images & moved


def write_more(folder, rng):
    """The images of the test split when there are more of them."""
    for path in (folder / "images").iterdir():
        path.unlink()
    (folder / "images").rmdir()
    write_phrases(folder, rng, images=60)
    return open_dataset("coco_phrases", data_dir=folder, evaluation=True).source.images


def test_what_was_cropped_away_is_skipped(tmp_path, rng, caplog):
    write_phrases(tmp_path, rng)
    # A dog in the left third and a man in the right: a crop of half the width has one of them.
    edges = {0: (0.0, 20.0), 2: (44.0, 64.0)}
    data = json.loads((tmp_path / "instances.json").read_text())
    for annotation in data["annotations"]:
        low, high = edges.get(annotation["id"] % 10, (0.0, 1.0))
        annotation["segmentation"] = [[low, 0.0, high, 0.0, high, 48.0, low, 48.0]]
    (tmp_path / "instances.json").write_text(json.dumps(data))
    mixture = [("coco_phrases", 1.0, {"data_dir": str(tmp_path), "kinds": "human"})]
    with caplog.at_level(logging.WARNING):
        taken, skipped = batches(mixture, 8, augment={"scale": (0.2, 0.25)})
    assert all(batch["referred"].any(axis=(1, 2, 3)).all() for batch in taken)
    assert skipped
    assert "No phrase names anything that is to be seen of 0000000000" in caplog.text


def test_kinds_of_phrases_can_be_chosen(tmp_path, rng):
    write_phrases(tmp_path, rng, images=12)
    whole, human, both = (
        len(open_dataset("coco_phrases", data_dir=tmp_path, kinds=kinds))
        for kinds in ("", "human", "human all")
    )
    assert whole == both == 2 * human > 0
    with pytest.raises(UserError, match="no phrase of the kind 'humans', only all, human"):
        open_dataset("coco_phrases", data_dir=tmp_path, kinds="humans")
    with pytest.raises(UserError, match="kinds of dataset coco_phrases must be str"):
        open_dataset("coco_phrases", data_dir=tmp_path, kinds=["human"])


def test_bad_lists_of_phrases_are_named(tmp_path, rng):
    with pytest.raises(NoLayoutError, match="no split 'train' of coco_phrases with referred"):
        open_dataset("coco_phrases", data_dir=tmp_path)
    write_phrases(tmp_path, rng, images=8)
    path = tmp_path / "refs.json"
    refs = json.loads(path.read_text())
    for broken in (
        [refs[0] | {"ann_ids": [999]}],
        [refs[0] | {"ann_ids": []}],
        [refs[0] | {"ann_ids": [10]}],
        [refs[0] | {"phrase": "  "}],
        [{"image": "a"}],
        {"refs": refs},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"refs\.json is not a list of phrases that fits inst"):
            open_both(tmp_path)
    path.write_text(json.dumps(refs))
    (tmp_path / "images" / refs[0]["image"]).unlink()
    with pytest.raises(UserError, match=f"names images/{refs[0]['image']}, which is not in"):
        open_both(tmp_path)


def open_both(folder):
    for split in ("train", "test"):
        open_dataset("coco_phrases", data_dir=folder, split=split)


# ---- the real data, where this machine has it ----------------------------------------------------


@pytest.mark.skipif("JAXPERCEPT_DATA" not in os.environ, reason="no real data on this machine")
def test_real_phrases(rng):
    folder = os.path.join(os.environ["JAXPERCEPT_DATA"], "coco_subset")
    train = open_dataset("coco_phrases", data_dir=folder)
    test = open_dataset("coco_phrases", data_dir=folder, evaluation=True)
    assert len(train) + len(test) == 1385
    assert len(train.source.images) + len(test.source.images) == 295
    assert 40 < len(test.source.images) < 80
    human = [
        open_dataset("coco_phrases", data_dir=folder, split=split, kinds="human")
        for split in ("train", "test")
    ]
    assert sum(map(len, human)) == 15
    with open(os.path.join(folder, "instances.json")) as file:
        areas = {a["id"]: a["area"] for a in json.load(file)["annotations"]}
    for records in (train, test):
        for index in rng.integers(len(records), size=25).tolist():
            one, reference = records[index], records.source.references[index]
            area = sum(areas[number] for number in reference.things)
            # Annotations of several things may overlap.
            assert one["referred"].sum() < 1.1 * area + 80
            assert one["referred"].sum() > (0.5 if len(reference.things) > 1 else 0.85) * area - 80
            assert one["valid"].mean() > 0.5
    mixture = [("coco_phrases", 1.0, {"data_dir": folder})]
    (batch,), _ = batches(mixture, 1, resolution=(96, 128), augment={"scale": (0.6, 1.0)})
    assert batch["referred"].any(axis=(1, 2, 3)).all()
