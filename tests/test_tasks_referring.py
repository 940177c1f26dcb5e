"""The referred object: painted over, found again by its colour."""

import jax.numpy as jnp
import numpy as np
from test_tasks_targets import TASK, batch, encode


def test_the_referred_object_is_painted_red(rng):
    data, task = batch(rng), TASK["referring"]
    image, mask, values = encode("referring")(data)
    assert values is None
    np.testing.assert_array_equal(mask, data["valid"])
    there = (data["referred"] * data["valid"])[..., 0] == 1
    assert 0.2 < there.mean() < 0.6
    expected = data["rgb"].copy()
    expected[there] = 255, 0, 0
    np.testing.assert_allclose((np.asarray(image) + 1) * 127.5, expected, atol=1e-4)
    assert (task.channels, task.reads_text) == (3, True)
    floats = {**data, "rgb": data["rgb"].astype(np.float32) / 127.5 - 1}
    np.testing.assert_allclose(encode("referring")(floats).image, image, atol=1e-6)


def test_what_is_red_enough_is_the_object(rng):
    """ADDP's rule: less than 50 from (255, 0, 0)."""
    task = TASK["referring"]
    colours = rng.integers(0, 256, (2, 40, 50, 3))
    away = rng.normal(size=(1, 40, 50, 3))
    away *= rng.uniform(40, 60, (1, 40, 50, 1)) / np.linalg.norm(away, axis=-1, keepdims=True)
    colours = np.concatenate([colours, np.clip(np.array([255, 0, 0]) + away, 0, 255)])
    colours[0, 0, 0] = 255, 0, 0
    score = np.asarray(task.finish(jnp.asarray(colours / 255, jnp.float32)))
    assert (score.shape, score.dtype) == ((3, 40, 50, 1), np.float32)
    distance = np.linalg.norm(colours - [255, 0, 0], axis=-1, keepdims=True)
    sure = np.abs(distance - 50) > 1e-3
    np.testing.assert_array_equal((score > 0.5)[sure], (distance < 50)[sure])
    assert 0.2 < (score[2] > 0.5).mean() < 0.9
    np.testing.assert_allclose(score, np.clip(1 - distance / 100, 0, 1), atol=1e-5)
    assert score[0, 0, 0] == 1
    # Of a right prediction, where the image itself is not red.
    data = batch(rng)
    data["rgb"][..., 2] |= 64
    image, mask, _ = encode("referring")(data)
    read = np.asarray(task.finish(task.to_prediction(image)))
    np.testing.assert_array_equal((read > 0.5)[mask], data["referred"][mask] == 1)
    mask_task = TASK["referring, mask"]
    grey = jnp.asarray(rng.random((2, 4, 5, 1)), jnp.float32)
    np.testing.assert_array_equal(mask_task.finish(grey), grey)
