"""Denoising with a text beside each image (InstructPix2Pix, ADDP) against torch."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from families_torch import quiet

from jaxpercept.checkpoints.load import load_model
from jaxpercept.checkpoints.tokenizer import padded_tokenizer
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods import build_method
from jaxpercept.methods.denoising import _DROPOUT_KEY

SIZE = (16, 32)
SCHEDULER = {**families.SCHEDULER, "prediction_type": "sample"}
TEXTS = ["the red ball", "a box", "the lamp on the left", "a chair", "the small box", "it"]
METHOD = {
    "name": "denoising",
    "family": "instruct_pix2pix",
    "noise": "gaussian",
    "timesteps": "addp_ris",
    "drop_text": 0.2,
    "drop_image": 0.3,
    "drop_both": 0.25,
    "text_guidance": 3.0,
    "image_guidance": 1.5,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A description, its weights, the same networks in torch, and the tokenizer."""
    folder = tmp_path_factory.mktemp("instruct")
    with quiet():
        modules = families.instruct_pix2pix(folder, 5, SCHEDULER)
    description, params = load_model(str(folder), padded=True)
    tokenize = padded_tokenizer(folder / "tokenizer", description.components["text_encoder"])
    described = dataclasses.replace(description, task="referring", method=METHOD)
    return described, jax.tree.map(jnp.asarray, params), modules, tokenize


@pytest.mark.parametrize("emphasis", [0.0, 4.0])
def test_the_loss_is_that_of_torch(model, rng, emphasis):
    description, params, modules, tokenize = model
    description = dataclasses.replace(description, task_options={"emphasis": emphasis})
    m = build_method(description, batch_size=len(TEXTS))
    assert set(m.fields) == {"rgb", "referred", "valid", "input_ids", "index"}
    rows = len(TEXTS)
    batch = {
        "rgb": rng.integers(0, 256, (rows, *SIZE, 3)).astype(np.uint8),
        "referred": rng.integers(0, 2, (rows, *SIZE, 1)).astype(np.float32),
        "valid": np.ones((rows, *SIZE, 1), bool),
        "input_ids": tokenize(TEXTS),
        "index": rng.permutation(rows).astype(np.int32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    key = jax.random.key(int(rng.integers(1000)))
    loss, _ = jax.jit(m.loss)(params, batch, key)

    index = batch["index"]
    key_t, key_noise = jax.random.split(key)
    policy, schedule = TimestepPolicy.parse("addp_ris"), m.solver.schedule
    t = torch.tensor(np.array(sample_timesteps(policy, key_t, index, schedule, strata=rows)))
    draw = per_example(key_noise, index, lambda k: jax.random.normal(k, (8, 16, 4)))
    noise = torch.tensor(np.array(draw)).permute(0, 3, 1, 2)
    place = np.array(per_example(jax.random.fold_in(key, _DROPOUT_KEY), index, jax.random.uniform))
    # 0.2 without text, the next 0.3 without image, the next 0.25 without both.
    no_text = (place < 0.2) | ((place >= 0.5) & (place < 0.75))
    no_image = (place >= 0.2) & (place < 0.75)
    texts = [text * (not dropped) for text, dropped in zip(TEXTS, no_text, strict=True)]
    rgb = np.array(batch["rgb"]).astype(np.float32)
    red = np.where(np.array(batch["referred"]) > 0, np.float32([255, 0, 0]), rgb)
    with quiet(), torch.no_grad():
        shown, target = (
            modules["vae"].encode(torch.tensor(x / 127.5 - 1).permute(0, 3, 1, 2)).latent_dist.mean
            for x in (rgb, red.astype(np.float32))
        )
        shown = shown * ~torch.tensor(no_image)[:, None, None, None]
        latent = target * modules["vae"].config.scaling_factor
        x = DDIMScheduler.from_config(SCHEDULER).add_noise(latent, noise, t)
        ids = torch.tensor(tokenize(texts).astype(np.int64))
        prompt = modules["text_encoder"](ids).last_hidden_state
        output = modules["unet"](torch.cat([x, shown], dim=1), t, prompt).sample
        referred = torch.tensor(np.array(batch["referred"])).permute(0, 3, 1, 2)
        weights = 1 + emphasis * F.avg_pool2d(referred, m.model.downscale)
        expected = (weights * (output - latent) ** 2).mean().item()
    assert float(loss) == pytest.approx(expected, rel=5e-5)


def test_every_condition_is_dropped_as_often_as_asked(model):
    """From the conditions themselves, over many examples of one image and one text."""
    description, params, _, tokenize = model
    m = build_method(description)
    rows = 4000
    batch = {"index": jnp.arange(rows), "input_ids": jnp.tile(tokenize(["a box"]), (rows, 1))}
    image = jnp.ones((rows, 1, 1, 4))
    told, text = jax.jit(m._conditions)(params, batch, image, jax.random.key(3))
    seen = np.asarray(told).any(axis=(1, 2, 3))
    empty = np.asarray(params["prompt"]["embedding"])
    read = np.abs(np.asarray(text.wanted) - empty).max(axis=(1, 2)) > 1e-4
    shares = {(True, False): 0.2, (False, True): 0.3, (False, False): 0.25, (True, True): 0.25}
    for (image_seen, text_read), share in shares.items():
        found = np.mean((seen == image_seen) & (read == text_read))
        assert found == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / rows))


def test_the_trained_model_is_guided(model):
    description, *_ = model
    recipe = build_method(description).perception.recipe
    assert recipe.family == "instruct_pix2pix"
    assert recipe.guidance == (3.0, 1.5)
    assert recipe.image_last
    assert recipe.padded_prompt


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop_text": 0.9}, "together at most 1"),
        ({"drop_text": -0.1}, "together at most 1"),
        ({"family": "e2e_ft"}, "marigold or instruct_pix2pix"),
        ({"noise": "image"}, "lies beside"),
        ({"text_guidance": -1.0}, "guidance of the text"),
    ],
)
def test_what_cannot_be_is_refused(model, changes, words):
    with pytest.raises(UserError, match=words):
        build_method(dataclasses.replace(model[0], method={**METHOD, **changes}))


def test_text_cannot_be_dropped_where_there_is_none(model):
    with pytest.raises(UserError, match="depth reads no text"):
        build_method(dataclasses.replace(model[0], task="depth"))
