"""What every task promises: its options, and what becomes of a network's output."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from task_cases import TRAINED, task_of

from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.inference.kinds import KINDS
from jaxpercept.tasks import TASKS, get_task
from jaxpercept.tasks.depth import DEPTH, DepthTask

B, H, W = 2, 10, 12
# ---- names and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_complete(name):
    options = {"palette": "scenes"} if name == "semantic" else {}
    task = get_task(name, **options)
    assert task.name == name
    assert task.kind in KINDS
    assert task == get_task(name, **options)
    assert hash(task) == hash(get_task(name, **options))  # it is static where jitted
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"
    assert set(task.default_weights) <= set(task.loss_names)
    assert bool(task.fields) == bool(task.loss_names) == bool(task.default_weights)
    if not task.fields:
        with pytest.raises(NotImplementedError, match=name):
            task.encode_target({})


def test_options_are_checked():
    assert get_task("disparity", min_max=True).min_max
    assert get_task("pose", sigma=0.05).sigma == 0.05
    for name, options, complaint in [
        ("dpeth", {}, "Unknown task 'dpeth'; choose one of: depth, dis, "),
        ("depth", {"scale": True}, "task 'depth' has no option 'scale'"),
        ("depth", {"name": "x"}, "has no option 'name'"),
        (
            "depth",
            {"scale_invariant": 1},
            "'scale_invariant' of the task 'depth' is 1: give a bool",
        ),
        ("pose", {"sigma": True}, "'sigma' of the task 'pose' is True: give a float"),
        ("pose", {"sigma": 0.0}, "sigma is 0.0: give a share above 0"),
        ("semantic", {}, "palette '' is unknown: use .*scenes"),
        ("semantic", {"palette": "voc"}, "palette 'voc' is unknown"),
        ("semantic", {"palette": 3}, "is 3: give a str"),
    ]:
        with pytest.raises(UserError, match=complaint):
            get_task(name, **options)


@pytest.mark.parametrize(
    ("case", "weights", "complaint"),
    [
        ("depth", {"angular": 1.0}, "has 'angular', which depth has not: use mse, l1, ssi, "),
        ("dis", {"mse": 1.0, "ssi": 1.0}, "'ssi'"),
        ("normals", {"angular_kappa": 1.0}, "'angular_kappa', which needs .*uncertainty=True"),
        ("semantic", {"cross_entropy": 1.0}, "'cross_entropy', which painted classes have not"),
        ("semantic, logits", {"mse": 1.0}, "'mse', which class logits have not"),
        ("referring", {"iou": 1.0}, "'iou', which a painted image has not: use mse or l1"),
    ],
)
def test_losses_that_a_task_has_not_are_refused(case, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        task_of(case).check_weights(weights)


# ---- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*TRAINED, "seg", "intrinsics"])
def test_predictions_are_in_the_range_of_their_kind(rng, case):
    """Of an autoencoder's image, where that can be, and of a head's map, both of any values."""
    task = task_of(case) if case in TRAINED else get_task(case)
    for channels in {3, task.head_channels} if task.channels in (1, 3) else {task.head_channels}:
        decoded = jnp.asarray(3 * rng.normal(size=(B, H, W, channels)), jnp.float32)
        headed = task.from_head(decoded) if channels == task.head_channels else decoded
        for x in (decoded, headed, decoded.astype(jnp.bfloat16)):
            maps = task.to_prediction(x)
            assert (maps.shape, maps.dtype) == ((B, H, W, task.channels), jnp.float32)
            final = np.asarray(task.finish(task.after_resize(maps)))
            kind = KINDS[task.kind]
            assert final.shape[-1] == (kind.channels or task.channels)
            assert final.min() >= kind.range[0] - 1e-6
            assert final.max() <= kind.range[1] + 1e-6
            if kind.vectors:
                np.testing.assert_allclose(np.linalg.norm(final, axis=-1), 1, atol=1e-5)


def test_one_channel_is_the_mean_of_three(rng):
    decoded = jnp.asarray(rng.normal(size=(B, H, W, 3)), jnp.float32)
    expected = (np.clip(np.asarray(decoded, np.float64).mean(-1, keepdims=True), -1, 1) + 1) / 2
    for name in ("depth", "disparity", "dis", "matting"):
        np.testing.assert_allclose(get_task(name).to_prediction(decoded), expected, atol=1e-6)


def test_each_map_of_a_head_is_stretched_by_itself(rng):
    decoded = jnp.asarray(9 * rng.normal(size=(3, H, W, 1)) + 50, jnp.float32).at[2].set(4.0)
    maps = np.asarray(DEPTH.to_prediction(DEPTH.from_head(decoded)))
    low, high = (np.asarray(f(decoded, axis=(1, 2, 3), keepdims=True)) for f in (jnp.min, jnp.max))
    np.testing.assert_allclose(maps[:2], ((decoded - low) / (high - low + 1e-9))[:2], atol=1e-5)
    assert np.isfinite(maps[2]).all()  # a constant map has no range
    alone = DEPTH.to_prediction(DEPTH.from_head(decoded[1:2]))
    np.testing.assert_array_equal(alone[0], maps[1])


@pytest.mark.parametrize("case", ["normals", "normals, with kappa", "normals, half range"])
def test_a_head_s_vectors_keep_their_direction(rng, case):
    """However long they are: the angular loss has no say in that."""
    task = task_of(case)
    vectors = rng.normal(size=(B, H, W, 3)) * rng.uniform(0.1, 20, (B, H, W, 1))
    vectors[..., 2] = np.abs(vectors[..., 2])
    decoded = vectors.copy()
    if not task.full_z_range:
        decoded[..., 2] = 2 * decoded[..., 2] - 1
    if task.uncertainty:
        decoded = np.concatenate([decoded, rng.normal(size=(B, H, W, 1))], axis=-1)
    maps = task.to_prediction(task.from_head(jnp.asarray(decoded, jnp.float32)))
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    np.testing.assert_allclose(maps, unit, atol=1e-5)


def test_what_an_ensemble_may_do():
    assert get_task("depth", shift_invariant=False).merge_options == {
        "scale_invariant": True,
        "shift_invariant": False,
    }
    merges = {name: task.merge for name, task in TASKS.items() if ":" not in name}
    assert {name for name in merges if merges[name] == "affine"} == {"depth", "disparity"}
    assert {name for name in merges if merges[name] == "normals"} == {"normals"}
    assert DepthTask() == DEPTH
    assert get_task("semantic", palette="nyu40").channels == 3
    assert get_task("semantic", palette="nyu40", logits=True).channels == len(PALETTES["nyu40"][0])
