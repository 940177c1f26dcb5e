"""The procedural scenes: exactness, conventions, language, and the same bits everywhere."""

import functools
import hashlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxpercept.data import scenes
from jaxpercept.data.scenes.builder import Parts, Thing
from jaxpercept.data.scenes.language import MAX_WORDS, SEEN, phrases, sights
from jaxpercept.data.scenes.palette import Draws, rotation
from jaxpercept.data.scenes.plan import Layout
from jaxpercept.errors import UserError

GOLDEN = {
    True: (
        "4a0cd1e607e74ea42d5c591930ba8f3be1ca8e4f357a7d893d25d89b84c52d35"
        "91d766b24c8e98542b95beecc943f98940d0382f63cb92c7d2de4f08911d4e1f"
    ),
    False: (
        "6de06a3b3d4fedc1927486e6959215c7c6b5cfef682e2554fcebc75d7f09d97b"
        "dd05d3ee154277213aca8f5119e56e503ddb0f8602d4f205412c65d624ba323c"
    ),
}
ARRAYS = ("rgb", "depth", "valid", "normals", "instance", "classes", "intrinsics")


def digest(render, indices, **options) -> str:
    total = hashlib.sha256()
    for index in indices:
        scene = render(index, **options)
        for name in ARRAYS:
            total.update(np.ascontiguousarray(scene[name]).tobytes())
        total.update(repr((scene["caption"], scene["phrases"])).encode())
    return total.hexdigest()


def geometry(render, index: int) -> tuple[Layout, Parts]:
    layout = scenes.compose(Draws(0, index), **render.keywords)
    return layout, layout.builder.finish(1 + len(layout.recess_walls))


def rays(scene, layout, rows, columns):
    """World origin and directions (camera z component 1) of pixels, in float64."""
    fx, fy, cx, cy = scene["intrinsics"].astype(np.float64)
    u, v = (columns + 0.5 - cx) / fx, (rows + 0.5 - cy) / fy
    camera = layout.camera
    right, up, forward = (np.array(a) for a in (camera.right, camera.up, camera.forward))
    return np.array(camera.position), u[:, None] * right - v[:, None] * up + forward


def slab(origin, direction, solid, parts):
    """(enter, leave) of rays with a solid's box: the textbook slab test, t along the ray."""
    axes, half = parts.solids.axes[solid], parts.solids.half[solid]
    o = axes @ (origin - parts.solids.centre[solid])
    d = direction @ axes.T
    with np.errstate(divide="ignore"):
        a, b = (-half - o) / d, (half - o) / d
    return np.minimum(a, b).max(1), np.maximum(a, b).min(1), o, d


def first_hit(origin, direction, solid, parts):
    """Distance to a box cut by its quadric, in t; infinity where the ray misses."""
    enter, leave, o, d = slab(origin, direction, solid, parts)
    used, k2, k1, k0 = parts.solids.quadric[solid]
    pieces = [(enter, leave)]
    if used:
        o, d = o / parts.solids.radii[solid], d / parts.solids.radii[solid]
        square = d[:, 0] ** 2 + d[:, 2] ** 2 + k2 * d[:, 1] ** 2
        linear = 2 * (o[0] * d[:, 0] + o[2] * d[:, 2] + k2 * o[1] * d[:, 1]) + k1 * d[:, 1]
        constant = o[0] ** 2 + o[2] ** 2 + k2 * o[1] ** 2 + k1 * o[1] + k0
        inner = linear**2 - 4 * square * constant
        root = np.sqrt(np.maximum(inner, 0))
        one, two = (-linear - root) / (2 * square), (-linear + root) / (2 * square)
        low, high = np.minimum(one, two), np.maximum(one, two)
        bowl, never = square > 0, inner < 0
        # Inside where the parabola is negative: between the roots, or outside of them.
        pieces = [
            (np.maximum(enter, np.where(bowl, low, -np.inf)),
             np.minimum(leave, np.where(bowl, np.where(never, -np.inf, high), low))),
            (np.maximum(enter, np.where(bowl, np.inf, high)), leave),
        ]  # fmt: skip
        whole = never & ~bowl
        pieces.append((np.where(whole, enter, np.inf), leave))
    best = np.full(len(direction), np.inf)
    for start, end in pieces:
        best = np.where((start <= end) & (start > 0) & (start < best), start, best)
    return best


def reference_depth(scene, layout, parts, rows, columns):
    """Every ray against every solid, one by one, in float64."""
    origin, direction = rays(scene, layout, rows, columns)
    _, room, _, _ = slab(origin, direction, 0, parts)
    best = room.copy()
    for solid in range(1, parts.inward):
        enter, leave, o, d = slab(origin, direction, solid, parts)
        at = o + enter[:, None] * d
        half = parts.solids.half[solid]
        opening = (np.abs(at[:, 2] - half[2]) < 1e-9) & (enter < leave) & (enter > 0)
        best = np.where(opening & (enter <= room + 1e-9), leave, best)
    for solid in range(parts.inward, len(parts.instance)):
        best = np.minimum(best, first_hit(origin, direction, solid, parts))
    return best


@pytest.fixture(params=[False, True], ids=["plain", "furnished"])
def render(request):
    return functools.partial(scenes.render, furnished=request.param)


@pytest.fixture
def index(rng) -> int:
    return int(rng.integers(0, 2**31))


def test_arrays_have_the_documented_shapes_and_ranges(render, rng):
    for number in rng.integers(0, 2**31, 20).tolist():
        scene = render(number)
        assert scene["rgb"].shape == (96, 128, 3)
        assert scene["rgb"].dtype == np.uint8
        assert scene["depth"].shape == (96, 128, 1)
        assert scene["depth"].dtype == np.float32
        assert scene["depth"].min() > 0.1
        assert scene["depth"].max() < 15
        assert scene["valid"].all()
        assert scene["valid"].dtype == bool
        assert scene["normals"].dtype == np.float32
        assert scene["instance"].dtype == scene["classes"].dtype == np.int32
        assert scene["instance"].min() >= 0
        assert scene["classes"].min() >= 0
        assert scene["classes"].max() < len(scenes.CLASSES)
        assert scene["rgb"].std() > 3
        assert scene["index"] == number


def test_depth_equals_slow_float64_ray_casting(render, rng):
    checked = wrong = 0
    for number in rng.integers(0, 2**31, 25).tolist():
        scene = render(number)
        layout, parts = geometry(render, number)
        rows, columns = rng.integers(0, 96, 300), rng.integers(0, 128, 300)
        truth = reference_depth(scene, layout, parts, rows, columns)
        error = np.abs(scene["depth"][rows, columns, 0] - truth) / truth
        checked, wrong = checked + len(rows), wrong + int((error > 2e-4).sum())
        assert np.median(error) < 1e-6
    # Only where a ray grazes an edge may rounding choose the other surface.
    assert wrong <= 0.003 * checked


def test_floor_and_ceiling_pixels_lie_on_their_planes(render, rng):
    for number in rng.integers(0, 2**31, 10).tolist():
        scene = render(number)
        layout, _ = geometry(render, number)
        for name, height in (("floor", 0.0), ("ceiling", layout.size[1])):
            here = (scene["classes"] == scenes.CLASSES.index(name)) & (scene["instance"] == 0)
            rows, columns = np.nonzero(here)
            if not rows.size:
                continue
            origin, direction = rays(scene, layout, rows, columns)
            y = origin[1] + direction[:, 1] * scene["depth"][rows, columns, 0]
            # A doorway has a ceiling of its own, at most 2.2 m high.
            right = (np.abs(y - height) < 2e-5) | ((name == "ceiling") & (y < 2.21))
            assert right.mean() > 0.999


def test_normals_are_unit_face_the_viewer_and_agree_with_depth(render, rng):
    for number in rng.integers(0, 2**31, 10).tolist():
        scene = render(number, height=96, width=128)
        normals, depth = scene["normals"].astype(np.float64), scene["depth"].astype(np.float64)
        assert np.abs((normals**2).sum(-1) - 1).max() < 1e-5
        fx, fy, cx, cy = scene["intrinsics"]
        u = (np.arange(128) + 0.5 - cx) / fx
        v = (np.arange(96) + 0.5 - cy) / fy
        # +x right, +y up, +z towards the viewer
        ray = np.stack(np.broadcast_arrays(u[None, :], -v[:, None], -1.0), -1)
        toward = (normals * ray).sum(-1)
        assert (toward < 1e-3).mean() > 0.999
        points = ray * depth
        right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        estimate = np.cross(down, right)
        estimate /= np.linalg.norm(estimate, axis=-1, keepdims=True)
        middle, around = normals[1:-1, 1:-1], (normals[1:-1, 2:], normals[1:-1, :-2],
                                               normals[2:, 1:-1], normals[:-2, 1:-1])  # fmt: skip
        flat = np.all([np.abs(middle - other).max(-1) < 1e-6 for other in around], axis=0)
        offset = (normals * points).sum(-1)  # the same on one plane, not on parallel ones
        for other in (offset[1:-1, 2:], offset[1:-1, :-2], offset[2:, 1:-1], offset[:-2, 1:-1]):
            flat &= np.abs(offset[1:-1, 1:-1] - other) < 1e-4
        assert flat.sum() > 1000
        assert (estimate * middle).sum(-1)[flat].min() > 0.999


def test_an_index_renders_the_same_whatever_was_rendered_before(render, index):
    first = digest(render, [index])
    render(index + 1, height=24, width=32)
    render(index // 2, seed=5)
    assert digest(render, [index]) == first
    assert digest(render, [index], seed=1) != first
    assert digest(render, [index + 1]) != first


def test_the_pictures_are_the_same_on_every_machine(render):
    assert (
        digest(render, range(6)) + digest(render, [2**31 - 1], seed=3, height=60, width=80)
        == GOLDEN[render.keywords["furnished"]]
    )


def test_the_bits_do_not_depend_on_simd_level(render, index):
    code = (
        "import hashlib, numpy as np\n"
        "from jaxpercept.data import scenes\n"
        f"s = scenes.render({index}, **{render.keywords})\n"
        "total = hashlib.sha256()\n"
        f"for name in {ARRAYS!r}: total.update(np.ascontiguousarray(s[name]).tobytes())\n"
        "print(total.hexdigest())\n"
    )
    found = set()
    for disabled in ("", "X86_V4 AVX512F AVX512_SKX", "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512_SKX"):
        environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": disabled}
        if not disabled:
            environment.pop("NPY_DISABLE_CPU_FEATURES")
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        found.add(result.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize("size", [(60, 80), (30, 40)])
def test_sizes_render_the_same_scene(render, index, size):
    height, width = size
    coarse = render(index, height=height, width=width)
    fine = render(index, height=3 * height, width=3 * width)
    # The middle of three pixels looks along the coarse pixel's ray.
    depth, other = coarse["depth"], fine["depth"][1::3, 1::3]
    assert (np.abs(depth - other) < 1e-4 * depth).mean() > 0.99
    assert (coarse["instance"] == fine["instance"][1::3, 1::3]).mean() > 0.99
    np.testing.assert_allclose(3 * coarse["intrinsics"], fine["intrinsics"], rtol=1e-6)
    blurred = fine["rgb"].reshape(height, 3, width, 3, 3).mean((1, 3))
    assert np.abs(blurred - coarse["rgb"]).mean() < 25


def test_what_lies_between_the_sampled_pixels_is_a_rival_too():
    """Places are taken from every second pixel of every second row."""
    things = [Thing("box", "", 1.0, "floor")] * 2
    instance = np.zeros((40, 60), np.int32)
    instance[10:20, 10:30] = 1
    instance[31, 40:50] = 2
    depth = np.where(instance == 2, 3.0, 2.0)[..., None].astype(np.float32)
    seen = sights(things, instance, depth)
    assert [(sight.id, sight.share * 2400) for sight in seen] == [(1, 200), (2, 10)]
    assert seen[1].x == pytest.approx(45 / 60)
    assert seen[1].depth == pytest.approx(3.0, abs=1e-3)
    assert ("the box", 1) not in phrases(seen)
    assert ("the box on the left", 1) in phrases(seen)


def test_phrases_name_visible_objects_and_only_one_each(render, rng):
    total = 0
    for number in rng.integers(0, 2**31, 40).tolist():
        scene = render(number)
        layout, _ = geometry(render, number)
        things, instance = layout.builder.things, scene["instance"]
        share = np.bincount(instance.ravel(), minlength=len(things) + 1) / instance.size
        x = {k: np.nonzero(instance == k)[1].mean() for k in range(1, len(share)) if share[k]}
        phrases = scene["phrases"]
        assert len({phrase for phrase, _ in phrases}) == len(phrases)
        for phrase, target in phrases:
            total += 1
            assert share[target] >= SEEN
            thing = things[target - 1]
            assert phrase.startswith("the ")
            assert thing.kind in phrase
            rivals = [
                k for k in x if k != target and things[k - 1].kind == thing.kind and share[k] > 1e-3
            ]
            colour = f"{thing.word} {thing.kind}" in phrase
            if colour:
                rivals = [k for k in rivals if things[k - 1].word == thing.word]
            if phrase == f"the {thing.kind}" or phrase == f"the {thing.word} {thing.kind}":
                assert not rivals
            elif phrase.endswith("on the left"):
                assert all(x[target] < x[k] for k in rivals)
            elif phrase.endswith("on the right"):
                assert all(x[target] > x[k] for k in rivals)
            elif "largest" in phrase:
                assert all(share[target] > share[k] for k in rivals)
    assert total > 60


def test_captions_are_short_english_from_a_small_vocabulary(render):
    words: set[str] = set()
    for number in range(150):
        caption = render(number, height=24, width=32)["caption"]
        split = caption.replace(",", "").split()
        assert 3 <= len(split) <= MAX_WORDS
        assert caption.isascii()
        words |= set(split)
    furnished = render.keywords["furnished"]
    assert (50 if furnished else 20) < len(words) < (300 if furnished else 70)


def test_source_is_random_access_and_pickles(render, index):
    source = scenes.SceneSource(3, 10, index, height=24, width=32, **render.keywords)
    assert len(source) == 10
    copy = pickle.loads(pickle.dumps(source))
    expected = render(index + 7, seed=3, height=24, width=32)
    for name in ARRAYS:
        np.testing.assert_array_equal(copy[7][name], expected[name])
    with pytest.raises(IndexError):
        source[10]


@pytest.mark.parametrize(
    "options", [{"index": -1}, {"index": 0, "height": 4}, {"index": 0, "seed": -2}]
)
def test_bad_arguments_are_named(options):
    with pytest.raises(UserError):
        scenes.render(**options)


def test_empty_source_is_refused():
    with pytest.raises(UserError):
        scenes.SceneSource(size=0)


def test_rotation_is_exactly_orthonormal(rng):
    for angle in rng.uniform(-7, 7, 200).tolist():
        cos, sin = rotation(angle)
        assert abs(cos * cos + sin * sin - 1) < 1e-15
        assert math.hypot(cos - math.cos(angle), sin - math.sin(angle)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("furnished", [False, True])
def test_a_core_renders_at_least_150_scenes_a_second(furnished):
    # In a process of its own: here every call is type-checked. The best of fifteen runs of each
    # scene, since other work on the machine only ever adds time.
    code = (
        "import time\n"
        "from jaxpercept.data import scenes\n"
        "best = [1e9] * 40\n"
        "for _ in range(15):\n"
        "    for number in range(40):\n"
        "        start = time.process_time()\n"
        f"        scenes.render(1000 + number, furnished={furnished})\n"
        "        best[number] = min(best[number], time.process_time() - start)\n"
        "print(len(best) / sum(best))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert float(result.stdout) > 150
