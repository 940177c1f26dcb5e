"""From config to optax: schedules, Adam, clipping, per-group learning rates, freezing by regex."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxpercept.errors import UserError

Params = dict[str, dict[str, Any]]


def split_params(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """Split weights into trainable and frozen ones.

    Args:
        params: `{component: {path: array}}`.
        trainable: regular expressions matched from the start of `component/path`.

    Raises:
        UserError: an expression matches no weight.
    """
    unused, picked, frozen = set(trainable), {}, {}
    for component, weights in params.items():
        for path, weight in weights.items():
            hits = {regex for regex in trainable if re.match(regex, f"{component}/{path}")}
            unused -= hits
            (picked if hits else frozen).setdefault(component, {})[path] = weight
    if unused:
        raise UserError(
            f"config.trainable {sorted(unused)[0]!r} matches no weight: weights are named like "
            "'unet/down_blocks.0.resnets.0.conv1.kernel'."
        )
    return picked, frozen


# What is left of the peak rate, as a function of the decay's progress in [0, 1] and of the final
# ratio. The first is Marigold's and GenPercept's IterExponential [`src/util/lr_scheduler.py`].
_DECAYS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "iter_exponential": lambda progress, ratio: jnp.exp(jnp.log(ratio) * progress),
    "cosine": lambda progress, ratio: ratio + (1 - ratio) * (1 + jnp.cos(jnp.pi * progress)) / 2,
    "constant": lambda progress, ratio: jnp.ones_like(progress),
}
SCHEDULES = tuple(_DECAYS)


def make_schedule(config: Any) -> optax.Schedule:
    """The learning rate of a config's `optimizer` section, by the number of updates done.

    With n updates done, w of warm-up and N in all: n / w of the peak before w, then the decay at
    (n - w) / (N - w), and from N on its end. With a warm-up the first update has rate 0.
    """
    decay, warmup = _DECAYS[config.schedule], config.warmup_steps
    peak, span, ratio = config.learning_rate, config.decay_steps - warmup, config.final_ratio

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        n = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((n - warmup) / max(span, 1), 0.0, 1.0)
        return peak * jnp.where(n < warmup, n / max(warmup, 1), decay(progress, ratio))

    return schedule


def _scale_by_group(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiply each weight's update by the factor of the first regex its name matches."""

    def rule(path: tuple[Any, ...]) -> int | None:
        name = "/".join(str(key.key) for key in path)
        hits = (i for i, (regex, _) in enumerate(multipliers) if re.match(regex, name))
        return next(hits, None)

    def init(params: Any) -> optax.EmptyState:
        used = {rule(path) for path, _ in jax.tree.leaves_with_path(params)}
        for i, (regex, _) in enumerate(multipliers):
            if i not in used:
                raise UserError(
                    f"config.optimizer.rate_multipliers {regex!r} scales no trained weight: "
                    "correct it, or move it before the expression that matches first."
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params

        def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            number = rule(path)
            return leaf if number is None else leaf * multipliers[number][1]

        return jax.tree.map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def make_optimizer(config: Any) -> tuple[optax.GradientTransformation, Callable]:
    """Build the optimizer of a config's `optimizer` section, and its learning-rate schedule.

    Adam as in torch (eps outside the root), decoupled weight decay on kernels only, optional
    clipping by global norm before it, moments in float32.
    """
    schedule = make_schedule(config)
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_kernel))
    if config.rate_multipliers:
        parts.append(_scale_by_group(tuple(config.rate_multipliers)))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts), schedule


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)
