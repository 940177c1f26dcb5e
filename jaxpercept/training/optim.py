"""From config to optax: schedules, Adam, clipping, per-group learning rates, freezing by regex."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def merge_params(*parts: Params) -> Params:
    """The inverse of `split_params`; later parts win."""
    merged: Params = {}
    for part in parts:
        for component, weights in part.items():
            merged[component] = {**merged.get(component, {}), **weights}
    return merged


def iter_exponential(
    peak: float, *, warmup_steps: int, total_steps: int, final_ratio: float
) -> optax.Schedule:
    """Marigold's IterExponential: linear warm-up from 0, then exponential decay, then constant.

    With n the update index: n/w before the warm-up's end w, r from N on, and r^((n-w)/(N-w))
    between [Marigold, GenPercept `src/util/lr_scheduler.py`]. The first update has rate 0.
    """

    def schedule(count: jax.Array) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        progress = (n - warmup_steps) / max(total_steps - warmup_steps, 1)
        decayed = jnp.exp(jnp.log(final_ratio) * jnp.clip(progress, 0.0, 1.0))
        return peak * jnp.where(n < warmup_steps, n / max(warmup_steps, 1), decayed)

    return schedule


def make_schedule(config: Any) -> optax.Schedule:
    """The learning-rate schedule of a config's `optimizer` section.

    Raises:
        UserError: an unknown schedule, or values that make none.
    """
    peak, warmup, total = config.learning_rate, config.warmup_steps, config.decay_steps
    if peak <= 0 or warmup < 0 or total < 1 or not 0 < config.final_ratio <= 1:
        raise UserError(
            "config.optimizer needs learning_rate > 0, warmup_steps >= 0, decay_steps >= 1 and "
            "0 < final_ratio <= 1."
        )
    if config.schedule == "iter_exponential":
        return iter_exponential(
            peak, warmup_steps=warmup, total_steps=total, final_ratio=config.final_ratio
        )
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(total, warmup + 1), peak * config.final_ratio
        )
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, peak, warmup)
    raise UserError(
        f"config.optimizer.schedule {config.schedule!r} is unknown: use 'iter_exponential', "
        "'cosine' or 'constant'."
    )


def _scale_by_group(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiply each weight's update by the factor of the first regex its name matches."""

    def factor(path: tuple[Any, ...]) -> float:
        name = "/".join(str(key.key) for key in path)
        return next((value for regex, value in multipliers if re.match(regex, name)), 1.0)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path), updates)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
