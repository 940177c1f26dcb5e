"""Miniature copies of published raw data, in the layouts and the file formats of the originals."""

import csv
import io
import json
import struct
import zlib

import h5py
import numpy as np
from layout_cases import CASES, write_copy
from PIL import Image
from scipy.io import savemat

from jaxpercept.data.hypersim import SPLITS_FILE

SIZE = (24, 32)


def write_hdf5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)


def hypersim_frame(rng, size=SIZE):
    """What one frame's files hold: a wall, normals of either side, a hole."""
    height, width = size
    focal = 886.81 * width / 1024
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - 0.5 - np.arange(height))
    rays = np.stack([x, y, np.full_like(x, -focal)], -1)
    z = rng.uniform(2, 9, size)
    positions = rays / focal * z[..., None]  # the camera is at the origin, not turned
    normals = rng.standard_normal((*size, 3))
    entities = rng.integers(1, 50, size).astype(np.int32)
    entities[:3, :5] = -1
    positions[0, 4:6] = -np.inf
    return {
        "color": rng.lognormal(0, 1, (*size, 3)).astype(np.float16),
        "depth_meters": np.linalg.norm(rays / focal * z[..., None], axis=-1).astype(np.float32),
        "normal_cam": normals.astype(np.float16),
        "normal_world": normals.astype(np.float16),
        "position": positions.astype(np.float32),
        "render_entity_id": entities,
        "semantic": rng.choice(np.array([-1, *range(1, 41)], np.int16), size),
    }


def write_hypersim(root, frames, split_of=lambda scene: "train", private=()):
    """`frames`: (scene, camera, number) -> arrays by the kind of their file."""
    rows = []
    for (scene, camera, number), arrays in frames.items():
        for kind, array in arrays.items():
            group = "final" if kind == "color" else "geometry"
            folder = root / scene / "images" / f"scene_{camera}_{group}_hdf5"
            write_hdf5(folder / f"frame.{number:04d}.{kind}.hdf5", dataset=array)
        keyframes = np.arange(30)[::-1]
        own = [n for s, c, n in frames if (s, c) == (scene, camera)]
        positions = np.where(np.isin(keyframes, own)[:, None], 0.0, [[9.0, 9.0, 9.0]])
        detail = root / scene / "_detail" / camera
        write_hdf5(detail / "camera_keyframe_frame_indices.hdf5", dataset=keyframes)
        write_hdf5(detail / "camera_keyframe_positions.hdf5", dataset=positions)
        public = (scene, camera, number) not in private
        rows.append([scene, camera, number, public, "", split_of(scene)])
    rows.append(["ai_999_001", "cam_00", 3, True, "", "train"])  # never downloaded
    with open(root / SPLITS_FILE, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "camera_name", "frame_id", "included_in_public_release",
                         "exclude_reason", "split_partition_name"])  # fmt: skip
        writer.writerows(rows)


# Labels, and the class that each belongs to; those of NYU's 40, "other prop" for the last.
NYU_LABELS = {"book": 23, "lamp": 35, "wall": 1, "floor": 2, "unicycle": 40}


def write_nyuv2(root, rng, count=6, train=(2, 5, 1)):
    """The labelled data set of `count` images; returns what it holds, images first."""
    height, width = SIZE
    arrays = {
        "images": rng.integers(0, 256, (count, 3, width, height), dtype=np.uint8),
        "depths": rng.uniform(0.7, 9.9, (count, width, height)).astype(np.float32),
        "rawDepths": rng.uniform(0.7, 9.9, (count, width, height)).astype(np.float32),
    }
    arrays["rawDepths"][:, :2] = 0
    blocks = rng.integers(0, len(NYU_LABELS) + 1, (count, width // 4, height // 4))
    labels = np.repeat(np.repeat(blocks, 4, 1), 4, 2).astype(np.uint16)
    counts = rng.integers(0, 3, blocks.shape).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    arrays |= {"labels": labels, "instances": counts}
    write_hdf5(root / "nyu_depth_v2_labeled.mat", **arrays)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "a") as file:
        # A cell array of MATLAB: references to arrays of characters.
        cells = file.create_dataset("names", (1, len(NYU_LABELS)), h5py.ref_dtype)
        for number, name in enumerate(NYU_LABELS):
            letters = np.array([[ord(letter)] for letter in name], np.uint16)
            cells[0, number] = file.create_dataset(f"#refs#/{number}", data=letters).ref
    mapping = np.array([list(NYU_LABELS.values())], np.uint8)
    savemat(root / "classMapping40.mat", {"mapClass": mapping})
    test = sorted(set(range(1, count + 1)) - set(train))
    splits = {"trainNdxs": np.array(train)[:, None], "testNdxs": np.array(test)[:, None]}
    savemat(root / "splits.mat", splits)
    return arrays


# ---- ScanNet -------------------------------------------------------------------------------------


def sens_frame(rng, colour_size, depth_size):
    """Colour, depth in millimetres with holes, and a pose; one in three poses is lost."""
    depth = rng.integers(300, 9000, depth_size).astype(np.uint16)
    depth[:2, :3], depth[-1, -1] = 0, 65535
    pose = np.full((4, 4), -np.inf) if rng.random() < 1 / 3 else rng.standard_normal((4, 4))
    return {
        "colour": rng.integers(0, 256, (*colour_size, 3), dtype=np.uint8),
        "depth": depth,
        "pose": pose.astype(np.float32),
    }


def write_sens(
    path, frames, matrix, *, units=1000.0, version=4, colour=2, depth=1, name=b"StructureSensor"
):
    """A recording; what is JPEG there is PNG here under the number of JPEG, for exactness.

    Args:
      matrix: 4 x 4, of the depth camera.
      colour, depth: how they are compressed; 1 PNG and 2 JPEG, 0 raw and 1 zlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = np.eye(4, dtype="<f4").tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<I", version))
        file.write(struct.pack("<Q", len(name)) + name)
        file.write(identity * 2 + np.asarray(matrix, "<f4").tobytes() + identity)
        file.write(struct.pack("<ii", colour, depth))
        for array in (frames[0]["colour"], frames[0]["depth"]):
            file.write(struct.pack("<II", array.shape[1], array.shape[0]))
        file.write(struct.pack("<f", units) + struct.pack("<Q", len(frames)))
        for number, frame in enumerate(frames):
            picture = io.BytesIO()
            Image.fromarray(frame["colour"]).save(picture, "png")
            stored = frame["depth"].astype("<u2").tobytes()
            stored = zlib.compress(stored) if depth == 1 else stored
            file.write(frame["pose"].astype("<f4").tobytes())
            file.write(struct.pack("<QQ", 1000 * number, 1000 * number + 7))
            file.write(struct.pack("<QQ", picture.tell(), len(stored)))
            file.write(picture.getvalue() + stored)
        file.write(struct.pack("<Q", 0))  # no measurements of acceleration


# ---- streets -------------------------------------------------------------------------------------

CITYSCAPES_CAMERA = {
    "extrinsic": {"baseline": 0.209313, "pitch": 0.038, "roll": 0.0, "x": 1.7, "y": 0.1,
                  "yaw": -0.0195, "z": 1.22},
    "intrinsic": {"fx": 2262.52, "fy": 2265.3017905988554, "u0": 1096.98, "v0": 513.137},
}  # fmt: skip


def write_cityscapes(root, rng, splits=("train", "val", "test"), count=2, size=(16, 32)):
    """Image, disparity and camera of every picture; returns the two arrays by the image's path."""
    made = {}
    for split in splits:
        for number in range(count):
            name = f"{split}/aachen/aachen_00000{number}_000019"
            rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            stored = rng.integers(1400, 30000, size).astype(np.uint16)
            stored[0, :6] = 0, 0, 1, 2, 1300, 65535  # none, none, infinite, far, far, near
            camera = json.loads(json.dumps(CITYSCAPES_CAMERA))
            camera["intrinsic"]["fx"] += 10 * number
            files = {
                f"leftImg8bit/{name}_leftImg8bit.png": rgb,
                f"disparity/{name}_disparity.png": stored,
            }
            for path, array in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / path)
            path = root / f"camera/{name}_camera.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(camera))
            made[f"leftImg8bit/{name}_leftImg8bit.png"] = rgb, stored, camera
    return made


def write_kitti_calibration(path, fx=721.5377, cx=609.5593, cy=172.854):
    """`calib_cam_to_cam.txt`, of which the other cameras' numbers are to be left alone."""
    lines = ["calib_time: 09-Jan-2012 13:57:47", "corner_dist: 9.950000e-02"]
    for camera, shift in (("00", 0.0), ("02", 44.85728), ("03", -339.5242)):
        f = fx if camera == "02" else 999.0
        numbers = [f, 0, cx, shift, 0, f, cy, 0.2163791, 0, 0, 1, 0.002745884]
        lines.append(f"S_rect_{camera}: 1.242000e+03 3.750000e+02")
        lines.append(f"P_rect_{camera}: " + " ".join(f"{number:.6e}" for number in numbers))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# ---- all -----------------------------------------------------------------------------------------


def _hypersim(root, rng):
    frames = {("ai_001_001", "cam_00", n): hypersim_frame(rng) for n in range(2)}
    write_hypersim(root, frames)


def _scannet(root, rng):
    matrix = np.array([[14.4, 0, 7.9, 0], [0, 14.5, 5.9, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    frames = [sens_frame(rng, (24, 32), (12, 16)) for _ in range(2)]
    write_sens(root / "scans/scene0000_00/scene0000_00.sens", frames, matrix)
    (root / "scannetv2_train.txt").write_text("scene0000_00\n")


def _diode(root, rng):
    case = next(c for c in CASES if (c.dataset, c.split) == ("diode", "train"))
    write_copy(root, type(case)(**vars(case) | {"size": (12, 16)}), rng)


def _nyuv2(root, rng):
    root.mkdir()
    write_nyuv2(root, rng)


def _case(name):
    return lambda root, rng: write_copy(root, next(c for c in CASES if str(c) == name), rng)


# Dataset -> (what writes a raw copy into a folder, the split, options).
RAW = {
    "hypersim": (_hypersim, "train", {}),
    "scannet": (_scannet, "train", {"every": 1}),
    "nyuv2": (_nyuv2, "train", {}),
    "diode": (_diode, "train", {}),
    "cityscapes": (write_cityscapes, "train", {}),
    "ibims1": (_case("ibims1-test-depth-rgb"), "test", {}),
    "kitti": (_case("kitti-train-depth-2011_09_26"), "train", {"crop": "none"}),
    "taskonomy": (_case("taskonomy-train-depth-allensville_rgb"), "train", {}),
}
