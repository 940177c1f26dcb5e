"""Predictions step by step, against those in one program."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_model
from tiny_model import COMPONENTS, SCHEDULER, one_device

from jaxpercept import PerceptionPipeline
from jaxpercept.errors import UserError
from jaxpercept.inference.correction import Session
from jaxpercept.models.config import CLIPTextConfig

TOKENS = 6
TEXT = CLIPTextConfig(
    vocab_size=50,
    hidden_size=tiny_model.WIDTH,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=TOKENS,
    eos_token_id=49,
    bos_token_id=48,
)
WIDE = {**COMPONENTS, "unet": dataclasses.replace(COMPONENTS["unet"], in_channels=8)}
BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
EULER = {**BETAS, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}
LCM = {**BETAS, "_class_name": "LCMScheduler", "prediction_type": "v_prediction"}
LCM |= {"original_inference_steps": 50}
DDIM = {**SCHEDULER, "clip_sample": False}
CLIPPED = {**SCHEDULER, "clip_sample": True, "clip_sample_range": 0.7}
MODELS = {
    "marigold": ({"recipe": {"family": "marigold"}, "scheduler": CLIPPED}, WIDE),
    "marigold, lcm": ({"recipe": {"family": "marigold"}, "scheduler": LCM}, WIDE),
    "rgb_blending": ({"recipe": {"family": "rgb_blending"}, "scheduler": DDIM}, COMPONENTS),
    "instruct_pix2pix": (
        {
            "recipe": {"family": "instruct_pix2pix"},
            "scheduler": EULER,
            "task": "referring",
            "task_options": {"paint": False},
        },
        {**WIDE, "text_encoder": TEXT},
    ),
}


def tokenize(texts):
    """Letters, five of each."""
    return np.array([[48, *(ord(c) % 40 for c in f"{text:5.5}")] for text in texts], np.int32)


@functools.cache
def opened(case):
    """A model of random weights, on one device."""
    changes, components = MODELS[case]
    rng = np.random.default_rng()
    description = tiny_model.description(**{"method": {}, "components": components, **changes})
    weights = tiny_model.params(rng, components, TOKENS)
    return PerceptionPipeline(
        description, weights, mesh=one_device(), tokenize=tokenize, checkpoint=case
    )


@pytest.fixture
def instructed():
    """One that reads texts, and draws noise between its steps."""
    return opened("instruct_pix2pix")


def texts_of(pipe):
    return {"prompt": "ball", "unwanted": "a box"} if pipe.perception.task.reads_text else {}


@pytest.mark.parametrize("case", MODELS)
def test_the_last_glimpse_is_the_prediction(case, rng):
    pipe = opened(case)
    images = rng.integers(0, 256, (2, 37, 50, 3)).astype(np.uint8)
    options = {"num_inference_steps": 4, "seed": int(rng.integers(1000)), **texts_of(pipe)}
    whole = pipe(images, batch_size=2, **options)
    glimpses = list(pipe.watch(images, **options))
    assert [(glimpse.step, glimpse.steps) for glimpse in glimpses] == [(n, 4) for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(glimpses[-1].prediction(), whole.prediction, rtol=0, atol=1e-4)
    early = glimpses[0].prediction()
    assert early.shape == whole.prediction.shape
    assert np.abs(early - whole.prediction).max() > 1e-3
    # From the latents of a glimpse both ways lead on.
    on = {"first_step": 2, "latents": glimpses[1].latents(), **options}
    again = list(pipe.watch(images, **on))
    assert [glimpse.step for glimpse in again] == [3, 4]
    np.testing.assert_allclose(again[-1].prediction(), whole.prediction, rtol=0, atol=1e-4)
    if case == "rgb_blending":  # the others: tests/test_correction.py
        resumed = pipe(images, batch_size=2, **on)
        np.testing.assert_allclose(resumed.prediction, whole.prediction, rtol=0, atol=1e-4)


def test_a_glimpse_shows_what_its_step_predicts(rng):
    pipe = opened("marigold")
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    noise = rng.standard_normal((1, 16, 24, 4)).astype(np.float32)
    first = next(pipe.watch(image, latents=noise, num_inference_steps=3)).prediction()
    model = pipe.perception
    latent = model.encode(pipe.params, jax.numpy.asarray(image[None] / 127.5 - 1, np.float32))
    table = model.steps(3).table
    timestep = jax.numpy.full(1, float(table.timestep[0]))
    output = model.network(pipe.params, latent)(jax.numpy.asarray(noise), timestep)
    alpha = float(pipe.perception.solver.schedule.alphas_cumprod[int(table.timestep[0])])
    x0 = alpha**0.5 * noise - (1 - alpha) ** 0.5 * np.asarray(output)  # of a v-prediction
    x0 = np.clip(x0, -0.7, 0.7)
    expected = model.to_prediction(model.decode(pipe.params, jax.numpy.asarray(x0)))
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-4)


def test_one_program_serves_all_steps(instructed, rng):
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    take = instructed._predictor.stepwise._take
    list(instructed.watch(image, "ball", num_inference_steps=2))
    before = take._cache_size()
    glimpses = list(instructed.watch(image, "box", num_inference_steps=5, seed=3))
    list(
        instructed.watch(
            image,
            "ball",
            num_inference_steps=5,
            first_step=4,
            latents=glimpses[3].latents(),
        )
    )
    assert take._cache_size() == before


def test_several_devices_predict_the_same(instructed, rng):
    images = rng.integers(0, 256, (3, 32, 48, 3)).astype(np.uint8)
    spread = PerceptionPipeline(instructed.description, instructed.params, tokenize=tokenize)
    options = {"num_inference_steps": 3, "seed": 4, "prompt": "ball"}
    *_, last = spread.watch(images, **options)
    expected = instructed(images, **options).prediction
    np.testing.assert_allclose(last.prediction(), expected, rtol=0, atol=1e-4)


def test_models_of_one_step_give_one_glimpse(rng):
    pipe = PerceptionPipeline(tiny_model.description(), tiny_model.params(rng), mesh=one_device())
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    (only,) = pipe.watch(image)
    assert (only.step, only.steps) == (1, 1)
    np.testing.assert_array_equal(only.prediction(), pipe(image).prediction)
    with pytest.raises(UserError, match="in one step"):
        next(pipe.watch(image, num_inference_steps=3))


def test_damaged_weights_are_named(monkeypatch):
    pipe = opened("marigold")
    bias = pipe.params["unet"]["conv_out.bias"]
    monkeypatch.setitem(pipe.params["unet"], "conv_out.bias", bias * np.nan)
    with pytest.raises(UserError, match="marigold predicts values that are not finite"):
        list(pipe.watch(np.zeros((32, 48, 3), np.uint8), num_inference_steps=2))


def test_rounds_that_are_watched_are_those_that_are_not(instructed, rng):
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    options = {"num_inference_steps": 6, "seed": 5}
    watched, alone = (Session(instructed, image, "ball", **options) for _ in range(2))
    for unwanted, steps in (("", 6), ("a box", 3), ("lamps", 3)):
        expected = alone.predict(unwanted)
        seen = list(watched.watch(unwanted))
        done = watched.rounds[-1]
        assert len(seen) == done.steps == expected.steps == steps
        assert (done.number, done.unwanted) == (expected.number, expected.unwanted)
        np.testing.assert_allclose(done.prediction, expected.prediction, rtol=0, atol=1e-3)
    assert watched.rounds[-1].unwanted == ("a box", "lamps")
    # One that is not watched to its end has not been.
    next(watched.watch("doors"))
    assert len(watched.rounds) == 3
    assert watched.predict("stairs").unwanted == ("a box", "lamps", "stairs")
