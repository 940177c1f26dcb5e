"""Cityscapes' disparity, KITTI's calibrations, ETH3D's archives, and cameras in general."""

import json
import math

import numpy as np
import pytest
from layout_cases import CASES, write_copy
from PIL import Image
from preparing import assert_same_records
from raw_copies import write_cityscapes, write_kitti_calibration

from jaxpercept.data.cameras import Camera, read_cityscapes, read_kitti, read_matrix, read_taskonomy
from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.palettes import CITYSCAPES_IDS
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.errors import UserError
from jaxpercept.preparation.pipeline import prepare


def stereo_depth(p, baseline, fx):
    """The published rule for one stored number, in Python's floats; 0 where there is no depth."""
    if p == 0:
        return 0.0
    disparity = (float(p) - 1.0) / 256.0
    return baseline * fx / disparity if disparity > 0 else 0.0


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_depth_of_cityscapes_is_that_of_its_disparity(tmp_path, rng, split):
    made = write_cityscapes(tmp_path, rng)
    records = open_dataset("cityscapes", data_dir=tmp_path, split=split, targets=["depth"])
    assert len(records) == 2
    for index in range(2):
        record = records[index]
        rgb, stored, camera = made[record["name"]]
        fx, baseline = camera["intrinsic"]["fx"], camera["extrinsic"]["baseline"]
        metres = np.vectorize(stereo_depth)(stored, baseline, fx)
        expected = np.where(metres < 80, metres, 0)
        np.testing.assert_array_equal(record["rgb"], rgb)
        np.testing.assert_allclose(record["depth"][..., 0], expected, rtol=1e-6)
        np.testing.assert_array_equal(record["valid"][..., 0], expected > 0)
        assert record["valid"][0, :6, 0].tolist() == [False] * 5 + [True]  # 93 m lie beyond 80
        np.testing.assert_allclose(record["intrinsics"][[0, 2, 3]], [fx, 1097.48, 513.637])
    far = open_dataset("cityscapes", data_dir=tmp_path, split=split, targets=["depth"],
                       max_depth=1e6)  # fmt: skip
    assert far[0]["valid"][0, :6, 0].tolist() == [False] * 3 + [True] * 3


def test_depth_and_classes_of_cityscapes(tmp_path, rng):
    made = write_cityscapes(tmp_path / "raw", rng, splits=("train", "val"))
    for name in made:
        path = tmp_path / "raw" / name.replace("leftImg8bit/", "gtFine/", 1)
        path = path.with_name(path.name.replace("leftImg8bit", "gtFine_labelIds"))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.choice(np.array([0, *CITYSCAPES_IDS], np.uint8), (16, 32))).save(path)
    folder = prepare("cityscapes", tmp_path / "raw", tmp_path / "to")
    header = json.loads((folder / "metadata.json").read_text())
    assert header["row"]["depth_scale"] == 1.0
    assert header["fields"]["depth"] == "float32"
    for targets in (["depth"], ["classes"], ["depth", "classes"]):
        raw, found = (
            open_dataset("cityscapes", split="val", data_dir=tmp_path / name, targets=targets)
            for name in ("raw", "to")
        )
        assert_same_records(found, raw)
    assert open_dataset("cityscapes", data_dir=tmp_path / "raw", split="val").targets == ("depth",)


def test_what_disparity_needs_is_named(tmp_path, rng):
    write_cityscapes(tmp_path, rng)
    opened = {"data_dir": tmp_path, "split": "train", "targets": ["depth"]}
    path = tmp_path / "camera/train/aachen/aachen_000000_000019_camera.json"
    for text in ("{}", "no", '{"extrinsic": {"baseline": "wide"}, "intrinsic": {"fx": 3}}'):
        path.write_text(text)
        with pytest.raises(UnreadableFileError, match=r"aachen_000000_000019_camera\.json"):
            open_dataset("cityscapes", **opened)[0]
    path.unlink()
    with pytest.raises(UserError, match="has no intrinsics: camera/train/aachen/aachen_000000_0"):
        open_dataset("cityscapes", **opened)
    with pytest.raises(UserError, match="no split 'train' of cityscapes with classes; expected"):
        open_dataset("cityscapes", **opened | {"targets": ["classes"]})


def test_units_follow_the_layout(tmp_path, rng):
    """The lists of GenPercept count 300 to the metre; a user's own number always wins."""
    write_cityscapes(tmp_path, rng)
    (tmp_path / "depth.png").parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((16, 32), 600, np.uint16)).save(tmp_path / "depth.png")
    image = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    (tmp_path / "mine.txt").write_text(f"{image} depth.png\n")
    opened = {"data_dir": tmp_path, "split": "train", "targets": ["depth"]}
    listed = open_dataset("cityscapes", list_file="mine.txt", **opened)
    assert listed[0]["depth"].max() == 2
    raw = open_dataset("cityscapes", **opened)[0]["depth"]
    half = open_dataset("cityscapes", depth_scale=2.0, **opened)[0]["depth"]
    near = raw > 0
    np.testing.assert_allclose(half[near], raw[near] / 2, rtol=1e-6)
    (tmp_path / "train.txt").write_text(f"{image} depth.png\n")
    with pytest.raises(UserError, match=r"and test of cityscapes .* depth_scale 300\.0 and 1\.0"):
        prepare("cityscapes", tmp_path, tmp_path / "to", targets=["depth"])
    prepare("cityscapes", tmp_path, tmp_path / "to", targets=["depth"], splits=["val"])


# ---- KITTI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.dataset.startswith("kitti")], ids=str)
def test_calibrations_of_kitti(tmp_path, rng, case):
    """Where they are, and cut with the image."""
    case = type(case)(**vars(case) | {"size": (370, 1226), "options": {}, "count": 1})
    write_copy(tmp_path, case, rng)
    opened = {"split": case.split, "data_dir": tmp_path}
    if case.split == "selection":
        path = tmp_path / case.rgb.format(i=0).replace("/image/", "/intrinsics/")
        path.parent.mkdir()
        path.with_suffix(".txt").write_text(
            "721.5377 0.0 596.5593 0.0 721.5377 149.854 0.0 0.0 1.0\n"
        )
        expected = [721.5377, 721.5377, 597.0593 - 5, 150.354 - 18]
    else:
        assert "intrinsics" not in open_dataset(case.dataset, **opened)[0]
        date = next(part for part in case.rgb.split("/") if part[:4] == "2011")[:10]
        write_kitti_calibration(tmp_path / date / "calib_cam_to_cam.txt")
        expected = [721.5377, 721.5377, 610.0593 - 5, 173.354 - 18]
    record = open_dataset(case.dataset, **opened)[0]
    assert record["rgb"].shape == (352, 1216, 3)  # 18 rows are above it, 5 columns beside it
    np.testing.assert_allclose(record["intrinsics"], expected, rtol=1e-5)


def test_frames_that_nobody_annotated_are_left_out(tmp_path, rng):
    (case,) = [c for c in CASES if (c.dataset, c.split) == ("kitti", "train")]
    write_copy(tmp_path, case, rng)
    (tmp_path / case.files["depth"].format(i=1)).unlink()
    records = open_dataset("kitti", data_dir=tmp_path, crop=None)
    assert records.source.names == [case.rgb.format(i=0), case.rgb.format(i=2)]
    (tmp_path / case.rgb.format(i=2)).unlink()
    with pytest.raises(UserError, match=r"has no rgb: .*image_03/data/0000000112\.\*"):
        open_dataset("kitti", data_dir=tmp_path)


# ---- cameras -------------------------------------------------------------------------------------


def test_the_field_of_view_of_taskonomy(tmp_path, rng):
    (tmp_path / "a.json").write_text(
        json.dumps({"field_of_view_rads": math.radians(90), "resolution": 512})
    )
    np.testing.assert_allclose(read_taskonomy(tmp_path / "a.json"), [256, 256, 256, 256], rtol=1e-6)
    for case in [c for c in CASES if c.dataset == "taskonomy" and not c.list_file]:
        folder = tmp_path / case.rgb.replace("/", "_")
        write_copy(folder, case, rng, count=1)
        assert "intrinsics" not in open_dataset("taskonomy", data_dir=folder)[0]
        path = case.files["depth"].format(i=0).replace("depth_zbuffer", "point_info")
        path = folder / path.replace("_domain_point_info.png", "_domain_fixatedpose.json")
        path.parent.mkdir(parents=True)
        path.write_text((tmp_path / "a.json").read_text())
        record = open_dataset("taskonomy", data_dir=folder)[0]
        np.testing.assert_allclose(record["intrinsics"], [256] * 4, rtol=1e-6)


def test_a_camera_that_all_pictures_share():
    camera = Camera(518.9, 519.5, 325.1, 253.2, 480, 640)
    np.testing.assert_allclose(camera.at((240, 320, 3)), [259.45, 259.75, 162.55, 126.6], rtol=1e-6)
    assert camera.at((426, 560, 3)) is None  # a part
    assert camera.at((352, 1216, 3)) is None
    assert {name for name, row in DATASETS.items() if row.camera} == {
        "nyuv2", "nyuv2_13", "vkitti", "diode",
    }  # fmt: skip
    for row in DATASETS.values():
        if row.camera:
            assert abs(row.camera.cx / row.camera.width - 0.5) < 0.03
            assert abs(row.camera.cy / row.camera.height - 0.5) < 0.03


def test_the_shared_camera_is_cut_with_the_image(tmp_path, rng):
    case = next(c for c in CASES if c.dataset == "vkitti" and c.split == "train")
    case = type(case)(**vars(case) | {"size": (375, 1242)})
    write_copy(tmp_path, case, rng, count=1)
    whole, cut = (open_dataset("vkitti", data_dir=tmp_path, **o)[0] for o in ({"crop": None}, {}))
    # 725.0087 and (620.5, 187), which count from the middle of the first pixel.
    np.testing.assert_allclose(whole["intrinsics"], [725.0087, 725.0087, 621, 187.5])
    np.testing.assert_allclose(cut["intrinsics"], [725.0087, 725.0087, 621 - 13, 187.5 - 23])
    classes = open_dataset("vkitti", data_dir=tmp_path, targets=["classes"])[0]
    assert "intrinsics" not in classes
    prepare("vkitti", tmp_path, tmp_path / "to", targets=["depth"])
    prepared = open_dataset("vkitti", data_dir=tmp_path / "to")
    np.testing.assert_array_equal(prepared[0]["intrinsics"], cut["intrinsics"])
    assert prepared.dataset.camera == DATASETS["vkitti"].camera


@pytest.mark.parametrize("reader", [read_cityscapes, read_kitti, read_matrix, read_taskonomy])
@pytest.mark.parametrize("text", ["", "{}", "1 2 3", "0 " * 9, "P_rect_02: nan 0 0 0 0 0 0 0 0"])
def test_files_that_say_nothing_of_a_camera(tmp_path, reader, text):
    (tmp_path / "camera").write_text(text)
    with pytest.raises(UnreadableFileError, match="camera"):
        reader(tmp_path / "camera")
