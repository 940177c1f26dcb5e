"""Every published family of checkpoints, opened from its folder, predicts as torch does."""

import dataclasses

import families
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_model import one_device

from jaxpercept import PerceptionPipeline
from jaxpercept.diffusion.noise import per_example
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import open_perception

KNOWN = sorted(families.FAMILIES.keys() - {"stable_diffusion"})
ONE_OF_EACH = [
    "marigold_depth_v1_0",
    "genpercept_dpt_disparity",
    "lotus_g_normals",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("marigold_depth_v1_1", "marigold_normals_v1_1", "marigold_iid_lighting"),
            *("genpercept_dis", "rgb_blending_strong", "e2e_ft_normals"),
        )
    ),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """`name -> (family, pipeline)`: a checkpoint with torch's answer, and the same opened here."""
    cache = {}

    def open_once(name):
        if name not in cache:
            cache.clear()  # one at a time
            seed = int(np.random.default_rng().integers(2**31))
            print("family seed", seed)
            folder = tmp_path_factory.mktemp("family") / "checkpoint"
            family = families.FAMILIES[name](folder, seed)
            cache[name] = family, open_family(family)
        return cache[name]

    return open_once


def open_family(family, **options):
    named = {"task": family.task} if family.needs_task else {}
    if family.method == "e2e_ft" and family.modules["unet"].config.in_channels == 4:
        named["family"] = "e2e_ft"
    options = {"mesh": one_device()} | options
    return PerceptionPipeline.from_pretrained(
        family.folder, base=family.base_folder, **named, **options
    )


def noise_for(family, pipe, rng, size, resolution, members):
    """Noise in diffusers' layout, for a model that starts from it."""
    if not pipe.perception.recipe.draws_noise:
        return None
    factor = pipe.perception.model.downscale
    long = resolution or max(size)
    cells = [-(-(edge * long // max(size)) // factor) for edge in size]
    channels = family.modules["unet"].config.out_channels
    return rng.standard_normal((members, channels, *cells), np.float32)


def both(family, pipe, rng, size, resolution, members=1, ensembling=None, **options):
    """Torch's answer and ours for one random image and one noise."""
    image = rng.random((*size, 3), np.float32)
    options = family.settings | {"processing_resolution": resolution} | options
    noise = noise_for(family, pipe, rng, size, resolution, members)
    extra, own = {}, {}
    if noise is not None:
        extra["latents"] = torch.from_numpy(noise)
    if members > 1:
        extra |= {"ensemble_size": members, "ensembling_kwargs": ensembling}
        own = {"ensemble_size": members, "ensembling": ensembling}
    if family.method.startswith("lotus"):
        extra["padded"] = True
    theirs = family.predict(image, **options, **extra)
    return theirs, pipe(image, latents=noise, **options, **own)


def tolerance(family):
    """Rounding of short vectors is magnified where they are brought to unit length."""
    return 1e-3 if family.task == "normals" else 1e-4


def assert_close(ours, theirs, family):
    # E2E-FT's scripts stretch depth to [0, 1], which an affine-invariant map has no need of.
    raw = theirs.raw if family.method == "e2e_ft" else None
    expected = theirs.prediction if raw is None else raw
    assert ours.prediction.shape == expected.shape
    np.testing.assert_allclose(ours.prediction, expected, rtol=0, atol=tolerance(family))
    if theirs.latent is not None:
        latent = theirs.latent.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours.latent, latent, rtol=0, atol=1e-4 * np.abs(latent).max())


@pytest.mark.parametrize("name", KNOWN)
def test_prediction_is_that_of_torch(opened, rng, name):
    """An odd size, made smaller and brought back."""
    family, pipe = opened(name)
    assert pipe.perception.task.name == family.task
    theirs, ours = both(family, pipe, rng, (45, 29), 32)
    assert_close(ours, theirs, family)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_prediction_at_native_size_is_that_of_torch(opened, rng, name):
    family, pipe = opened(name)
    steps = {"num_inference_steps": 2} if pipe.perception.recipe.family == "marigold" else {}
    theirs, ours = both(family, pipe, rng, (27, 33), 0, match_input_resolution=False, **steps)
    assert_close(ours, theirs, family)


@pytest.mark.parametrize("name", ["marigold_normals_v0_1", "marigold_iid_appearance"])
@pytest.mark.parametrize("reduction", [0, 1])
def test_ensembles_are_those_of_torch(opened, rng, name, reduction):
    family, pipe = opened(name)
    names = ("closest", "mean") if family.task == "normals" else ("median", "mean")
    theirs, ours = both(
        family,
        pipe,
        rng,
        (30, 20),
        32,
        members=4,
        num_inference_steps=1,
        ensembling={"reduction": names[reduction]},
    )
    if names[reduction] == "closest":
        # Two members may be as close as each other, up to rounding.
        equal = np.abs(ours.prediction - theirs.prediction).max(-1) < 2e-3
        assert equal.mean() > 0.97
    else:
        assert_close(ours, theirs, family)
    np.testing.assert_allclose(ours.uncertainty, theirs.uncertainty, atol=2e-3)


def test_depth_ensembles_are_those_of_torch_up_to_their_search(opened, rng):
    """Without the search for scales and shifts, which rounding decides, they are equal."""
    family, pipe = opened("marigold_depth_v1_1")
    options = {"members": 4, "num_inference_steps": 1}
    theirs, ours = both(family, pipe, rng, (30, 20), 32, ensembling={"max_iter": 0}, **options)
    assert_close(ours, theirs, family)
    np.testing.assert_allclose(ours.uncertainty, theirs.uncertainty, atol=2e-4)
    theirs, ours = both(family, pipe, rng, (30, 20), 32, ensembling={}, **options)
    assert np.abs(ours.prediction - theirs.prediction).mean() < 0.05
    same, _ = theirs, ours
    assert np.corrcoef(ours.prediction.ravel(), same.prediction.ravel())[0, 1] > 0.95


def test_stochastic_steps_are_those_of_torch_given_their_noise(opened, rng):
    family, pipe = opened("marigold_depth_lcm")
    steps, seed, cells = 3, 5, (16, 12)
    image = rng.random((32, 24, 3), np.float32)
    noise = rng.standard_normal((1, 4, *cells), np.float32)
    key = jax.random.split(jax.random.key(seed))[1]
    between = [
        per_example(
            key,
            jax.numpy.zeros(1, int),
            lambda k, n=n: jax.random.normal(jax.random.fold_in(k, n), (*cells, 4)),
        )
        for n in range(steps - 1)
    ]
    options = {"num_inference_steps": steps, "processing_resolution": 0}
    theirs = family.predict(
        image,
        latents=torch.from_numpy(noise),
        step_noise=[torch.from_numpy(np.array(z).transpose(0, 3, 1, 2)) for z in between],
        **options,
    )
    assert_close(pipe(image, latents=noise, seed=seed, **options), theirs, family)


@pytest.mark.parametrize("name", ["marigold_depth_v1_1", "genpercept_depth"])
def test_bfloat16_is_close_to_torch_in_float32(opened, rng, name):
    """Half precision has eight bits: a random network's depth moves by about one in a hundred."""
    family, _ = opened(name)
    pipe = open_family(family, dtype="bfloat16")
    theirs, ours = both(family, pipe, rng, (30, 20), 32)
    error = np.abs(ours.prediction - theirs.prediction)
    assert error.mean() < 0.03
    assert error.max() < 0.15


def test_several_images_and_batches_give_what_each_gives_alone(opened, rng):
    family, _ = opened("marigold_depth_v1_1")
    pipe = open_family(family, mesh=None)  # all devices
    images = rng.random((3, 16, 24, 3), np.float32)
    options = {"processing_resolution": 0, "num_inference_steps": 2, "seed": 3}
    together = pipe(images, **options)
    in_turns = pipe(images, batch_size=1, **options)
    np.testing.assert_allclose(together.prediction, in_turns.prediction, atol=1e-5)
    other = pipe(images, **options | {"seed": 4})
    assert np.abs(together.prediction - other.prediction).max() > 1e-3
    merged = pipe(images, ensemble_size=3, ensembling={"alignment": "closed_form"}, **options)
    assert merged.prediction.shape == together.prediction.shape
    assert merged.uncertainty.shape == together.prediction.shape
    assert merged.latent.shape[0] == 9
    np.testing.assert_allclose(merged.prediction.min((1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(merged.prediction.max((1, 2, 3)), 1, atol=1e-6)
    first = pipe(images[:1], ensemble_size=3, batch_size=16, **options)
    np.testing.assert_allclose(first.latent, merged.latent[:3], atol=1e-4)


def test_intrinsics_come_apart_with_their_names(opened, rng):
    _, pipe = opened("marigold_iid_lighting")
    out = pipe(rng.random((2, 16, 24, 3), np.float32), processing_resolution=0)
    assert out.prediction.shape == (6, 16, 24, 3)
    assert out.target_properties["target_names"] == ["albedo", "shading", "residual"]


def test_a_prompt_is_read_where_there_is_a_text_encoder(opened, rng):
    """GenPercept's ablations were trained with one, and are given it at prediction."""
    family, pipe = opened("genpercept_bare_depth")
    image, settings = rng.random((32, 24, 3), np.float32), {"processing_resolution": 0}
    empty = pipe(image, **settings).prediction
    theirs = family.predict(image, prompt="a red cube", **settings).prediction
    assert np.abs(theirs - empty).max() > 1e-2
    ours = open_family(family, prompt="a red cube")(image, **settings).prediction
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    by_call = pipe(image, prompt="a red cube", **settings).prediction
    np.testing.assert_array_equal(by_call, ours)
    np.testing.assert_array_equal(pipe(image, **settings).prediction, empty)


def test_a_dpt_head_that_ends_with_a_relu(tmp_path, rng):
    """As GenPercept's trainer leaves a run: `unet/` and `dpt_head/`, side by side."""
    family = families.FAMILIES["genpercept_dpt_disparity"](tmp_path / "published")
    latest, published = tmp_path / "latest", family.folder.parent
    latest.mkdir()
    family.folder.rename(latest / "unet")
    (published / "vae").rename(latest / "vae")
    (published / "dpt_head_identity").rename(latest / "dpt_head")
    family = dataclasses.replace(family, folder=latest)
    image, settings = rng.random((32, 48, 3), np.float32), {"processing_resolution": 0}

    # The ReLU cuts off half of the map.
    layers, seen = family.modules["dpt_head"].head.head, []
    handle = layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    family.predict(image, **settings)
    handle.remove()
    with torch.no_grad():
        layers[-2].bias -= seen[0].median()
    save_file(family.modules["dpt_head"].state_dict(), latest / "dpt_head/model.safetensors")
    without = family.predict(image, **settings).prediction
    layers[-1] = torch.nn.ReLU()
    theirs = family.predict(image, **settings).prediction
    assert np.abs(theirs - without).mean() > 0.05
    np.testing.assert_allclose(open_family(family)(image, **settings).prediction, theirs, atol=1e-4)

    def end():
        named = {"task": family.task, "base": family.base_folder}
        return open_perception(str(latest), **named)[0].components["head"].final_activation

    assert end() == "relu"
    (latest / "dpt_head/config.json").write_text('{"final_activation": "identity"}')
    assert end() == "identity"
    (latest / "dpt_head/config.json").write_text('{"final_activation": 5}')
    with pytest.raises(UserError, match="final_activation=5"):
        end()
    (latest / "dpt_head/config.json").write_text('{"model_type": "dpt"}')  # GenPercept's own
    assert end() == "relu"


def test_text_to_image_models_are_refused(tmp_path):
    family = families.FAMILIES["stable_diffusion"](tmp_path / "sd")
    with pytest.raises(UserError, match=r"fine-tune it with python -m jaxpercept\.train"):
        PerceptionPipeline.from_pretrained(family.folder)
    with pytest.raises(UserError, match=r"--family .*genpercept"):
        PerceptionPipeline.from_pretrained(family.folder, task="depth")
    with pytest.raises(UserError, match=r"UNet of 8 input channels, this one has 4"):
        PerceptionPipeline.from_pretrained(family.folder, task="depth", family="marigold")


def test_what_the_files_do_not_say_must_be_named(tmp_path):
    e2e = families.FAMILIES["e2e_ft_depth"](tmp_path / "e2e")
    with pytest.raises(UserError, match=r"e2e_ft model.*--task"):
        PerceptionPipeline.from_pretrained(e2e.folder)
    with pytest.raises(UserError, match="Unknown task 'dpeth'"):
        PerceptionPipeline.from_pretrained(e2e.folder, task="dpeth")
    with pytest.raises(UserError, match="family 'e2e' is unknown"):
        PerceptionPipeline.from_pretrained(e2e.folder, task="depth", family="e2e")
    bare = families.FAMILIES["genpercept_depth"](tmp_path / "genpercept")
    with pytest.raises(UserError, match=r"no text_encoder.*--base"):
        PerceptionPipeline.from_pretrained(bare.folder, task="depth")
    dpt = families.FAMILIES["genpercept_dpt_disparity"](tmp_path / "dpt")
    for file in dpt.folder.parent.glob("dpt_head_identity/*"):
        file.unlink()
    with pytest.raises(UserError, match=r"dpt_head_identity/model\.safetensors"):
        PerceptionPipeline.from_pretrained(dpt.folder, task="disparity", base=dpt.base_folder)
