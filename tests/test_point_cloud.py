"""Points from depth, and the PLY file they are written to."""

import math
from pathlib import Path

import numpy as np
import pytest

from jaxpercept.errors import UserError
from jaxpercept.inference.point_cloud import (
    Intrinsics,
    affine_to_metric,
    edge_mask,
    save_point_cloud,
    unproject,
    write_ply,
)

TYPES = {"float": "<f4", "uchar": "u1"}


def read_ply(path):
    """Vertices by property, and the comments, as the format's description says."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    lines = [line.split() for line in head.decode("ascii").splitlines()]
    assert lines[:2] == [["ply"], ["format", "binary_little_endian", "1.0"]]
    comments = [" ".join(words[1:]) for words in lines if words[0] == "comment"]
    (count,) = (int(words[2]) for words in lines if words[:2] == ["element", "vertex"])
    layout = np.dtype([(words[2], TYPES[words[1]]) for words in lines if words[0] == "property"])
    assert len(body) == count * layout.itemsize
    vertices = np.frombuffer(body, layout)
    points = np.stack([vertices[name] for name in "xyz"], axis=-1)
    colors = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=-1)
    return points, colors, comments


def project(points, camera):
    x, y, z = np.moveaxis(points.astype(np.float64), -1, 0)
    return np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], axis=-1)


def a_camera(rng):
    fx, fy, cx, cy = (float(value) for value in rng.uniform((30, 30, 10, 8), (80, 80, 40, 25)))
    return Intrinsics(fx, fy, cx, cy)


def a_picture(rng, size):
    return rng.integers(0, 256, (*size, 3)).astype(np.uint8)


# ---- Geometry ------------------------------------------------------------------------------------


def test_points_project_back_to_their_pixels(rng):
    camera = a_camera(rng)
    depth = rng.uniform(0.5, 10, (33, 47)).astype(np.float32)
    points = unproject(depth, camera)
    assert points.dtype == np.float32
    rows, columns = np.indices(depth.shape)
    np.testing.assert_allclose(
        project(points, camera), np.stack([columns, rows], axis=-1), atol=1e-4
    )
    np.testing.assert_array_equal(points[..., 2], depth)
    np.testing.assert_array_equal(unproject(depth, camera, "opengl"), points * (1, -1, -1))


def test_a_plane_stays_a_plane(rng):
    camera = Intrinsics.from_fov(70.0, (48, 64))
    towards = rng.uniform(0, 2 * np.pi)
    normal = np.array([0.5 * np.cos(towards), 0.5 * np.sin(towards), -1])
    normal /= np.linalg.norm(normal)
    rows, columns = np.indices((48, 64))
    rays = np.stack(
        [(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones((48, 64))], -1
    )
    # Points p with normal . p = -2: two metres before the camera.
    depth = -2 / (rays @ normal)
    points = unproject(depth, camera)
    np.testing.assert_allclose(points @ normal, -2, atol=1e-5)
    # A wrong shift bends it, as users see.
    for shift, flat in ((0.0, True), (1.0, False)):
        cloud = unproject(depth + shift, camera).reshape(-1, 3).astype(np.float64)
        thickness = np.linalg.svd(cloud - cloud.mean(axis=0), compute_uv=False)[-1]
        assert (thickness < 1e-3) == flat


def test_field_of_view(rng):
    degrees, (height, width) = float(rng.uniform(20, 120)), (48, 64)
    camera = Intrinsics.from_fov(degrees, (height, width))
    assert camera.fx == camera.fy
    # The image reaches half a pixel beyond the centres of its outer pixels.
    left, right = ((u - camera.cx) / camera.fx for u in (-0.5, width - 0.5))
    angle = math.degrees(math.atan(right) - math.atan(left))
    assert angle == pytest.approx(degrees)
    assert left == pytest.approx(-right)
    assert -0.5 - camera.cy == pytest.approx(camera.cy - (height - 0.5))


def test_a_resized_image_sees_the_same(rng):
    camera = a_camera(rng)
    half = camera.scaled((48, 64), (24, 16))
    assert (half.fx, half.fy) == pytest.approx((camera.fx / 4, camera.fy / 2))
    # The corner of a pixel of the small image is one of the large image, on the same ray.
    for small, large in (((-0.5, -0.5), (-0.5, -0.5)), ((2.5, 6.5), (11.5, 13.5))):
        rays = [
            ((u - which.cx) / which.fx, (v - which.cy) / which.fy)
            for (u, v), which in ((small, half), (large, camera))
        ]
        assert rays[0] == pytest.approx(rays[1])
    back = half.scaled((24, 16), (48, 64))
    assert (back.fx, back.fy, back.cx, back.cy) == pytest.approx(
        (camera.fx, camera.fy, camera.cx, camera.cy)
    )


def test_metres_of_affine_predictions(rng):
    metres = rng.uniform(1, 10, (9, 12))
    scale, shift = float(rng.uniform(2, 5)), float(rng.uniform(-1, 1))
    for kind, truth in (("affine_depth", metres), ("affine_disparity", 1 / metres)):
        values = ((truth - shift) / scale).astype(np.float32)
        fitted = affine_to_metric(values, scale, shift, kind)
        assert fitted.dtype == np.float32
        np.testing.assert_allclose(fitted, metres, rtol=1e-4)
    # At infinity, or behind the camera.
    values = np.array([[0.1, 0.2, 0.5]])
    for kind, last in (("affine_depth", 0.6), ("affine_disparity", 1 / 0.6)):
        fitted = affine_to_metric(values, 2.0, -0.4, kind)
        np.testing.assert_allclose(fitted, [[np.nan, np.nan, last]], rtol=1e-6)


def test_edges(rng):
    depth = np.full((6, 8), 2.0, np.float32)
    depth[:, 4:] = 2.15
    depth[3, 1] = np.nan
    expected = np.zeros((6, 8), bool)
    assert (edge_mask(depth, 0.08) == expected).all()
    expected[:, 3:5] = True
    assert (edge_mask(depth, 0.07) == expected).all()
    assert (edge_mask(depth.T, 0.07) == expected.T).all()
    # The unit of depth does not matter, nor what lies beyond all measure.
    assert (edge_mask(depth * 1000, 0.07) == expected).all()
    depth[:, 4:] = np.inf
    assert (edge_mask(depth, 0.07) == expected).all()
    # A floor is no edge, though depth changes by metres.
    rows = np.arange(20, 60, dtype=np.float64)[:, None]
    assert not edge_mask(np.repeat(100 / rows, 5, axis=1), 0.06).any()


# ---- Files ---------------------------------------------------------------------------------------


def test_file_of_points(tmp_path, rng):
    points = rng.normal(size=(7, 9, 3)).astype(np.float32)
    colors, valid = a_picture(rng, (7, 9)), rng.random((7, 9)) < 0.6
    valid[0] = True
    points[0, 0, 1], points[0, 1, 2] = np.nan, np.inf
    path = tmp_path / "sub/cloud.ply"
    count = write_ply(path, points, colors, valid, ["first\nstill first", "second"])
    valid[0, :2] = False
    assert count == valid.sum()
    read, read_colors, comments = read_ply(path)
    np.testing.assert_array_equal(read, points[valid])
    np.testing.assert_array_equal(read_colors, colors[valid])
    assert comments == ["first still first", "second"]
    assert list(path.parent.iterdir()) == [path]
    assert write_ply(path, np.nan_to_num(points), colors) == 63


def test_a_failed_write_leaves_the_old_cloud(tmp_path, rng, monkeypatch):
    path = tmp_path / "cloud.ply"
    write_ply(path, np.ones((1, 2, 3), np.float32), a_picture(rng, (1, 2)))
    before = path.read_bytes()
    with pytest.raises(UserError, match="no point is left"):
        write_ply(path, np.full((1, 2, 3), np.nan, np.float32), a_picture(rng, (1, 2)))

    def full(*_):
        raise OSError("no space left on device")

    # The last thing that can fail, when all is written.
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_ply(path, np.ones((5, 2, 3), np.float32), a_picture(rng, (5, 2)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["affine_depth", "affine_disparity", "metric_depth"])
def test_cloud_of_a_prediction(tmp_path, rng, kind):
    size = (12, 16)
    metres, rgb, camera = rng.uniform(1, 5, size), a_picture(rng, size), a_camera(rng)
    fit = {} if kind == "metric_depth" else {"scale": 3.25, "shift": -0.5}
    truth = 1 / metres if kind == "affine_disparity" else metres
    values = (truth - fit.get("shift", 0)) / fit.get("scale", 1)
    count = save_point_cloud(
        tmp_path / "a.ply",
        kind,
        values[..., None].astype(np.float32),
        rgb,
        intrinsics=camera,
        convention="opengl",
        edge_threshold=None,
        **fit,
    )
    assert count == 12 * 16
    points, colors, comments = read_ply(tmp_path / "a.ply")
    expected = unproject(metres, camera, "opengl").reshape(-1, 3)
    np.testing.assert_allclose(points, expected, rtol=1e-3)
    np.testing.assert_array_equal(colors, rgb.reshape(-1, 3))
    header = "\n".join(comments)
    assert f"fx {camera.fx:.9g} fy {camera.fy:.9g} cx {camera.cx:.9g} cy {camera.cy:.9g}" in header
    assert "intrinsics (given)" in header
    assert "convention opengl: +x right, +y up, +z towards the viewer" in header
    assert ("scale 3.25 shift -0.5" in header) == bool(fit)
    assert ("1 / metres = " in header) == (kind == "affine_disparity")


def test_cloud_without_camera_or_edges(tmp_path, rng):
    depth = np.full((20, 30, 1), 2, np.float32)
    depth[:, 20:] = 4
    depth[0, 0], depth[0, 1], depth[0, 2] = np.nan, 0, np.inf
    count = save_point_cloud(tmp_path / "a.ply", "metric_depth", depth, a_picture(rng, (20, 30)))
    # Two columns along the jump, three pixels without depth, two beside the one at infinity.
    assert count == 600 - 2 * 20 - 3 - 2
    points, _, comments = read_ply(tmp_path / "a.ply")
    assert any("assumed, 60 degrees horizontal field of view" in line for line in comments)
    camera = Intrinsics.from_fov(60.0, (20, 30))
    assert any(f"fx {camera.fx:.9g}" in line for line in comments)
    assert points[:, 2].max() == 4
    pixels = project(points, camera)
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    assert len(np.unique(np.rint(pixels), axis=0)) == count


def test_the_file_opens_in_plyfile(tmp_path, rng):
    plyfile = pytest.importorskip("plyfile")
    points, colors = rng.normal(size=(4, 5, 3)), a_picture(rng, (4, 5))
    write_ply(tmp_path / "a.ply", points, colors, comments=["x"])
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    np.testing.assert_allclose(vertex["y"], points[..., 1].ravel(), rtol=1e-6)
    np.testing.assert_array_equal(vertex["blue"], colors[..., 2].ravel())


# ---- Refusals ------------------------------------------------------------------------------------


def test_what_gives_no_cloud(tmp_path, rng):
    depth, rgb = np.ones((4, 5, 1), np.float32), a_picture(rng, (4, 5))

    def refused(message, kind="metric_depth", prediction=depth, image=rgb, **options):
        with pytest.raises(UserError, match=message):
            save_point_cloud(tmp_path / "a.ply", kind, prediction, image, **options)

    refused("give scale and shift", "affine_depth")
    refused("give scale and shift", "affine_disparity", scale=1.0)
    refused("leave scale and shift out", scale=1.0, shift=0.0)
    refused("normals is none", "normals")
    for scale, shift in ((0.0, 1.0), (-1.0, 0.0), (np.nan, 0.0), (1.0, np.nan), (np.inf, 0.0)):
        refused("give no metres", "affine_depth", scale=scale, shift=shift)
    refused("no point is left", "affine_depth", scale=1.0, shift=-5.0)
    refused("no point is left", prediction=depth * np.float32(np.nan))
    refused("unknown: use opengl or opencv", convention="blender")
    refused("above 0", edge_threshold=0.0)
    refused("above 0", edge_threshold=math.nan)
    refused("6 x 4 .* 5 x 4 pixels", image=a_picture(rng, (4, 6)))
    assert not list(tmp_path.iterdir())


def test_what_is_no_camera():
    good = {"fx": 1.0, "fy": 1.0, "cx": -3.0, "cy": 0.0}
    Intrinsics(**good)
    for name, value in (("fx", -1.0), ("fy", 0.0), ("fx", math.nan), ("cy", math.inf)):
        with pytest.raises(UserError, match=f"have {name} ="):
            Intrinsics(**good | {name: value})
    for degrees in (0.0, 180.0, -60.0, math.nan):
        with pytest.raises(UserError, match="field of view"):
            Intrinsics.from_fov(degrees, (4, 5))
    with pytest.raises(UserError, match="no scale and shift"):
        affine_to_metric(np.ones((1, 1)), 1.0, 0.0, "normals")
