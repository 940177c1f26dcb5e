"""CLIP's text tower (transformers' CLIPTextModel), names as published SD checkpoints have them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpercept.models.attention import dot_product_attention
from jaxpercept.models.config import CLIPTextConfig
from jaxpercept.models.layers import ACTIVATIONS, DType, Embedding, LayerNorm, Linear


class CLIPTextEmbeddings(nnx.Module):
    """Token plus learned position."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType):
        width = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, width, dtype=dtype)
        self.position_embedding = Embedding(config.max_position_embeddings, width, dtype=dtype)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        positions = jnp.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)[None]


class CLIPAttention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, attention: str):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention = attention
        self.q_proj = Linear(width, width, dtype=dtype)
        self.k_proj = Linear(width, width, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.out_proj = Linear(width, width, dtype=dtype)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        q, k, v = (
            y.reshape(*y.shape[:2], self.num_heads, -1)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        out = dot_product_attention(q, k, v, implementation=self.attention, is_causal=True)
        return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers around `hidden_act`: quick_gelu (OpenAI) or gelu (OpenCLIP)."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType):
        self.hidden_act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, attention: str):
        norm = {"eps": config.layer_norm_eps, "dtype": dtype}
        self.layer_norm1 = LayerNorm(config.hidden_size, **norm)
        self.self_attn = CLIPAttention(config, dtype=dtype, attention=attention)
        self.layer_norm2 = LayerNorm(config.hidden_size, **norm)
        self.mlp = CLIPMLP(config, dtype=dtype)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, remat: str, attention: str):
        self.remat = remat
        self.layers = nnx.List(
            [
                CLIPEncoderLayer(config, dtype=dtype, attention=attention)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        for layer in self.layers:
            x = (jax.checkpoint(layer) if self.remat == "block" else layer)(x)
        return x


class CLIPTextTransformer(nnx.Module):
    """Embeddings, encoder, final norm."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DType, remat: str, attention: str):
        self.embeddings = CLIPTextEmbeddings(config, dtype=dtype)
        self.encoder = CLIPEncoder(config, dtype=dtype, remat=remat, attention=attention)
        self.final_layer_norm = LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps, dtype=dtype
        )

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nnx.Module):
    """Last hidden state, after the final norm, of at most max_position_embeddings token ids.

    SD 2.x ships the tower with its last layer already cut off, so that the last hidden state is the
    right one there too. Source: transformers, models/clip/modeling_clip.py; Radford et al.,
    arXiv 2103.00020.

    Published files prefix every name with "text_model."; transformers 5 drops the prefix from the
    files it writes itself. The tree here has it.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DType = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ):
        self.config = config
        self.text_model = CLIPTextTransformer(config, dtype=dtype, remat=remat, attention=attention)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens exceed the text encoder's "
                f"{self.config.max_position_embeddings} positions"
            )
        return self.text_model(input_ids)
