"""The built-in checkpoint: complete, small, and the same model in torch diffusers."""

from importlib import resources

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from jaxpercept.checkpoints import diffusers
from jaxpercept.checkpoints.load import load_model, resolve
from jaxpercept.models.functional import functional
from jaxpercept.models.vae import encode_mean


def test_size_and_files():
    folder = resources.files("jaxpercept") / "assets" / "sd-tiny"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert (folder / "README.md").is_file()


def test_torch_opens_it_and_computes_the_same(rng):
    folder = resolve("sd-tiny")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    checkpoint = diffusers.load(folder)
    params = jax.tree.map(jax.numpy.asarray, checkpoint.params)

    image = rng.uniform(-1, 1, (1, 24, 32, 3)).astype(np.float32)
    vae = functional(checkpoint.configs["vae"])
    latent = jax.jit(lambda p, x: encode_mean(vae, p, x))(params["vae"], image)
    with torch.no_grad():
        posterior = pipe.vae.encode(torch.from_numpy(image.transpose(0, 3, 1, 2))).latent_dist
        expected = posterior.mean * pipe.vae.config.scaling_factor
    np.testing.assert_allclose(latent.transpose(0, 3, 1, 2), expected.numpy(), atol=1e-4)

    ids = np.asarray(pipe.tokenizer(["a red sofa"]).input_ids, np.int32)
    encoder = functional(checkpoint.configs["text_encoder"])
    text = jax.jit(lambda p, i: encoder.bind(p)(i))(params["text_encoder"], ids)
    with torch.no_grad():
        states = pipe.text_encoder(torch.from_numpy(ids).long()).last_hidden_state
    np.testing.assert_allclose(text, states.numpy(), atol=1e-4)


def test_empty_prompt_is_start_and_end():
    _, params = load_model("sd-tiny")
    assert params["prompt"]["embedding"].shape == (1, 2, 96)
