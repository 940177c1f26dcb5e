"""The UNet and its blocks against torch diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import downsampling, embeddings, resnet, upsampling
from flax import nnx
from torch_checkpoints import FULL_UNET
from torch_parity import (
    from_torch,
    max_abs,
    normal,
    params_of,
    port,
    quick_jit,
    randomise,
    to_torch,
)

from jaxpercept.models import blocks, layers
from jaxpercept.models.config import UNetConfig
from jaxpercept.models.functional import functional

TINY = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
ONE_LEVEL = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
THREE_LEVELS = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VARIANTS = {
    "sd1": {"layers_per_block": 2},
    "sd2": THREE_LEVELS | {"use_linear_projection": True, "attention_head_dim": [2, 4, 8]},
    "eight-channels": {
        "in_channels": 8,
        "out_channels": 5,
        "layers_per_block": [1, 2],
        "cross_attention_dim": [12, 12],
        "transformer_layers_per_block": [1, 2],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
    },
    "lotus": {
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 4,
    },
}


def torch_unet(rng, **changes):
    return randomise(diffusers.UNet2DConditionModel(**TINY | changes), rng)


def ported(reference, **options):
    unet = functional(UNetConfig.from_dict(dict(reference.config)), **options)
    return unet, params_of(reference, unet.shapes)


def inputs(rng, config, height=8, width=8, length=5):
    """sample, timesteps, encoder_hidden_states, class_labels for a batch of two."""
    context = config.per_level("cross_attention_dim")[0]
    labels = config.projection_class_embeddings_input_dim
    return (
        normal(rng, 2, height, width, config.in_channels),
        rng.integers(0, 1000, 2, dtype=np.int32),
        normal(rng, 2, length, context),
        None if labels is None else normal(rng, 2, labels),
    )


def torch_output(reference, sample, timesteps, context, labels):
    labels = None if labels is None else torch.from_numpy(labels)
    timesteps, context = torch.from_numpy(timesteps), torch.from_numpy(context)
    return reference(to_torch(sample), timesteps, context, class_labels=labels).sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_features_match_torch(rng, variant):
    reference = torch_unet(rng, **VARIANTS[variant])
    unet, params = ported(reference)
    # 15 x 10 shrinks to 8 x 5 and 4 x 3: every up-sampler must go to the size of its skip.
    args = inputs(rng, unet.config, 15, 10)
    want_features = []
    for block in reference.up_blocks:
        block.register_forward_hook(lambda module, args, out: want_features.append(out))
    want = torch_output(reference, *args)

    apply = quick_jit(lambda p, *args: unet.bind(p)(*args, return_features=True))
    got, features = apply(params, *args)
    assert max_abs(got, want) <= 1e-5
    assert len(features) == len(unet.config.block_out_channels)
    for feature, want_feature in zip(features, want_features, strict=True):
        # Residual sums reach tens here, and so do their rounding errors.
        assert max_abs(feature, want_feature) <= 1e-5 * max(1, want_feature.abs().max())


def test_gradients_match_torch_and_remat_changes_nothing(rng):
    reference = torch_unet(rng, **ONE_LEVEL)
    unet, params = ported(reference)
    sample, timesteps, context, _ = inputs(rng, unet.config)
    weight = normal(rng, *sample.shape[:3], 4)

    def gradient(unet):
        def loss(params, *args):
            return jnp.mean(weight * unet.bind(params)(*args))

        return quick_jit(jax.grad(loss))(params, sample, timesteps, context)

    got, remat = gradient(unet), gradient(functional(unet.config, remat="block"))
    reference.requires_grad_(True)
    out = torch_output(reference, sample, timesteps, context, None)
    (out * to_torch(weight)).mean().backward()
    for p in reference.parameters():
        p.data = p.grad
    for path, want in params_of(reference, unet.shapes).items():
        assert max_abs(got[path], want) <= 1e-5, path
        assert max_abs(got[path], remat[path]) <= 1e-6, path


def test_remat_keeps_less_for_the_backward_pass():
    shape = jax.ShapeDtypeStruct
    args = shape((1, 32, 32, 4), "float32"), shape((1,), "int32"), shape((1, 5, 12), "float32")

    def kept_bytes(remat):
        unet = functional(UNetConfig.from_dict(TINY), remat=remat)
        forward = lambda params, *args: unet.bind(params)(*args)  # noqa: E731
        backward = jax.eval_shape(lambda *args: jax.vjp(forward, *args)[1], unet.shapes, *args)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    # What is left: the parameters, one input for each pair of blocks, and the resampling layers.
    assert kept_bytes("block") < 0.15 * kept_bytes("none")


def test_bfloat16(rng):
    reference = torch_unet(rng, **ONE_LEVEL)
    unet, params = ported(reference, dtype=jnp.bfloat16)
    args = inputs(rng, unet.config)
    low = quick_jit(lambda p, *args: unet.bind(p)(*args))(params, *args)
    assert low.dtype == jnp.bfloat16
    want = from_torch(torch_output(reference, *args))
    error = np.asarray(low, np.float32) - want
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.std(want)


def test_class_labels_must_fit_the_config(rng):
    unet, params = ported(torch_unet(rng))
    sample, timesteps, context, _ = inputs(rng, unet.config)
    with pytest.raises(ValueError, match="class_labels"):
        jax.jit(lambda p, *a: unet.bind(p)(*a))(
            params, sample, timesteps, context, normal(rng, 2, 4)
        )


@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
def test_resnet_block(rng, widths):
    i, o = widths
    reference = resnet.ResnetBlock2D(
        in_channels=i, out_channels=o, temb_channels=20, groups=8, eps=1e-5
    )
    randomise(reference, rng)
    make = lambda: blocks.ResnetBlock2D(i, o, time_channels=20, num_groups=8)  # noqa: E731
    apply, params = port(make, reference)
    x, time = normal(rng, 2, 5, 7, i), normal(rng, 2, 20)
    assert max_abs(apply(params, x, time), reference(to_torch(x), to_torch(time))) <= 1e-5


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
@pytest.mark.parametrize("vae", [False, True])
def test_downsample(rng, size, vae):
    reference = downsampling.Downsample2D(6, use_conv=True, padding=0 if vae else 1, name="op")
    randomise(reference, rng)
    padding = ((0, 1), (0, 1)) if vae else 1
    apply, params = port(lambda: blocks.Downsample2D(6, padding=padding), reference)
    x = normal(rng, 2, *size, 6)
    assert max_abs(apply(params, x), reference(to_torch(x))) <= 1e-5


@pytest.mark.parametrize("size", [None, (7, 9), (8, 9)])
def test_upsample(rng, size):
    reference = randomise(upsampling.Upsample2D(6, use_conv=True), rng)
    x = normal(rng, 2, 4, 5, 6)

    class Sized(blocks.Upsample2D):
        def __call__(self, x):
            return super().__call__(x, size)

    apply, params = port(lambda: Sized(6), reference)
    assert max_abs(apply(params, x), reference(to_torch(x), size)) <= 1e-5


@pytest.mark.parametrize("size", [(1, 2), (7, 15), (16, 5), (30, 31), (13, 9)])
def test_nearest_is_torchs(size):
    """From the rounded-up half back to the whole, as the UNet needs, and to a third more."""
    h, w = ((s + 1) // 2 for s in size)
    x = np.arange(h * w, dtype=np.float32).reshape(1, h, w, 1)
    for target in (size, (h + h // 3, w)):
        got = layers.resize_nearest(jnp.asarray(x), target)
        want = torch.nn.functional.interpolate(to_torch(x), size=target, mode="nearest")
        assert max_abs(got, want) == 0


@pytest.mark.parametrize(("dim", "flip", "shift"), [(16, True, 0), (16, False, 1), (15, True, 0)])
def test_timestep_features(rng, dim, flip, shift):
    timesteps = rng.uniform(0, 1000, 7).astype(np.float32)
    want = embeddings.get_timestep_embedding(torch.from_numpy(timesteps), dim, flip, shift)
    got = layers.timestep_embedding(
        jnp.asarray(timesteps), dim, flip_sin_to_cos=flip, freq_shift=shift
    )
    assert got.dtype == jnp.float32
    # The phase reaches 1000, where float32 has steps of 6e-5: compare with float64 as a bound.
    assert max_abs(got, want) <= 2e-4


def test_timestep_embedding(rng):
    reference = randomise(embeddings.TimestepEmbedding(8, 24), rng)
    apply, params = port(lambda: blocks.TimestepEmbedding(8, 24), reference)
    x = normal(rng, 3, 8)
    assert max_abs(apply(params, x), reference(to_torch(x))) <= 1e-5


@pytest.mark.parametrize("offset", [0, 100])
def test_group_norm_keeps_its_digits_far_from_zero(rng, offset):
    reference = randomise(torch.nn.GroupNorm(4, 16, eps=1e-6), rng)
    apply, params = port_norm(reference)
    x = normal(rng, 2, 9, 11, 16) + np.float32(offset)
    want = from_torch(reference.double()(to_torch(x).double()))
    assert max_abs(apply(params, x), want) <= (2e-6 if offset == 0 else 1e-4)


def port_norm(reference):
    class Net(nnx.Module):
        def __init__(self):
            self.norm = layers.GroupNorm(4, 16, eps=1e-6)

        def __call__(self, x):
            return self.norm(x)

    return port(Net, torch.nn.ModuleDict({"norm": reference}))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_layer_norm(rng, eps):
    class Net(nnx.Module):
        def __init__(self):
            self.norm = layers.LayerNorm(16, eps=eps)

        def __call__(self, x):
            return self.norm(x)

    reference = randomise(torch.nn.LayerNorm(16, eps=eps), rng)
    apply, params = port(Net, torch.nn.ModuleDict({"norm": reference}))
    x = normal(rng, 2, 5, 16)
    assert max_abs(apply(params, x), reference(to_torch(x))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_UNET)
def test_full_size(rng, name):
    reference = randomise(diffusers.UNet2DConditionModel(**FULL_UNET[name]), rng)
    unet, params = ported(reference)
    args = inputs(rng, unet.config, 32, 32, 77)
    args = [None if a is None else a[:1] for a in args]
    with torch.no_grad():
        want = torch_output(reference, *args)
    error = max_abs(jax.jit(lambda p, *args: unet.bind(p)(*args))(params, *args), want)
    print(f"{name}: {error:.1e} of {want.abs().max():.2f}")
    assert error <= 1e-5
