"""The rule table between PyTorch's tensors and the parameters here."""

import jax
import numpy as np
import pytest
import torch_checkpoints
from hypothesis import given
from hypothesis import strategies as st
from torch_checkpoints import assert_bit_equal, state

from jaxpercept.checkpoints import rules
from jaxpercept.checkpoints.rules import to_jax, to_torch
from jaxpercept.errors import UserError
from jaxpercept.models.config import CLIPTextConfig, VAEConfig
from jaxpercept.models.functional import functional


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=1)
    | st.tuples(st.integers(1, 70), st.integers(1, 9))
    | st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_rules_are_inverse(shape, seed):
    tensor = np.random.default_rng(seed).standard_normal(shape, np.float32)
    leaf = {1: "scale", 2: "kernel", 4: "kernel"}[len(shape)]
    axes = rules.RULES[leaf, len(shape)][1]
    target = {f"m.{leaf}": jax.ShapeDtypeStruct([tensor.shape[i] for i in axes], np.float32)}
    params = to_jax(target, {"m.weight": tensor})
    assert params[f"m.{leaf}"].flags.c_contiguous
    assert_bit_equal(to_torch(params), {"m.weight": tensor})


def test_layouts(rng):
    conv, linear = rng.standard_normal((5, 4, 3, 2)), rng.standard_normal((40, 7))
    target = {"c.kernel": np.empty((3, 2, 4, 5)), "l.kernel": np.empty((7, 40))}
    params = to_jax(target, {"c.weight": conv, "l.weight": linear}, dtype=None)
    assert params["c.kernel"][2, 1, 3, 4] == conv[4, 3, 2, 1]
    assert params["l.kernel"][6, 33] == linear[33, 6]


def test_unknown_leaf_has_no_rule():
    with pytest.raises(ValueError, match=r"No conversion rule for parameter 'a\.gamma' of rank 1"):
        to_torch({"a.gamma": np.ones(3)})


def test_old_vae_attention_names_and_convolutions():
    """As in files that diffusers wrote before 0.17, and in those converted from the original."""
    vae = torch_checkpoints.vae()
    shapes = functional(VAEConfig.from_dict(dict(vae.config))).shapes
    new = state("vae", vae)
    old = {}
    for key, value in new.items():
        if "mid_block.attentions" in key:
            for name, today in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
                key = key.replace(today, name)
            key = key.replace("to_out.0", "proj_attn")
        old[key] = value
    assert sum("proj_attn" in key for key in old) == 4
    assert_bit_equal(to_torch(to_jax(shapes, old)), new)

    as_conv = {
        k: v[..., None, None] if "attentions" in k and v.ndim == 2 else v for k, v in old.items()
    }
    assert as_conv["encoder.mid_block.attentions.0.query.weight"].shape == (32, 32, 1, 1)
    assert_bit_equal(to_torch(to_jax(shapes, as_conv)), new)

    both = {**old, "encoder.mid_block.attentions.0.to_q.bias": np.zeros(32)}
    with pytest.raises(UserError, match=r"attentions\.0\.to_q\.bias twice"):
        to_jax(shapes, both)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_prefix_and_position_ids(prefix):
    text_encoder = torch_checkpoints.text_encoder("sd2", vocab_size=99)
    config = CLIPTextConfig.from_dict(text_encoder.config.to_dict())
    with_prefix = state("text_encoder", text_encoder)
    stored = {prefix + key.removeprefix("text_model."): v for key, v in with_prefix.items()}
    stored[f"{prefix}embeddings.position_ids"] = np.arange(24)[None]
    assert_bit_equal(to_torch(to_jax(functional(config).shapes, stored)), with_prefix)


def test_strictness_lists_and_counts():
    shapes = {f"l{i:02}.bias": np.empty(3) for i in range(12)} | {
        "c.kernel": np.empty((3, 3, 4, 5))
    }
    tensors = {"c.weight": np.ones((5, 8, 3, 3)), "x.weight": np.ones(2), "l00.bias": np.ones(3)}
    with pytest.raises(UserError) as error:
        to_jax(shapes, tensors, where="W")
    message = str(error.value)
    assert "missing (11): l01.bias, l02.bias," in message
    assert "l10.bias, and 1 more" in message
    assert "not expected (1): x.weight" in message
    assert "of another shape (1): c.weight [5, 8, 3, 3] instead of [5, 4, 3, 3]" in message


def test_no_linear_layer_passes_as_convolution_elsewhere():
    with pytest.raises(UserError, match="of another shape"):
        to_jax(
            {"mid_block.proj_in.kernel": np.empty((4, 4))},
            {"mid_block.proj_in.weight": np.ones((4, 4, 1, 1))},
        )
