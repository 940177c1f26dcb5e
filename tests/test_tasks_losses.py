"""The losses of every task: their values in NumPy, their gradients at the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_cases import TRAINED, task_of

from jaxpercept import losses
from jaxpercept.errors import UserError
from jaxpercept.tasks import Target, get_task
from jaxpercept.tasks.depth import DEPTH

B, H, W = 2, 10, 12
# Depth has the losses of disparity.
CASES = [case for case in TRAINED if case != "depth"]


def loss_names(task):
    """Those that may have a weight."""

    def allowed(name):
        try:
            task.check_weights({name: 1.0})
        except UserError:
            return False
        return True

    return [name for name in task.loss_names if allowed(name)]


def target_of(task, rng):
    """A random target; half of one image, and more, is masked."""
    mask = rng.random((B, H, W, 1)) > 0.2
    mask[0, :, : W // 2] = False
    image = rng.uniform(-1, 1, (B, H, W, 3)).astype(np.float32)
    values = None
    if task.name == "normals":
        image /= np.linalg.norm(image, axis=-1, keepdims=True)
    elif task.name == "semantic":
        values = rng.integers(0, task.num_classes, (B, H, W, 1)).astype(np.int32)
        image = task.colours[values[..., 0]]
    elif task.name == "pose":
        values = rng.uniform(-1, 1, (B, H, W, 17)).astype(np.float32)
    else:
        image = image[..., :1].repeat(3, -1)
    return jax.tree.map(jnp.asarray, Target(image, mask, values))


def right_decoded(task, target):
    """What the target is compared with, had the network predicted it."""
    if task.name == "pose":
        return target.values
    if task.name == "semantic" and task.logits:
        return 8 * jax.nn.one_hot(target.values[..., 0], task.num_classes)
    if getattr(task, "uncertainty", False):
        return jnp.concatenate([target.image, target.image[..., :1]], axis=-1)
    return target.image


def noisy(rng, x, strength=0.5):
    return x + strength * jnp.asarray(rng.normal(size=x.shape), jnp.float32)


@functools.cache
def gradients(case):
    """Of each loss: its value and gradient, compiled once."""
    task = task_of(case)

    @jax.jit
    def compute(decoded, target, keys):
        def loss(decoded, name):
            return task.pixel_losses(decoded, target, {name: 1.0}, keys)[name]

        return {name: jax.value_and_grad(loss)(decoded, name) for name in loss_names(task)}

    return lambda decoded, target: compute(decoded, target, jax.random.split(jax.random.key(1), B))


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_named(rng, case):
    task = task_of(case)
    target = target_of(task, rng)
    terms = task.loss_terms(right_decoded(task, target), target)
    assert set(loss_names(task)) <= set(terms) <= set(task.loss_names)
    task.check_weights(task.default_weights)


@pytest.mark.parametrize("case", CASES)
def test_every_loss_has_a_finite_gradient_and_leaves_the_rest_alone(rng, case):
    task, run = task_of(case), gradients(case)
    target = target_of(task, rng)
    right = right_decoded(task, target)
    empty = target._replace(mask=jnp.zeros_like(target.mask))
    outside = np.broadcast_to(~np.asarray(target.mask), right.shape)
    for decoded, where, kind in [
        (noisy(rng, right), target, "random"),
        (right, target, "right"),
        (-right, target, "opposite"),
        (jnp.zeros_like(right), target, "zero"),
        (noisy(rng, right, 1e4), target, "huge"),
        (noisy(rng, right), empty, "empty"),
    ]:
        for name, (value, gradient) in run(decoded, where).items():
            assert np.isfinite(value), (name, kind)
            assert np.isfinite(gradient).all(), (name, kind)
            assert not np.asarray(gradient)[outside].any(), (name, kind)
            if kind == "random":
                assert np.asarray(gradient)[~outside].any(), name
                assert value != 0, name
            if kind == "empty":
                assert value == 0, name
                assert not np.asarray(gradient).any(), name


@pytest.mark.parametrize("case", CASES)
def test_a_right_prediction_costs_least(rng, case):
    """But for kappa's, whose least value depends on the certainty."""
    task, run = task_of(case), gradients(case)
    target = target_of(task, rng)
    if "iou" in task.loss_names:
        # Soft IoU, unlike the other losses, is least at equality for hard masks only.
        target = target._replace(image=jnp.where(target.image > 0, 1.0, -1.0))
    right = right_decoded(task, target)
    perfect, wrong = run(right, target), run(noisy(rng, right), target)
    for name in set(perfect) - {"angular_kappa"}:
        # The angle's clip: arccos(1 - 1e-4); logits of 8 are no certainty.
        limits = {"angular": 0.0142, "cross_entropy": 0.01}
        least = limits.get(name, 1e-5)
        assert -1e-6 <= float(perfect[name][0]) < least, name
        assert float(perfect[name][0]) < float(wrong[name][0]), name


@pytest.mark.parametrize("case", ["disparity", "normals", "dis", "semantic", "pose", "referring"])
def test_squared_and_absolute_errors(rng, case):
    """A one-channel task compares the mean of the image's three channels."""
    task, run = task_of(case), gradients(case)
    target = target_of(task, rng)
    decoded = noisy(rng, right_decoded(task, target))
    truth = np.asarray(target.values if case == "pose" else target.image, np.float64)
    ours = np.asarray(decoded, np.float64)
    if task.channels == 1:
        ours, truth = ours.mean(-1, keepdims=True), truth[..., :1]
    error = (ours - truth)[np.asarray(target.mask)[..., 0]]
    values = run(decoded, target)
    np.testing.assert_allclose(values["mse"][0], (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(values["l1"][0], np.abs(error).mean(), rtol=1e-5)


def test_depth_is_compared_as_genpercept_has_it(rng):
    target = target_of(DEPTH, rng)
    decoded = noisy(rng, target.image)
    terms = jax.jit(DEPTH.pixel_losses)(decoded, target)
    p, g, mask = decoded.mean(axis=-1, keepdims=True) + 2, target.image[..., :1] + 2, target.mask
    expected = {
        "mse": losses.mse(p, g, mask),
        "ssi": 0.5 * losses.ssi(p, g, mask),
        "grad": 2 * losses.gradient(p, g, mask),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    released = gradients("disparity")(decoded, target)["grad"][0]
    np.testing.assert_allclose(released, losses.gradient(p, g, mask, vertical_only=True), rtol=1e-5)
    assert released < float(terms["grad"]) / 2


def test_the_median_alignment_is_genpercept_s_on_request(rng):
    """As released it takes the medians of masked pixels, too, of maps in [1, 3]."""
    target = target_of(DEPTH, rng)
    decoded = noisy(rng, target.image)
    p, g = decoded.mean(axis=-1, keepdims=True) + 2, target.image[..., :1] + 2
    values = {}
    for released in (False, True):
        task = get_task("depth", released_median=released)
        values[released] = float(
            task.pixel_losses(decoded, target, {"ssi_median": 1.0})["ssi_median"]
        )
        expected = losses.ssi_median(p, g, target.mask, compat=released)
        np.testing.assert_allclose(values[released], expected, rtol=1e-5)
    assert abs(values[True] - values[False]) > 1e-3


def test_upside_down_depth_is_not_rewarded(rng):
    """A least-squares fit alone would flip it."""
    target, run = target_of(DEPTH, rng), gradients("disparity")
    assert run(target.image * 0.5, target)["ssi"][0] < 1e-5
    assert run(-target.image, target)["ssi"][0] > 0.2


def test_probabilities_are_read_off_the_image(rng):
    """BCE and soft IoU of (x + 1) / 2, in NumPy."""
    task = task_of("dis")
    target = target_of(task, rng)
    decoded = jnp.asarray(rng.uniform(-0.9, 0.9, (B, H, W, 3)), jnp.float32)
    values = gradients("dis")(decoded, target)
    q = (np.asarray(decoded, np.float64).mean(-1) + 1) / 2
    t, mask = (
        (np.asarray(target.image, np.float64)[..., 0] + 1) / 2,
        np.asarray(target.mask)[..., 0],
    )
    entropy = -(t * np.log(q) + (1 - t) * np.log(1 - q))[mask].mean()
    np.testing.assert_allclose(values["bce"][0], entropy, rtol=1e-5)
    both, sums = ((x * mask).sum((1, 2)) for x in (q * t, q + t))
    np.testing.assert_allclose(
        values["iou"][0], np.mean(1 - (both + 1) / (sums - both + 1)), rtol=1e-5
    )


def test_cross_entropy_is_of_logits(rng):
    task = task_of("semantic, logits")
    target = target_of(task, rng)
    logits = noisy(rng, jnp.zeros((B, H, W, task.num_classes)), 3)
    shares = np.asarray(jax.nn.softmax(logits), np.float64)
    label = np.take_along_axis(shares, np.asarray(target.values), axis=-1)
    expected = -np.log(label)[np.asarray(target.mask)].mean()
    value = gradients("semantic, logits")(logits, target)["cross_entropy"][0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_angles_are_between_vectors(rng):
    """With half the range, of the vectors that the image means."""
    target = target_of(task_of("normals"), rng)
    decoded, mask = noisy(rng, target.image), np.asarray(target.mask)[..., 0]
    for case, scale, shift in [("normals", 1, 0), ("normals, half range", 0.5, 0.5)]:
        u, v = (np.asarray(x, np.float64).copy() for x in (decoded, target.image))
        for x in (u, v):
            x[..., 2] = x[..., 2] * scale + shift
        norms = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
        cosine = np.clip((u * v).sum(-1) / norms, -1 + 1e-4, 1 - 1e-4)
        value = gradients(case)(decoded, target)["angular"][0]
        np.testing.assert_allclose(value, np.arccos(cosine)[mask].mean(), rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_weights_choose_the_terms_and_random_pixels_belong_to_the_example(rng, case):
    task = task_of(case)
    target = target_of(task, rng)
    decoded = noisy(rng, right_decoded(task, target))
    weights = {name: float(rng.uniform(0.5, 3)) for name in loss_names(task)}
    plain = {name: value for name, (value, _) in gradients(case)(decoded, target).items()}
    keys = jax.random.split(jax.random.key(1), B)
    turned = jax.tree.map(lambda x: x[::-1], target)
    terms = jax.jit(lambda *a: task.pixel_losses(a[0], a[1], weights, a[2]))(
        decoded[::-1], turned, keys[::-1]
    )
    assert set(terms) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_allclose(terms[name], weight * plain[name], rtol=2e-5, err_msg=name)
