"""Miniature copies of data sets, in every layout they are published in."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxpercept.data.palettes import CITYSCAPES_IDS, NYU40_TO_13, PALETTES
from jaxpercept.data.readers import AXES
from jaxpercept.data.row import TARGETS

SIZE = (10, 14)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout: where the fields of example i lie (`{i}`), and how they are written.

    Attributes:
      list_file: the list that names the `columns` of all examples, if there is one.
      scale: units of depth files per metre.
      axes: of stored normals.
      ids: number in the file of every class, or the colour of every class.
      prefix, suffix: of every path and of every line in the list.
      strip: what the list leaves out of paths.
      count: how many examples are written.
      size: (height, width) of the files.
    """

    dataset: str
    split: str
    rgb: str
    files: dict[str, str]
    list_file: str = ""
    columns: tuple[str, ...] = ("rgb", "depth")
    prefix: str = ""
    suffix: str = ""
    strip: str = ""
    scale: float = 1000.0
    axes: str = "right_up_back"
    ids: tuple = tuple(range(40))
    options: dict = dataclasses.field(default_factory=dict)
    count: int = 3
    size: tuple = SIZE

    @property
    def targets(self):
        return tuple(target for target in TARGETS if target in self.files)

    def __str__(self):
        return f"{self.dataset}-{self.split}-{'-'.join(self.targets)}-{self.rgb.split('/')[0]}"


MARIGOLD = {"axes": "right_up_back", "columns": ("rgb", "normals")}
DSINE = {"axes": "left_up_back"}
NO_CROP = {"options": {"crop": None}}
VKITTI = "Scene{scene}/{condition}/frames/"


def vkitti(split, scene, condition, rgb, depth, classes):
    at = VKITTI.format(scene=scene, condition=condition)
    return Case(
        "vkitti", split, rgb + at + "rgb/Camera_{i}/rgb_0000{i}.jpg",
        {"depth": depth + at + "depth/Camera_{i}/depth_0000{i}.png",
         "classes": classes + at + "classSegmentation/Camera_{i}/classgt_0000{i}.png"},
        scale=100, ids=PALETTES["vkitti"].colours, count=2, **NO_CROP,
    )  # fmt: skip


def dis(split, folder, root=""):
    return Case("dis5k", split, root + folder + "/im/1#Accessories#{i}.jpg",
                {"alpha": root + folder + "/gt/1#Accessories#{i}.png"})  # fmt: skip


CASES = [
    Case("list", "train", "a/{i}.png", {"depth": "b/{i}.png", "alpha": "c/{i}.png"}, "train.txt",
         ("depth", "skipped", "alpha", "rgb"), options={"columns": "depth - alpha rgb"}),
    Case("folder", "all", "rgb/x/{i}.jpg",
         {"depth": "depth/x/{i}.npy", "normals": "normals/x/{i}.png",
         "alpha": "alpha/x/{i}.png", "trimap": "trimap/x/{i}.png", "classes": "classes/x/{i}.png"}),
    Case("genpercept", "all", "hypersim/rgb_{i}.jpg", {"depth": "d/{i}.exr", "normals": "n/{i}.exr",
         "classes": "s/{i}.png"}, ids=PALETTES["nyu40"].colours),
    Case("genpercept", "all", "train/{i}.jpg", {"alpha": "mask/{i}.png"}),
    Case("genpercept", "all", "normals/{i}.jpg", {"normals": "normals/{i}.npy"}),
    Case("nyuv2", "train", "rgb/000{i}.jpg", {"depth": "depth/000{i}.png",
         "classes": "labels40/000{i}.png"}, "train.txt", ("rgb", "depth", "classes", "scene")),
    Case("nyuv2_13", "test", "rgb/000{i}.jpg", {"classes": "labels40/000{i}.png"}, "test.txt",
         ("rgb", "depth", "classes", "scene"), ids=tuple(NYU40_TO_13.index(c) for c in range(13))),
    Case("nyuv2", "test", "test/bathroom/rgb_004{i}.png",
         {"depth": "test/bathroom/depth_004{i}.png"},
         "filename_list_test.txt", ("rgb", "depth", "filled")),
    Case("nyuv2", "test", "bathroom/rgb_0004{i}.jpg",
         {"depth": "bathroom/sync_depth_0004{i}.png"}, "nyudepthv2_test_files_with_gt.txt",
         prefix="/", suffix=" 518.8579"),
    Case("nyuv2", "test", "00000{i}_img.png", {"normals": "00000{i}_normal.npy"}, "nyuv2_test.txt",
         **MARIGOLD),
    Case("nyuv2", "test", "test/00000{i}_img.png", {"normals": "test/00000{i}_normal.png"},
         **DSINE),
    Case("hypersim", "train", "ai_001_00{i}/rgb_cam_00_fr0004.png",
         {"depth": "ai_001_00{i}/depth_plane_cam_00_fr0004.png",
          "normals": "ai_001_00{i}/normal_cam_cam_00_fr0004.npy"},
         "filename_list_train_filtered.txt"),
    Case("hypersim", "train", "without_depth/rgb_cam_01_fr003{i}.png",
         {"normals": "without_depth/normal_cam_cam_01_fr003{i}.npy"},
         "filename_list_train_filtered.txt", ("rgb",)),
    Case("hypersim", "train", "val/ai_038_009/rgb_cam_01_fr003{i}.png",
         {"normals": "val/ai_038_009/normal_cam_cam_01_fr003{i}.npy"}, "hypersim_filtered_all.txt",
         **MARIGOLD),
    Case("vkitti", "val", "rgb/Scene01/clone/frames/rgb/Camera_0/rgb_0000{i}.jpg",
         {"depth": "depth/Scene01/clone/frames/depth/Camera_0/depth_0000{i}.png"},
         "vkitti_val.txt", scale=100, **NO_CROP),
    vkitti("train", "02", "clone", "", "", ""),
    vkitti("train", "20", "15-deg-left", "rgb/", "depth/", "classSegmentation/"),
    vkitti("val", "01", "sunset", "vkitti_2.0.3_rgb/", "vkitti_2.0.3_depth/",
           "vkitti_2.0.3_classSegmentation/"),
    Case("taskonomy", "train", "rgb/p{i}.png", {"depth": "depth/p{i}.png"}, "train.txt", scale=512),
    Case("taskonomy", "train", "allensville_rgb/rgb/point_{i}_view_0_domain_rgb.png",
         {"depth": "allensville_depth_zbuffer/depth_zbuffer/"
                   "point_{i}_view_0_domain_depth_zbuffer.png"}, scale=512),
    Case("taskonomy", "train", "rgb/taskonomy/allensville/point_{i}_view_0_domain_rgb.png",
         {"depth": "depth_zbuffer/taskonomy/allensville/point_{i}_view_0_domain_depth_zbuffer.png"},
         scale=512),
    Case("kitti_eigen", "val",
         "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/000000006{i}.png",
         {"depth": "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/000000006{i}.png"},
         "eigen_val_from_train_800.txt", suffix=" 721.5377", scale=256, **NO_CROP),
    Case("kitti_eigen", "train",
         "2011_09_26/2011_09_26_drive_0057_sync/image_02/data/000000011{i}.png",
         {"depth": "train/2011_09_26_drive_0057_sync/proj_depth/groundtruth/image_02/"
                   "000000011{i}.png"},
         "eigen_train_files_with_gt.txt", suffix=" 721.5377", scale=256, strip="train/", **NO_CROP),
    Case("kitti", "train",
         "2011_09_26/2011_09_26_drive_0057_sync/image_03/data/000000011{i}.png",
         {"depth": "train/2011_09_26_drive_0057_sync/proj_depth/groundtruth/image_03/"
                   "000000011{i}.png"}, scale=256, **NO_CROP),
    Case("kitti", "val",
         "2011_10_03/2011_10_03_drive_0047_sync/image_02/data/000000011{i}.jpg",
         {"depth": "val/2011_10_03_drive_0047_sync/proj_depth/groundtruth/image_02/"
                   "000000011{i}.png"}, scale=256, **NO_CROP),
    Case("kitti", "selection",
         "depth_selection/val_selection_cropped/image/"
         "2011_09_26_drive_0002_sync_image_000000000{i}_image_02.png",
         {"depth": "depth_selection/val_selection_cropped/groundtruth_depth/"
                   "2011_09_26_drive_0002_sync_groundtruth_depth_000000000{i}_image_02.png"},
         scale=256, **NO_CROP),
    Case("scannet", "test", "scene0568_00/color/00010{i}.jpg",
         {"depth": "scene0568_00/depth/00010{i}.png"}, "scannet_val_sampled_list_800_1.txt"),
    Case("scannet", "test", "scene0806_00/00107{i}_img.png",
         {"normals": "scene0806_00/00107{i}_normal.npy"}, "scannet_test.txt", **MARIGOLD),
    Case("scannet", "test", "scene0806_00/00107{i}_img.png",
         {"normals": "scene0806_00/00107{i}_normal.png"}, **DSINE),
    Case("diode", "test", "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010.png",
         {"depth": "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010_depth.npy",
          "mask": "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010_depth_mask.npy",
          "normals": "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010_normal.npy"},
         "diode_val_all_filename_list.txt", ("rgb", "depth", "mask"), scale=1),
    Case("diode", "test", "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010.png",
         {"normals": "indoors/scene_00019/scan_00183/00019_00183_indoors_00{i}_010_normal.npy"},
         "diode_test.txt", **MARIGOLD),
    Case("diode", "train", "train/outdoor/scene_0000{i}/scan_00183/0_outdoor_000_010.png",
         {"depth": "train/outdoor/scene_0000{i}/scan_00183/0_outdoor_000_010_depth.npy",
          "mask": "train/outdoor/scene_0000{i}/scan_00183/0_outdoor_000_010_depth_mask.npy",
          "normals": "train/outdoor/scene_0000{i}/scan_00183/0_outdoor_000_010_normal.npy"},
         scale=1),
    Case("ibims1", "test", "rgb/corridor_0{i}.png",
         {"depth": "depth/corridor_0{i}.png", "mask": "mask_invalid/corridor_0{i}.png",
          "mask_transparent": "mask_transp/corridor_0{i}.png"}, scale=65535 / 50),
    Case("ibims1", "test", "corridor_0{i}_img.png", {"normals": "corridor_0{i}_normal.npy"},
         "ibims_test.txt", **MARIGOLD),
    Case("ibims1", "test", "corridor_0{i}_img.png", {"normals": "corridor_0{i}_normal.png"},
         **DSINE),
    Case("sintel", "all", "temple_2/frame_002{i}_img.png",
         {"normals": "temple_2/frame_002{i}_normal.npy"}, "sintel_filtered.txt", **MARIGOLD),
    Case("sintel", "all", "temple_2/frame_002{i}_img.png",
         {"normals": "temple_2/frame_002{i}_normal.exr"}, **DSINE),
    dis("train", "DIS-TR"), dis("val", "DIS-VD", "DIS5K/"), dis("te1", "DIS-TE1"),
    dis("te4", "DIS-TE4"), dis("test", "DIS-TE2"),
    Case("p3m10k", "train", "train/blurred_image/p_{i}.jpg", {"alpha": "train/mask/p_{i}.png"}),
    Case("p3m10k", "p", "validation/P3M-500-P/blurred_image/p_{i}.jpg",
         {"alpha": "validation/P3M-500-P/mask/p_{i}.png",
          "trimap": "validation/P3M-500-P/trimap/p_{i}.png"}),
    Case("p3m10k", "np", "P3M-10k/validation/P3M-500-NP/original_image/p_{i}.jpg",
         {"alpha": "P3M-10k/validation/P3M-500-NP/mask/p_{i}.png",
          "trimap": "P3M-10k/validation/P3M-500-NP/trimap/p_{i}.png"}),
    Case("aim500", "test", "original/o_{i}.jpg", {"alpha": "mask/o_{i}.png",
         "trimap": "trimap/o_{i}.png"}),
    Case("aim500", "test", "AIM-500/original/o_{i}.jpg", {"alpha": "AIM-500/mask/o_{i}.png",
         "trimap": "AIM-500/trimap/o_{i}.png"}),
    Case("alphamatting", "all", "image/GT0{i}.jpg", {"alpha": "alpha/GT0{i}.png",
         "trimap": "trimap/GT0{i}.png"}),
    Case("masks", "all", "image/10008{i}.jpg", {"alpha": "mask/10008{i}.png"}),
    Case("camvid", "test", "test/0001TP_00669{i}.png", {"classes": "testannot/0001TP_00669{i}.png"},
         ids=tuple(range(11))),
    Case("cityscapes", "train", "rgb/{i}.png", {"depth": "depth/{i}.png"}, "train.txt", scale=300),
    Case("cityscapes", "val", "leftImg8bit/val/ulm/ulm_00000{i}_000019_leftImg8bit.png",
         {"classes": "gtFine/val/ulm/ulm_00000{i}_000019_gtFine_labelIds.png"},
         ids=tuple(CITYSCAPES_IDS)),
    Case("ade20k", "val", "images/validation/ADE_val_0000000{i}.jpg",
         {"classes": "annotations/validation/ADE_val_0000000{i}.png"}, ids=tuple(range(1, 151))),
    Case("ade20k", "train", "ADEChallengeData2016/images/training/ADE_train_0000000{i}.jpg",
         {"classes": "ADEChallengeData2016/annotations/training/ADE_train_0000000{i}.png"},
         ids=tuple(range(1, 151))),
]  # fmt: skip


# ---- writing -------------------------------------------------------------------------------------


def make_example(rng, case):
    """The arrays that a record should hold."""
    size = case.size
    depth = np.rint(rng.uniform(0.7, 9.0, (*size, 1)) * case.scale) / np.float32(case.scale)
    normals = rng.standard_normal((*size, 3))
    normals[..., 2] = np.abs(normals[..., 2])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0, :3] = 0
    classes = rng.integers(0, len(case.ids), (*size, 1)).astype(np.int32)
    classes[-1, :3] = 255
    return {
        "rgb": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "depth": depth.astype(np.float32),
        "normals": normals.astype(np.float32),
        "alpha": rng.integers(0, 256, (*size, 1)).astype(np.float32) / np.float32(255),
        "trimap": rng.choice(np.array([0, 128, 255], np.uint8), (*size, 1)),
        "classes": classes,
        "mask": rng.random((*size, 1)) < 0.7,
        "mask_transparent": rng.random((*size, 1)) < 0.7,
    }


def write_example(folder, case, number, example):
    for field, template in {"rgb": case.rgb, **case.files}.items():
        path = folder / template.format(i=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = example[field]
        if field == "depth":
            write_depth(path, array, case.scale)
        elif field == "normals":
            write_normals(path, array, case.axes)
        elif field == "classes":
            Image.fromarray(stored_classes(array[..., 0], case.ids)).save(path)
        elif field.startswith("mask") and path.suffix == ".npy":
            np.save(path, array[..., 0].astype(np.float64))
        elif field == "rgb" and path.suffix == ".jpg":
            Image.fromarray(array).save(path, "png")  # lossless; the suffix is what counts
        elif field == "rgb":
            Image.fromarray(array).save(path)
        else:
            values = array[..., 0] * (255 if field == "alpha" else 1)
            Image.fromarray(np.rint(values).astype(np.uint8)).save(path)


def write_depth(path, depth, scale):
    if path.suffix == ".npy":
        np.save(path, depth)
    elif path.suffix == ".exr":
        openexr = pytest.importorskip("OpenEXR")
        openexr.File({}, dict.fromkeys("RGB", depth[..., 0])).write(str(path))
    else:
        Image.fromarray(np.rint(depth[..., 0] * scale).astype(np.uint16)).save(path)


def write_normals(path, normals, axes):
    stored = normals * np.array(AXES[axes], np.float32)
    if path.suffix == ".npy":
        np.save(path, stored.astype(np.float64))
    elif path.suffix == ".exr":
        openexr = pytest.importorskip("OpenEXR")
        channels = {name: np.ascontiguousarray(stored[..., k]) for k, name in enumerate("RGB")}
        openexr.File({}, channels).write(str(path))
    else:
        absent = ~stored.any(axis=-1, keepdims=True)
        pixels = np.where(absent, 0, np.rint((stored + 1) / 2 * 255))
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def stored_classes(classes, ids):
    """The picture of a class map: numbers, or colours; void is 0 or black where that is free."""
    void = (0, 0, 0) if isinstance(ids[0], tuple) else (255 if 0 in ids else 0)
    table = np.array([*ids, void], np.uint8)
    return table[np.where(classes == 255, len(ids), classes)]


def write_copy(folder, case, rng, count=None):
    """A miniature copy; returns the examples by the path of their image."""
    count = count or case.count
    folder.mkdir(parents=True, exist_ok=True)
    examples = {}
    lines = []
    for number in range(count):
        example = make_example(rng, case)
        write_example(folder, case, number, example)
        examples[case.rgb.format(i=number)] = example
        paths = {"rgb": case.rgb, **case.files}
        words = [paths.get(c, "nowhere.png").format(i=number) for c in case.columns]
        words = [case.prefix + word.removeprefix(case.strip) for word in words]
        lines.append(" ".join(words) + case.suffix + "\n")
    if case.list_file:
        (folder / case.list_file).write_text("".join(lines))
    elif case.dataset == "genpercept":
        write_json_lines(folder, case, count)
    return examples


def write_json_lines(folder, case, count):
    names = {"depth": "depth", "normals": "normal", "alpha": "matting", "classes": "seg"}
    rows = [
        {"image": case.rgb.format(i=number)}
        | {
            f"{names[field]}_conditioning_image": path.format(i=number)
            for field, path in case.files.items()
        }
        for number in range(count)
    ]
    for part, chosen in (("a", rows[:1]), ("b", rows[1:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
