"""How each task's targets are corrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks_targets import TASK, B, H, W, batch, encode

from jaxpercept.diffusion import corruption

CORRUPTIBLE = [name for name in TASK if TASK[name].corruptible]


@pytest.mark.parametrize("name", CORRUPTIBLE)
def test_corrupted_targets(rng, name):
    """Images as the targets' are: finite and in range, whatever lies outside the mask."""
    task, data = TASK[name], batch(rng)
    for field in ("depth", "alpha", "referred"):
        anything = rng.choice(np.float32([np.nan, np.inf, -7, 1e30]), data[field].shape)
        data[field] = np.where(data["valid"], data[field], anything)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), B)
    corrupt = jax.jit(task.corrupt)
    right = corrupt(data, np.zeros(B, np.float32), keys)
    np.testing.assert_allclose(right, encode(name)(data).image, atol=1e-6)
    wrong = np.asarray(corrupt(data, np.full(B, 1, np.float32), keys))
    assert (wrong.shape, wrong.dtype) == ((B, H, W, 3), np.float32)
    assert np.isfinite(wrong).all()
    assert np.abs(wrong).max() <= 1 + 1e-6
    if name != "referring":
        np.testing.assert_array_equal(wrong[..., 1:], wrong[..., :1].repeat(2, -1))
    assert np.abs(wrong - right).mean() > 1e-2


def test_how_targets_are_corrupted(rng):
    """Depth is blurred, a mask moved and cut; what is painted has another red."""
    maps, masks = {"depth", "disparity"}, {"dis", "matting", "referring"}
    assert {TASK[name].name for name in CORRUPTIBLE} == maps | masks
    data, keys = batch(rng), jax.random.split(jax.random.key(int(rng.integers(2**31))), B)
    strength = rng.uniform(0.5, 3, B).astype(np.float32)
    image = encode("depth")(data).image[..., :1]
    ours = jax.jit(TASK["depth"].corrupt)(data, strength, keys)
    np.testing.assert_allclose(
        ours[..., :1], jax.jit(corruption.blur_depth)(image, strength, keys), atol=1e-6
    )
    ours = jax.jit(TASK["dis"].corrupt)(data, strength, keys)
    alpha = jnp.where(data["valid"], data["alpha"], 0)
    mask = jax.jit(corruption.corrupt_mask)(alpha, strength, keys)
    assert np.mean(np.abs((ours[..., :1] + 1) / 2 - mask) > 1e-6) < 0.01
    # The painted object's colour goes with the example, too.
    painted = (np.asarray(jax.jit(TASK["referring"].corrupt)(data, strength, keys)) + 1) * 127.5
    second = jnp.stack([jax.random.split(key)[1] for key in keys])
    colours = corruption.corrupt_colour(np.float32([1, 0, 0]), jnp.asarray(strength), second)
    for image, rgb, colour in zip(painted, data["rgb"], 255 * colours, strict=True):
        changed = np.abs(image - rgb).max(axis=-1) > 1
        assert changed.any()
        np.testing.assert_allclose(image[changed] - colour[None], 0, atol=0.01)
