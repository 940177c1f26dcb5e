"""Small UNets with random LoRA adapters in peft, and the same weights in this package."""

from __future__ import annotations

import diffusers
import numpy as np
import peft
import torch
from peft.utils import get_peft_model_state_dict
from torch_parity import randomise

from jaxpercept.checkpoints.rules import to_jax
from jaxpercept.models.config import UNetConfig
from jaxpercept.models.functional import Functional, functional
from jaxpercept.models.lora import LoraConfig, is_lora

TINY = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def torch_unet(rng: np.random.Generator, **changes) -> diffusers.UNet2DConditionModel:
    return randomise(diffusers.UNet2DConditionModel(**TINY | changes), rng)


def config_of(unet: diffusers.UNet2DConditionModel) -> UNetConfig:
    return UNetConfig.from_dict(dict(unet.config))


def peft_config(lora: LoraConfig, **options) -> peft.LoraConfig:
    settings = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "init_lora_weights": "gaussian",
    }
    return peft.LoraConfig(**settings | options)


def randomise_adapter(module: torch.nn.Module, rng: np.random.Generator) -> None:
    """Random A and B of moderate effect, so that rounding errors do not grow on the way."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".lora_" in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)


def add_adapter(
    unet: diffusers.UNet2DConditionModel, lora: LoraConfig, rng: np.random.Generator, **options
) -> diffusers.UNet2DConditionModel:
    unet.add_adapter(peft_config(lora, **options))
    randomise_adapter(unet, rng)
    return unet


def factors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of files."""
    return {k: v.detach() for k, v in get_peft_model_state_dict(module).items()}


def params_of(module: torch.nn.Module, network: Functional) -> dict[str, np.ndarray]:
    """Weights and LoRA factors of a torch module with an adapter, in this package's layout."""
    state = {k: v for k, v in module.state_dict().items() if ".lora_" not in k}
    state = {k.replace(".base_layer.", "."): v for k, v in state.items()} | factors(module)
    return to_jax(network.shapes, {k: v.detach().numpy() for k, v in state.items()})


def ported(
    unet: diffusers.UNet2DConditionModel, lora: LoraConfig
) -> tuple[Functional, dict[str, np.ndarray]]:
    network = functional(config_of(unet), lora=lora)
    return network, params_of(unet, network)


def only_lora(params: dict) -> dict:
    return {path: value for path, value in params.items() if is_lora(path)}
