"""Every layout of every dataset, on a miniature copy with the published names and encodings."""

import ast
import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from layout_cases import (
    CASES,
    SIZE,
    Case,
    dis,
    make_example,
    vkitti,
    write_copy,
    write_example,
)
from PIL import Image

from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.layouts import NoLayoutError
from jaxpercept.data.listings import Lists
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.data.scannet_sens import SensFiles
from jaxpercept.errors import UserError

# ---- reading -------------------------------------------------------------------------------------


def close_normals(path):
    return {".png": 0.012}.get(Path(path).suffix, 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_miniature_copy(tmp_path, rng, case):
    examples = write_copy(tmp_path, case, rng)
    records = open_dataset(
        case.dataset, split=case.split, data_dir=tmp_path, targets=case.targets, **case.options
    )
    assert records.targets == case.targets
    assert records.split == case.split
    names = {Path(name).with_suffix("") for name in examples}
    found = [records[i] for i in range(len(records))]
    if case.dataset == "folder":
        names = {name.relative_to("rgb") for name in names}
    assert {Path(record["name"]).with_suffix("") for record in found} == names
    for record, example in zip(found, examples.values(), strict=True):
        check(record, example, case)


def check(record, example, case):
    np.testing.assert_array_equal(record["rgb"], example["rgb"])
    valid = np.ones((*SIZE, 1), bool)
    deep = np.ones_like(valid)
    for mask in ("mask", "mask_transparent"):
        if mask in case.files:
            deep &= example[mask]
    if "depth" in case.files:
        expected = np.where(deep, example["depth"], 0)
        np.testing.assert_allclose(record["depth"], expected, rtol=1e-6)
        assert record["depth"].dtype == np.float32
        valid &= deep
    if "normals" in case.files:
        normals = example["normals"]
        if DATASETS[case.dataset].depth_masks_normals and "depth" in case.files:
            normals = np.where(deep, normals, 0)
        tolerance = close_normals(case.files["normals"])
        np.testing.assert_allclose(record["normals"], normals, atol=tolerance)
        length = np.linalg.norm(record["normals"], axis=-1)
        there = normals.any(-1)
        np.testing.assert_allclose(length, there, atol=1e-6)
        valid &= there[..., None]
    if "alpha" in case.files:
        np.testing.assert_array_equal(record["alpha"], example["alpha"])
        assert ("trimap" in record) == ("trimap" in case.files)
    if "trimap" in case.files:
        np.testing.assert_array_equal(record["trimap"], example["trimap"])
    if "classes" in case.files:
        np.testing.assert_array_equal(record["classes"], example["classes"])
        assert record["classes"].dtype == np.int32
        valid &= example["classes"] != 255
    np.testing.assert_array_equal(record["valid"], valid)
    known = {"name", "rgb", "valid", "trimap", "unmasked_depth", "labels", *case.targets}
    assert record.keys() <= known


def test_every_layout_has_its_case():
    """Each layout of each row, and each target of it, is opened by a case above."""
    tested = {}
    for case in CASES:
        tested.setdefault(case.dataset, set()).update(case.targets)
    missing = {
        name: set(row.targets) - tested.get(name, set())
        for name, row in DATASETS.items()
        if row.needs_data_dir
        and name not in ("tfds", "coco_keypoints", "eth3d", "tiny_imagenet")
        and not row.provides <= {"referred", "instances", "caption"}
    }
    # Containers have tests of their own. Normals of Virtual KITTI are one's own; the others are
    # read as their neighbours are.
    allowed = {
        "hypersim": {"classes"},
        "nyuv2": {"instances"},
        "list": {"normals", "classes"},
        "vkitti": {"normals"},
        "nyuv2_13": {"depth", "normals", "instances"},
    }
    assert all(left <= allowed.get(name, set()) for name, left in missing.items()), missing


def test_all_te_splits_of_dis5k_together(tmp_path, rng):
    for part in ("1", "2", "3", "4"):
        write_copy(tmp_path, dis("test", f"DIS-TE{part}"), rng, count=2)
    assert len(open_dataset("dis5k", data_dir=tmp_path, split="test")) == 8
    assert len(open_dataset("dis5k", data_dir=tmp_path, split="te3")) == 2


def test_vkitti_takes_the_six_conditions_of_its_splits(tmp_path, rng):
    for scene, condition in (("02", "clone"), ("18", "fog"), ("01", "rain"), ("06", "30-deg-left")):
        write_copy(tmp_path, vkitti("train", scene, condition, "", "", ""), rng, count=2)
    names = open_dataset("vkitti", data_dir=tmp_path, targets=["depth"]).source.names
    assert names == [f"Scene02/clone/frames/rgb/Camera_{i}/rgb_0000{i}.jpg" for i in (0, 1)]


def test_vkitti_normals_computed_by_oneself(tmp_path, rng):
    case = dataclasses.replace(
        vkitti("train", "02", "clone", "rgb/", "depth/", "unused/"),
        files={
            "depth": "depth/Scene02/clone/frames/depth/Camera_{i}/depth_0000{i}.png",
            "normals": "normal/Scene02/clone/frames/normal/Camera_{i}/normal_0000{i}.png",
        },
        axes="right_down_front",
    )
    example = write_copy(tmp_path, case, rng, count=1)[case.rgb.format(i=0)]
    options = {"data_dir": tmp_path, "crop": None, "normals_axes": "right_down_front"}
    record = open_dataset("vkitti", targets=["normals"], max_depth=5.0, **options)[0]
    near = example["depth"] < 5
    np.testing.assert_allclose(record["normals"], example["normals"] * near, atol=0.012)
    np.testing.assert_array_equal(record["valid"], near & example["normals"].any(-1, keepdims=True))
    assert "depth" not in record


@pytest.mark.parametrize("listed", [True, False])
def test_eth3d_has_raw_depth_of_one_size(tmp_path, rng, listed):
    """Little-endian float32 metres, rows first, inf where nothing was measured."""
    rgb = "playground/images/dslr_images/DSC_0581.JPG"
    raw = "playground/ground_truth_depth/dslr_images/DSC_0581.JPG"
    if listed:
        rgb, raw = f"rgb/{rgb}", f"depth/playground_dslr_depth/{raw}"
    for path in (rgb, raw):
        (tmp_path / path).parent.mkdir(parents=True)
    Image.new("RGB", (6048, 4032), (10, 200, 30)).save(tmp_path / rgb, "png")
    depth = np.full((4032, 6048), np.inf, np.float32)
    measured = slice(1000, 1100), slice(4500, 4700)
    depth[measured] = rng.uniform(1e-4, 200, (100, 200))
    depth[1000, 4500:4503] = (0, 1e-5, 1e-6)  # not above the least that counts
    depth.astype("<f4").tofile(tmp_path / raw)
    if listed:
        (tmp_path / "eth3d_filename_list.txt").write_text(f"{rgb} {raw}\n")
    records = open_dataset("eth3d", data_dir=tmp_path, evaluation=True)
    record = records[0]
    assert record["rgb"].shape == (4032, 6048, 3)
    assert record["valid"].sum() == 100 * 200 - 3
    found = record["depth"][measured][..., 0]
    np.testing.assert_array_equal(found[1:], depth[measured][1:])
    np.testing.assert_array_equal(found[0, 3:], depth[measured][0, 3:])
    assert not found[0, :3].any()
    assert record["depth"].sum(dtype=np.float64) == found.sum(dtype=np.float64)
    with (tmp_path / raw).open("ab") as file:
        file.write(b"0000")
    with pytest.raises(UnreadableFileError, match="DSC_0581"):
        records[0]


def test_kitti_eigen_test_is_cropped_and_evaluated_in_eigens_part_of_the_crop(tmp_path, rng):
    case = Case("kitti_eigen", "test", "2011_09_26/image_02/data/000000006{i}.png",
                {"depth": "groundtruth/image_02/000000006{i}.png"}, scale=256,
                size=(375, 1242))  # fmt: skip
    example = make_example(rng, case)
    example["depth"][200, 500:503] = np.array([[0], [80], [1 / 256]])
    write_example(tmp_path, case, 0, example)
    paths = case.rgb.format(i=0), case.files["depth"].format(i=0)
    line, without = f"{paths[0]} {paths[1]} 721.5377\n", f"{paths[0]} None 721.5377\n"
    (tmp_path / "eigen_test_files_with_gt.txt").write_text(line * 652 + without * 45)
    records = open_dataset("kitti_eigen", data_dir=tmp_path, evaluation=True)
    assert (len(records), records.split) == (652, "test")
    crop = {key: example[key][23:375, 13:1229] for key in ("rgb", "depth")}  # the lowest 352 rows
    crop["depth"] = np.where(crop["depth"] < 80, crop["depth"], 0)
    np.testing.assert_array_equal(records[0]["rgb"], crop["rgb"])
    np.testing.assert_array_equal(records[0]["depth"], crop["depth"])
    inside = np.zeros((352, 1216, 1), bool)
    inside[117:321, 43:1172] = True
    np.testing.assert_array_equal(records[0]["valid"], inside & (crop["depth"] > 0))
    assert records[0]["valid"].sum() == 204 * 1129 - 2


def test_labels_that_count_from_one(tmp_path, rng):
    case = next(c for c in CASES if str(c).startswith("nyuv2-train"))
    case = dataclasses.replace(case, ids=tuple(range(1, 41)))
    examples = write_copy(tmp_path, case, rng)
    records = open_dataset("nyuv2", data_dir=tmp_path, targets=["classes"], first_class=1)
    for record, example in zip(records, examples.values(), strict=True):
        np.testing.assert_array_equal(record["classes"], example["classes"])


# ---- what does not match -------------------------------------------------------------------------


def test_a_folder_of_something_else_is_told_what_was_expected(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    for name, row in DATASETS.items():
        if name in ("tfds", "folder", "list", "coco_keypoints", "tiny_imagenet"):
            continue
        if row.needs_data_dir:
            with pytest.raises(NoLayoutError) as error:
                open_dataset(name, data_dir=tmp_path, targets=row.targets[:1])
            assert f"of {name} with {row.targets[0]}; expected {row.layout}" in str(error.value)


def test_what_was_expected_names_every_list():
    for name, row in DATASETS.items():
        said = re.sub(
            r"(\w*)\{(\S+?)\}([\w.]*)",
            lambda m: " ".join(f"{m[1]}{part}{m[3]}" for part in m[2].split(",")),
            row.layout,
        )
        for layout in row.layouts:
            for file in layout.splits.values() if isinstance(layout, Lists | SensFiles) else ():
                assert re.search(rf"\b{re.escape(file)}", said), (name, file)


@pytest.mark.parametrize("name", ["camvid-test-classes-test", "dis5k-train-alpha-DIS-TR",
                                  "hypersim-train-depth-normals-ai_001_00{i}"])  # fmt: skip
def test_a_missing_file_names_itself(tmp_path, rng, name):
    case = next(case for case in CASES if str(case) == name)
    write_copy(tmp_path, case, rng)
    target = case.targets[-1]
    lost = case.files[target].format(i=2)
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match=f"has no {target}: {lost} is not in") as error:
        open_dataset(case.dataset, split=case.split, data_dir=tmp_path, targets=case.targets)

    assert not isinstance(error.value, NoLayoutError)


def test_a_target_that_this_copy_lacks(tmp_path, rng):
    case = next(c for c in CASES if c.list_file == "vkitti_val.txt")
    write_copy(tmp_path, case, rng)
    with pytest.raises(UserError, match="no split 'val' of vkitti with classes; expected"):
        open_dataset("vkitti", data_dir=tmp_path, split="val", targets=["classes"])
    with pytest.raises(UserError, match="Dataset camvid has no normals; it has classes"):
        open_dataset("camvid", data_dir=tmp_path, targets=["normals"])
    with pytest.raises(UserError, match="Unknown target 'flow'; known are depth"):
        open_dataset("camvid", data_dir=tmp_path, targets=["flow"])
    with pytest.raises(UserError, match="not read from lists with classes; leave list_file"):
        open_dataset("camvid", data_dir=tmp_path, list_file="vkitti_val.txt")
    with pytest.raises(UserError, match="columns 'rgb depth' of dataset list have no alpha"):
        open_dataset("list", data_dir=tmp_path, targets=["alpha"])
    with pytest.raises(UserError, match="Unknown normals_axes 'up'; known are right_up_back"):
        open_dataset("vkitti", data_dir=tmp_path, split="val", normals_axes="up")
    with pytest.raises(UserError, match="first_class must be a number"):
        open_dataset("vkitti", data_dir=tmp_path, split="val", first_class=-1)


def test_json_lines_that_lack_something(tmp_path, rng):
    case = next(c for c in CASES if c.dataset == "genpercept" and "alpha" in c.files)
    write_copy(tmp_path, case, rng)
    with pytest.raises(UserError, match=r"Object 1 of .*a\.jsonl has no normal_conditioning_image"):
        open_dataset("genpercept", data_dir=tmp_path, targets=["normals"])
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in "ab":
        (tmp_path / f"{name}.jsonl").rename(lists / f"{name}.jsonl")
    with pytest.raises(UserError, match="no split 'all' of genpercept with alpha; expected"):
        open_dataset("genpercept", data_dir=tmp_path, targets=["alpha"])
    for list_file, count in (("lists", 3), ("lists/b.jsonl", 2)):
        options = {"data_dir": tmp_path, "targets": ["alpha"], "list_file": list_file}
        assert len(open_dataset("genpercept", **options)) == count
    (tmp_path / "mask/2.png").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl names mask/2\.png, which is not in"):
        open_dataset("genpercept", data_dir=tmp_path, targets=["alpha"], list_file="lists")
    for text in ("not json\n", "[1]\n"):
        (lists / "b.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"b\.jsonl"):
            open_dataset("genpercept", data_dir=tmp_path, targets=["alpha"], list_file="lists")


def test_dis_masks_count_as_alpha_in_json_lines(tmp_path, rng):
    case = next(c for c in CASES if c.dataset == "genpercept" and "alpha" in c.files)
    examples = list(write_copy(tmp_path, case, rng).values())
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text().replace("matting_", "dis_"))
    record = open_dataset("genpercept", data_dir=tmp_path, targets=["alpha"])[0]
    np.testing.assert_array_equal(record["alpha"], examples[0]["alpha"])


# ---- how many there must be ----------------------------------------------------------------------


def write_kitti(folder, images, lines):
    for path in ("a.png", "b.png"):
        (folder / path).touch()
    text = "a.png b.png 721.5\n" * images + "a.png None 721.5\n" * (lines - images)
    (folder / "eigen_test_files_with_gt.txt").write_text(text)


def test_kitti_eigen_is_652_images_or_nothing(tmp_path):
    write_kitti(tmp_path, 652, 697)
    assert len(open_dataset("kitti_eigen", data_dir=tmp_path, evaluation=True)) == 652
    for images, lines in ((697, 697), (651, 697), (653, 653)):
        write_kitti(tmp_path, images, lines)
        with pytest.raises(UserError, match=f"is 652 images, this list names {images}"):
            open_dataset("kitti_eigen", data_dir=tmp_path, evaluation=True)
        assert len(open_dataset("kitti_eigen", data_dir=tmp_path, split="test")) == images
    (tmp_path / "mine.txt").write_text("a.png b.png\n")
    with pytest.raises(UserError, match=r"--dataset=list --options=list_file=FILE,crop=kitti_be"):
        open_dataset("kitti_eigen", data_dir=tmp_path, evaluation=True, list_file="mine.txt")


def test_other_counts_are_told_both_numbers(tmp_path, rng, caplog):
    case = next(c for c in CASES if str(c).startswith("camvid"))
    write_copy(tmp_path, case, rng)
    with caplog.at_level(logging.WARNING):
        open_dataset("camvid", data_dir=tmp_path, split="test")
        assert not caplog.messages
        open_dataset("camvid", data_dir=tmp_path, evaluation=True)
    assert "3 examples here and 233 as published" in caplog.text


def test_counts_follow_the_list_that_is_read(tmp_path, rng):
    row = DATASETS["scannet"]
    assert row.expected == {"test": 800}
    expected = {layout.expected["test"] for layout in row.layouts}
    assert expected == {800, 300}
    assert DATASETS["kitti_eigen"].expected["test"] == 652


def test_names_of_a_list_have_a_hash(tmp_path, rng):
    case = next(c for c in CASES if str(c).startswith("scannet"))
    write_copy(tmp_path, case, rng)
    first = open_dataset("scannet", data_dir=tmp_path, split="test").names_sha256()
    path = tmp_path / case.list_file
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[::-1]))
    assert open_dataset("scannet", data_dir=tmp_path, split="test").names_sha256() != first
    path.write_text("\n\n".join(lines))
    assert open_dataset("scannet", data_dir=tmp_path, split="test").names_sha256() == first
    with pytest.raises(UserError, match="come from no list"):
        open_dataset("scenes").names_sha256()


# ---- a new row -----------------------------------------------------------------------------------


def test_the_row_of_the_documentation_works(tmp_path, rng, monkeypatch):
    text = (Path(__file__).parents[1] / "docs/data.md").read_text()
    (code,) = (block for block in text.split("```python")[1:] if "my_mattes" in block)
    *imports, expression = ast.parse(code.split("```")[0]).body
    names = {}
    exec(compile(ast.Module(imports, []), "data.md", "exec"), names)
    row = eval(compile(ast.Expression(expression.value), "data.md", "eval"), names)
    monkeypatch.setitem(DATASETS, "my_mattes", row)
    case = Case("my_mattes", "test", "test/photo/{i}.jpg", {"alpha": "test/matte/{i}.png",
                "trimap": "test/trimap/{i}.png"})  # fmt: skip
    examples = write_copy(tmp_path, case, rng)
    records = open_dataset("my_mattes", data_dir=tmp_path, split="test")
    for record, example in zip(records, examples.values(), strict=True):
        check(record, example, case)
    with pytest.raises(UserError, match="expected train/ and test/ with photo/"):
        open_dataset("my_mattes", data_dir=tmp_path)


# ---- unwanted files ------------------------------------------------------------------------------


def test_files_of_unwanted_targets_are_not_opened(tmp_path, rng):
    case = next(c for c in CASES if c.dataset == "nyuv2" and len(c.targets) == 2)
    examples = list(write_copy(tmp_path, case, rng).values())
    for path in (tmp_path / "depth").iterdir():
        path.unlink()
    records = open_dataset("nyuv2", data_dir=tmp_path, targets=["classes"])
    np.testing.assert_array_equal(records[0]["valid"], examples[0]["classes"] != 255)
    images = open_dataset("nyuv2", data_dir=tmp_path, targets=[])
    assert images[0]["valid"].all()
    assert images[0].keys() == {"name", "rgb", "valid"}
    with pytest.raises(UserError, match=r"names depth/0000\.png"):
        open_dataset("nyuv2", data_dir=tmp_path)
