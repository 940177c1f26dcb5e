"""COCO's people: which become examples, and where their keypoints and boxes lie."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.errors import UserError


def person(number, image, keypoints, box, **changes):
    return {
        "id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": box,
        "keypoints": np.asarray(keypoints).ravel().tolist(),
        "num_keypoints": int((np.asarray(keypoints)[:, 2] > 0).sum()), **changes,
    }  # fmt: skip


@pytest.fixture
def coco(tmp_path, rng):
    """Two images of 40 x 60; three people worth having, a crowd and somebody almost out of view."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    images = {7: "000000000007.jpg", 3: "000000000003.jpg"}
    pixels = {k: rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for k in images}
    for number, name in images.items():
        Image.fromarray(pixels[number]).save(tmp_path / "train2017" / name, "png")
    points = np.zeros((17, 3), int)
    points[:8] = [(20 + k, 10 + k, 1 + k % 2) for k in range(8)]
    few = points * (np.arange(17) < 2)[:, None]
    people = [
        person(1, 7, points, [18.0, 8.0, 12.0, 16.0]),
        person(2, 7, points + (points[:, 2:] > 0) * (5, 5, 0), [20.0, 10.0, 20.0, 20.0]),
        person(3, 3, points, [18.5, 8.0, 10.0, 12.0]),
        person(4, 3, few, [0.0, 0.0, 30.0, 30.0]),
        person(5, 3, points, [0.0, 0.0, 30.0, 30.0], iscrowd=1),
    ]
    data = {
        "images": [{"id": k, "file_name": name} for k, name in images.items()],
        "annotations": people,
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "annotations/person_keypoints_train2017.json").write_text(json.dumps(data))
    return tmp_path, pixels, points, people


def test_coco_people_are_cut_out(coco):
    folder, pixels, points, _ = coco
    records = open_dataset("coco_keypoints", data_dir=folder)
    assert records.source.names == [
        "train2017/000000000003.jpg#3", "train2017/000000000007.jpg#1",
        "train2017/000000000007.jpg#2",
    ]  # fmt: skip
    record = records[1]
    # The box (18, 8, 30, 24) grows by an eighth on every side: columns 16:32, rows 6:26.
    np.testing.assert_array_equal(record["rgb"], pixels[7][6:26, 16:32])
    np.testing.assert_array_equal(record["box"], [2, 2, 14, 18])
    expected = np.where(points[:, 2:] > 0, points - np.array([15.5, 5.5, 0]), 0)
    np.testing.assert_allclose(record["keypoints"], expected)
    assert record["keypoints"].dtype == np.float32
    assert record["valid"].all()
    assert record["flip_pairs"] == DATASETS["coco_keypoints"].flip_pairs


def test_coco_largest_person_of_every_image(coco):
    folder, pixels, points, _ = coco
    records = open_dataset("coco_keypoints", data_dir=folder, persons="largest")
    assert records.source.names == ["train2017/000000000003.jpg", "train2017/000000000007.jpg"]
    record = records[1]
    np.testing.assert_array_equal(record["rgb"], pixels[7])
    np.testing.assert_array_equal(record["box"], [20, 10, 40, 30])
    expected = np.where(points[:, 2:] > 0, points + np.array([5.5, 5.5, 0]), 0)
    np.testing.assert_allclose(record["keypoints"], expected)


def test_coco_that_is_none_is_named(coco, tmp_path):
    folder, _, _, people = coco
    with pytest.raises(UserError, match=r"no annotations/person_keypoints_val2017.json; expected"):
        open_dataset("coco_keypoints", data_dir=folder, split="val")
    with pytest.raises(UserError, match="persons must be"):
        open_dataset("coco_keypoints", data_dir=folder, persons="all")
    with pytest.raises(UserError, match="nobody with 9 keypoints"):
        open_dataset("coco_keypoints", data_dir=folder, min_keypoints=9)
    path = folder / "annotations/person_keypoints_train2017.json"
    (folder / "train2017/000000000003.jpg").unlink()
    with pytest.raises(UserError, match=r"names train2017/000000000003\.jpg, which is not in"):
        open_dataset("coco_keypoints", data_dir=folder)
    for text in ("{", json.dumps({"annotations": people}), "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a COCO keypoint file"):
            open_dataset("coco_keypoints", data_dir=folder)
