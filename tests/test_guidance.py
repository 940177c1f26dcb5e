"""Guidance, and InstructPix2Pix's checkpoints sampled with it, against diffusers."""

import itertools

import diffusers
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from families_torch import quiet
from hypothesis import given
from hypothesis import strategies as st

from jaxpercept.checkpoints.load import load_model
from jaxpercept.diffusion.guidance import Branch, Guidance, Text
from jaxpercept.diffusion.noise import per_example
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import padded_tokenizer
from jaxpercept.methods.latent_model import LatentModel
from jaxpercept.methods.perception import Perception
from jaxpercept.methods.recipe import Recipe
from jaxpercept.models.functional import functional
from jaxpercept.tasks.referring import ReferringTask

PHRASES = ["the red ball", "a chair on the left"]
DDIM = {**families.SCHEDULER, "prediction_type": "epsilon"}
EULER = {key: DDIM[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
EULER |= {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}
SCALE = st.floats(0, 8)


def mixed(guidance: Guidance, outputs, *, corrected: bool = False) -> float:
    mixture = guidance.mixture(corrected=corrected)
    pairs = zip(mixture.weights, mixture.branches, strict=True)
    return sum(weight * outputs[branch] for weight, branch in pairs)


@given(SCALE, SCALE, SCALE, st.tuples(*[st.floats(-2, 2)] * 4))
def test_weights_are_those_of_the_formulas(text, image, correction, values):
    branches = [Branch("wanted"), Branch("empty"), Branch("empty", False), Branch("unwanted")]
    outputs = dict(zip(branches, values, strict=True))
    told, shown, nothing, wrong = values
    guidance = Guidance(text, image, correction)
    two_scales = nothing + image * (shown - nothing) + text * (told - shown)
    assert mixed(guidance, outputs) == pytest.approx(two_scales, abs=1e-4)
    assert mixed(guidance, outputs, corrected=True) == pytest.approx(
        two_scales + correction * (told - wrong), abs=1e-4
    )
    replaced = nothing + image * (wrong - nothing) + text * (told - wrong)
    other = Guidance(text, image, correction, combine="replace")
    assert mixed(other, outputs) == pytest.approx(two_scales, abs=1e-4)
    assert mixed(other, outputs, corrected=True) == pytest.approx(replaced, abs=1e-4)
    for each in (guidance, other):
        for corrected in (False, True):
            weights = each.mixture(corrected=corrected).weights
            assert weights.sum() == pytest.approx(1, abs=1e-5)
    # The paper's formula, in each of the two ways.
    paper = (1 + correction) * told - correction * wrong
    added = Guidance(1.0, 1.0, correction)
    instead = Guidance(1 + correction, 1.0, combine="replace")
    for each in (added, instead):
        assert mixed(each, outputs, corrected=True) == pytest.approx(paper, abs=1e-4)


def test_no_guidance_is_one_pass():
    assert Guidance().mixture().branches == (Branch("wanted"),)
    assert Guidance(text=3.0).mixture().branches == (Branch("wanted"), Branch("empty"))
    corrected = Guidance(correction=2.0).mixture(corrected=True)
    assert corrected.branches == (Branch("wanted"), Branch("unwanted"))
    np.testing.assert_array_equal(corrected.weights, [3, -2])


@pytest.mark.parametrize("wrong", [{"text": -1.0}, {"image": float("nan")}, {"combine": "max"}])
def test_impossible_guidance_is_refused(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        Guidance(**wrong)


@pytest.fixture
def folder(tmp_path, rng):
    """(scheduler, full_size) -> an InstructPix2Pix checkpoint."""

    def build(scheduler, full_size=False):
        families.instruct_pix2pix(tmp_path, int(rng.integers(1000)), scheduler, full_size=full_size)
        return tmp_path

    return build


def opened(folder):
    """The checkpoint's perception, weights and tokenizer."""
    description, params = load_model(str(folder), padded=True)
    networks = {part: functional(config) for part, config in description.components.items()}
    recipe = Recipe.of("instruct_pix2pix")
    solver = recipe.solver(description.scheduler)
    model = LatentModel(**networks, schedule=solver.schedule)
    tokenize = padded_tokenizer(folder / "tokenizer", description.components["text_encoder"])
    params = jax.tree.map(jnp.asarray, params)
    return (
        Perception(model, recipe, solver, ReferringTask()),
        params,
        lambda x: jnp.asarray(tokenize(x)),
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("scheduler", "full_size"),
    [
        pytest.param(EULER, False, id="euler"),
        pytest.param(DDIM, False, id="ddim"),
        pytest.param(EULER, True, id="full size", marks=pytest.mark.slow),
    ],
)
def test_sampling_is_that_of_diffusers(folder, scheduler, full_size, monkeypatch, rng):
    folder = folder(scheduler, full_size)
    model, params, tokenize = opened(folder)
    cells, factor = (2, 16, 24), model.model.downscale
    assert factor == (8 if full_size else 2)
    image = rng.uniform(-1, 1, (2, *(factor * n for n in cells[1:]), 3)).astype(np.float32)
    noise = rng.standard_normal((*cells, 4)).astype(np.float32)
    key, index = jax.random.key(int(rng.integers(1000))), jnp.array([4, 9])
    scales = [float(scale) for scale in rng.uniform(1.2, 4, 2)]

    @jax.jit
    def run(params, image, noise, ids, mixture):
        latent = model.encode(params, image)
        text = Text(model.embed(params, ids))
        return model.predict(
            params, latent, noise, text=text, mixture=mixture, num_steps=5, key=key, index=index
        )

    ours, latent = run(params, image, noise, tokenize(PHRASES), Guidance(*scales).mixture())

    count = itertools.count()

    def same_noise(shape, **_):
        number = next(count)

        def draw(key):
            return jax.random.normal(jax.random.fold_in(key, number), noise.shape[1:])

        return torch.from_numpy(np.array(per_example(key, index, draw))).permute(0, 3, 1, 2)

    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    monkeypatch.setattr(module, "randn_tensor", same_noise)
    with quiet():
        pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        options = {
            "image": torch.from_numpy((image + 1) / 2).permute(0, 3, 1, 2),
            "latents": torch.from_numpy(noise).permute(0, 3, 1, 2),
            "num_inference_steps": 5,
            "guidance_scale": scales[0],
            "image_guidance_scale": scales[1],
        }
        theirs = pipe(PHRASES, output_type="latent", **options).images
        decoded = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample
    assert next(count) in (0, 5)
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(latent, theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(ours, decoded.permute(0, 2, 3, 1), rtol=0, atol=1e-3)


def test_one_step_of_guidance_is_that_of_torch(folder, rng):
    """Also with a correction, for which diffusers has nothing."""
    folder = folder(DDIM)
    model, params, tokenize = opened(folder)
    image, x = (rng.standard_normal((2, 16, 24, 4)).astype(np.float32) for _ in range(2))
    t = np.array([801.0, 40.0], np.float32)
    texts = [tokenize(PHRASES), tokenize(["a lamp", "the small box"]), tokenize([""] * 2)]
    embed = jax.jit(model.embed)
    wanted, unwanted, empty = (np.array(embed(params, ids)) for ids in texts)
    guidance = Guidance(*(float(scale) for scale in rng.uniform(1.2, 4, 3)))

    @jax.jit
    def run(params, image, x, t, text, mixture):
        return model.network(params, image, text, mixture)(x, t)

    with quiet():
        network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")

        def theirs(image, prompt):
            unscaled = image / model.model.vae.config.scaling_factor
            inputs = torch.from_numpy(np.concatenate([x, unscaled], -1)).permute(0, 3, 1, 2)
            output = network(inputs, torch.from_numpy(t), torch.from_numpy(prompt)).sample
            return output.permute(0, 2, 3, 1).numpy()

        told, shown = theirs(image, wanted), theirs(image, empty)
        nothing, wrong = theirs(0 * image, empty), theirs(image, unwanted)
    two = nothing + guidance.image * (shown - nothing) + guidance.text * (told - shown)
    ours = run(params, image, x, t, Text(wanted), guidance.mixture())
    np.testing.assert_allclose(ours, two, rtol=0, atol=1e-5 * np.abs(two).max())
    corrected = run(params, image, x, t, Text(wanted, unwanted), guidance.mixture(corrected=True))
    three = two + guidance.correction * (told - wrong)
    np.testing.assert_allclose(corrected, three, rtol=0, atol=1e-5 * np.abs(three).max())
    plain = run(params, image, x, t, Text(wanted), Guidance().mixture())
    np.testing.assert_allclose(plain, told, rtol=0, atol=1e-5 * np.abs(told).max())
