"""The header says what the numbers mean: by it alone records are what the readers give."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import raw_copies
import refcoco_copies
import tensorflow_datasets as tfds
from layout_cases import CASES, write_copy
from PIL import Image

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.preparation.pipeline import prepare
from jaxpercept.preparation.report import drawn

# Dataset -> what the header must say of units and of the camera.
SAID = {
    "hypersim": (1000, "record"),
    "scannet": (1000, "record"),
    "nyuv2": (1000, "row"),
    "diode": (1, "row"),
    "cityscapes": (1, "record"),
    "ibims1": (65535 / 50, None),
    "kitti": (256, None),
    "taskonomy": (512, None),
}


def by_header(header, row):
    """Depth in metres, normals, classes and intrinsics, of what TFDS gives and the header says."""
    said, found = header["conventions"], {}
    if "depth" in said:
        depth = said["depth"]
        assert depth["measured"] == "planar"
        metres = row["depth"].astype(np.float32) / np.float32(depth["units_per_metre"])
        valid = metres > depth["valid_above_metres"]
        valid &= metres < float(depth["valid_below_metres"])
        if depth["mask"]:
            valid &= row[depth["mask"]].astype(bool)
        found |= {"depth": np.where(valid, metres, 0)}
    if "normals" in said:
        assert (said["normals"]["axes"], said["normals"]["towards"]) == ("right_up_back", "viewer")
        found["normals"] = row["normals"]
    if "intrinsics" in row:
        found["intrinsics"] = row["intrinsics"]
    elif "intrinsics" in said:
        assert said["intrinsics"]["of_all"] == "row.camera"
        *numbers, height, width = header["row"]["camera"]
        y, x = row["rgb"].shape[0] / height, row["rgb"].shape[1] / width
        found["intrinsics"] = np.array(numbers) * (x, y, x, y)
    return found


@pytest.mark.parametrize("name", SAID)
def test_records_follow_from_the_header(tmp_path, rng, name):
    (write, split, options), (units, camera) = raw_copies.RAW[name], SAID[name]
    write(tmp_path / "raw", rng)
    folder = prepare(name, tmp_path / "raw", tmp_path / "to", splits=[split], options=options)
    header = json.loads((folder / "metadata.json").read_text())
    assert header["conventions"]["depth"]["units_per_metre"] == units
    assert ("intrinsics" in header["conventions"]) == (camera is not None)
    assert ("intrinsics" in header["fields"]) == (camera == "record")
    rows = tfds.builder_from_directory(folder).as_data_source(split=split)
    records = open_dataset(name, split=split, data_dir=tmp_path / "raw",
                           targets=header["targets"], **options)  # fmt: skip
    assert len(rows) == len(records) > 0
    for row, record in zip(rows, records, strict=True):
        found = by_header(header, row)
        assert ("intrinsics" in found) == ("intrinsics" in record) == (camera is not None)
        if "normals" in found and name == "hypersim":  # only where depth is, as GenPercept has it
            found["normals"] = found["normals"] * (found["depth"] > 0)
        for key, value in found.items():
            np.testing.assert_allclose(record[key], value, rtol=1e-6, atol=1e-7, err_msg=key)
        assert (record["depth"] > 0).any()
        assert (record["depth"] == 0).any() or name in ("kitti", "taskonomy")


def test_hashes_are_those_of_the_source(tmp_path, rng):
    made = raw_copies.write_cityscapes(tmp_path / "raw", rng, splits=("train",))
    folder = prepare("cityscapes", tmp_path / "raw", tmp_path / "to", splits=["train"])
    facts = json.loads((folder / "metadata.json").read_text())["splits"]["train"]
    expected = []
    for name in sorted(made):
        places = name, name.replace("leftImg8bit", "disparity"), name.replace(
            "leftImg8bit", "camera"
        ).replace(".png", ".json")  # fmt: skip
        data = b"".join((tmp_path / "raw" / place).read_bytes() for place in places)
        expected.append(hashlib.sha256(data).hexdigest())
    with open(folder / "report/records-train.csv", newline="") as file:
        assert [row["source_sha256"] for row in csv.DictReader(file)] == expected
    assert facts["source_sha256"] == hashlib.sha256("".join(expected).encode()).hexdigest()
    assert facts["source_sha256_of"] == "files"
    for shard, digest in zip(facts["shards"], facts["shard_sha256"], strict=True):
        assert hashlib.sha256((folder / shard).read_bytes()).hexdigest() == digest
    # A camera that changes is another source, though images and disparities are the same.
    path = next((tmp_path / "raw").rglob("*_camera.json"))
    path.write_text(path.read_text().replace("0.209313", "0.219313"))
    other = prepare("cityscapes", tmp_path / "raw", tmp_path / "other", splits=["train"])
    changed = json.loads((other / "metadata.json").read_text())["splits"]["train"]
    assert changed["source_sha256"] != facts["source_sha256"]


def test_phrases_and_scenes_are_described(tmp_path, rng):
    (tmp_path / "raw").mkdir()
    refcoco_copies.write_refer(tmp_path / "raw", refcoco_copies.world(rng))
    folder = prepare("refcoco", tmp_path / "raw", tmp_path / "to", splits=["train"])
    header = json.loads((folder / "metadata.json").read_text())
    assert {"instance", "phrases", "kinds"} <= header["meaning"].keys() == header["fields"].keys()
    assert header["conventions"] == {}
    folder = prepare("scenes", None, tmp_path / "to", splits=["test"], limit=2, resolution=(24, 32))
    header = json.loads((folder / "metadata.json").read_text())
    said = header["conventions"]
    assert said.keys() == {"depth", "normals", "classes", "intrinsics"}
    assert said["depth"]["valid_below_metres"] == "inf"
    assert said["depth"]["mask"] == "mask"
    assert header["splits"]["test"]["source_sha256_of"] == "records"
    assert len(header["palette"]) == len(header["class_names"]) == 54


def test_splits_of_other_units_do_not_share_a_header(tmp_path, rng):
    raw_copies.write_cityscapes(tmp_path / "raw", rng, splits=("train", "val"))
    opened = {"targets": ["depth"]}
    prepare("cityscapes", tmp_path / "raw", tmp_path / "to", splits=["val"], **opened)
    with pytest.raises(UserError, match=r"holds splits whose max_depth is 80\.0, not 60\.0"):
        prepare("cityscapes", tmp_path / "raw", tmp_path / "to", splits=["train"],
                options={"max_depth": 60}, **opened)  # fmt: skip
    prepare("cityscapes", tmp_path / "raw", tmp_path / "to", splits=["train"], **opened)


# ---- the report ----------------------------------------------------------------------------------


def test_classes_are_drawn_in_the_colours_of_the_row(tmp_path, rng):
    case = next(c for c in CASES if c.dataset == "camvid")
    case = type(case)(**vars(case) | {"size": (60, 80)})
    examples = write_copy(tmp_path / "raw", case, rng)
    folder = prepare("camvid", tmp_path / "raw", tmp_path / "to", splits=["test"])
    palette = PALETTES["camvid"].colours
    header = json.loads((folder / "metadata.json").read_text())
    assert header["palette"] == [list(colour) for colour in palette]
    for example in examples.values():
        pixels = drawn(example, header["palette"])["classes"]
        assert pixels.shape == (60, 80, 3)
        for place in map(tuple, rng.integers((60, 80), size=(100, 2))):
            number = int(example["classes"][..., 0][place])
            assert tuple(pixels[place].tolist()) == (
                (0, 0, 0) if number == 255 else palette[number]
            )
    with Image.open(Path(folder, "report/examples-test.png")) as picture:
        shown = {tuple(colour) for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert len(set(palette) & shown) >= 10  # 11, of which each is seen in 4800 random pixels
    unknown = drawn({"rgb": pixels, "classes": np.array([[[0], [3], [255]]], np.int32)})["classes"]
    assert unknown[0, :2].any(-1).all()
    assert not unknown[0, 2].any()
