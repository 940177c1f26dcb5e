"""The one train step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxpercept.checkpoints.load import merge_params
from jaxpercept.training.optim import Params
from jaxpercept.training.sharding import replicated

State = dict[str, Any]
"""`step`, `params` (trainable), `opt_state`, and `ema` where weights are averaged."""
LossFn = Callable[[Params, dict[str, Array], Array], tuple[Float[Array, ""], dict[str, Array]]]


def init_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool) -> State:
    """The state before the first step. The averaged weights start as a copy."""
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    state_sharding: State,
    schedule: optax.Schedule,
    seed: int,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[State, Params, dict[str, Array]], tuple[State, dict[str, Array]]]:
    """Build `step(state, frozen, batch) -> (state, metrics)`, jitted, its state donated.

    Args:
        loss_fn: `(params, batch, key) -> (loss, terms)` over all weights.
        optimizer: updates the trainable weights.
        mesh: where the state and the batch live.
        state_sharding: the state's tree of shardings; the new state keeps them.
        schedule: the optimizer's learning rate, reported in the metrics.
        seed: with the step and each example's index, the only source of randomness.
        accumulate: number of micro-batches a step's gradient is averaged over; above 1 the batch's
            first axis counts them, see `sharding.put_batch`.
        ema_decay: decay of the averaged weights; 0 keeps none.

    The frozen weights are arguments, never constants of the compiled step. The metrics are the
    loss, its terms, the gradient's global norm and the learning rate. Gradients that are not finite
    are left out, see `_finite`; the metrics then say so.
    """

    def gradients(params: Params, frozen: Params, batch: dict[str, Array], key: Array):
        def loss_of(trainable: Params):
            return loss_fn(merge_params(frozen, trainable), batch, key)

        (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, {"loss": loss, **terms}

    def accumulated(params: Params, frozen: Params, batch: dict[str, Array], key: Array):
        def body(total: Any, micro: dict[str, Array]):
            return jax.tree.map(jnp.add, total, gradients(params, frozen, micro, key)), None

        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(gradients, params, frozen, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, batch)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: State, frozen: Params, batch: dict[str, Array]):
        # Randomness is a function of (seed, step, example index): resuming is exact.
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        compute = gradients if accumulate == 1 else accumulated
        grads, metrics = compute(state["params"], frozen, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        grads = _finite(grads, metrics["loss"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if ema_decay:
            # Early on, average over the steps there are, so that the start is soon forgotten.
            decay = jnp.minimum(ema_decay, (1.0 + state["step"]) / (10.0 + state["step"]))
            new["ema"] = jax.tree.map(
                lambda old, now: old + (1.0 - decay) * (now - old), state["ema"], params
            )
        metrics["learning_rate"] = jnp.asarray(schedule(state["step"]), jnp.float32)
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, replicated(mesh)))


def _finite(grads: Params, loss: Float[Array, ""]) -> Params:
    """Zeros for each gradient that is not finite, and for all where the loss is not.

    Leaf by leaf, so that XLA can free each gradient once it is used: to wait for all of them
    would hold as much memory as the weights take.
    """

    def checked(grad: Array) -> Array:
        finite = jnp.isfinite(loss) & jnp.isfinite(jnp.sum(jnp.square(grad)))
        return jnp.where(finite, grad, jnp.zeros_like(grad))

    return jax.tree.map(checked, grads)
