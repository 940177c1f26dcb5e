"""Raw downloads: Hypersim's and NYU Depth v2's own files, by other formulations."""

import h5py
import numpy as np
import pytest
import raw_copies
from preparing import assert_same_records

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.hypersim import SPLITS_FILE, filled, tone_mapped
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.errors import UserError
from jaxpercept.preparation.pipeline import prepare

h5py.get_config()  # so that a missing package fails here
FRAMES = [("ai_001_001", "cam_00", 0), ("ai_001_001", "cam_01", 12), ("ai_002_003", "cam_00", 7)]


@pytest.fixture
def hypersim(tmp_path, rng):
    frames = {frame: raw_copies.hypersim_frame(rng) for frame in FRAMES}
    raw_copies.write_hypersim(
        tmp_path / "raw", frames, lambda scene: "val" if scene == "ai_002_003" else "train"
    )
    return tmp_path / "raw", frames


def marigold_tone_map(colour, entities):
    """The published recipe, step by step in float64."""
    colour = colour.astype(np.float64)
    brightness = 0.3 * colour[..., 0] + 0.59 * colour[..., 1] + 0.11 * colour[..., 2]
    current = np.percentile(brightness[entities != -1], 90)
    scale = 0.0 if current < 1e-4 else np.power(0.8, 2.2) / current
    return np.clip(np.power(np.maximum(scale * colour, 0), 1 / 2.2), 0, 1) * 255


def marigold_depth(distance, entities):
    height, width = distance.shape
    focal = 886.81 * width / 1024
    x = np.linspace(-0.5 * width + 0.5, 0.5 * width - 0.5, width)[None, :].repeat(height, 0)
    y = np.linspace(-0.5 * height + 0.5, 0.5 * height - 0.5, height)[:, None].repeat(width, 1)
    plane = np.stack([x, y, np.full_like(x, focal)], -1)
    planar = distance / np.linalg.norm(plane, axis=-1) * focal * 1000
    return np.where(entities == -1, 0, planar)


def test_hypersim_is_marigold_s(hypersim):
    root, frames = hypersim
    for split, chosen in (("train", FRAMES[:2]), ("val", FRAMES[2:])):
        records = open_dataset("hypersim", split=split, data_dir=root, targets=["depth", "normals"])
        assert records.source.names == [f"{s}/rgb_{c}_fr{n:04d}.png" for s, c, n in chosen]
        for index, frame in enumerate(chosen):
            record, raw = records[index], frames[frame]
            shown = marigold_tone_map(raw["color"], raw["render_entity_id"])
            assert np.abs(record["rgb"] + 0.5 - shown).max() < 0.51  # truncated
            depth = marigold_depth(raw["depth_meters"], raw["render_entity_id"])
            assert np.abs(record["depth"][..., 0] * 1000 + 0.5 - depth)[depth > 0].max() < 0.51
            np.testing.assert_array_equal(record["valid"][..., 0], depth > 0)
            np.testing.assert_allclose(record["intrinsics"], [27.7128, 27.7128, 16, 12], atol=1e-3)


def test_normals_look_at_the_camera(hypersim):
    root, frames = hypersim
    opened = {"split": "train", "data_dir": root, "targets": ["normals"]}
    by_positions, by_rays, as_they_are = (
        open_dataset("hypersim", orientation=kind, **opened)[0]["normals"]
        for kind in ("positions", "rays", "none")
    )
    raw = frames[FRAMES[0]]
    normals = raw["normal_cam"].astype(np.float64)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    known = raw["render_entity_id"] != -1  # normals are only where there is depth
    np.testing.assert_allclose(as_they_are[known], normals[known], atol=1e-6)
    facing = (normals * -np.nan_to_num(raw["position"], neginf=0)).sum(-1)
    towards = np.where(facing[..., None] < 0, -normals, normals)
    clear = known & np.isfinite(raw["position"]).all(-1) & (np.abs(facing) > 0.01)
    assert clear.mean() > 0.5
    for found in (by_positions, by_rays):
        np.testing.assert_allclose(found[clear], towards[clear], atol=1e-6)
    assert (np.abs(as_they_are - by_rays).max(-1) > 0.1).mean() > 0.2


def test_labels_are_classes_of_nyu(hypersim):
    root, frames = hypersim
    records = open_dataset("hypersim", split="val", data_dir=root, targets=["classes"])
    labels, found = frames[FRAMES[2]]["semantic"], records[0]["classes"][..., 0]
    assert set(records[0]) == {"name", "rgb", "valid", "classes", "labels"}
    assert records.dataset.class_names[:2] == ("wall", "floor")
    for label in np.unique(labels):  # 1 is wall
        assert set(found[labels == label].tolist()) == {255 if label == -1 else int(label) - 1}
    for path in root.rglob("*semantic.hdf5"):
        path.unlink()
    with pytest.raises(UserError, match=r"semantic\.hdf5 is missing; download it or leave classes"):
        open_dataset("hypersim", split="val", data_dir=root, targets=["classes"])


def test_points_at_infinity_take_a_neighbour_s_place(rng):
    points = rng.standard_normal((5, 2, 3)).astype(np.float32)
    expected = points.copy()
    points[0, 0] = -np.inf
    points[2:4, 1] = -np.inf
    expected[0, 0], expected[2:4, 1] = expected[1, 0], expected[1, 1]
    np.testing.assert_array_equal(filled(points), expected)


def test_tone_mapping_of_odd_frames(rng):
    colour = rng.uniform(0, 1, (4, 5, 3)).astype(np.float32)
    nothing = np.zeros((4, 5), bool)
    expected = (colour ** (1 / 2.2) * 255).astype(np.uint8)  # no known pixel: as it is
    np.testing.assert_allclose(tone_mapped(colour, nothing), expected, atol=1)
    assert (tone_mapped(colour * 1e-5, ~nothing) == 0).all()  # dark: black
    colour[0, 0] = np.nan
    assert (tone_mapped(colour, nothing)[0, 0] == 0).all()
    colour[0, 0] = np.inf
    assert (tone_mapped(colour, nothing)[0, 0] == 255).all()


def test_prepared_hypersim_is_the_raw_one(hypersim, tmp_path):
    root, frames = hypersim
    broken = {
        "nan_depth": ("depth_meters", np.nan),
        "zero_entity": ("render_entity_id", 0),
        "nan_normals": ("normal_cam", np.nan),
        "black": ("color", slice(None)),
    }
    for number, (kind, value) in enumerate(broken.values(), start=20):
        frame = {key: array.copy() for key, array in frames[FRAMES[0]].items()}
        if kind == "color":
            frame[kind][:] = 0
        else:
            frame[kind][8, 8] = value
        frames["ai_001_001", "cam_05", number] = frame
    raw_copies.write_hypersim(
        root, frames, lambda scene: "val" if scene == "ai_002_003" else "train"
    )
    folder = prepare("hypersim", root, tmp_path / "to", shard_size=2)
    names = ["nan", "entity 0", "nan", "one colour"]
    rejected = (folder / "report/rejected-train.csv").read_text().splitlines()[1:]
    assert len(rejected) == 4
    for line, name in zip(rejected, names, strict=True):
        assert name in line
    for targets in (["depth"], ["normals"], ["classes"], ["depth", "normals", "classes"]):
        opened = {"split": "val", "targets": targets}
        raw = open_dataset("hypersim", data_dir=root, **opened)
        assert_same_records(open_dataset("hypersim", data_dir=tmp_path / "to", **opened), raw)
        train = open_dataset("hypersim", data_dir=tmp_path / "to", split="train", targets=targets)
        assert [train[i]["name"] for i in range(len(train))] == [
            "ai_001_001/rgb_cam_00_fr0000.png", "ai_001_001/rgb_cam_01_fr0012.png",
        ]  # fmt: skip


def test_far_and_private_frames(tmp_path, rng):
    frames = {frame: raw_copies.hypersim_frame(rng) for frame in FRAMES}
    frames[FRAMES[0]]["depth_meters"][5:7] = 100
    raw_copies.write_hypersim(tmp_path, frames, private=[FRAMES[1]])
    records = open_dataset("hypersim", split="train", data_dir=tmp_path)
    assert len(records) == 2
    assert not records[0]["valid"][5:7].any()
    assert (records[0]["depth"][5:7] == 0).all()
    (tmp_path / "some.txt").write_text("ai_002_003/rgb_cam_00_fr0007.png depth.png\n")
    listed = open_dataset("hypersim", split="train", data_dir=tmp_path, list_file="some.txt")
    assert listed.source.names == ["ai_002_003/rgb_cam_00_fr0007.png"]
    assert_same_one(listed[0], records[1])


def assert_same_one(found, expected):
    for key in ("rgb", "depth", "valid"):
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize(
    ("damage", "options", "complaint"),
    [
        (
            lambda root: [path.unlink() for path in root.rglob("*depth_meters.hdf5")],
            {},
            "depth_meters.hdf5 is missing; download it or leave depth out",
        ),
        (lambda root: (root / SPLITS_FILE).unlink(), {}, "put Hypersim's evermotion_dataset"),
        (lambda root: (root / SPLITS_FILE).write_text("a,b\n1,2\n"), {}, "KeyError"),
        (lambda root: None, {"split": "test"}, "no image of split 'test'"),
        (lambda root: None, {"orientation": "left"}, "Unknown orientation 'left'"),
        (lambda root: None, {"normals_axes": "right_up_back"}, "leave normals_axes away"),
        (lambda root: None, {"list_file": "no.txt"}, "Cannot read the list"),
        (
            lambda root: (root / "a.txt").write_text("x.png y"),
            {"list_file": "a.txt"},
            "names x.png",
        ),
        (
            lambda root: [path.unlink() for path in root.rglob("*position.hdf5")],
            {"targets": ["normals"]},
            "position.hdf5 is missing.*orientation=rays",
        ),
    ],
)
def test_what_is_wrong_with_hypersim_is_named(hypersim, damage, options, complaint):
    root, _ = hypersim
    damage(root)
    with pytest.raises(UserError, match=complaint):
        open_dataset("hypersim", **{"split": "train", "data_dir": root} | options)


def test_a_damaged_file_of_hypersim_is_named(hypersim):
    root, _ = hypersim
    records = open_dataset("hypersim", split="train", data_dir=root)
    path = root / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableFileError, match=r"frame\.0000\.depth_meters\.hdf5"):
        records[0]
    records[1]
    raw_copies.write_hdf5(path, dataset=np.ones((5, 6), np.float32))
    with pytest.raises(UnreadableFileError, match=r"holds \(5, 6\), not \(24, 32\)"):
        records[0]


# ---- NYU Depth v2 --------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [False, True])
def test_nyuv2_of_matlab(tmp_path, rng, filled):
    (tmp_path / "raw").mkdir()
    arrays = raw_copies.write_nyuv2(tmp_path / "raw", rng)
    options = {"filled": True} if filled else {}
    metres = arrays["depths" if filled else "rawDepths"]
    prepare("nyuv2", tmp_path / "raw", tmp_path / "to", options=options)
    for split, numbers in (("train", (2, 5, 1)), ("test", (3, 4, 6))):
        records = open_dataset("nyuv2", split=split, data_dir=tmp_path / "raw", **options)
        assert records.source.names == [f"{number:04d}" for number in numbers]
        for index, number in enumerate(numbers):
            record = records[index]
            np.testing.assert_array_equal(
                record["rgb"], arrays["images"][number - 1].transpose(2, 1, 0)
            )
            np.testing.assert_allclose(record["depth"][..., 0], metres[number - 1].T, atol=5.1e-4)
        prepared = open_dataset("nyuv2", split=split, data_dir=tmp_path / "to")
        assert_same_records(prepared, records)


@pytest.mark.parametrize("name", ["nyuv2", "nyuv2_13"])
def test_classes_and_things_of_matlab(tmp_path, rng, name):
    """By loops over pixels and things, as the toolbox has them, and by names of classes."""
    (tmp_path / "raw").mkdir()
    arrays = raw_copies.write_nyuv2(tmp_path / "raw", rng)
    targets = ["depth", "classes", "instances"]
    prepare(name, tmp_path / "raw", tmp_path / "to")
    raw, prepared = (
        open_dataset(name, split="test", data_dir=tmp_path / folder, targets=targets)
        for folder in ("raw", "to")
    )
    assert_same_records(prepared, raw)
    names = {
        "nyuv2": {0: "void", 1: "books", 2: "lamp", 3: "wall", 4: "floor", 5: "other prop"},
        "nyuv2_13": {0: "void", 1: "books", 2: "objects", 3: "wall", 4: "floor", 5: "objects"},
    }
    for index, number in enumerate((3, 4, 6)):
        record = raw[index]
        labels = arrays["labels"][number - 1].T
        counts = arrays["instances"][number - 1].T
        class_names = dict(enumerate(raw.dataset.class_names)) | {255: "void"}
        for y, x in np.ndindex(labels.shape):
            found = class_names[int(record["classes"][y, x, 0])]
            assert found == names[name][int(labels[y, x])]
        things = [
            (label, count, (labels == label) & (counts == count))
            for label in range(1, 6) for count in (1, 2)
            if ((labels == label) & (counts == count)).any()
        ]  # fmt: skip
        assert record["kinds"] == tuple(list(raw_copies.NYU_LABELS)[t[0] - 1] for t in things)
        assert record["instance"].max() == len(things)
        for place, (_, _, mask) in enumerate(things, start=1):
            np.testing.assert_array_equal(record["instance"][..., 0] == place, mask)
        known = (labels > 0) & (record["depth"][..., 0] > 0)
        np.testing.assert_array_equal(record["valid"][..., 0], known)


def test_what_is_wrong_with_matlab_s_files_is_named(tmp_path, rng):
    raw_copies.write_nyuv2(tmp_path, rng)
    opened = {"split": "train", "data_dir": tmp_path}
    with pytest.raises(UserError, match="leave first_class away"):
        open_dataset("nyuv2", first_class=1, **opened)
    with pytest.raises(UserError, match="filled of dataset nyuv2 must be bool, got 'yes'"):
        open_dataset("nyuv2", filled="yes", **opened)
    (tmp_path / "classMapping40.mat").write_bytes(b"no")
    with pytest.raises(UserError, match=r"classMapping40\.mat .*; put the published mapping"):
        open_dataset("nyuv2", targets=["classes"], **opened)
    (tmp_path / "classMapping40.mat").unlink()
    with pytest.raises(UserError, match=r"and classMapping40\.mat for classes"):
        open_dataset("nyuv2", targets=["classes"], **opened)
    assert len(open_dataset("nyuv2", targets=["depth", "instances"], **opened)) == 3
    (tmp_path / "splits.mat").write_bytes(b"no")
    with pytest.raises(UserError, match=r"splits\.mat"):
        open_dataset("nyuv2", split="train", data_dir=tmp_path)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", raw_copies.RAW)
def test_raw_copies_make_batches(tmp_path, rng, name):
    """Alone and mixed with scenes, some of which have intrinsics and some not."""
    write, split, options = raw_copies.RAW[name]
    write(tmp_path / "raw", rng)
    options = {"data_dir": tmp_path / "raw", "split": split, **options}
    for mixture in ([(name, 1.0, options)], [(name, 0.5, options), ("scenes", 0.5, {"size": 4})]):
        data = make_train_dataset(mixture, resolution=(8, 16), batch_size=2, seed=0)
        iterator = iter(data)
        batches = [next(iterator) for _ in range(3)]
        iterator.close()
        for batch in batches:
            assert batch["rgb"].shape == (2, 8, 16, 3)
            assert batch["valid"].any(axis=(1, 2, 3)).all()
            assert np.isfinite(batch["depth_range"]).all()


@pytest.mark.parametrize("name", ["hypersim", "nyuv2"])
def test_raw_classes_make_batches(tmp_path, rng, name):
    write, split, options = raw_copies.RAW[name]
    write(tmp_path / "raw", rng)
    mixture = [(name, 1.0, {"data_dir": tmp_path / "raw", "split": split, **options})]
    fields = ("rgb", "classes", "valid")
    data = make_train_dataset(mixture, resolution=(8, 16), batch_size=2, seed=0, fields=fields)
    batch = next(iter(data))
    assert batch["classes"].shape == (2, 8, 16, 1)
    assert set(np.unique(batch["classes"][batch["valid"]]).tolist()) <= set(range(40))
