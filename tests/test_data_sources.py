"""Readers and sources: formats, conversions, and what is said about bad files."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxpercept.data.folders import open_folder, open_list
from jaxpercept.data.layouts import Request
from jaxpercept.data.readers import (
    RawFloat32Reader,
    UnreadableFileError,
    read_depth,
    read_mask,
    read_rgb,
)
from jaxpercept.data.sources import ImageZipSource, TFDSSource
from jaxpercept.errors import UserError


def folder_source(folder, *targets, **options):
    """The files of `FIELD/NAME.*`, opened for depth unless `targets` says otherwise."""
    return open_folder(Request("folder", "all", folder, (8, 8), targets or ("depth",)), **options)


def list_source(folder, list_file, *targets, **options):
    request = Request("list", "test", folder, (8, 8), targets or ("depth",))
    return open_list(request, lists={}, list_file=list_file, **options)


def write_pair(folder, name, rng, size=(12, 16)):
    """One rgb/NAME.png with a 16-bit depth/NAME.png; returns both arrays."""
    for sub in ("rgb", "depth"):
        (folder / sub / name).parent.mkdir(parents=True, exist_ok=True)
    rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    depth = rng.integers(1, 2**16, size, dtype=np.uint16)
    Image.fromarray(rgb).save(folder / "rgb" / f"{name}.png")
    Image.fromarray(depth).save(folder / "depth" / f"{name}.png")
    return rgb, depth


# ---- images --------------------------------------------------------------------------------------


def test_rgb_is_read_exactly_from_png(tmp_path, rng):
    rgb, _ = write_pair(tmp_path, "a", rng)
    np.testing.assert_array_equal(read_rgb(tmp_path / "rgb" / "a.png"), rgb)


def test_grey_palette_and_16_bit_images_become_rgb(tmp_path, rng):
    grey = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    expected = np.repeat(grey[..., None], 3, -1)
    for name, image in {
        "L.png": Image.fromarray(grey),
        "P.png": Image.fromarray(grey).convert("P"),
        "LA.png": Image.fromarray(grey).convert("LA"),
        "I16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "CMYK.tif": Image.fromarray(expected).convert("CMYK"),
    }.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_rgb(tmp_path / name), expected, err_msg=name)


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[0, 1] = (200, 100, 50, 0)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    rgb = read_rgb(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb[0, 0], (200, 100, 50))
    np.testing.assert_array_equal(rgb[0, 1], (255, 255, 255))


def test_exif_orientation_is_applied(tmp_path, rng):
    rgb = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), np.rot90(rgb, -1))


@pytest.mark.parametrize("cut", [0, 10, 60])
@pytest.mark.parametrize("format_", ["png", "jpeg"])
def test_damaged_image_is_named(tmp_path, rng, cut, format_):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, format_)
    path = tmp_path / f"broken.{format_}"
    path.write_bytes(buffer.getvalue()[:cut])
    with pytest.raises(UnreadableFileError, match=f"broken.{format_}"):
        read_rgb(path)


# ---- depth ---------------------------------------------------------------------------------------


def test_depth_formats_agree(tmp_path, rng):
    openexr = pytest.importorskip("OpenEXR")
    depth = rng.integers(0, 2**16, (7, 9), dtype=np.uint16)
    metres = depth.astype(np.float32)
    Image.fromarray(depth).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", metres)
    np.save(tmp_path / "b.npy", metres[..., None].astype(np.float64))
    openexr.File({}, {"Y": metres}).write(str(tmp_path / "a.exr"))
    other = np.zeros_like(metres)
    openexr.File({}, {"A": other, "B": other, "R": metres}).write(str(tmp_path / "b.exr"))
    for name in ("a.png", "a.npy", "b.npy", "a.exr", "b.exr"):
        read = read_depth(tmp_path / name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[..., 0], metres, err_msg=name)


def test_raw_float32_depth(tmp_path, rng):
    depth = rng.random((4, 6), np.float32)
    (tmp_path / "a.JPG").write_bytes(depth.astype("<f4").tobytes())
    np.testing.assert_array_equal(RawFloat32Reader(4, 6)(tmp_path / "a.JPG")[..., 0], depth)
    with pytest.raises(UnreadableFileError, match=r"a\.JPG"):
        RawFloat32Reader(4, 7)(tmp_path / "a.JPG")


def test_missing_exr_extra_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "OpenEXR", None)
    with pytest.raises(UserError, match=r"jaxpercept\[exr\]"):
        read_depth(tmp_path / "a.exr")


def test_wrong_depth_files_are_named(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(tmp_path / "eight.png")
    np.save(tmp_path / "three.npy", np.zeros((4, 4, 3)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "broken.exr").write_bytes(b"\x76\x2f\x31\x01 not really")
    (tmp_path / "a.gif").write_bytes(b"")
    for path in tmp_path.iterdir():
        with pytest.raises(UnreadableFileError, match=path.name):
            read_depth(path)


def test_mask_is_above_zero(tmp_path, rng):
    mask = rng.random((5, 6)) < 0.5
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", mask.astype(np.float64))
    for name in ("a.png", "a.npy"):
        np.testing.assert_array_equal(read_mask(tmp_path / name)[..., 0], mask)


# ---- folders and lists ---------------------------------------------------------------------------


def test_folder_pairs_files_by_name(tmp_path, rng):
    arrays = {name: write_pair(tmp_path, name, rng) for name in ("b", "a", "sub/c")}
    np.save(tmp_path / "depth" / "a.npy", arrays["a"][1].astype(np.float32))
    (tmp_path / "depth" / "a.png").unlink()
    (tmp_path / "rgb" / "notes.txt").write_text("not an image")
    source = pickle.loads(pickle.dumps(folder_source(tmp_path)))
    assert [source[i]["name"] for i in range(len(source))] == ["a", "b", "sub/c"]
    for example in source:
        rgb, depth = arrays[example["name"]]
        np.testing.assert_array_equal(example["rgb"], rgb)
        np.testing.assert_array_equal(example["depth"][..., 0], depth)


def test_folder_reads_masks(tmp_path, rng):
    write_pair(tmp_path, "a", rng)
    mask = rng.random((12, 16)) < 0.5
    (tmp_path / "mask").mkdir()
    Image.fromarray(mask).save(tmp_path / "mask" / "a.png")
    np.testing.assert_array_equal(folder_source(tmp_path)[0]["mask"][..., 0], mask)


def test_bad_folders_are_named(tmp_path, rng):
    with pytest.raises(UserError, match="nowhere does not exist"):
        folder_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="rgb is missing"):
        folder_source(tmp_path)
    (tmp_path / "rgb").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        folder_source(tmp_path)
    write_pair(tmp_path, "a", rng)
    write_pair(tmp_path, "b", rng)
    (tmp_path / "depth" / "a.png").unlink()
    with pytest.raises(UserError, match=r"rgb/a\.png has no depth"):
        folder_source(tmp_path)
    (tmp_path / "rgb" / "a.png").unlink()
    (tmp_path / "rgb" / "b.png").rename(tmp_path / "rgb" / "c.png")
    write_pair(tmp_path, "c", rng)
    with pytest.raises(UserError, match=r"depth/b\.png has no image"):
        folder_source(tmp_path)
    write_pair(tmp_path, "b", rng)
    Image.open(tmp_path / "rgb" / "b.png").save(tmp_path / "rgb" / "b.jpg")
    with pytest.raises(UserError, match="two files named b"):
        folder_source(tmp_path)


def test_different_sizes_are_named(tmp_path, rng):
    write_pair(tmp_path, "a", rng)
    Image.fromarray(np.ones((12, 15), np.uint16)).save(tmp_path / "depth" / "a.png")
    with pytest.raises(UnreadableFileError, match="depth of a has size"):
        folder_source(tmp_path)[0]


def test_list_skips_empty_lines_and_absent_depth(tmp_path, rng):
    rgb, depth = write_pair(tmp_path, "a", rng)
    lines = "rgb/a.png depth/a.png labels/a.png office\n\nrgb/a.png None 721.5\n"
    (tmp_path / "test.txt").write_text(lines)
    source = pickle.loads(pickle.dumps(list_source(tmp_path, "test.txt")))
    assert len(source) == 1
    assert source[0]["name"] == "rgb/a.png"
    np.testing.assert_array_equal(source[0]["rgb"], rgb)
    np.testing.assert_array_equal(source[0]["depth"][..., 0], depth)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rgb/a.png depth/missing.png\n", "names depth/missing.png, which is not in"),
        ("nowhere/a.png depth/a.png\n", "names nowhere/a.png"),
        ("rgb/a.png\n", "Line 1 of .* has 1 words"),
        ("\n", "names no files"),
    ],
)
def test_bad_lists_are_named(tmp_path, rng, text, message):
    write_pair(tmp_path, "a", rng)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        list_source(tmp_path, "list.txt")
    with pytest.raises(UserError, match="Cannot read the list"):
        list_source(tmp_path, "none.txt")


# ---- archives and TFDS ---------------------------------------------------------------------------


def write_archive(folder, rng, per_class=3):
    (folder / "classes.json").write_text(json.dumps({"n01": "goldfish", "n02": "tabby cat"}))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for wnid in ("n02", "n01", "n99"):
            for i in range(per_class):
                buffer = io.BytesIO()
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "jpeg")
                archive.writestr(f"{wnid}/{wnid}_{i}.JPEG", buffer.getvalue())


def test_archive_is_captioned_and_picklable_while_open(tmp_path, rng):
    write_archive(tmp_path, rng)
    source = ImageZipSource(tmp_path)
    assert len(source) == 6  # n99 has no name and hence no caption
    first = source[0]
    assert first["caption"] == "a photo of a goldfish"
    assert source[5]["caption"] == "a photo of a tabby cat"
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0]["rgb"], first["rgb"])
    odd = ImageZipSource(tmp_path, keep=lambda i: i % 2 == 1)
    assert odd.names == source.names[1::2]


def test_damaged_archives_are_named(tmp_path, rng):
    with pytest.raises(UserError, match=r"images\.zip and classes\.json"):
        ImageZipSource(tmp_path)
    write_archive(tmp_path, rng)
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(UserError, match="no image of a class"):
        ImageZipSource(tmp_path)
    write_archive(tmp_path, rng)
    source = ImageZipSource(tmp_path)
    data = bytearray((tmp_path / "images.zip").read_bytes())
    at = data.find(b"n01/n01_0.JPEG")
    data[at + 40 : at + 200] = bytes(160)
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(UnreadableFileError, match=r"n01/n01_0\.JPEG"):
        pickle.loads(pickle.dumps(source))[0]


def test_tfds_features_become_examples(rng, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    depth = rng.random((6, 8)).astype(np.float32)
    calls = []

    def data_source(name, **kwargs):
        calls.append((name, kwargs))
        return [{"image": image, "depth": depth}, {"image": image[..., :1], "depth": depth}, {}]

    monkeypatch.setattr(tfds, "data_source", data_source)
    source = pickle.loads(pickle.dumps(TFDSSource("nyu_depth_v2", "train[:1%]", "data")))
    assert len(source) == 3
    np.testing.assert_array_equal(source[0]["rgb"], image)
    np.testing.assert_array_equal(source[0]["depth"][..., 0], depth)
    np.testing.assert_array_equal(source[1]["rgb"], np.repeat(image[..., :1], 3, -1))
    assert calls[0] == (
        "nyu_depth_v2",
        {"split": "train[:1%]", "data_dir": "data", "download": False},
    )
    with pytest.raises(UnreadableFileError, match="nyu_depth_v2/train"):
        source[2]


def test_unprepared_tfds_dataset_is_a_user_error(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def data_source(*args, **kwargs):
        raise FileNotFoundError("not there")

    monkeypatch.setattr(tfds, "data_source", data_source)
    with pytest.raises(UserError, match="tfds build no_such_dataset"):
        TFDSSource("no_such_dataset", "train", tmp_path)
