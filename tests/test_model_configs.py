"""Strict configs, and Functional: a network without its weights."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from torch_parity import max_abs, params_of

from jaxpercept.errors import UserError
from jaxpercept.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.functional import functional

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
CLIP = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# config.json of stabilityai/stable-diffusion-2-1: unet and text_encoder.
SD21_UNET = json.loads("""{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "act_fn": "silu",
  "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": false, "cross_attention_dim": 1024,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                       "DownBlock2D"],
  "downsample_padding": 1, "dual_cross_attention": false, "flip_sin_to_cos": true, "freq_shift": 0,
  "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
  "norm_num_groups": 32, "num_class_embeds": null, "only_cross_attention": false,
  "out_channels": 4, "sample_size": 96,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
                     "CrossAttnUpBlock2D"],
  "upcast_attention": true, "use_linear_projection": true
}""")
SD21_TEXT = json.loads("""{
  "_name_or_path": "text_encoder", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
  "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 1024,
  "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
  "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
  "num_attention_heads": 16, "num_hidden_layers": 23, "pad_token_id": 1, "projection_dim": 512,
  "torch_dtype": "float32", "transformers_version": "4.25.0.dev0", "vocab_size": 49408
}""")


def test_published_sd21_configs_and_sizes():
    unet = functional(UNetConfig.from_dict(SD21_UNET))
    text = functional(CLIPTextConfig.from_dict(SD21_TEXT))
    assert sum(s.size for s in unet.shapes.values()) == 865_910_724
    assert sum(s.size for s in text.shapes.values()) == 340_387_840


@pytest.mark.parametrize(
    ("cls", "config"), [(UNetConfig, UNET), (VAEConfig, VAE), (CLIPTextConfig, CLIP)]
)
def test_round_trip_through_json(cls, config):
    parsed = cls.from_dict(config)
    assert cls.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed
    assert hash(parsed) == hash(cls.from_dict(config))


@pytest.mark.parametrize(
    ("cls", "reference"),
    [(UNetConfig, diffusers.UNet2DConditionModel), (VAEConfig, diffusers.AutoencoderKL)],
)
def test_diffusers_reads_what_we_write_and_we_its_defaults(cls, reference):
    config = UNET if cls is UNetConfig else VAE
    ours = cls.from_dict(config)
    theirs = reference.from_config(ours.to_dict())
    assert cls.from_dict(dict(theirs.config)) == ours
    assert {name.rpartition(".")[0] for name in theirs.state_dict()} == {
        path.rpartition(".")[0] for path in functional(ours).shapes
    }


def test_transformers_reads_what_we_write():
    ours = CLIPTextConfig.from_dict(CLIP | {"bos_token_id": 1, "eos_token_id": 2})
    theirs = transformers.CLIPTextConfig.from_dict(ours.to_dict())
    assert CLIPTextConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("cls", "config", "key", "value"),
    [
        (UNetConfig, UNET, "controlnet_depth", 3),
        (UNetConfig, UNET, "only_cross_attention", [True, False]),
        (UNetConfig, UNET, "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        (UNetConfig, UNET, "down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        (UNetConfig, UNET, "up_block_types", ["UpBlock2D"]),
        (UNetConfig, UNET, "class_embed_type", "timestep"),
        (UNetConfig, UNET, "addition_embed_type", "text_time"),
        (UNetConfig, UNET, "time_cond_proj_dim", 256),
        (UNetConfig, UNET, "act_fn", "gelu"),
        (UNetConfig, UNET, "attention_head_dim", 3),
        (UNetConfig, UNET, "layers_per_block", [1, 2, 3]),
        (UNetConfig, UNET, "block_out_channels", [8, 18]),
        (UNetConfig, UNET, "norm_num_groups", None),
        (UNetConfig, UNET, "norm_eps", "small"),
        (UNetConfig, UNET, "in_channels", True),
        (UNetConfig, UNET, "out_channels", 0),
        (UNetConfig, UNET, "use_linear_projection", "yes"),
        (VAEConfig, VAE, "shift_factor", 0.1),
        (VAEConfig, VAE, "latents_mean", [0.0] * 4),
        (VAEConfig, VAE, "scaling_factor", 0),
        (VAEConfig, VAE, "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        (VAEConfig, VAE, "temporal_layers", 2),
        (CLIPTextConfig, CLIP, "hidden_act", "relu"),
        (CLIPTextConfig, CLIP, "num_attention_heads", 3),
        (CLIPTextConfig, CLIP, "model_type", "t5"),
        (CLIPTextConfig, CLIP, "rope_theta", 1e4),
    ],
)
def test_unsupported_keys_and_values_are_named(cls, config, key, value):
    with pytest.raises(UserError, match=rf"^{cls.CLASS_NAME} config: .*{key}.*\.$"):
        cls.from_dict(config | {key: value})


def test_projection_needs_its_input_size():
    with pytest.raises(UserError, match="projection_class_embeddings_input_dim"):
        UNetConfig.from_dict(UNET | {"class_embed_type": "projection"})


def test_num_attention_heads_is_attention_head_dim():
    config = UNetConfig.from_dict(UNET | {"num_attention_heads": [4, 8]})
    assert config == UNetConfig.from_dict(UNET | {"attention_head_dim": [4, 8]})


def test_private_and_inert_keys_are_accepted():
    extra = {"_anything": {"a": 1}, "dropout": 0.0, "addition_embed_type_num_heads": 64}
    assert UNetConfig.from_dict(UNET | extra) == UNetConfig.from_dict(UNET)
    assert VAEConfig.from_dict({**VAE, "act_fn": "silu"}) == VAEConfig.from_dict(VAE)


def test_bind_lists_what_does_not_fit():
    vae = functional(VAEConfig.from_dict(VAE))
    params = {path: jnp.zeros(s.shape) for path, s in vae.shapes.items()}
    del params["quant_conv.bias"]
    params["quant_conv.weight"] = jnp.zeros(3)
    params["decoder.conv_in.kernel"] = jnp.zeros((3, 3, 4, 17))
    with pytest.raises(ValueError, match="do not fit") as error:
        vae.bind(params)
    for words in ("missing quant_conv.bias", "unexpected quant_conv.weight", r"(3, 3, 4, 17)"):
        assert words in str(error.value)


def test_functional_is_one_object_for_one_network():
    config = UNetConfig.from_dict(UNET)
    assert functional(config) == functional(UNetConfig.from_dict(UNET), dtype="float32")
    assert hash(functional(config)) == hash(functional(config))
    assert functional(config) != functional(config, remat="block")
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in functional(config).shapes.values())
    for option in ({"remat": "full"}, {"attention": "flash"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            functional(config, **option)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (VAEConfig.from_dict(VAE), diffusers.AutoencoderKL),
        (UNetConfig.from_dict(UNET), diffusers.UNet2DConditionModel),
    ],
    ids=["vae", "unet"],
)
def test_init_is_torchs_default(config, reference):
    """Same support and spread as a fresh torch module, parameter by parameter."""
    net = functional(config)
    params = net.init(jax.random.key(0))
    fresh = params_of(reference.from_config(config.to_dict()), net.shapes)
    for path, value in params.items():
        assert value.shape == net.shapes[path].shape
        ours, theirs = np.abs(value), np.abs(fresh[path])
        if value.size > 500:
            assert ours.max() == pytest.approx(theirs.max(), rel=0.05), path
            assert ours.mean() == pytest.approx(theirs.mean(), rel=0.15), path
        if path.endswith("scale") or ".norm" in path:
            np.testing.assert_array_equal(value, fresh[path])
    again, other = net.init(jax.random.key(0)), net.init(1)
    assert all(max_abs(again[p], params[p]) == 0 for p in params)
    assert all(max_abs(other[p], params[p]) > 0 for p in params if p.endswith("kernel"))


def test_modules_need_no_graph_mode():
    """No shared references, so that flax's tree mode (its announced default) reads them too."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        vae = functional(VAEConfig.from_dict(VAE | {"scaling_factor": 0.5}))
        image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
        out = jax.eval_shape(lambda p, x: vae.bind(p).encode(x), vae.shapes, image)
    assert out.shape == (1, 4, 4, 8)
