"""What each task is trained towards, against plain NumPy: images, masks, values, and the way back.

Invalid pixels hold anything here, NaN included: no target may carry that into the autoencoder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpercept.data.palettes import PALETTES
from jaxpercept.data.transforms import depth_range, disparity_range
from jaxpercept.tasks import TASKS, get_task

B, H, W = 3, 12, 16
NAMES = ("depth", "disparity", "normals", "dis", "matting", "referring", "pose")
TASK = {
    **{name: get_task(name) for name in NAMES},
    "disparity as released": get_task("disparity", min_max=True),
    "normals, half range": get_task("normals", full_z_range=False),
    "referring, mask": get_task("referring", paint=False),
    "painted classes": get_task("semantic", palette="scenes"),
    "class logits": get_task("semantic", palette="scenes", logits=True),
}
CLASSES = len(PALETTES["scenes"].names)


@functools.cache
def encode(name):
    return jax.jit(TASK[name].encode_target)


def batch(rng):
    """Every field of every task. A few pixels of each image are invalid."""
    valid = rng.random((B, H, W, 1)) > 0.2
    depth = (rng.gamma(2.0, 2.0, (B, H, W, 1)) + 0.5).astype(np.float32)
    # What lies beyond the valid range has a depth too, such as a sky; or it has none.
    depth[~valid] *= rng.choice([0, 10], (~valid).sum())
    normals = rng.normal(size=(B, H, W, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[..., 2] = np.abs(normals[..., 2])
    normals[rng.random((B, H, W)) < 0.1] = 0
    classes = rng.integers(0, CLASSES, (B, H, W, 1)).astype(np.int32)
    classes[rng.random(classes.shape) < 0.1] = 255
    places = rng.uniform((0, 0, 1), (W, H, 2.99), (B, 17, 3)).astype(np.float32)
    places[rng.random((B, 17)) < 0.3] = 0
    places[..., 2] = np.floor(places[..., 2])
    quantiles = [depth_range(d, v) for d, v in zip(depth, valid, strict=True)]
    limits = [
        disparity_range(np.where(v, d, 0), v, d, q)
        for d, v, q in zip(depth, valid, quantiles, strict=True)
    ]
    return {
        "rgb": rng.integers(0, 256, (B, H, W, 3)).astype(np.uint8),
        "valid": valid,
        "depth": depth,
        "depth_range": np.stack(quantiles),
        "disparity_range": np.stack(limits),
        "normals": normals,
        "alpha": rng.random((B, H, W, 1), np.float32),
        "referred": rng.integers(0, 2, (B, H, W, 1)).astype(np.float32),
        "classes": classes,
        "keypoints": places,
    }


# ---- depth and disparity -------------------------------------------------------------------------


def test_depth(rng):
    data = batch(rng)
    image, mask, values = encode("depth")(data)
    assert values is None
    assert (image.shape, image.dtype) == ((B, H, W, 3), jnp.float32)
    np.testing.assert_array_equal(mask, data["valid"])
    for i in range(B):
        d = data["depth"][i].astype(np.float64)
        low, high = np.quantile(d[data["valid"][i]], [0.02, 0.98])
        expected = np.clip((d - low) / (high - low) * 2 - 1, -1, 1)
        np.testing.assert_allclose(image[i], expected.repeat(3, -1), atol=2e-6)
    # The nearest 2 % are -1, the farthest 2 % are +1.
    measured = np.asarray(image)[data["valid"][..., 0]]
    assert 0.01 < (measured[:, 0] == -1).mean() < 0.04
    assert 0.01 < (measured[:, 0] == 1).mean() < 0.04


def test_disparity_between_the_quantiles(rng):
    data = batch(rng)
    image, mask, _ = encode("disparity")(data)
    np.testing.assert_array_equal(mask, data["valid"])
    for i in range(B):
        d, valid = data["depth"][i].astype(np.float64), data["valid"][i]
        near, far = np.quantile(d[valid], [0.02, 0.98])
        u = np.where(valid, 1 / np.where(valid, d, 1), 0)
        expected = np.where(valid, np.clip((u - 1 / far) / (1 / near - 1 / far), 0, 1) * 2 - 1, -1)
        np.testing.assert_allclose(image[i], expected.repeat(3, -1), atol=1e-5)


def scale_shift_disparity(depth, valid):
    """GenPercept's normaliser as recipes have it, quantiles included."""
    usable = valid & (depth > 0)
    near, far = np.quantile(depth[usable], [0.02, 0.98])
    with np.errstate(divide="ignore"):
        u = (1 / depth - 1 / far) / (1 / near - 1 / far)
    u[~usable] = u.min()
    u = (u - u.min()) / (u.max() - u.min()) * 2 - 1
    u[~usable] = -1
    return np.clip(u, -1, 1)


def test_disparity_as_genpercept_released_it(rng):
    """Exactly: the quantiles cancel out, and a sky beyond the valid range is what -1 means."""
    data = batch(rng)
    image, mask, _ = encode("disparity as released")(data)
    np.testing.assert_array_equal(mask, data["valid"])
    floors = []
    for i in range(B):
        expected = scale_shift_disparity(data["depth"][i].astype(np.float64), data["valid"][i])
        np.testing.assert_allclose(image[i], expected.repeat(3, -1), atol=1e-5)
        floors.append(expected[data["valid"][i]].min())
        assert expected.max() == pytest.approx(1)
    assert max(floors) > -0.999  # the sky's
    # By default a single near pixel does not decide.
    assert np.abs(encode("disparity")(data).image - image).max() > 0.1


@pytest.mark.parametrize("name", ["depth", "disparity", "disparity as released"])
@pytest.mark.parametrize("bad_range", [(2.0, 2.0), (0.0, 0.0), (np.nan, np.nan), (3.0, 1.0)])
def test_degenerate_ranges_are_masked_out(rng, name, bad_range):
    data = batch(rng)
    for field in ("depth_range", "disparity_range"):
        data[field][1] = np.tile(bad_range, data[field].shape[1] // 2)
    image, mask, _ = encode(name)(data)
    assert np.isfinite(image).all()
    assert not mask[1].any()
    assert mask[0].any()
    assert mask[2].any()


def test_disparity_has_no_use_for_depth_that_is_not_positive(rng):
    data = batch(rng)
    for k, value in enumerate((0.0, -3.0)):
        data["depth"][0, k, k], data["valid"][0, k, k] = value, True
        for name in ("disparity", "disparity as released"):
            image, mask, _ = encode(name)(data)
            assert not mask[0, k, k].any()
            np.testing.assert_array_equal(image[0, k, k], -1)


@pytest.mark.parametrize(("name", "limits"), [("depth", "depth_range"), ("disparity", "")])
def test_the_prediction_of_a_right_image_is_the_map(rng, name, limits):
    data = batch(rng)
    image, mask, _ = encode(name)(data)
    low, high = (data[limits or "disparity_range"][:, k, None, None, None] for k in (0, 1))
    restored = TASK[name].to_prediction(image) * (high - low) + low
    assert restored.shape == (B, H, W, 1)
    with np.errstate(divide="ignore"):
        values = data["depth"] if limits else 1 / data["depth"]
    np.testing.assert_allclose(
        np.asarray(restored)[mask], np.clip(values, low, high)[mask], rtol=1e-4, atol=1e-4
    )


# ---- normals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normals", "normals, half range"])
def test_normals(rng, name):
    data = batch(rng)
    image, mask, values = encode(name)(data)
    assert values is None
    expected_mask = data["valid"] & (np.abs(data["normals"]).sum(-1, keepdims=True) > 0)
    np.testing.assert_array_equal(mask, expected_mask)
    assert 0.5 < expected_mask.mean() < 0.8
    expected = data["normals"] * expected_mask
    if name != "normals":
        expected[..., 2] = 2 * expected[..., 2] - 1
    np.testing.assert_allclose(image, expected, atol=1e-6)
    restored = TASK[name].to_prediction(image)
    inside = expected_mask[..., 0]
    np.testing.assert_allclose(np.asarray(restored)[inside], data["normals"][inside], atol=1e-6)


# ---- masks and mattes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"), [("dis", "alpha"), ("matting", "alpha"), ("referring, mask", "referred")]
)
def test_foreground(rng, name, field):
    data = batch(rng)
    image, mask, values = encode(name)(data)
    assert values is None
    np.testing.assert_array_equal(mask, data["valid"])
    expected = np.where(data["valid"], 2 * data[field] - 1, -1).repeat(3, -1)
    np.testing.assert_allclose(image, expected, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(TASK[name].to_prediction(image))[mask], data[field][mask], atol=1e-6
    )


# ---- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["painted classes", "class logits"])
def test_classes(rng, name):
    data = batch(rng)
    data["classes"][0, 0, 0] = CLASSES  # one too many, and one too few
    data["classes"][0, 0, 1] = -1
    image, mask, values = encode(name)(data)
    known = data["valid"] & (data["classes"] >= 0) & (data["classes"] < CLASSES)
    np.testing.assert_array_equal(mask, known)
    assert not known[0, 0, :2].any()
    assert 0.5 < known.mean() < 0.9
    table = np.asarray(PALETTES["scenes"].colours, np.float64)
    expected = np.where(known, table[data["classes"][..., 0] % CLASSES] / 127.5 - 1, -1)
    np.testing.assert_allclose(image, expected, atol=1e-6)  # void is black
    np.testing.assert_array_equal(np.asarray(values)[known], data["classes"][known])
    assert (np.asarray(values) >= 0).all()
    assert (np.asarray(values) < CLASSES).all()


@pytest.mark.parametrize("palette", sorted(PALETTES))
def test_painted_classes_are_read_back(rng, palette):
    """By the nearest colour, as long as the error is below half the way to the next one."""
    task = get_task("semantic", palette=palette)
    count = len(PALETTES[palette].names)
    assert (task.channels, task.head_channels, task.num_classes) == (3, 3, count)
    classes = rng.integers(0, count, (2, 5, 40, 1)).astype(np.int32)
    data = {"classes": classes, "valid": np.ones(classes.shape, bool)}
    image = jax.jit(task.encode_target)(data).image
    colours = np.asarray(PALETTES[palette].colours, np.float64) / 255
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    margin = apart[apart > 0].min()
    error = rng.normal(size=image.shape)
    error *= 0.49 * margin / np.linalg.norm(error, axis=-1, keepdims=True)
    read = jax.jit(lambda image: task.finish(task.to_prediction(image)))(image)
    np.testing.assert_array_equal(read, classes)
    assert read.dtype == jnp.float32
    inexact = task.finish(jnp.asarray(np.asarray(task.to_prediction(image)) + error, jnp.float32))
    np.testing.assert_array_equal(inexact, classes)
    far = jnp.asarray(rng.random((1, 9, 11, 3)), jnp.float32)
    distance = ((np.asarray(far, np.float64)[..., None, :] - colours) ** 2).sum(-1)
    chosen = np.asarray(task.finish(far)).astype(int)
    np.testing.assert_allclose(
        np.take_along_axis(distance, chosen, -1)[..., 0], distance.min(-1), atol=1e-6
    )


def test_class_logits(rng):
    task = TASK["class logits"]
    assert (task.channels, task.head_channels) == (CLASSES, CLASSES)
    logits = 5 * rng.normal(size=(2, 4, 5, CLASSES)).astype(np.float32)
    shares = task.to_prediction(task.from_head(jnp.asarray(logits)))
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    read = task.finish(shares)
    np.testing.assert_array_equal(read[..., 0], logits.argmax(-1))
    assert (read.shape, read.dtype) == ((2, 4, 5, 1), jnp.float32)


# ---- pose ----------------------------------------------------------------------------------------


def test_heat_maps(rng):
    data = batch(rng)
    data["keypoints"][0, 0] = 8.5, 3.5, 2  # the middle of pixel (3, 8)
    data["keypoints"][0, 1] = np.nan, np.nan, 0
    image, mask, maps = encode("pose")(data)
    assert np.asarray(mask).all()
    assert maps.shape == (B, H, W, 17)
    sigma = TASK["pose"].sigma * H
    for i in range(B):
        for k, (px, py, seen) in enumerate(data["keypoints"][i].astype(np.float64)):
            y, x = np.mgrid[:H, :W] + 0.5
            blob = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)) if seen else 0
            np.testing.assert_allclose(maps[i, ..., k], np.zeros((H, W)) + 2 * blob - 1, atol=1e-5)
    assert maps[0, 3, 8, 0] == 1
    np.testing.assert_array_equal(maps[0, ..., 1], -1)
    np.testing.assert_allclose(image, np.asarray(maps).max(-1, keepdims=True).repeat(3, -1))
    np.testing.assert_allclose(TASK["pose"].to_prediction(maps), (maps + 1) / 2, atol=1e-6)


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK)
def test_targets_are_finite_and_in_range_whatever_lies_outside_the_mask(rng, name):
    data = batch(rng)
    clean = encode(name)(data)
    for field in ("depth", "normals", "alpha", "referred"):
        anything = rng.choice(np.float32([np.nan, np.inf, -7, 1e30]), data[field].shape)
        data[field] = np.where(data["valid"], data[field], anything)
    data["classes"] = np.where(data["valid"], data["classes"], 10**6)
    dirty = encode(name)({k: data[k] for k in TASK[name].fields} | {"rgb": data["rgb"]})
    for leaf in jax.tree.leaves(dirty[::2]):
        assert np.isfinite(leaf).all()
    assert np.abs(dirty.image).max() <= 1
    np.testing.assert_array_equal(dirty.mask, clean.mask)
    mask = np.asarray(clean.mask)[..., 0]
    np.testing.assert_array_equal(np.asarray(dirty.image)[mask], np.asarray(clean.image)[mask])


@pytest.mark.parametrize("name", TASK)
def test_the_mirrored_batch_has_the_mirrored_target(rng, name):
    """What `mirror` does to predictions is what mirroring the picture does to its truth."""
    task, data = TASK[name], batch(rng)
    turned = {k: x[:, :, ::-1] if x.ndim == 4 else x for k, x in data.items()}
    turned["normals"] = turned["normals"] * np.float32([-1, 1, 1])
    order = [0, *(k + (1 if k % 2 else -1) for k in range(1, 17))]  # left and right in pairs
    turned["keypoints"] = data["keypoints"][:, order] * np.float32([-1, 1, 1])
    turned["keypoints"][..., 0] += W * (turned["keypoints"][..., 2] > 0)

    def prediction(data):
        target = encode(name)(data)
        if name == "class logits":
            return jax.nn.one_hot(target.values[..., 0], CLASSES), target.mask
        image = target.values if name == "pose" else target.image
        return task.to_prediction(image), target.mask

    there, mask = prediction(data)
    expected, expected_mask = prediction(turned)
    mirrored = task.mirror(there)
    np.testing.assert_array_equal(mask[:, :, ::-1], expected_mask)
    inside = np.asarray(expected_mask)[..., 0]
    np.testing.assert_allclose(
        np.asarray(mirrored)[inside], np.asarray(expected)[inside], atol=2e-6
    )
    np.testing.assert_array_equal(task.mirror(mirrored), there)


def test_every_task_that_can_be_trained_is_here():
    trained = {name for name, task in TASKS.items() if task.fields}
    elsewhere = {name for name in TASKS if name.startswith("generalist")}  # test_generalist.py
    assert trained - elsewhere == {task.name for task in TASK.values()}
