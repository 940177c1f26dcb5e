"""A diffusers folder's networks here and in torch, on the same random input.

The only module that needs torch and diffusers (`pip install 'jaxpercept[torch]'`).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpercept.checkpoints import diffusers
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional

TOLERANCE = 1e-4
"""Largest deviation allowed, relative to the output's largest value, in float32."""
_LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}


def check_against_torch(folder: Path, *, seed: int = 0) -> dict[str, float]:
    """Largest relative deviation of each network's output; an autoencoder's there and back.

    Args:
        folder: in diffusers layout.
        seed: of the inputs.

    Raises:
        UserError: no diffusers folder, torch or diffusers is not installed, or a network deviates
            by more than `TOLERANCE`.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no diffusers folder: only those can be compared with torch.")
    try:
        torch = importlib.import_module("torch")
        libraries = {name: importlib.import_module(lib) for name, lib in _LIBRARIES.items()}
    except ImportError as error:
        raise UserError(
            f"comparing needs {error.name}: pip install 'jaxpercept[torch]', or leave --check out."
        ) from error
    checkpoint = diffusers.load_parts(folder)
    rng = np.random.default_rng(seed)
    deviations = {}
    for name, config in checkpoint.configs.items():
        network = functional(config)
        class_name = config.CLASS_NAME
        module = getattr(libraries[name], class_name).from_pretrained(folder / name).float().eval()
        ours, theirs = _OUTPUTS[name](torch, module, network, checkpoint.params[name], rng)
        deviations[name] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if bad := [name for name, value in deviations.items() if not value <= TOLERANCE]:
        raise UserError(
            f"{folder / bad[0]} gives another output in torch (deviation "
            f"{deviations[bad[0]]:.1e}): do not use this export, and report it."
        )
    return deviations


def _unet(torch: Any, module: Any, network: Any, params: Any, rng: np.random.Generator):
    config = network.config
    x = rng.standard_normal((1, 16, 16, config.in_channels), np.float32)
    width = config.per_level("cross_attention_dim")[0]
    text = rng.standard_normal((1, 2, width), np.float32)
    t, labels = np.asarray([500]), None
    if config.class_embed_type == "projection":
        labels = rng.standard_normal((1, config.projection_class_embeddings_input_dim), np.float32)
    run = jax.jit(lambda p, *inputs: network.bind(p)(*inputs))
    ours = run(params, x, t, text, *(() if labels is None else (labels,)))
    with torch.no_grad():
        theirs = module(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t),
            torch.from_numpy(text),
            class_labels=None if labels is None else torch.from_numpy(labels),
        ).sample
    return np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 1)


def _vae(torch: Any, module: Any, network: Any, params: Any, rng: np.random.Generator):
    side = 16 * network.config.downsampling
    x = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    tiny = network.config.CLASS_NAME == "AutoencoderTiny"

    def there_and_back(params: Any, x: Any) -> Any:
        vae = network.bind(params)
        encoded = vae.encode(x)
        return vae.decode(encoded if tiny else encoded[..., : encoded.shape[-1] // 2])

    ours = jax.jit(there_and_back)(params, x)
    with torch.no_grad():
        encoded = module.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        latent = encoded.latents if tiny else encoded.latent_dist.mode()
        theirs = module.decode(latent).sample
    return np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 1)


def _text_encoder(torch: Any, module: Any, network: Any, params: Any, rng: np.random.Generator):
    ids = rng.integers(0, network.config.vocab_size - 2, (1, 8))
    ours = jax.jit(lambda p, ids: network.bind(p)(ids))(params, ids.astype(np.int32))
    with torch.no_grad():
        theirs = module(torch.from_numpy(ids)).last_hidden_state
    return np.asarray(ours), theirs.numpy()


_OUTPUTS = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}
