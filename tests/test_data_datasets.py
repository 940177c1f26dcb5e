"""The table of datasets: units, valid ranges, crops, and what is said about wrong requests."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpercept.data import datasets
from jaxpercept.data.crops import CROPS, EVAL_CROPS
from jaxpercept.data.datasets import DATASETS, TARGETS, EmptyMaskError, open_dataset
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.errors import UserError


def write_list_dataset(folder, depths, list_file="train.txt", size=None):
    """Files rgb/N.png, depth/N.png (uint16) for every array and the list that names them."""
    lines = []
    for sub in ("rgb", "depth"):
        (folder / sub).mkdir(exist_ok=True, parents=True)
    for i, depth in enumerate(depths):
        rgb = np.full((*depth.shape, 3), i, np.uint8)
        Image.fromarray(rgb).save(folder / "rgb" / f"{i}.png")
        Image.fromarray(depth.astype(np.uint16)).save(folder / "depth" / f"{i}.png")
        lines.append(f"rgb/{i}.png depth/{i}.png\n")
    (folder / list_file).write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("name", "unit", "low", "high"),
    [
        ("hypersim", 1000, 1e-5, 65),
        ("nyuv2", 1000, 1e-3, 10),
        ("taskonomy", 512, 1e-5, 65),
        ("cityscapes", 300, 1e-5, 80),
        ("scannet", 1000, 1e-3, 10),
    ],
)
def test_units_and_strict_valid_range(tmp_path, name, unit, low, high):
    edge = [0, 1, 2, int(low * unit), high * unit - 1, high * unit, high * unit + 1]
    raw = np.minimum(np.array([edge], np.int64), 65535)
    write_list_dataset(tmp_path, [raw])
    record = open_dataset(name, data_dir=tmp_path, split="train" if name != "scannet" else "test",
                          list_file="train.txt")[0]  # fmt: skip
    metres = raw[..., None].astype(np.float32) / np.float32(unit)
    valid = (metres > low) & (metres < high)
    np.testing.assert_array_equal(record["valid"], valid)
    np.testing.assert_array_equal(record["depth"], np.where(valid, metres, 0))
    assert record["depth"].dtype == np.float32
    assert record["name"] == "rgb/0.png"


def test_vkitti_is_cropped_and_the_sky_is_invalid(tmp_path, rng):
    raw = rng.integers(100, 7900, (375, 1242))
    raw[:100] = 65535
    write_list_dataset(tmp_path, [raw], "vkitti_train.txt")
    record = open_dataset("vkitti", data_dir=tmp_path)[0]
    assert record["rgb"].shape == (352, 1216, 3)
    metres = raw[23:, 13:1229, None].astype(np.float32) / 100
    np.testing.assert_array_equal(record["valid"], metres < 80)
    np.testing.assert_array_equal(record["depth"], np.where(metres < 80, metres, 0))
    evaluation = open_dataset(
        "vkitti", data_dir=tmp_path, list_file="vkitti_train.txt", evaluation=True
    )
    assert 0 < evaluation[0]["valid"].sum() < record["valid"].sum()
    write_list_dataset(tmp_path, [raw[:300]], "vkitti_train.txt")
    with pytest.raises(UnreadableFileError, match="smaller than the KITTI benchmark crop"):
        open_dataset("vkitti", data_dir=tmp_path)[0]


def test_crops_are_those_of_the_papers():
    assert CROPS["kitti_benchmark"](375, 1242) == (slice(23, 375), slice(13, 1229))
    assert EVAL_CROPS["nyu"](480, 640) == (slice(45, 471), slice(41, 601))
    assert EVAL_CROPS["nyu"](240, 320) == (slice(22, 235), slice(20, 300))
    assert EVAL_CROPS["eigen"](352, 1216) == (slice(117, 321), slice(43, 1172))
    assert EVAL_CROPS["garg"](352, 1216) == (slice(143, 349), slice(43, 1172))


def test_evaluation_counts_the_crop_only(tmp_path):
    write_list_dataset(tmp_path, [np.full((240, 320), 2000)], "test.txt")
    records = open_dataset("nyuv2", data_dir=tmp_path, evaluation=True)
    expected = np.zeros((240, 320, 1), bool)
    expected[22:235, 20:300] = True
    np.testing.assert_array_equal(records[0]["valid"], expected)
    whole = open_dataset("nyuv2", data_dir=tmp_path, evaluation=True, eval_crop=None)
    assert whole[0]["valid"].all()


def test_folder_scale_follows_the_format(tmp_path, rng):
    folder = write_list_dataset(tmp_path / "png", [np.array([[0, 1500, 3000]])])
    record = open_dataset("folder", data_dir=folder)[0]
    np.testing.assert_array_equal(record["depth"][0, :, 0], np.float32([0, 1.5, 3]))
    np.testing.assert_array_equal(record["valid"][0, :, 0], [False, True, True])
    record = open_dataset("folder", data_dir=folder, depth_scale=500.0, max_depth=5.0)[0]
    np.testing.assert_array_equal(record["depth"][0, :, 0], np.float32([0, 3, 0]))
    (folder / "depth" / "0.png").unlink()
    metres = np.array([[0, np.nan, np.inf]], np.float32)
    metres[0, 0] = 1.25
    np.save(folder / "depth" / "0.npy", metres)
    record = open_dataset("folder", data_dir=folder)[0]
    np.testing.assert_array_equal(record["valid"][0, :, 0], [True, False, False])
    np.testing.assert_array_equal(record["depth"][0, :, 0], np.float32([1.25, 0, 0]))
    write_list_dataset(folder, [np.ones((1, 3)), np.ones((1, 3))])
    (folder / "depth" / "0.png").unlink()
    with pytest.raises(UserError, match="mixes PNG and floating-point depth"):
        open_dataset("folder", data_dir=folder)
    assert len(open_dataset("folder", data_dir=folder, depth_scale=1000)) == 2


def names(**options):
    return set(open_dataset("folder", **options).source.names)


def test_held_out_images_are_evaluated_and_not_trained_on(tmp_path):
    folder = write_list_dataset(tmp_path, [np.ones((1, 2))] * 60)
    held_out = names(data_dir=folder, held_out=0.3, evaluation=True)
    trained = names(data_dir=folder, held_out=0.3)
    assert not held_out & trained
    assert held_out | trained == names(data_dir=folder) == names(data_dir=folder, evaluation=True)
    assert 6 <= len(held_out) <= 30  # names are fixed: so is this number
    smaller = names(data_dir=folder, held_out=0.1, evaluation=True)
    assert smaller < held_out
    write_list_dataset(folder, [np.ones((1, 2))] * 90)  # more images: nobody changes sides
    assert held_out < names(data_dir=folder, held_out=0.3, evaluation=True)
    assert trained < names(data_dir=folder, held_out=0.3)
    # Every field follows its image.
    source = open_dataset("folder", data_dir=folder, held_out=0.3).source
    for name, image, depth in zip(
        source.names, source.columns["rgb"], source.columns["depth"], strict=True
    ):
        assert Path(image).stem == Path(depth).stem == name


@pytest.mark.parametrize(
    ("name", "held_out", "message"),
    [
        ("folder", 1.0, "held_out of dataset folder is a share from 0 to below 1, not 1.0"),
        ("folder", 1e-9, r"held_out=1e-09 leaves none of the 2 images of dataset folder to eval"),
        ("scenes", 0.1, "Dataset scenes has splits of its own; leave held_out away"),
    ],
)
def test_shares_that_cannot_be_held_out(tmp_path, name, held_out, message):
    folder = write_list_dataset(tmp_path, [np.ones((1, 2))] * 2)
    with pytest.raises(UserError, match=message):
        open_dataset(name, data_dir=folder, held_out=held_out, evaluation=True)


def test_file_mask_restricts_valid(tmp_path, rng):
    depth = rng.uniform(1, 5, (8, 9, 1)).astype(np.float32)
    mask = rng.random((8, 9)) < 0.5
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a_depth.npy", depth)
    np.save(tmp_path / "a_depth_mask.npy", mask.astype(np.float64))
    (tmp_path / "diode_val_all_filename_list.txt").write_text("a.png a_depth.npy a_depth_mask.npy")
    records = open_dataset("diode", data_dir=tmp_path, evaluation=True)
    np.testing.assert_array_equal(records[0]["valid"][..., 0], mask)
    assert "mask" not in records[0]
    assert records.dataset.clip_range == (0.6, 350.0)


def test_empty_mask_is_named(tmp_path):
    write_list_dataset(tmp_path, [np.zeros((4, 5))])
    with pytest.raises(EmptyMaskError, match=r"rgb/0\.png"):
        open_dataset("nyuv2", data_dir=tmp_path)[0]


def test_records_can_be_pickled(tmp_path):
    write_list_dataset(tmp_path, [np.full((4, 5), 1000)])
    records = open_dataset("nyuv2", data_dir=tmp_path)
    copy = pickle.loads(pickle.dumps(records))
    np.testing.assert_array_equal(copy[0]["depth"], records[0]["depth"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nyu", {}, "Unknown dataset 'nyu'; known are .*nyuv2"),
        ("nyuv2", {}, "needs a folder; set data_dir"),
        ("nyuv2", {"data_dir": "nowhere"}, "nowhere does not exist"),
        ("nyuv2", {"data_dir": ".", "split": "val"}, "has no split 'val', only train, test"),
        ("nyuv2", {"data_dir": ".", "depht_scale": 1}, "has no option 'depht_scale'"),
        ("folder", {"data_dir": "{}", "depth_scale": 0}, "depth_scale must be positive"),
        ("folder", {"data_dir": "{}", "min_depth": 5, "max_depth": 4}, "min_depth must be below"),
        ("folder", {"data_dir": "{}", "eval_crop": "nyuu"}, "Unknown eval_crop 'nyuu'"),
        ("folder", {"data_dir": "{}", "first_class": "a"}, "first_class of dataset folder must be"),
        ("list", {"data_dir": "{}", "columns": 3}, "columns of dataset list must be str, got 3"),
        ("tfds", {"data_dir": "."}, "needs the option `builder`"),
    ],
)
def test_wrong_requests_are_named(tmp_path, name, options, message):
    write_list_dataset(tmp_path, [np.ones((4, 5))])
    options = {k: str(tmp_path) if v == "{}" else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        open_dataset(name, **options)


@pytest.mark.parametrize("name", ["scenes", "furnished"])
def test_scenes_are_records_and_splits_are_disjoint(rng, name):
    train = open_dataset(name, resolution=(16, 24))
    test = open_dataset(name, resolution=(16, 24), evaluation=True, size=3)
    assert len(test) == 3
    assert len(train) == 2**24
    record = pickle.loads(pickle.dumps(test))[int(rng.integers(3))]
    for field, channels, dtype in (
        ("rgb", 3, np.uint8),
        ("depth", 1, np.float32),
        ("valid", 1, np.bool_),
        ("normals", 3, np.float32),
        ("instance", 1, np.int32),
        ("classes", 1, np.int32),
    ):
        assert record[field].shape == (16, 24, channels)
        assert record[field].dtype == dtype
    assert record["caption"]
    assert train[0]["name"] == "scene_0000000000"
    assert test[0]["name"] == f"scene_{2**30:010d}"
    assert (train[0]["rgb"] != test[0]["rgb"]).any()


def test_every_row_is_complete():
    for name, row in DATASETS.items():
        assert row.name == name
        assert row.licence
        assert row.splits
        assert row.provides <= {*TARGETS, "caption"}
        assert set(row.expected) | set(row.exact) <= set(row.splits)
        assert bool(row.layout) == (row.needs_data_dir and name != "tfds")
        assert len(row.class_names) == len(row.palette)
        assert bool(row.class_names) <= ("classes" in row.provides)
        assert all(max(pair) < len(row.keypoint_names) for pair in row.flip_pairs)
        assert row.alignment == "least_square"
        assert row.crop is None or row.crop in CROPS
        assert row.eval_crop is None or row.eval_crop in EVAL_CROPS
    assert datasets.TRAIN_SCENES.stop <= datasets.TEST_SCENES.start
    assert datasets.TEST_SCENES.stop < 2**31


def test_the_documentation_has_every_row():
    text = (Path(__file__).parents[1] / "docs/data.md").read_text()
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name, row in DATASETS.items():
        cells = [cell.strip() for cell in lines[name].split("|")[1:-1]]
        targets = re.sub(r" \(\d+\)| ?\+? ?caption", "", cells[1])
        assert tuple(filter(None, targets.split(", "))) == row.targets
        assert row.layout in cells[2]
        for split in row.splits:
            count = f" {row.expected[split]:,}" if split in row.expected else ""
            assert split + count in cells[4].split(", ")
        assert cells[5] == row.licence


# ---- the real data, where this machine has it ----------------------------------------------------

data_root = os.environ.get("JAXPERCEPT_DATA", "")
needs_data = pytest.mark.skipif(not data_root, reason="JAXPERCEPT_DATA names no data folder")


@needs_data
def test_real_nyuv2(rng):
    train = open_dataset("nyuv2", data_dir=f"{data_root}/nyuv2", split="train")
    test = open_dataset("nyuv2", data_dir=f"{data_root}/nyuv2", evaluation=True)
    assert (len(train), len(test)) == (795, 654)
    assert not set(train.source.names) & set(test.source.names)
    record = train[int(rng.integers(795))]
    assert record["rgb"].shape == (240, 320, 3)
    assert record["valid"].mean() > 0.9
    assert 0.3 < np.median(record["depth"][record["valid"]]) < 9
    assert test[0]["valid"].sum() <= 213 * 280


@needs_data
def test_real_tiny_imagenet(rng):
    train = open_dataset("tiny_imagenet", data_dir=f"{data_root}/tiny_imagenet")
    test = open_dataset("tiny_imagenet", data_dir=f"{data_root}/tiny_imagenet", split="test")
    assert (len(train), len(test)) == (24000, 1000)
    assert not set(train.source.names) & set(test.source.names)
    record = train[int(rng.integers(24000))]
    assert record["rgb"].shape == (64, 64, 3)
    assert record["caption"].startswith(("a photo of a ", "a photo of an "))
    held_out_classes = {member.split("/")[0] for member in test.source.names}
    assert len(held_out_classes) == 200


@needs_data
def test_real_folder():
    records = open_dataset("folder", data_dir=f"{data_root}/tum_cabinet")
    assert len(records) == 58
    assert 0.5 < np.median(records[0]["depth"][records[0]["valid"]]) < 5
