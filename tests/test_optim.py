"""Optimizer: schedules, Adam and AdamW against torch, clipping, groups, freezing."""

import jax
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from jaxpercept.checkpoints.load import merge_params
from jaxpercept.config import base_config
from jaxpercept.errors import UserError
from jaxpercept.training.optim import make_optimizer, make_schedule, split_params

SHAPES = {"conv.kernel": (3, 3, 2, 4), "conv.bias": (4,), "linear.kernel": (5, 3)}


def optimizer_config(**changes) -> ConfigDict:
    c = base_config().optimizer
    c.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.01, **changes})
    return c


def tree(rng, scale=0.3):
    return {"unet": {k: scale * rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}}


def steps(config, params, grads):
    optimizer, _ = make_optimizer(config)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = update(params, state, grad)
    return params["unet"]


def torch_steps(make, params, grads, clip=None):
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params["unet"].items()}
    optimizer = make(tensors)
    for grad in grads:
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(grad["unet"][key])
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
    return {k: t.detach().numpy() for k, t in tensors.items()}


def assert_close(ours, theirs, tolerance):
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=tolerance, err_msg=key)


def test_iter_exponential_is_the_published_formula():
    """n < w: n/w; n >= N: r; else r^((n-w)/(N-w)), times the peak."""
    w, total, r, peak = 7, 50, 0.01, 3e-5
    schedule = make_schedule(
        optimizer_config(
            schedule="iter_exponential",
            warmup_steps=w,
            decay_steps=total,
            final_ratio=r,
            learning_rate=peak,
        )
    )
    rates = jax.jit(jax.vmap(schedule))(np.arange(1001))
    for n in (0, 1, 6, 7, 8, 30, 49, 50, 51, 1000):
        factor = n / w if n < w else r if n >= total else r ** ((n - w) / (total - w))
        assert rates[n] == pytest.approx(peak * factor, rel=2e-6), n
    assert rates[0] == 0.0


def test_other_schedules_start_peak_and_end_where_they_should():
    def rates(name, **changes):
        schedule = make_schedule(optimizer_config(schedule=name, **{**values, **changes}))
        return jax.jit(jax.vmap(schedule))(np.array([0, 5, 10, 55, 100, 200]))

    values = {"warmup_steps": 10, "decay_steps": 100, "learning_rate": 2.0, "final_ratio": 0.1}
    # 55 is half way between the end of the warm-up and the end.
    np.testing.assert_allclose(rates("cosine"), [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rates("constant"), [0, 1, 2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(rates("constant", warmup_steps=0), 2, rtol=1e-6)


def test_adam_is_torch_s(rng):
    params, grads = tree(rng), [tree(rng, 10.0 ** rng.uniform(-6, 1)) for _ in range(10)]
    theirs = torch_steps(lambda p: torch.optim.Adam(p.values(), lr=0.01, eps=1e-8), params, grads)
    assert_close(steps(optimizer_config(), params, grads), theirs, 1e-6)


def test_adamw_is_torch_s_with_decay_on_kernels_only(rng):
    params, grads = tree(rng), [tree(rng) for _ in range(10)]

    def make(tensors):
        kernels = [t for k, t in tensors.items() if k.endswith("kernel")]
        others = [t for k, t in tensors.items() if not k.endswith("kernel")]
        groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)

    config = optimizer_config(weight_decay=0.1, b1=0.8, b2=0.95)
    assert_close(steps(config, params, grads), torch_steps(make, params, grads), 1e-6)


def test_clipping_is_by_the_global_norm(rng):
    params = tree(rng)
    grads = [tree(rng, scale) for scale in (1e-3, 1.0, 30.0)]  # below, about and above the norm
    theirs = torch_steps(lambda p: torch.optim.Adam(p.values(), lr=0.01), params, grads, clip=4.0)
    assert_close(steps(optimizer_config(clip_norm=4.0), params, grads), theirs, 2e-6)


def test_rates_by_group_and_the_first_match_counts(rng):
    params, grads = tree(rng), [tree(rng) for _ in range(3)]
    plain = steps(optimizer_config(), params, grads)
    rules = ((r"unet/conv\.bias", 0.0), (r"unet/conv", 0.5))
    scaled = steps(optimizer_config(rate_multipliers=rules), params, grads)
    start = params["unet"]
    np.testing.assert_array_equal(scaled["conv.bias"], start["conv.bias"])
    np.testing.assert_array_equal(scaled["linear.kernel"], plain["linear.kernel"])
    half = start["conv.kernel"] + 0.5 * (plain["conv.kernel"] - start["conv.kernel"])
    np.testing.assert_allclose(scaled["conv.kernel"], half, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rules", [(("vae/", 0.5),), (("unet/", 1.0), ("unet/conv", 0.5))])
def test_a_group_of_no_weight_is_refused(rng, rules):
    with pytest.raises(UserError, match=f"'{rules[-1][0]}' scales no trained weight"):
        make_optimizer(optimizer_config(rate_multipliers=rules))[0].init(tree(rng))


def test_weights_are_split_by_expressions_and_put_together_again(rng):
    params = {**tree(rng), "vae": {"decoder.conv.kernel": np.ones(2), "encoder.k": np.ones(1)}}
    trained, frozen = split_params(params, (r"unet/conv\.", r"vae/decoder"))
    assert {part: sorted(weights) for part, weights in trained.items()} == {
        "unet": ["conv.bias", "conv.kernel"],
        "vae": ["decoder.conv.kernel"],
    }
    assert {part: sorted(weights) for part, weights in frozen.items()} == {
        "unet": ["linear.kernel"],
        "vae": ["encoder.k"],
    }
    merged = merge_params(frozen, trained)
    assert merged.keys() == params.keys()
    for part, weights in params.items():
        assert merged[part].keys() == weights.keys()
        assert all(merged[part][path] is weight for path, weight in weights.items())
    # An expression matches from the start of the name, not anywhere in it.
    with pytest.raises(UserError, match=r"config.trainable 'conv' matches no weight"):
        split_params(params, ("unet/", "conv"))
