"""CLIP's text tower against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_checkpoints import FULL_TEXT_ENCODER
from torch_parity import max_abs, params_of, quick_jit, randomise

from jaxpercept.models.config import CLIPTextConfig
from jaxpercept.models.functional import functional

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def torch_clip(rng, **changes):
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY | changes)), rng)


def ported(reference, **options):
    clip = functional(CLIPTextConfig.from_dict(reference.config.to_dict()), **options)
    return clip, params_of(reference, clip.shapes)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [2, 12])
def test_matches_transformers(rng, hidden_act, length):
    reference = torch_clip(rng, hidden_act=hidden_act)
    clip, params = ported(reference)
    ids = rng.integers(0, 99, (3, length), dtype=np.int32)
    want = reference(torch.from_numpy(ids)).last_hidden_state
    assert max_abs(quick_jit(lambda p, x: clip.bind(p)(x))(params, ids), want) <= 1e-5


def test_names_are_those_of_published_files(rng):
    clip, _ = ported(torch_clip(rng))
    assert "text_model.embeddings.token_embedding.embedding" in clip.shapes
    assert "text_model.encoder.layers.1.self_attn.q_proj.kernel" in clip.shapes
    assert all(path.startswith("text_model.") for path in clip.shapes)


def test_no_token_sees_a_later_one(rng):
    clip, params = ported(torch_clip(rng))
    encode = quick_jit(lambda p, x: clip.bind(p)(x))
    ids = rng.integers(0, 99, (1, 12), dtype=np.int32)
    changed = ids.copy()
    changed[0, 6:] = (changed[0, 6:] + 1) % 99
    assert max_abs(encode(params, ids)[:, :6], encode(params, changed)[:, :6]) == 0


def test_bfloat16_and_remat(rng):
    clip, params = ported(torch_clip(rng))
    ids = rng.integers(0, 99, (2, 5), dtype=np.int32)
    low = functional(clip.config, dtype=jnp.bfloat16, remat="block")
    full, half = quick_jit(lambda p, x: (clip.bind(p)(x), low.bind(p)(x)))(params, ids)
    assert half.dtype == jnp.bfloat16
    assert max_abs(full, half) < 0.1 * float(jnp.abs(full).max())


def test_too_many_tokens(rng):
    clip, params = ported(torch_clip(rng))
    with pytest.raises(ValueError, match="13 tokens exceed the text encoder's 12"):
        clip.bind(params)(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_TEXT_ENCODER)
def test_full_size(rng, name):
    config = transformers.CLIPTextConfig(**FULL_TEXT_ENCODER[name])
    reference = randomise(transformers.CLIPTextModel(config), rng)
    clip, params = ported(reference)
    ids = rng.integers(0, 49408, (1, 77), dtype=np.int32)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).last_hidden_state
    error = max_abs(jax.jit(lambda p, x: clip.bind(p)(x))(params, ids), want)
    print(f"{name}: {error:.1e} of {want.abs().max():.2f}")
    assert error <= 1e-5
