"""LoRA layers against peft in torch diffusers, fresh factors, training and merging."""

import json

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from lora_torch import (
    add_adapter,
    config_of,
    factors,
    only_lora,
    params_of,
    peft_config,
    ported,
    randomise_adapter,
    torch_unet,
)
from torch_parity import max_abs, normal, quick_jit, randomise, to_torch

from jaxpercept.checkpoints import rules
from jaxpercept.checkpoints.merging import merge
from jaxpercept.errors import UserError
from jaxpercept.models.config import VAEConfig
from jaxpercept.models.functional import abstract, bind, functional
from jaxpercept.models.layers import Linear
from jaxpercept.models.lora import ATTENTION, LoraConfig, adapted, is_lora
from jaxpercept.training.optim import split_params
from jaxpercept.training.sharding import make_mesh, tree_shardings
from jaxpercept.training.step import init_state, make_train_step

TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
# Every kind of layer there is: strided, resizing and 1x1 convolutions, linear layers elsewhere.
EVERYWHERE = (
    *("conv_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("proj_in", "ff.net.0.proj", "net.2", "time_emb_proj", "linear_1", "attn1.to_q"),
)
VARIANTS = {
    "rank-4": (LoraConfig(4, 4), {}),
    "wider-than-the-layer": (LoraConfig(64, 40), {}),
    "linear-projection": (
        LoraConfig(3, 7.5, ("proj_in", "attn2.to_k")),
        {"use_linear_projection": True},
    ),
    "every-layer": (LoraConfig(2, 6, EVERYWHERE), TWO_LEVELS),
}


def inputs(rng, config):
    """sample, timesteps, encoder_hidden_states for a batch of two."""
    return (
        normal(rng, 2, 6, 8, config.in_channels),
        rng.integers(0, 1000, 2, dtype=np.int32),
        normal(rng, 2, 5, config.per_level("cross_attention_dim")[0]),
    )


def torch_output(reference, sample, timesteps, context):
    return reference(
        to_torch(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
    ).sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_match_peft(rng, variant):
    lora, changes = VARIANTS[variant]
    reference = add_adapter(torch_unet(rng, **changes), lora, rng)
    network, params = ported(reference, lora)
    args, weight = inputs(rng, network.config), normal(rng, 2, 6, 8, 4)
    trained = only_lora(params)
    frozen = {path: value for path, value in params.items() if not is_lora(path)}

    def loss(trained, frozen, *args):
        out = network.bind({**frozen, **trained})(*args)
        return jnp.sum(weight * out), out

    (_, got), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen, *args)
    want = torch_output(reference, *args)
    assert max_abs(got, want) <= 1e-5 * max(1, want.abs().max())
    with torch.no_grad():
        reference.disable_adapters()
        assert max_abs(torch_output(reference, *args), want) > 0.05  # there is something to match
        reference.enable_adapters()

    (want * to_torch(weight)).sum().backward()
    for p in reference.parameters():
        if p.grad is not None:
            p.data = p.grad
    for path, gradient in only_lora(params_of(reference, network)).items():
        assert max_abs(grads[path], gradient) <= 1e-4 * np.abs(gradient).max(), path
    assert grads.keys() == trained.keys()


def test_paths_are_the_state_dict_keys_of_peft(rng):
    lora = LoraConfig(3, 3)
    reference = add_adapter(torch_unet(rng), lora, rng)
    network = functional(config_of(reference), lora=lora)
    tensors = rules.to_torch(
        {path: np.empty(s.shape) for path, s in only_lora(network.shapes).items()}
    )
    want = factors(reference)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in want.items()}
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    assert tensors[name.format("A")].shape == (3, 12)
    assert tensors[name.format("B")].shape == (16, 3)


def test_fresh_lora_changes_nothing_to_the_bit(rng):
    config = config_of(torch_unet(rng))
    plain, network = functional(config), functional(config, lora=LoraConfig(4, 9))
    base, params = plain.init(7), network.init(7)
    assert base.keys() == {path for path in params if not is_lora(path)}
    for path, value in base.items():
        np.testing.assert_array_equal(params[path], value)
    args = inputs(rng, config)
    want, got = (
        jax.jit(lambda p, *args, n=n: n.bind(p)(*args))(p, *args)
        for n, p in ((plain, base), (network, params))
    )
    np.testing.assert_array_equal(got, want)


def test_fresh_factors_are_pefts_gaussian(rng):
    lora = LoraConfig(64, 64)
    reference = torch_unet(rng)
    reference.add_adapter(peft_config(lora))
    network = functional(config_of(reference), lora=lora)
    fresh = network.init(int(rng.integers(2**31)), paths=only_lora(network.shapes))
    assert fresh.keys() == only_lora(network.shapes).keys()
    want = {k: v.numpy() for k, v in factors(reference).items()}
    got = rules.to_torch(fresh)
    assert all(not v.any() for values in (got, want) for k, v in values.items() if "lora_B" in k)

    def spread(values):
        drawn = np.concatenate([v.ravel() for k, v in values.items() if "lora_A" in k])
        return drawn.mean(), drawn.std()

    for mean, std in (spread(got), spread(want)):  # of 16 thousand values
        assert abs(mean) < 5 * (1 / 64) / 120
        assert abs(std - 1 / 64) < 0.04 / 64
    values = [v for k, v in got.items() if "lora_A" in k and v.shape == (64, 16)]
    assert not np.array_equal(values[0], values[1])


def test_without_lora_nothing_is_added(rng):
    config = config_of(torch_unet(rng))
    assert functional(config) is functional(config, lora=None)
    assert not only_lora(functional(config).shapes)
    lora = LoraConfig(4, 4)
    assert functional(config, lora=lora) is functional(config, lora=LoraConfig(4, 4, ATTENTION))
    assert functional(config, lora=lora) != functional(config)
    assert functional(config, lora=lora) != functional(config, lora=LoraConfig(4, 8))


class One(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        self.linear = Linear(24, 40, dtype=dtype)

    def __call__(self, x):
        return self.linear(x)


def test_no_array_of_a_kernels_size_is_made():
    """Neither A B, nor W + A B, nor a gradient of W; what is scaled has rank columns."""
    graphdef, shapes = abstract(adapted(One, LoraConfig(3, 5, ("linear",))))
    frozen = {p: s for p, s in shapes.items() if not is_lora(p)}

    def loss(trained, frozen, x):
        return jnp.sum(bind(graphdef, shapes, {**frozen, **trained})(x) ** 2)

    x = jax.ShapeDtypeStruct((2, 7, 24), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(only_lora(shapes), frozen, x)
    made = [(e.primitive.name, v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
    kernels = {(24, 40), (40, 24)}
    assert {name for name, shape in made if shape in kernels} <= {
        "transpose",
        "convert_element_type",
    }
    assert ("mul", (2, 7, 3)) in made
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [(24, 3), (3, 40)]


def test_factors_are_cast_to_the_layers_type(rng):
    make = adapted(lambda: One(jnp.bfloat16), LoraConfig(3, 5, ("linear",)))
    graphdef, shapes = abstract(make)
    assert {s.dtype for s in shapes.values()} == {jnp.dtype("float32")}
    params = {path: normal(rng, *s.shape) for path, s in shapes.items()}
    x = normal(rng, 2, 7, 24)
    got = bind(graphdef, shapes, params)(jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    w, b, a1, b1 = (
        params[f"linear.{name}"].astype(np.float64)
        for name in ("kernel", "bias", "lora_A.kernel", "lora_B.kernel")
    )
    want = x @ w + b + 5 / 3 * (x @ a1 @ b1)
    assert max_abs(got, want) <= 2**-6 * np.abs(want).max()


def test_merged_is_fuse_lora(rng):
    lora = LoraConfig(5, 8, EVERYWHERE)
    reference = add_adapter(torch_unet(rng, **TWO_LEVELS), lora, rng)
    network, params = ported(reference, lora)
    merged = merge({"unet": params, "vae": {"conv.bias": np.ones(3)}}, lora)
    assert merged["vae"].keys() == {"conv.bias"}
    reference.fuse_lora()
    reference.unload_lora()
    want = rules.to_jax(
        functional(network.config).shapes,
        {k: v.detach().numpy() for k, v in reference.state_dict().items()},
    )
    assert merged["unet"].keys() == want.keys()
    for path, value in want.items():
        assert max_abs(merged["unet"][path], value) <= 1e-6, path
        changed = any(f".{path}".endswith(f".{t}.kernel") for t in lora.targets)
        assert (max_abs(params[path], value) > 1e-2) == changed, path


def test_merged_predicts_the_same(rng):
    lora = LoraConfig(4, 2)
    reference = add_adapter(torch_unet(rng), lora, rng)
    network, params = ported(reference, lora)
    plain, args = functional(network.config), inputs(rng, network.config)
    merged = merge({"unet": params}, lora)["unet"]
    got = quick_jit(lambda p, *args: plain.bind(p)(*args))(merged, *args)
    assert max_abs(got, torch_output(reference, *args)) <= 1e-5


def test_merging_loses_nothing_to_half_precision(rng):
    lora = LoraConfig(2, 4, ("to_q",))
    a, b, w = normal(rng, 6, 2), 1e-3 * normal(rng, 2, 5), normal(rng, 6, 5)

    def merged(w, b=b):
        other = {"to_k.kernel": w, "to_q.bias": w[0]}
        weights = {"to_q.kernel": w, "to_q.lora_A.kernel": a, "to_q.lora_B.kernel": b} | other
        result = merge({"unet": weights}, lora)["unet"]
        assert result.keys() == {"to_q.kernel", *other}
        assert all(result[path] is value for path, value in other.items())
        return result["to_q.kernel"]

    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        kernel = merged(jnp.asarray(w, dtype))
        assert kernel.dtype == np.float32
        exact = w.astype(dtype).astype(np.float64) + 2.0 * a.astype(np.float64) @ b
        assert np.abs(kernel - exact).max() <= 1e-6
    with pytest.raises(UserError, match=r"unet/to_q\.kernel .* is not finite: check the training"):
        merged(w, np.full_like(b, np.inf))
    with pytest.raises(ValueError, match="factors of to_q"):
        merge({"unet": {"to_q.kernel": w, "to_q.lora_A.kernel": a}}, lora)
    with pytest.raises(ValueError, match="factors of to_q"):
        merge(
            {"unet": {"to_q.kernel": w, "to_q.lora_A.kernel": a, "to_q.lora_B.kernel": b}},
            LoraConfig(3, 4, ("to_q",)),
        )
    with pytest.raises(ValueError, match="no LoRA factors"):
        merge({"unet": {"to_q.kernel": w}}, lora)


def test_an_autoencoder_takes_it_too(rng):
    settings = {"block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1}
    reference = randomise(diffusers.AutoencoderKL(**settings), rng)
    lora = LoraConfig(3, 6, (*ATTENTION, "conv1"), "vae")
    peft.inject_adapter_in_model(peft_config(lora), reference)
    randomise_adapter(reference, rng)
    network = functional(VAEConfig.from_dict(dict(reference.config)), lora=lora)
    params = params_of(reference, network)
    image = normal(rng, 1, 6, 8, 3)
    got = quick_jit(lambda p, x: network.bind(p).encode(x))(params, image)
    want = reference.encode(to_torch(image)).latent_dist.parameters
    assert max_abs(got, want) <= 1e-5 * max(1, want.abs().max())


def test_config_round_trip():
    lora = LoraConfig(16, 2.5, ("to_v", "to_q", "ff.net.2"), "vae")
    assert lora.targets == ("ff.net.2", "to_q", "to_v")
    assert LoraConfig.from_dict(json.loads(json.dumps(lora.to_dict()))) == lora
    default = LoraConfig.from_dict({"rank": 4, "alpha": 4})
    assert default == LoraConfig(4, 4, ("to_q", "to_k", "to_v", "to_out.0"), "unet")
    assert default.scale == 1
    assert hash(default) == hash(LoraConfig(4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 10**6}, "rank=1000000"),
        ({"rank": None}, "rank=None"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": -1.0}, "alpha=-1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"alpha": "4"}, "alpha='4'"),
        ({"targets": []}, "targets="),
        ({"targets": "to_q"}, "targets='to_q'"),
        ({"targets": ["to_q", ""]}, "targets="),
        ({"targets": [".*"]}, "targets="),
        ({"targets": [3]}, "targets="),
        ({"component": "text_encoder"}, "component='text_encoder'"),
        ({"dropout": 0.1}, "'dropout'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        LoraConfig.from_dict({"rank": 4, "alpha": 4} | changes)


@pytest.mark.parametrize("key", ["rank", "alpha"])
def test_missing_settings_are_named(key):
    config = {"rank": 4, "alpha": 4}
    del config[key]
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        LoraConfig.from_dict(config)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_x", "'to_x' names no layer of the UNet2DConditionModel"),
        ("o_q", "'o_q' names no layer"),
        ("attn1", "attn1' is neither a linear layer nor a convolution"),
        ("norm1", "norm1' is neither"),
    ],
)
def test_targets_that_are_no_layers_are_named(rng, target, message):
    config = config_of(torch_unet(rng))
    with pytest.raises(UserError, match=message):
        functional(config, lora=LoraConfig(4, 4, ("to_q", target)))


def test_training_touches_the_factors_alone(rng):
    graphdef, shapes = abstract(adapted(One, LoraConfig(3, 3, ("linear",))))
    params = {path: normal(rng, *s.shape) for path, s in shapes.items()}
    params["linear.lora_B.kernel"] *= 0
    trained, frozen = split_params({"unet": params}, ["unet/.*lora_"])
    assert trained["unet"].keys() == only_lora(shapes).keys()

    def loss_fn(params, batch, key):
        out = bind(graphdef, shapes, params["unet"])(batch["x"])
        return jnp.mean((out - batch["y"]) ** 2), {}

    optimizer, mesh = optax.adam(1e-2), make_mesh(devices=jax.devices()[:1])
    state = init_state(trained, optimizer, ema=False)
    moments = [x.shape for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
    assert sorted(moments) == sorted(2 * [v.shape for v in trained["unet"].values()])
    step = make_train_step(
        loss_fn,
        optimizer,
        mesh=mesh,
        state_sharding=tree_shardings(state, mesh),
        schedule=lambda count: jnp.float32(1e-2),
        seed=0,
    )
    before = jax.tree.map(np.copy, trained)
    batch = {"x": jnp.asarray(normal(rng, 9, 24)), "y": jnp.asarray(normal(rng, 9, 40))}
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.99 * losses[0]
    assert state["params"]["unet"].keys() == trained["unet"].keys()
    for path, value in state["params"]["unet"].items():
        assert not np.array_equal(value, before["unet"][path]), path
