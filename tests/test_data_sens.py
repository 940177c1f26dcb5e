"""ScanNet's recordings: every frame at random, and what is wrong with a file."""

import pickle
import struct

import numpy as np
import pytest
from preparing import assert_same_records
from raw_copies import sens_frame, write_sens

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.geometry import resize_rgb
from jaxpercept.data.readers import UnreadableFileError
from jaxpercept.data.scannet_sens import Recording
from jaxpercept.errors import UserError
from jaxpercept.preparation.pipeline import prepare

COLOUR, DEPTH = (24, 32), (12, 16)
MATRIX = np.array([[14.4, 0, 7.9, 0], [0, 14.5, 5.9, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SCENES = {"scene0000_00": 7, "scene0000_01": 3, "scene0011_00": 5}


@pytest.fixture
def scans(tmp_path, rng):
    """Recordings of two scenes to train on and one to validate on, and the lists."""
    made = {}
    for scene, count in SCENES.items():
        made[scene] = [sens_frame(rng, COLOUR, DEPTH) for _ in range(count)]
        write_sens(tmp_path / f"scans/{scene}/{scene}.sens", made[scene], MATRIX)
    (tmp_path / "scannetv2_train.txt").write_text("scene0000_00\nscene0000_01\nscene0707_00\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene0011_00\n")
    return tmp_path, made


def expected_metres(stored):
    """ScanNet's millimetres; 0 is no measurement, and neither is what lies beyond 10 m."""
    return [[v / 1000 if 1 < v < 10_000 else 0.0 for v in row] for row in stored.tolist()]


def test_frames_in_any_order(scans, rng):
    root, made = scans
    frames = made["scene0000_00"]
    recording = Recording(root / "scans/scene0000_00/scene0000_00.sens")
    assert len(recording) == 7
    assert (recording.size, recording.units) == (DEPTH, 1000)
    np.testing.assert_allclose(recording.intrinsics, [14.4, 14.5, 8.4, 6.4], rtol=1e-6)
    for number in (*rng.permutation(7).tolist(), 6, 0):
        found = recording[number]
        np.testing.assert_array_equal(found.rgb, frames[number]["colour"])
        np.testing.assert_array_equal(found.depth[..., 0], frames[number]["depth"])
        np.testing.assert_array_equal(found.pose, frames[number]["pose"])
        recording = pickle.loads(pickle.dumps(recording))


def test_a_frame_far_back_is_found_by_its_header_alone(scans, monkeypatch):
    """What lies before a frame is not read."""
    root, _ = scans
    recording = Recording(root / "scans/scene0000_00/scene0000_00.sens")
    decoded = []
    monkeypatch.setattr("zlib.decompress", lambda data: decoded.append(data) or bytes(2 * 12 * 16))
    recording[6]
    assert len(decoded) == 1


def test_scenes_and_pictures_of_lists(scans, caplog):
    root, made = scans
    records = open_dataset("scannet", data_dir=root, every=3)
    chosen = [("scene0000_00", 0), ("scene0000_00", 3), ("scene0000_00", 6), ("scene0000_01", 0)]
    assert "1 of the 3 scenes of" in caplog.text
    assert "such as scene0707_00" in caplog.text
    assert records.source.names == [f"{scene}/color/{n:06d}.jpg" for scene, n in chosen]
    for index, (scene, number) in enumerate(chosen):
        record, frame = records[index], made[scene][number]
        np.testing.assert_array_equal(record["rgb"], resize_rgb(frame["colour"], DEPTH))
        np.testing.assert_allclose(
            record["depth"][..., 0], expected_metres(frame["depth"]), rtol=1e-6
        )
        np.testing.assert_array_equal(record["valid"], record["depth"] > 0)
        assert 0 < record["valid"].sum() < record["valid"].size
        np.testing.assert_allclose(record["intrinsics"], [14.4, 14.5, 8.4, 6.4], rtol=1e-6)
    lines = "scene0011_00/color/000004.jpg scene0011_00/depth/000004.png\n"
    for name in ("scannet_val_sampled_list_800_1.txt", "own.txt"):
        (root / name).write_text(lines)
        options = {} if name != "own.txt" else {"list_file": name}
        test = open_dataset("scannet", data_dir=root, evaluation=True, **options)
        assert test.split == "test"
        assert test.source.names == ["scene0011_00/color/000004.jpg"]
        frame = made["scene0011_00"][4]
        np.testing.assert_allclose(
            test[0]["depth"][..., 0], expected_metres(frame["depth"]), rtol=1e-6
        )
    assert "1 examples here and 800 as published" in caplog.text


@pytest.mark.parametrize(("units", "depth"), [(1000.0, 0), (5000.0, 1)])
def test_other_units_and_no_compression(tmp_path, rng, units, depth):
    frame = sens_frame(rng, COLOUR, DEPTH)
    write_sens(
        tmp_path / "scene0003_00/scene0003_00.sens", [frame], MATRIX, units=units, depth=depth
    )
    (tmp_path / "mine.txt").write_text("scene0003_00")
    record = open_dataset("scannet", data_dir=tmp_path, list_file="mine.txt")[0]
    metres = frame["depth"][..., None] / units
    metres = np.where((metres > 1e-3) & (metres < 10), metres, 0)
    np.testing.assert_allclose(record["depth"], metres, rtol=1e-6)


def test_prepared_recordings_are_the_raw_ones(scans):
    root, _ = scans
    options = {"every": 2}
    prepare("scannet", root, root / "to", options=options, shard_size=2)
    for split in ("train", "val"):
        raw = open_dataset("scannet", split=split, data_dir=root, **options)
        assert_same_records(open_dataset("scannet", split=split, data_dir=root / "to"), raw)


def damaged(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


HEADER = 4 + 8 + len("StructureSensor")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b"SENS"), "as a recording of ScanNet"),
        (lambda path: damaged(path, 0, struct.pack("<I", 3)), "version 3, not 4"),
        (lambda path: damaged(path, 4, struct.pack("<Q", 2**60)), "version 4, not 4"),
        (lambda path: damaged(path, HEADER + 260, struct.pack("<i", 2)), "depth by 2"),
        (lambda path: damaged(path, HEADER + 256, struct.pack("<i", 0)), "by method 0"),
        (lambda path: damaged(path, HEADER + 272, struct.pack("<I", 0)), "depth of 12 x 0"),
        (lambda path: damaged(path, HEADER + 128, struct.pack("<f", 0)), "no focal lengths"),
    ],
)
def test_files_that_are_no_recordings_are_named(scans, damage, complaint):
    root, _ = scans
    damage(root / "scans/scene0000_01/scene0000_01.sens")
    with pytest.raises(UserError, match=rf"scene0000_01\.sens as a rec.*{complaint}|{complaint}"):
        open_dataset("scannet", data_dir=root)


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_frame_is_named(scans, number):
    """A length that leads nowhere: that frame and all after it are lost, those before are not."""
    root, made = scans
    path = root / "scans/scene0000_01/scene0000_01.sens"
    content = path.read_bytes()
    second = content.index(made["scene0000_01"][1]["pose"].tobytes(), HEADER + 300)
    for length in (2**63 + 5, 2**40, len(content)):
        damaged(path, second + 80, struct.pack("<Q", length))
        recording = Recording(path)
        recording[0]
        with pytest.raises(UnreadableFileError, match=rf"frame {number} of .*scene0000_01\.sens"):
            recording[number]
    path.write_bytes(content[:-20] if number == 2 else content[: second + 100])
    with pytest.raises(UnreadableFileError, match=f"frame {number} of .* cut off"):
        Recording(path)[number]
    with pytest.raises(UnreadableFileError, match="There is no frame 3 of"):
        Recording(path)[3]


@pytest.mark.parametrize(
    ("line", "options", "complaint"),
    [
        ("scene0000_00", {"every": 0}, "every of dataset scannet must be at least 1, got 0"),
        ("scene0000_00", {"every": "all"}, "every of dataset scannet must be int, got 'all'"),
        ("scene0000_00", {"first_class": 1}, "Recordings say themselves.*leave first_class away"),
        ("kitchen", {}, "names kitchen, which is no scene like scene0191_00"),
        ("scene0707_00", {}, "holds no recording of a scene of"),
        ("scene0000_01/color/000003.jpg", {}, "frame 3 of scene0000_01, which has 3; check"),
        ("scene0707_00/color/000001.jpg", {}, r"scene0707_00\.sens is not in .*; download it"),
    ],
)
def test_wrong_lists_and_options(scans, line, options, complaint):
    root, _ = scans
    (root / "mine.txt").write_text(line)
    with pytest.raises(UserError, match=complaint):
        open_dataset("scannet", data_dir=root, list_file="mine.txt", **options)
    with pytest.raises(UserError, match=r"no split 'test' of scannet with depth; expected ScanNet"):
        open_dataset("scannet", data_dir=root, split="test")
    with pytest.raises(UserError, match=r"Cannot read the list .*nowhere\.txt"):
        open_dataset("scannet", data_dir=root, list_file="nowhere.txt")
