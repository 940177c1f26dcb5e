"""Miniature copies of published raw data: HDF5 of Hypersim and of NYU Depth v2."""

import csv

import h5py
import numpy as np
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


def write_nyuv2(root, rng, count=6, train=(2, 5, 1)):
    """The labelled data set of `count` images; returns what it holds, images first."""
    height, width = SIZE
    arrays = {
        "images": rng.integers(0, 256, (count, 3, width, height), dtype=np.uint8),
        "depths": rng.uniform(0.7, 9.9, (count, width, height)).astype(np.float32),
        "rawDepths": rng.uniform(0.7, 9.9, (count, width, height)).astype(np.float32),
    }
    arrays["rawDepths"][:, :2] = 0
    write_hdf5(root / "nyu_depth_v2_labeled.mat", **arrays)
    test = sorted(set(range(1, count + 1)) - set(train))
    splits = {"trainNdxs": np.array(train)[:, None], "testNdxs": np.array(test)[:, None]}
    savemat(root / "splits.mat", splits)
    return arrays
