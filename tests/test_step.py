"""The train step: what it computes, what it gives up, what it never does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpercept.training import sharding
from jaxpercept.training.step import _finite, init_state, make_train_step

ROWS, DECAY, RATE = 8, 0.6, 0.05


def loss(params, batch, key):
    """A plain mean over examples, with noise from the key."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (3,)))(batch["index"])
    output = batch["x"] @ params["net"]["kernel"] + params["net"]["bias"][None]
    error = output @ params["tower"]["kernel"] - batch["y"] - 0.1 * noise
    mse = jnp.mean(error**2)
    return mse, {"mse": mse}


class Run:
    """A state on one device, and its compiled step."""

    def __init__(self, params, tower, **options):
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.accumulate = options.get("accumulate", 1)
        optimizer = optax.sgd(optax.constant_schedule(RATE))

        def init(params):
            return init_state(params, optimizer, ema=options.get("ema_decay", 0) > 0)

        shardings = sharding.tree_shardings(jax.eval_shape(init, params), self.mesh)
        self.state = jax.jit(init, out_shardings=shardings)(
            sharding.put_tree(params, shardings["params"])
        )
        self.tower = sharding.put_tree(tower, sharding.tree_shardings(tower, self.mesh))
        self.step = make_train_step(
            loss,
            optimizer,
            mesh=self.mesh,
            state_sharding=shardings,
            schedule=optax.constant_schedule(RATE),
            **{"seed": 5, **options},
        )

    def __call__(self, batch):
        placed = sharding.put_batch(batch, self.mesh, self.accumulate)
        self.state, metrics = self.step(self.state, self.tower, placed)
        return {name: float(value) for name, value in metrics.items()}


@pytest.fixture
def problem(rng):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"net": {"kernel": normal(4, 2), "bias": normal(2)}}
    tower = {"tower": {"kernel": normal(2, 3)}}
    batches = [
        {"x": normal(ROWS, 4), "y": normal(ROWS, 3), "index": np.arange(ROWS, dtype=np.int32)}
        for _ in range(6)
    ]
    return params, tower, batches


def test_metrics_update_and_average(problem):
    params, tower, batches = problem
    run = Run(params, tower, ema_decay=DECAY)
    np.testing.assert_array_equal(run.state["ema"]["net"]["bias"], params["net"]["bias"])
    average = np.array(params["net"]["kernel"])
    grad_of = jax.jit(jax.grad(lambda p, b, k: loss({**tower, **p}, b, k)[0]))
    for n, batch in enumerate(batches):
        before = jax.tree.map(np.array, run.state["params"])
        metrics = run(batch)
        key = jax.random.fold_in(jax.random.key(5), n)  # of (seed, step) alone
        grad = grad_of(before, batch, key)
        assert metrics["loss"] == metrics["mse"]
        assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grad)), rel=1e-5)
        assert metrics["learning_rate"] == pytest.approx(RATE)
        now = np.array(run.state["params"]["net"]["kernel"])
        expected = before["net"]["kernel"] - RATE * np.array(grad["net"]["kernel"])
        np.testing.assert_allclose(now, expected, rtol=0, atol=1e-5)
        decay = min(DECAY, (1 + n) / (10 + n))  # the first steps are soon forgotten
        average = decay * average + (1 - decay) * now
        ema = run.state["ema"]["net"]["kernel"]
        np.testing.assert_allclose(ema, average, rtol=0, atol=1e-5)
    assert int(run.state["step"]) == len(batches)


def test_micro_batches_add_up_to_the_batch(problem):
    params, tower, batches = problem
    whole, parts = Run(params, tower), Run(params, tower, accumulate=4)
    for batch in batches:
        left, right = whole(batch), parts(batch)
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=1e-5), name
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_is_left_out(problem, value, accumulate):
    """1e30: the loss overflows in float32, as it does in a run that diverges."""
    params, tower, batches = problem
    run = Run(params, tower, accumulate=accumulate, ema_decay=DECAY)
    run(batches[0])
    before = jax.tree.map(np.array, run.state["params"])
    batches[1]["x"][3, 2] = value
    metrics = run(batches[1])
    assert not np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, run.state["params"], before)
    assert int(run.state["step"]) == 2
    metrics = run(batches[2])
    assert np.isfinite(metrics["loss"])
    for leaf in jax.tree.leaves(run.state):
        assert np.isfinite(leaf).all()
    assert np.abs(run.state["params"]["net"]["bias"] - before["net"]["bias"]).max() > 1e-4


def test_each_gradient_that_is_finite_counts():
    grads = {"net": {"kernel": jnp.array([1.0, np.nan]), "bias": jnp.array([2.0])}}
    kept = _finite(grads, jnp.float32(0.5))
    np.testing.assert_array_equal(kept["net"]["kernel"], [0, 0])
    np.testing.assert_array_equal(kept["net"]["bias"], [2])
    none = _finite(grads, jnp.float32(np.inf))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


def test_the_step_compiles_once_gives_up_its_state_and_syncs_nothing(problem):
    params, tower, batches = problem
    run = Run(params, tower)
    placed = [sharding.put_batch(batch, run.mesh) for batch in batches]
    frozen_before = np.array(run.tower["tower"]["kernel"])
    state, _ = run.step(run.state, run.tower, placed[0])
    old = state
    # Nothing crosses between host and device unasked, and nothing is traced again.
    with jax.transfer_guard("disallow"):
        for batch in placed[1:]:
            state, metrics = run.step(state, run.tower, batch)
    assert run.step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((run.tower, placed)))
    np.testing.assert_array_equal(run.tower["tower"]["kernel"], frozen_before)
    assert np.isfinite(float(metrics["loss"]))


def test_frozen_weights_are_arguments_not_constants(problem):
    """Constants would be copied into every program, and folded while it is compiled."""
    params, tower, batches = problem
    run = Run(params, tower)
    batch = sharding.put_batch(batches[0], run.mesh)
    text = run.step.lower(run.state, run.tower, batch).as_text()
    assert "tensor<2x3xf32>" in text.split("func.func public @main")[1].split("->")[0]
