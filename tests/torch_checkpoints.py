"""Small Stable-Diffusion checkpoints with random weights, written by diffusers and transformers."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

from jaxpercept.checkpoints.rules import to_torch

logging.disable_progress_bar()

POSITIONS = 24
WORDS = ("a", "room", "with", "red", "cube")

_LEVELS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
FULL_UNET = {
    "sd1": {**_LEVELS, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        **_LEVELS,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
"""The UNets of Stable Diffusion 1.x and 2.x."""
FULL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
"""The autoencoder of both."""
FULL_TEXT_ENCODER = {
    "sd1": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "sd2": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
"""CLIP ViT-L/14 and OpenCLIP ViT-H, as far as they are read."""


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> int:
    """A hand-written CLIP vocabulary: the ASCII characters and a few words. Returns its size."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [c + "</w>" for c in characters]
    merges = []
    for word in WORDS:
        left = word[0]
        for i, character in enumerate(word[1:], start=1):
            right = character + ("</w>" if i == len(word) - 1 else "")
            if left + right not in tokens:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    return len(tokens)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, norms and biases included, at the scale of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5
            else:
                noise = 0.1 * noise + ("norm" in name and name.endswith("weight"))
            parameter.copy_(noise)
    return module.eval()


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)` without the remarks that diffusers' own logs."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def unet(kind: str, seed: int = 0, **overrides) -> UNet2DConditionModel:
    """kind: "sd1" (convolution projections, one number of heads), "sd2" (linear, heads a level)
    or "marigold" (sd2 with eight input channels)."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4 if kind == "sd1" else (2, 4),
        "use_linear_projection": kind != "sd1",
        "in_channels": 8 if kind == "marigold" else 4,
    }
    return randomise(UNet2DConditionModel(**(settings | overrides)), seed)


def vae(seed: int = 1, **overrides) -> AutoencoderKL:
    settings = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return randomise(AutoencoderKL(**(settings | overrides)), seed)


def text_encoder(kind: str, vocab_size: int, seed: int = 2, **overrides) -> CLIPTextModel:
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "quick_gelu" if kind == "sd1" else "gelu",
        "projection_dim": 32,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1 if kind == "sd1" else 0,
    }
    return randomise(CLIPTextModel(CLIPTextConfig(**(settings | overrides))), seed)


def scheduler(kind: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if kind == "sd1" else "v_prediction",
    )


def write_checkpoint(
    folder: Path,
    kind: str = "sd2",
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "10GB",
    seed: int = 0,
) -> dict[str, torch.nn.Module]:
    """Writes a diffusers folder; returns the modules with the weights it holds, in float32.

    variant: part of the weight files' names, "fp16" for example. dtype: of the stored weights.
    max_shard_size: "100KB" splits the weights into many files with an index.
    """
    vocab_size = write_tokenizer(folder / "tokenizer", "<|endoftext|>" if kind == "sd1" else "!")
    modules = {
        "unet": unet(kind, seed),
        "vae": vae(seed + 1),
        "text_encoder": text_encoder(kind, vocab_size, seed + 2),
    }
    for name, module in modules.items():
        cast(module, dtype)
        module.save_pretrained(folder / name, variant=variant, max_shard_size=max_shard_size)
        cast(module, torch.float32)
    scheduler(kind).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.29.2",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return modules


def state(name: str, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict under the names of published checkpoints."""
    prefix = "text_model." if name == "text_encoder" else ""
    return {prefix + key: value.numpy() for key, value in module.state_dict().items()}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert value.shape == right[key].shape, key
        np.testing.assert_array_equal(value, right[key], err_msg=key)


def assert_holds(checkpoint, modules):
    for name, module in modules.items():
        assert_bit_equal(to_torch(checkpoint.params[name]), state(name, module))
