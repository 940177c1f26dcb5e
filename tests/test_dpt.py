"""GenPercept's DPT head against transformers' classes, and the UNet's features against hooks."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from dpt_torch import UNUSED, TorchHead
from torch_parity import from_torch, max_abs, normal, quick_jit, randomise, to_torch

from jaxpercept.checkpoints import rules
from jaxpercept.checkpoints.weights import open_weights
from jaxpercept.errors import UserError
from jaxpercept.models.config import UNetConfig
from jaxpercept.models.dpt import DPTConfig, published_tensors
from jaxpercept.models.functional import functional

SMALL = {
    "neck_hidden_sizes": [8, 16, 24, 24],
    "fusion_hidden_size": 16,
    "add_projection": True,
    "use_bias_in_fusion_residual": False,
}
# Latents of 16 x 24 and of 15 x 10: the sizes of a UNet's up blocks.
EVEN = [(4, 6), (8, 12), (16, 24), (16, 24)]
ODD = [(4, 3), (8, 5), (15, 10), (15, 10)]

# hf_configs/dpt-sd2.1-unet-after-upsample-general/config.json of GenPercept.
PUBLISHED = json.loads("""{
  "_commit_hash": null, "add_projection": true, "architectures": ["DPTForDepthEstimation"],
  "attention_probs_dropout_prob": null, "auxiliary_loss_weight": 0.4,
  "backbone_featmap_shape": null, "backbone_out_indices": null, "fusion_hidden_size": 256,
  "head_in_index": -1, "hidden_act": "gelu", "hidden_dropout_prob": null, "hidden_size": 768,
  "image_size": null, "initializer_range": 0.02, "intermediate_size": null, "is_hybrid": false,
  "layer_norm_eps": null, "model_type": "dpt", "neck_hidden_sizes": [320, 640, 1280, 1280],
  "neck_ignore_stages": [], "num_attention_heads": null, "num_channels": null,
  "num_hidden_layers": null, "patch_size": null, "qkv_bias": null, "readout_type": "project",
  "reassemble_factors": [4, 2, 1, 0.5], "semantic_classifier_dropout": 0.1,
  "semantic_loss_ignore_index": 255, "torch_dtype": "float32", "transformers_version": null,
  "use_auxiliary_head": true, "use_batch_norm_in_fusion_residual": false,
  "use_bias_in_fusion_residual": false
}""")


def torch_head(rng, **changes):
    return randomise(TorchHead(**SMALL | changes), rng)


def params_of(reference, config):
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return rules.to_jax(functional(config).shapes, published_tensors(tensors, config))


def features_of(rng, sizes, widths):
    pairs = zip(sizes, reversed(widths), strict=True)
    return [normal(rng, 2, *size, width) for size, width in pairs]


def close(got, want):
    """Values reach ten here, and so do their rounding errors."""
    return max_abs(got, want) <= 1e-5 * max(1, np.abs(want).max())


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        (EVEN, {}),
        (ODD, {"add_projection": False, "use_bias_in_fusion_residual": None}),
        (EVEN[2:], {"neck_hidden_sizes": [8, 16], "fusion_hidden_size": 256}),
    ],
    ids=["identity", "relu", "two-levels"],
)
def test_output_matches_torch(rng, sizes, changes):
    reference = torch_head(rng, **changes)
    config = DPTConfig.from_dict(SMALL | changes)
    features = features_of(rng, sizes, config.neck_hidden_sizes)
    inputs = [to_torch(x) for x in features]
    reference.head.head[4].bias -= reference(inputs).median()
    if sizes == ODD:
        config = dataclasses.replace(config, final_activation="relu")
        reference.head.head[5] = torch.nn.ReLU()
    want = reference(inputs).numpy()[..., None]
    assert 0.4 < np.mean(want > 0) < 0.6

    net = functional(config)
    got = quick_jit(lambda p, x: net.bind(p)(x))(params_of(reference, config), features)
    scale = 2 ** (len(sizes) + 1)
    assert got.shape == (2, scale * sizes[0][0], scale * sizes[0][1], 1)
    assert close(got, want)


def test_gradients_match_torch_and_remat_changes_nothing(rng):
    three_levels = {"neck_hidden_sizes": [8, 16, 24]}
    reference = torch_head(rng, **three_levels)
    config = DPTConfig.from_dict(SMALL | three_levels)
    features = features_of(rng, ODD[1:], config.neck_hidden_sizes)
    params = params_of(reference, config)
    weight = normal(rng, 2, 128, 80, 1)

    def gradient(net):
        loss = lambda p, x: jnp.mean(weight * net.bind(p)(x))  # noqa: E731
        return quick_jit(jax.grad(loss, argnums=(0, 1)))(params, features)

    got, d_features = gradient(functional(config))
    remat, _ = gradient(functional(config, remat="block"))
    inputs = [to_torch(x).requires_grad_() for x in features]
    reference.requires_grad_(True)
    (reference(inputs) * torch.from_numpy(weight[..., 0])).mean().backward()
    # A ReLU whose input is zero but for rounding passes its gradient on, or not: a few of ten
    # thousand may do so in one of the two only.
    for ours, theirs in zip(d_features, inputs, strict=True):
        assert relative(ours, from_torch(theirs.grad)) <= 1e-2
    used = {n: p for n, p in reference.named_parameters() if not n.startswith(UNUSED)}
    tensors = {name: p.grad.numpy() for name, p in used.items()}
    for path, want in rules.to_jax(functional(config).shapes, tensors).items():
        assert relative(got[path], want) <= 1e-2, path
        assert relative(got[path], remat[path]) <= 1e-2, path


def test_remat_keeps_less_for_the_backward_pass():
    config = DPTConfig.from_dict(SMALL)
    widths = config.neck_hidden_sizes[::-1]
    pairs = zip(EVEN, widths, strict=True)
    features = [jax.ShapeDtypeStruct((1, *size, width), "float32") for size, width in pairs]

    def kept_bytes(remat):
        net = functional(config, remat=remat)
        forward = lambda params, x: net.bind(params)(x)  # noqa: E731
        backward = jax.eval_shape(lambda p, x: jax.vjp(forward, p, x)[1], net.shapes, features)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    assert kept_bytes("block") < 0.15 * kept_bytes("none")


def test_bfloat16(rng):
    reference = torch_head(rng)
    config = DPTConfig.from_dict(SMALL)
    features = features_of(rng, EVEN, config.neck_hidden_sizes)
    net = functional(config, dtype=jnp.bfloat16)
    got = quick_jit(lambda p, x: net.bind(p)(x))(params_of(reference, config), features)
    assert got.dtype == jnp.bfloat16
    want = reference([to_torch(x) for x in features]).numpy()[..., None]
    assert np.sqrt(np.mean((np.asarray(got, np.float32) - want) ** 2)) < 0.05 * np.std(want)


def test_published_config_and_size():
    config = DPTConfig.from_dict(PUBLISHED)
    assert config == DPTConfig()
    shapes = functional(config).shapes
    assert sum(s.size for s in shapes.values()) == 18_474_753
    with torch.device("meta"):
        reference = TorchHead(**{key: PUBLISHED[key] for key in SMALL})
    tensors = published_tensors(reference.state_dict(), config)
    names = {path: rules.torch_name(path, len(s.shape)) for path, s in shapes.items()}
    assert set(names.values()) == tensors.keys()
    assert sum(t.numel() for t in tensors.values()) == 18_474_753


@pytest.mark.parametrize("unused", [True, False])
@pytest.mark.parametrize("prefix", ["feature_upsample_0.conv", "neck.up.conv", "upsample"])
def test_published_file(rng, tmp_path, unused, prefix):
    """The upsampler under any name; the weights that no output depends on there or not."""
    reference = torch_head(rng)
    config = DPTConfig.from_dict(SMALL)
    tensors = {
        name.replace("feature_upsample_0.conv", prefix): tensor
        for name, tensor in reference.state_dict().items()
        if unused or not name.startswith(UNUSED)
    }
    assert len(tensors) == (38 if unused else 36)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    stored = published_tensors(open_weights(tmp_path / "model.safetensors"), config)
    params = rules.to_jax(functional(config).shapes, stored)
    want = {n: t for n, t in reference.state_dict().items() if not n.startswith(UNUSED)}
    back = rules.to_torch(params)
    assert back.keys() == want.keys()
    assert all(np.array_equal(back[name], want[name].numpy()) for name in want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"feature_upsample_0.conv.weight": None},
            r"missing \(1\): feature_upsample_0",
        ),
        ({"up.weight": (8, 8, 3, 3), "up.bias": (8,)}, "not expected .*up.bias, up.weight"),
        (
            dict.fromkeys(["feature_upsample_0.conv.weight", "feature_upsample_0.conv.bias"])
            | {"up.weight": (8, 16, 3, 3), "up.bias": (8,)},
            r"missing \(2\): feature_upsample_0.*not expected \(2\): up.bias, up.weight",
        ),
        ({"head.head.4.bias": None}, r"missing \(1\): head.head.4.bias"),
        ({"feature_upsample_0.conv.weight": (8, 8, 1, 1)}, r"of another shape \(1\): feature_up"),
        ({"neck.reassemble_stage.layers.0.projection.bias": (8,)}, "not expected .*reassemble"),
        ({"neck.fusion_stage.layers.1.projection.bias": (8,)}, "of another shape"),
        ({"neck.fusion_stage.layers.1.residual_layer1.convolution1.weight": None}, "missing"),
    ],
)
def test_other_files_are_refused(rng, change, message):
    config = DPTConfig.from_dict(SMALL)
    tensors = {name: tensor.numpy() for name, tensor in torch_head(rng).state_dict().items()}
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(UserError, match=message):
        rules.to_jax(functional(config).shapes, published_tensors(tensors, config))


def test_config_goes_to_transformers_and_back():
    config = DPTConfig.from_dict(SMALL | {"final_activation": "relu"})
    theirs = transformers.DPTConfig.from_dict(config.to_dict())
    assert all(getattr(theirs, key) == value for key, value in SMALL.items())
    assert DPTConfig.from_dict(theirs.to_dict()) == config
    # What a file leaves out is transformers' default.
    assert DPTConfig.from_dict({}) == DPTConfig.from_dict(transformers.DPTConfig().to_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_batch_norm_in_fusion_residual", True),
        ("head_in_index", 0),
        ("is_hybrid", True),
        ("model_type", "zoedepth"),
        ("final_activation", "elu"),
        ("neck_hidden_sizes", []),
        ("fusion_hidden_size", 15),
        ("add_relative_position", True),
    ],
)
def test_unsupported_configs_are_named(key, value):
    with pytest.raises(UserError, match=rf"^DPTForDepthEstimation config: .*{key}.*\.$"):
        DPTConfig.from_dict(SMALL | {key: value})


def test_features_must_fit_the_config(rng):
    config = DPTConfig.from_dict(SMALL)
    net = functional(config)
    features = features_of(rng, EVEN, config.neck_hidden_sizes)
    for wrong in (features[1:], features[::-1]):
        with pytest.raises(ValueError, match="reads features of"):
            jax.eval_shape(lambda p, x: net.bind(p)(x), net.shapes, wrong)


UNET = {
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "use_linear_projection": True,
}


def test_unet_and_head_together(rng):
    """A UNet whose file has no conv_norm_out and conv_out, and the head on its features."""
    torch_unet = randomise(diffusers.UNet2DConditionModel(**UNET), rng)
    head = torch_head(rng, neck_hidden_sizes=UNET["block_out_channels"])
    sample, context = normal(rng, 2, 15, 10, 4), normal(rng, 2, 2, 12)
    timesteps = np.ones(2, np.int32)
    want_features = []
    for block in torch_unet.up_blocks:
        block.register_forward_hook(lambda module, args, out: want_features.append(out))
    torch_unet(to_torch(sample), torch.from_numpy(timesteps), torch.from_numpy(context))
    want = head(want_features).numpy()[..., None]

    unet = functional(UNetConfig.from_dict(UNET), head=False)
    tensors = {
        name: tensor.numpy()
        for name, tensor in torch_unet.state_dict().items()
        if not name.startswith(("conv_out", "conv_norm_out"))
    }
    dpt = functional(DPTConfig.from_dict(SMALL | {"neck_hidden_sizes": [8, 16, 24]}))

    @quick_jit
    def apply(params, head_params, *args):
        features = unet.bind(params).features(*args)
        return dpt.bind(head_params)(features), features

    params = rules.to_jax(unet.shapes, tensors)
    got, features = apply(params, params_of(head, dpt.config), sample, timesteps, context)
    assert [x.shape[1:3] for x in features] == [(8, 5), (15, 10), (15, 10)]
    for ours, theirs in zip(features, want_features, strict=True):
        assert close(ours, from_torch(theirs))
    # The features' own errors come on top.
    assert max_abs(got, want) <= 3e-5 * max(1, np.abs(want).max())


def test_a_unet_without_its_head():
    config = UNetConfig.from_dict(UNET)
    unet, whole = functional(config, head=False), functional(config)
    assert unet != whole
    left_away = {"conv_norm_out.scale", "conv_norm_out.bias", "conv_out.kernel", "conv_out.bias"}
    assert whole.shapes.keys() - unet.shapes.keys() == left_away
    shape = jax.ShapeDtypeStruct
    args = shape((2, 8, 8, 4), "float32"), shape((2,), "int32"), shape((2, 2, 12), "float32")
    with pytest.raises(ValueError, match="call its features method"):
        jax.eval_shape(lambda p, *args: unet.bind(p)(*args), unet.shapes, *args)
    with pytest.raises(ValueError, match="head=False is for a UNetConfig"):
        functional(DPTConfig(), head=False)
