"""Corrupted targets against OpenCV, Pillow and torchvision's transforms written in NumPy."""

import functools
import itertools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance

from jaxpercept.diffusion import corruption
from jaxpercept.diffusion.corruption import Box, Jitter, Move, gaussian_blur, intensity

RED = np.float32([1, 0, 0])
OCHRE = np.float32([0.75, 0.5, 0.25])  # away from 0 and 1, where every change is seen
blur = jax.jit(gaussian_blur)
move = jax.jit(corruption.move)
erase = jax.jit(corruption.erase)
jitter = jax.jit(corruption.jitter)


def keys_of(rng, count):
    return jax.random.split(jax.random.key(int(rng.integers(2**31))), count)


@functools.cache
def drawn(draw, *size):
    """Draws for many keys and changes."""
    return jax.jit(jax.vmap(lambda key, change: draw(key, change, *size)))


# ---- intensity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 10, 1000])
def test_intensity(total):
    t = np.arange(total)
    rises, stays, falls = (
        np.asarray(intensity(jnp.asarray(t), total, kind)) for kind in corruption.INTENSITIES
    )
    np.testing.assert_allclose(rises, (t + 1) / total, rtol=1e-6)
    np.testing.assert_allclose(falls, rises[::-1], rtol=1e-6)
    assert len(np.unique(stays)) == 1
    for values in (rises, stays, falls):
        assert values.min() > 0
        assert values.max() <= 1
        assert values.dtype == np.float32
        assert values.mean() == pytest.approx((total + 1) / (2 * total), rel=1e-5)


# ---- blur ----------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 7), (2, 40), (9, 15), (16, 31), (70, 50)]


@pytest.mark.parametrize("size", SIZES)
def test_the_blur_is_opencv_s(rng, size):
    """Images smaller than the kernel, which are mirrored again and again, included."""
    image = rng.normal(size=(5, *size, 3)).astype(np.float32)
    sigma = np.float32([0.05, 0.3, *rng.uniform(0.5, 10, 2), 40])
    ours = blur(image, sigma)
    for i in range(5):
        expected = cv2.GaussianBlur(image[i].astype(np.float64), (31, 31), float(sigma[i]))
        np.testing.assert_allclose(ours[i], expected.reshape(image[i].shape), atol=2e-6)


def test_no_sigma_is_no_blur(rng):
    """OpenCV would take 5 pixels."""
    image = rng.normal(size=(3, 20, 33, 1)).astype(np.float32)
    ours = blur(image, np.float32([0, 1e-6, 0.02]))
    np.testing.assert_array_equal(ours, image)


def test_depth_is_blurred_as_in_the_released_code(rng):
    depth = rng.uniform(-1, 1, (6, 24, 40, 1)).astype(np.float32)
    depth[0, 0] = 1.5  # clipped
    strength = np.float32([0.001, 0.2, 0.5, 1, 2, 0])
    keys = keys_of(rng, 6)
    ours = jax.jit(corruption.blur_depth)(depth, strength, keys)
    draws = np.asarray(jax.vmap(jax.random.uniform)(keys))
    for i in range(5):
        zero_one = np.clip((depth[i, ..., 0].astype(np.float64) + 1) / 2, 0, 1)
        sigma = 10 * float(strength[i]) * float(draws[i])
        expected = cv2.GaussianBlur(zero_one, (31, 31), sigma) * 2 - 1
        np.testing.assert_allclose(ours[i, ..., 0], expected, atol=2e-6)
    np.testing.assert_array_equal(ours[5], depth[5])
    np.testing.assert_array_equal(ours[0], np.clip(depth[0], -1, 1))  # 0.01 pixels at most


# ---- moving --------------------------------------------------------------------------------------


def inverse_matrix(by, size):
    """From places in the moved image to places in the mask: of 3 x 3 matrices, inverted."""
    height, width = size
    to_middle = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    back = np.array([[1, 0, width / 2 + by.right], [0, 1, height / 2 + by.down], [0, 0, 1]])
    a = math.radians(by.angle)
    # y points down: this turns clockwise.
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    grow = np.diag([by.scale, by.scale, 1])
    return np.linalg.inv(back @ turn @ grow @ to_middle)


@pytest.mark.parametrize("size", [(24, 32), (17, 9), (40, 21)])
def test_masks_move_as_in_torchvision(rng, size):
    """By a loop over pixels; and by Pillow, whose fixed-point arithmetic errs at a few edges."""
    height, width = size
    mask = rng.random((*size, 1)).astype(np.float32)
    for _ in range(4):
        right, down = rng.integers(-4, 5, 2).tolist()
        angle, scale = rng.uniform((-40, 0.6), (40, 1.6)).tolist()
        by = Move(angle, right, down, scale)
        ours = np.asarray(move(mask, Move(*map(jnp.float32, by))))[..., 0]
        matrix = inverse_matrix(by, size)
        sure, seen = 0, 0
        for y, x in itertools.product(range(height), range(width)):
            u, v, _ = matrix @ (x + 0.5, y + 0.5, 1)
            if min(abs(u - round(u)), abs(v - round(v))) < 1e-4:
                continue  # a tie between two pixels
            inside = 0 <= u < width and 0 <= v < height
            expected = mask[math.floor(v), math.floor(u), 0] if inside else 0
            assert ours[y, x] == expected, (y, x, by)
            sure, seen = sure + 1, seen + inside
        assert sure > 0.9 * height * width
        assert seen > 0
        picture = Image.fromarray(mask[..., 0])
        theirs = picture.transform(
            (width, height), Image.Transform.AFFINE, matrix[:2].ravel(), Image.Resampling.NEAREST
        )
        assert (np.asarray(theirs) != ours).mean() < 0.02


def test_moves_one_can_see():
    mask = np.zeros((5, 5, 1), np.float32)
    mask[1, 3] = 1  # above and right of the middle

    def places(angle=0.0, right=0.0, down=0.0, scale=1.0):
        by = Move(*map(jnp.float32, (angle, right, down, scale)))
        return np.argwhere(np.asarray(move(mask, by))[..., 0]).tolist()

    assert places() == [[1, 3]]
    assert places(right=1.0, down=2.0) == [[3, 4]]
    assert places(right=2.0) == []
    assert places(angle=90.0) == [[3, 3]]  # clockwise
    assert places(scale=0.5) == []
    mask[1, 3], mask[2, 2] = 0, 1
    assert places(scale=3.0) == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]


def test_drawn_moves(rng):
    height, width, count = 40, 100, 4000
    change = np.full(count, 0.2, np.float32)
    by = jax.tree.map(
        np.asarray, drawn(corruption.draw_move, (height, width))(keys_of(rng, count), change)
    )
    for values, bound in (
        (by.angle, 10),
        (by.right, 20),
        (by.down, 8),
        (by.scale - 1, 0.2),
    ):
        assert np.abs(values).max() <= bound * 1.0001
        assert np.abs(values).max() > 0.98 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(values.mean()) < 0.06 * bound
    np.testing.assert_array_equal(by.right, np.rint(by.right))
    np.testing.assert_array_equal(by.down, np.rint(by.down))
    together = np.corrcoef([by.angle, by.right, by.down, by.scale])
    assert np.abs(together - np.eye(4)).max() < 0.1
    still = drawn(corruption.draw_move, (height, width))(keys_of(rng, 3), np.zeros(3, np.float32))
    for values, nothing in zip(still, (0, 0, 0, 1), strict=True):
        np.testing.assert_array_equal(values, nothing)


# ---- erasing -------------------------------------------------------------------------------------


def torchvision_box(rng, change, size):
    """RandomErasing.get_params as documented."""
    height, width = size
    if rng.random() >= 0.5:
        return 0, 0, 0, 0
    for _ in range(10):
        area = height * width * rng.uniform(0, change)
        ratio = math.exp(rng.uniform(math.log(0.5), math.log(2)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            return int(top), int(left), rows, columns
    return 0, 0, 0, 0


@pytest.mark.parametrize(("size", "change"), [((30, 50), 0.2), ((4, 300), 0.8), ((1, 9), 0.5)])
def test_drawn_boxes(rng, size, change):
    """Their sides and places are distributed as torchvision's; long images take few of them."""
    count = 6000
    box = drawn(corruption.draw_box, size)(keys_of(rng, count), np.full(count, change, np.float32))
    top, left, height, width = ours = np.asarray(box)
    theirs = np.array([torchvision_box(rng, change, size) for _ in range(count)]).T
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    assert ours.min() >= 0
    if size[0] == 1:  # nothing is smaller than one row, but no row at all
        assert (height == 0).all()
    else:
        assert height.max() == theirs[2].max()
    there = [x[:, (x[2] > 0) & (x[3] > 0)] for x in (ours, theirs)]
    assert there[0].shape[1] == pytest.approx(there[1].shape[1], abs=5 * (count / 2) ** 0.5)
    if there[0].size == 0:
        return
    for one, other in zip(*there, strict=True):
        error = 5 * (one.std() + other.std() + 0.01) / there[0].shape[1] ** 0.5
        assert one.mean() == pytest.approx(other.mean(), abs=error)
        assert one.std() == pytest.approx(other.std(), rel=0.2, abs=0.05)
    alike = [np.corrcoef(x[2], x[3])[0, 1] for x in there]
    assert alike[0] == pytest.approx(alike[1], abs=0.3 if there[0].shape[1] < 1000 else 0.1)


@settings(max_examples=20, deadline=None)
@given(*(st.integers(0, 12) for _ in range(4)))
def test_erasing(top, left, height, width):
    mask = np.arange(1, 133, dtype=np.float32).reshape(11, 12, 1)
    expected = mask.copy()
    expected[top : top + height, left : left + width] = 0
    ours = erase(mask, Box(*map(jnp.int32, (top, left, height, width))))
    np.testing.assert_array_equal(ours, expected)


# ---- colours -------------------------------------------------------------------------------------

ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_canvas_changes_its_colour_as_in_torchvision(rng, order):
    """Its ColorJitter calls Pillow's enhancers in turn, each of which rounds to eight bits."""
    for colour in (RED, rng.random(3).astype(np.float32)):
        factors = rng.uniform(0.4, 1.6, 3).astype(np.float32)
        canvas = Image.new("RGB", (4, 5), tuple(np.rint(255 * colour).astype(int).tolist()))
        for which in order:
            canvas = ENHANCE[which](canvas).enhance(float(factors[which]))
        ours = jitter(jnp.asarray(colour), Jitter(jnp.asarray(factors), jnp.asarray(order)))
        np.testing.assert_allclose(255 * ours, np.asarray(canvas)[2, 2], atol=5)


def test_drawn_jitter(rng):
    count = 6000
    by = drawn(corruption.draw_jitter)(keys_of(rng, count), np.full(count, 0.2, np.float32))
    factors, order = map(np.asarray, by)
    assert factors.min() == pytest.approx(0.8, abs=1e-3)
    assert factors.max() == pytest.approx(1.2, abs=1e-3)
    np.testing.assert_allclose(factors.std(axis=0), 0.2 / 3**0.5, rtol=0.05)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.1
    orders, counts = np.unique(order, axis=0, return_counts=True)
    assert orders.tolist() == [list(p) for p in itertools.permutations(range(3))]
    assert np.abs(counts - count / 6).max() < 6 * (count / 6) ** 0.5


# ---- of a batch ----------------------------------------------------------------------------------


SIZE, ROWS = (24, 32), 8


@functools.cache
def corrupting(name):
    """Each of the three, of a batch."""
    if name == "corrupt_colour":
        return jax.jit(lambda data, *draws: corruption.corrupt_colour(OCHRE, *draws))
    return jax.jit(getattr(corruption, name))


@pytest.mark.parametrize("name", ["blur_depth", "corrupt_mask", "corrupt_colour"])
def test_what_happens_to_an_example_is_its_own(rng, name):
    """Whatever its row, its neighbours and its device are."""
    data = (rng.random((ROWS, *SIZE, 1)) < 0.5).astype(np.float32)
    data[3] = data[5]
    strength = rng.uniform(0.5, 1.5, ROWS).astype(np.float32)
    strength[5] = strength[3]
    keys = keys_of(rng, ROWS)
    run = corrupting(name)
    ours = np.asarray(run(data, strength, keys))
    order = rng.permutation(ROWS)
    np.testing.assert_array_equal(run(data[order], strength[order], keys[order]), ours[order])
    assert (ours[3] != ours[5]).any()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put((data, strength, keys), NamedSharding(mesh, P("data")))
    # Another program may round otherwise, and so take another nearest pixel here and there.
    assert np.abs(run(*split) - ours).mean() < 1e-4
    # The same keys again, and others.
    np.testing.assert_array_equal(run(data, strength, keys), ours)
    assert (np.asarray(run(data, strength, keys_of(rng, ROWS))) != ours).any(axis=-1).any()
    # Without strength nothing happens, and hardly anything at the lowest timestep.
    nothing = data if name != "corrupt_colour" else np.tile(OCHRE, (ROWS, 1))
    np.testing.assert_allclose(run(data, 0 * strength, keys), nothing, rtol=0, atol=1e-6)
    least = np.full(ROWS, intensity(jnp.array([0]), 1000, "increasing"))
    assert np.abs(run(data, least, keys) - nothing).mean() < 1e-3


def test_a_mask_is_moved_then_cut(rng):
    masks = (rng.random((ROWS, *SIZE, 1)) < 0.7).astype(np.float32)
    strength = rng.uniform(0.5, 4, ROWS).astype(np.float32)
    keys = keys_of(rng, ROWS)
    ours = corrupting("corrupt_mask")(masks, strength, keys)
    changed = 0
    halves = jax.vmap(jax.random.split)(keys)
    change = np.float32(0.2) * strength
    by = drawn(corruption.draw_move, SIZE)(halves[:, 0], change)
    box = drawn(corruption.draw_box, SIZE)(halves[:, 1], change)
    for i in range(ROWS):
        moved = move(masks[i], jax.tree.map(lambda x, i=i: x[i], by))
        expected = erase(moved, jax.tree.map(lambda x, i=i: x[i], box))
        assert (ours[i] != expected).mean() < 0.005  # another program rounds otherwise
        changed += (np.asarray(ours[i]) != masks[i]).mean()
    assert changed > 0.5
