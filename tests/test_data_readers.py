"""Readers of normals, mattes, trimaps and class maps: formats, conventions, bad files."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxpercept.data.palettes import (
    CITYSCAPES_IDS,
    NYU40_TO_13,
    PALETTES,
    spread_colours,
)
from jaxpercept.data.readers import (
    AXES,
    VOID,
    ClassesReader,
    NormalsReader,
    UnreadableFileError,
    read_alpha,
    read_trimap,
)
from jaxpercept.data.scenes import CLASSES
from jaxpercept.errors import UserError


def unit_vectors(rng, size=(9, 13)):
    vectors = rng.standard_normal((*size, 3))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write_png16(path, pixels, rng):
    """A 16-bit colour PNG; every row is filtered in another way, as encoders do."""
    height, width, _ = pixels.shape
    rows = pixels.astype(">u2").tobytes()
    stride, step = width * 6, 6
    data, before = b"", bytes(stride)
    for y in range(height):
        row = rows[y * stride : (y + 1) * stride]
        kind = int(rng.integers(5))
        out = bytearray()
        for i, value in enumerate(row):
            left = row[i - step] if i >= step else 0
            corner = before[i - step] if i >= step else 0
            up = before[i]
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda v: abs(guess - v))
            out.append((value - (0, left, up, (left + up) // 2, paeth)[kind]) % 256)
        data, before = data + bytes([kind]) + bytes(out), row

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )  # fmt: skip


# ---- normals -------------------------------------------------------------------------------------


def test_normals_formats_agree(tmp_path, rng):
    openexr = pytest.importorskip("OpenEXR")
    normals = unit_vectors(rng)
    np.save(tmp_path / "a.npy", normals)
    for name, letters in (("a.exr", "RGB"), ("b.exr", "XYZ")):
        planes = {
            c: np.ascontiguousarray(normals[..., k], np.float32) for k, c in enumerate(letters)
        }
        openexr.File({}, planes | {"A": np.ones((9, 13), np.float32)}).write(str(tmp_path / name))
    Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8)).save(tmp_path / "8.png")
    write_png16(tmp_path / "16.png", np.rint((normals + 1) * 32767.5).astype(np.uint16), rng)
    for name, tolerance in (("a.npy", 1e-6), ("a.exr", 1e-6), ("b.exr", 1e-6), ("8.png", 0.012),
                            ("16.png", 5e-5)):  # fmt: skip
        read = NormalsReader()(tmp_path / name)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, normals, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(read, axis=-1), 1, atol=1e-6)


def test_sixteen_bits_are_more_than_eight(tmp_path, rng):
    """Neighbouring 16-bit values whose high bytes agree are told apart."""
    pixels = np.full((4, 6, 3), 40000, np.uint16)
    pixels[:, 3:, 0] += 7
    write_png16(tmp_path / "a.png", pixels, rng)
    read = NormalsReader()(tmp_path / "a.png")
    expected = pixels / 65535 * 2 - 1
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(read, expected, atol=1e-6)
    assert (read[:, :3] != read[:, 3:]).any()


def test_axes_are_directions(tmp_path, rng):
    """What a wall ahead, the floor and a wall on the right look like in the usual frames."""
    ours = {"ahead": (0, 0, 1), "floor": (0, 1, 0), "right": (-1, 0, 0)}
    frames = {
        "right_up_back": {"ahead": (0, 0, 1), "floor": (0, 1, 0), "right": (-1, 0, 0)},
        # OpenCV's camera: x right, y down, z away.
        "right_down_front": {"ahead": (0, 0, -1), "floor": (0, -1, 0), "right": (-1, 0, 0)},
        # DSINE: OpenCV's axes, but normals point away from the camera.
        "left_up_back": {"ahead": (0, 0, 1), "floor": (0, 1, 0), "right": (1, 0, 0)},
    }
    for axes, surfaces in frames.items():
        for surface, stored in surfaces.items():
            np.save(tmp_path / "n.npy", np.broadcast_to(np.array(stored, np.float64), (2, 3, 3)))
            read = NormalsReader(axes)(tmp_path / "n.npy")
            assert (read == ours[surface]).all(), (axes, surface)
    assert len(AXES) == 8
    normals = unit_vectors(rng)
    np.save(tmp_path / "n.npy", normals)
    for axes, signs in AXES.items():
        np.testing.assert_allclose(
            NormalsReader(axes)(tmp_path / "n.npy"), normals * signs, atol=1e-6
        )
    with pytest.raises(UserError, match="Unknown normals_axes 'xyz'"):
        NormalsReader("xyz")


def test_absent_normals_are_zero(tmp_path, rng):
    normals = unit_vectors(rng, (2, 6)) * rng.uniform(0.5, 3, (2, 6, 1))
    normals[0, :5] = [[0, 0, 0], [0.05, 0.05, 0], [np.nan, 1, 0], [np.inf, 0, 0], [0, -0.0, 0]]
    np.save(tmp_path / "a.npy", normals)
    read = NormalsReader("left_down_front")(tmp_path / "a.npy")
    present = np.ones((2, 6), bool)
    present[0, :5] = False
    np.testing.assert_array_equal(read.any(-1), present)
    assert not np.signbit(read[~present]).any()
    np.testing.assert_allclose(np.linalg.norm(read, axis=-1), present, atol=1e-6)
    pixels = np.full((1, 4, 3), 200, np.uint8)
    pixels[0, :3] = [[0, 0, 0], [127, 128, 127], [0, 0, 255]]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = NormalsReader()(tmp_path / "a.png")
    np.testing.assert_array_equal(read.any(-1), [[False, False, True, True]])


def test_wrong_normals_are_named(tmp_path, rng):
    np.save(tmp_path / "two.npy", np.zeros((4, 4, 2)))
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    np.save(tmp_path / "whole.npy", np.zeros((4, 4, 3), np.int32))
    Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "broken.exr").write_bytes(b"\x76\x2f\x31\x01 not really")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    openexr = pytest.importorskip("OpenEXR")
    openexr.File({}, {"Y": np.zeros((4, 4), np.float32)}).write(str(tmp_path / "one.exr"))
    for path in [*tmp_path.iterdir(), tmp_path / "nowhere.npy"]:
        with pytest.raises(UnreadableFileError, match=path.name):
            NormalsReader()(path)


# ---- mattes --------------------------------------------------------------------------------------


def test_alpha_formats_agree(tmp_path, rng):
    values = rng.integers(0, 256, (7, 9), dtype=np.uint8)
    for name, image in {
        "L.png": Image.fromarray(values),
        "RGB.png": Image.fromarray(np.repeat(values[..., None], 3, -1)),
        "P.png": Image.fromarray(values).convert("P"),
        "I16.png": Image.fromarray(values.astype(np.uint16) * 257),
    }.items():
        image.save(tmp_path / name)
        alpha = read_alpha(tmp_path / name)
        assert alpha.dtype == np.float32
        np.testing.assert_array_equal(alpha[..., 0], values.astype(np.float32) / np.float32(255))
    binary = rng.random((7, 9)) < 0.5
    Image.fromarray(binary).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_alpha(tmp_path / "1.png")[..., 0], binary)


def test_coloured_and_transparent_masks_are_named(tmp_path, rng):
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "colour.png")
    Image.fromarray(colours).convert("RGBA").save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("none")
    for path in tmp_path.iterdir():
        with pytest.raises(UnreadableFileError, match=path.name):
            read_alpha(path)


def test_any_grey_of_a_trimap_is_unknown(tmp_path):
    Image.fromarray(np.array([[0, 1, 127, 128, 254, 255]], np.uint8)).save(tmp_path / "a.png")
    trimap = read_trimap(tmp_path / "a.png")
    assert trimap.dtype == np.uint8
    np.testing.assert_array_equal(trimap[0, :, 0], [0, 128, 128, 128, 128, 255])


# ---- classes -------------------------------------------------------------------------------------


def test_class_numbers_go_through_the_table(tmp_path, rng):
    numbers = rng.integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    image = Image.fromarray(numbers)
    image.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())  # colours mean nothing
    image.save(tmp_path / "b.png")
    Image.fromarray(numbers.astype(np.uint16) * 3).save(tmp_path / "c.png")
    table = rng.integers(0, 20, 100)
    for name, stored in (
        ("a.png", numbers),
        ("b.png", numbers),
        ("c.png", numbers.astype(int) * 3),
    ):
        read = ClassesReader(tuple(table.tolist()))(tmp_path / name)[..., 0]
        assert read.dtype == np.int32
        expected = np.where(stored < 100, table[np.minimum(stored, 99)], VOID)
        np.testing.assert_array_equal(read, expected, err_msg=name)
        read = ClassesReader()(tmp_path / name)[..., 0]
        np.testing.assert_array_equal(read, np.minimum(stored, VOID), err_msg=name)


def test_colours_become_classes(tmp_path, rng):
    colours = PALETTES["ade20k"].colours
    classes = rng.integers(0, len(colours), (12, 12))
    pixels = np.array(colours, np.uint8)[classes]
    pixels[0, 0], pixels[1, 1] = (0, 0, 0), (1, 2, 3)
    classes[0, 0] = classes[1, 1] = VOID
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        ClassesReader(colours=colours)(tmp_path / "a.png")[..., 0], classes
    )
    with pytest.raises(UnreadableFileError, match=r"a\.png: expected one class number per pixel"):
        ClassesReader()(tmp_path / "a.png")


@pytest.mark.parametrize("name", PALETTES)
def test_palettes_are_distinct_and_leave_black_to_void(name):
    names, colours = PALETTES[name]
    assert len(names) == len(colours)
    assert len(set(colours)) == len(colours)
    assert (0, 0, 0) not in colours
    assert all(0 <= value <= 255 for value in itertools.chain(*colours))
    doubled = {name for name in names if names.count(name) > 1}
    assert not doubled


def test_sizes_and_order_of_palettes():
    sizes = {"nyu40": 40, "nyu13": 13, "ade20k": 150, "cityscapes": 19, "camvid": 11, "vkitti": 14}
    assert {name: len(PALETTES[name].names) for name in sizes} == sizes
    assert PALETTES["scenes"].names == CLASSES
    colours = np.array(((0, 0, 0), *spread_colours(63)))
    assert sorted(map(tuple, colours)) == list(itertools.product((0, 85, 170, 255), repeat=3))
    apart = [np.linalg.norm(colours[:n] - colours[n], axis=1).min() for n in range(1, 64)]
    assert (np.diff(apart) <= 0).all()
    assert apart[0] == pytest.approx(255 * 3**0.5)
    assert sorted(CITYSCAPES_IDS.values()) == list(range(19))
    assert len(NYU40_TO_13) == 40
    assert set(NYU40_TO_13) == set(range(13))
    same = {"bed", "books", "ceiling", "chair", "floor", "picture", "sofa", "table", "television",
            "wall", "window"}  # fmt: skip
    for number, name in enumerate(PALETTES["nyu40"].names):
        if name in same:
            assert PALETTES["nyu13"].names[NYU40_TO_13[number]] == name
