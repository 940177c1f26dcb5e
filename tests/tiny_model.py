"""A depth model of a few thousand random weights, for the tests of everything around it."""

from __future__ import annotations

import dataclasses
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jaxpercept
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.inference.batches import local_mesh
from jaxpercept.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.functional import functional
from jaxpercept.tasks.depth import DEPTH

WIDTH = 8
COMPONENTS = {
    "unet": UNetConfig(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ),
    "vae": VAEConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ),
}
TEXT_ENCODER = CLIPTextConfig(
    vocab_size=1024,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=24,
)
"""For the tokenizer of sd-tiny."""
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def one_device() -> Mesh:
    """A mesh of one device, where it does not matter: batches are not filled up."""
    mesh = local_mesh()
    return Mesh(mesh.devices[:1], mesh.axis_names)


def description(**changes: Any) -> Description:
    """A one-step depth model trained at 32 x 48; the autoencoder's factor is 2."""
    values = {
        "components": COMPONENTS,
        "scheduler": SCHEDULER,
        "method": {"name": "one_step"},
        "task": "depth",
        "resolution": (32, 48),
        "base_checkpoint": "random",
        **changes,
    }
    return Description(**values)


def params(
    rng: np.random.Generator, components: Mapping[str, Any] = COMPONENTS, tokens: int = 2
) -> dict[str, dict[str, np.ndarray]]:
    """Random weights and a random encoded prompt of so many tokens."""
    weights = {
        name: {
            path: _draw(path, leaf.shape, rng) for path, leaf in functional(config).shapes.items()
        }
        for name, config in components.items()
    }
    prompt = rng.normal(size=(1, tokens, WIDTH)).astype(np.float32)
    return {**weights, "prompt": {"embedding": prompt}}


def _draw(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=shape).astype(np.float32)
    if path.endswith("kernel"):
        return noise / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
    return 0.2 * noise + np.float32(path.endswith("scale"))


def save(folder: Path, rng: np.random.Generator, **changes: Any) -> Path:
    """An Orbax export of the model."""
    save_export(folder, description(**changes), params(rng))
    return folder


def save_referring(folder: Path, rng: np.random.Generator, **changes: Any) -> Path:
    """An Orbax export of a model that looks for what a text names, in several steps; its tokenizer
    is sd-tiny's."""
    tokenizer = Path(jaxpercept.__file__).parent / "assets" / "sd-tiny" / "tokenizer"
    unet = dataclasses.replace(COMPONENTS["unet"], in_channels=8)
    components = {
        **COMPONENTS,
        "unet": unet,
        "text_encoder": TEXT_ENCODER,
        **changes.pop("components", {}),
    }
    values = {
        "components": components,
        "method": {},
        "recipe": {"family": "instruct_pix2pix", "num_steps": 6},
        "task": "referring",
        "task_options": {"paint": False},
        **changes,
    }
    save_export(folder, description(**values), params(rng, components, tokens=24))
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


class Mirror:
    """A model without weights: the decoded image is the network's input, and so is the latent."""

    task = DEPTH
    recipe = types.SimpleNamespace(draws_noise=False, num_steps=1)
    targets = 1

    def __init__(self, downscale: int = 8):
        self.model = types.SimpleNamespace(downscale=downscale)

    def encode(self, params: Any, rgb: jax.Array) -> jax.Array:
        """The input."""
        return rgb

    def predict(self, params: Any, image: jax.Array, noise: Any = None, **options: Any):
        """The input twice."""
        return image, image

    def to_prediction(self, decoded: jax.Array) -> jax.Array:
        """Depth, as if the image showed it."""
        return self.task.to_prediction(decoded)
