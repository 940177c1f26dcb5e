"""Conversion between formats: nothing is lost, and torch predicts what jaxpercept predicts."""

import dataclasses
import json
import shutil

import families
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_model
import torch
import torch_checkpoints
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MarigoldDepthPipeline,
    MarigoldNormalsPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families_torch import quiet
from safetensors.numpy import load_file
from tiny_model import one_device

from jaxpercept import PerceptionPipeline, convert
from jaxpercept.checkpoints import lora, orbax
from jaxpercept.checkpoints.load import load_model
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import open_perception
from jaxpercept.inference.stablehlo import flat
from jaxpercept.methods.layouts import as_marigold
from jaxpercept.models.functional import functional
from jaxpercept.models.lora import LoraConfig, is_lora
from jaxpercept.training import sharding

SIZE = (32, 48)


def opened(source, **options):
    return PerceptionPipeline.from_pretrained(source, mesh=one_device(), **options)


def tensors(folder):
    """Every weight file's tensors, by folder; transformers 5 leaves the text tower's prefix out."""
    return {
        path.parent.name: {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
        for path in folder.glob("*/*.safetensors")
    }


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch_checkpoints.assert_bit_equal(left[name], right[name])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A text-to-image checkpoint."""
    folder = tmp_path_factory.mktemp("base") / "stable-diffusion"
    torch_checkpoints.write_checkpoint(folder, seed=int(np.random.default_rng().integers(2**31)))
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: openrail++\n---\n# Base\n")
    return folder


def save_trained(folder, base, prompt="", says=None, prompt_dtype=np.float32, **changes):
    """A one-step model as a training run leaves it: no text encoder, no tokenizer.

    says: the prompt by the config, if that is another one.
    """
    description, params = load_model(str(base), prompt=prompt)
    networks = ("unet", "vae")
    config = {"steps": 5, "batch_size": 2, "data": {"mixture": {"scenes": 1.0}}}
    values = {
        "components": {name: description.components[name] for name in networks},
        "method": {"name": "one_step", "inference_timestep": 7},
        "task": "depth",
        "resolution": SIZE,
        "model_index": {},
        "config": {**config, "prompt": prompt if says is None else says},
    }
    kept = {name: params[name] for name in networks}
    kept["prompt"] = {"embedding": params["prompt"]["embedding"].astype(prompt_dtype)}
    orbax.save_export(folder, dataclasses.replace(description, **(values | changes)), kept)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A depth model."""
    folder = save_trained(tmp_path_factory.mktemp("run") / "depth", base)
    report = {"metrics": {"abs_rel": 0.125}, "protocol": {"split": "test", "images": 3}}
    (folder / "evaluation/scenes").mkdir(parents=True)
    (folder / "evaluation/scenes/metrics.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize("name", ["marigold_depth_v1_1", "marigold_iid_lighting", "base"])
def test_diffusers_to_orbax_and_back_is_bit_equal(name, base, tmp_path):
    source = base
    if name != "base":
        source = families.FAMILIES[name](tmp_path / name, 1).folder
    # Some weights are stored in half precision: their type survives.
    half = AutoencoderKL.from_pretrained(source / "vae")
    torch_checkpoints.cast(half, torch.float16)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    half.save_pretrained(changed / "vae")
    there = convert.convert(str(changed), tmp_path / "orbax")
    back = convert.convert(str(there), tmp_path / "back", format="diffusers")
    assert_equal(tensors(back), tensors(changed))
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (back, changed))
        for content in (ours, theirs):
            content.pop("_diffusers_version")
            content.pop("safety_checker", None)  # not converted
        assert ours == theirs
    for file in (changed / "tokenizer").iterdir():
        assert (back / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_families_keep_what_was_named(tmp_path, rng):
    family = families.FAMILIES["e2e_ft_normals"](tmp_path / "source", 2)
    image = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    before = opened(family.folder, task="normals")(image, processing_resolution=0)
    for format in ("orbax", "diffusers"):
        folder = convert.convert(
            str(family.folder), tmp_path / format, format=format, task="normals"
        )
        after = opened(folder)(image, processing_resolution=0)
        np.testing.assert_array_equal(after.prediction, before.prediction)
        assert after.kind == "normals"


def test_families_keep_how_they_read_a_prompt(tmp_path):
    """Lotus pads it, also one that is given."""
    family = families.FAMILIES["lotus_d_depth"](tmp_path / "source", 2)

    def read(source, prompt, **named):
        return open_perception(str(source), prompt=prompt, **named)[1]["prompt"]["embedding"]

    texts = ("", "a red cube")
    before = [read(family.folder, text, task="depth") for text in texts]
    assert before[0].shape == before[1].shape == (1, torch_checkpoints.POSITIONS, 32)
    assert np.abs(before[0] - before[1]).max() > 0.1
    for format in ("orbax", "diffusers"):
        folder = convert.convert(str(family.folder), tmp_path / format, format=format, task="depth")
        after = [read(folder, text) for text in texts]
        np.testing.assert_array_equal(after, before)


def test_a_prompt_survives(base, tmp_path, rng):
    text = "a room with red"
    source = save_trained(tmp_path / "source", base, text)
    image = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    ours = opened(source)(image).prediction
    folder = convert.convert(str(source), tmp_path / "diffusers", format="diffusers")
    back = convert.convert(str(folder), tmp_path / "back")
    for other in (folder, back):
        assert load_model(str(other))[1]["prompt"]["embedding"].shape == (1, 6, 32)
        np.testing.assert_array_equal(opened(other)(image).prediction, ours)
    with pytest.raises(UserError, match="'a room with red', and diffusers' Marigold pipelines"):
        convert.convert(str(source), tmp_path / "out", format="diffusers", layout="marigold")

    # A run that goes on from either gets the prompt it asks for.
    wanted = load_model(str(base), prompt="a cube")[1]["prompt"]["embedding"]
    for other in (folder, back):
        given = load_model(str(other), prompt="a cube")[1]["prompt"]["embedding"]
        np.testing.assert_array_equal(given, wanted)
    content = json.loads((back / "jaxpercept.json").read_text())
    for key, value in (("prompt", 5), ("trainable", ["("]), ("trainable", "unet")):
        changed = content | {"config": {key: value}}
        (back / "jaxpercept.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"has {key}="):
            load_model(str(back))


def test_a_prompt_that_the_text_encoder_does_not_give(base, tmp_path):
    half = save_trained(tmp_path / "half", base, "a room", prompt_dtype=ml_dtypes.bfloat16)
    convert.convert(str(half), tmp_path / "out", format="diffusers")  # rounding is no difference
    torch_checkpoints.write_checkpoint(
        tmp_path / "sd", seed=int(np.random.default_rng().integers(9))
    )
    inherited = save_trained(tmp_path / "inherited", base, "a room", says="")
    same_length = save_trained(tmp_path / "other", base, "a room", says="a cube")
    for source, other in ((half, tmp_path / "sd"), (inherited, base), (same_length, base)):
        with pytest.raises(UserError, match="reads something else than the text encoder makes of"):
            convert.convert(str(source), tmp_path / "no", format="diffusers", base=str(other))
        assert not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
def test_trained_model_predicts_the_same_in_torch(trained, tmp_path, rng):
    folder = convert.convert(str(trained), tmp_path / "out", format="diffusers")
    image = rng.random((1, *SIZE, 3), np.float32)
    ours = opened(trained)(image).prediction
    again = opened(folder)(image).prediction
    np.testing.assert_array_equal(again, ours)

    with quiet():
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        assert isinstance(pipe.unet, UNet2DConditionModel)
        assert pipe.unet.config.in_channels == 4
        # The pipeline would change steps_offset to 1, the scheduler by itself does not.
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(1)
        (t,) = scheduler.timesteps
        assert int(t) == 7
        ids = pipe.tokenizer("", padding="do_not_pad", return_tensors="pt").input_ids
        text = pipe.text_encoder(ids)[0]
        x = torch.from_numpy(image).permute(0, 3, 1, 2) * 2 - 1
        scale = pipe.vae.config.scaling_factor
        z = pipe.vae.encode(x).latent_dist.mode() * scale
        latent = -pipe.unet(z, t, encoder_hidden_states=text).sample
        decoded = pipe.vae.decode(latent / scale).sample.mean(1).clip(-1, 1)
    np.testing.assert_allclose(ours[..., 0], (decoded.numpy() + 1) / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "task", "options", "tolerance"),
    [
        (MarigoldDepthPipeline, "depth", {}, 1e-4),
        # Rounding of short vectors is magnified where they are brought to unit length.
        (MarigoldNormalsPipeline, "normals", {"full_z_range": False}, 1e-3),
    ],
)
def test_marigold_pipeline_of_diffusers_runs_a_one_step_model(
    base, tmp_path, rng, kind, task, options, tolerance
):
    source = save_trained(tmp_path / "source", base, task=task, task_options=options)
    folder = convert.convert(
        str(source), tmp_path / "out", format="diffusers", layout="marigold", base=str(base)
    )
    image = rng.random((37, 45, 3), np.float32)  # neither the training's size nor divisible
    ours = opened(source)(image).prediction
    with quiet():
        pipe = kind.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(torch.from_numpy(image).permute(2, 0, 1)[None]).prediction
    np.testing.assert_allclose(ours, theirs, atol=tolerance)
    again = opened(folder)
    assert again.perception.recipe.family == "marigold"
    np.testing.assert_allclose(again(image).prediction, ours, atol=tolerance / 10)


@pytest.mark.parametrize(
    ("task", "options", "fields"),
    [
        ("depth", {}, {"scale_invariant": True, "shift_invariant": True}),
        ("depth", {"scale_invariant": False}, {"scale_invariant": False, "shift_invariant": True}),
        (
            "disparity",
            {"shift_invariant": False},
            {"scale_invariant": True, "shift_invariant": False},
        ),
        ("normals", {}, {"use_full_z_range": True}),
        ("normals", {"full_z_range": False}, {"use_full_z_range": False}),
    ],
)
def test_marigold_index_says_what_the_task_was_trained_with(rng, task, options, fields):
    description = tiny_model.description(task=task, task_options=options)
    changed, _ = as_marigold(description, tiny_model.params(rng)["unet"])
    names = ("scale_invariant", "shift_invariant", "use_full_z_range")
    assert {key: changed.model_index[key] for key in names if key in changed.model_index} == fields


# ---- low-rank additions --------------------------------------------------------------------------


def save_adapted(folder, rng, *trainable):
    """A run that trained these, and kept the rest in half precision."""
    config, params = LoraConfig(3, 6), tiny_model.params(rng)
    shapes = functional(tiny_model.COMPONENTS["unet"], lora=config).shapes
    for path, shape in shapes.items():
        if is_lora(path):
            params["unet"][path] = 0.03 * rng.normal(size=shape.shape).astype(np.float32)
        else:
            params["unet"][path] = params["unet"][path].astype(ml_dtypes.bfloat16)
    description = tiny_model.description(
        lora=config.to_dict(), config={"trainable": list(trainable)}
    )
    orbax.save_export(folder, description, params)
    return params["unet"]


def test_merging_into_half_precision_keeps_the_additions(tmp_path, rng):
    unet = save_adapted(tmp_path / "run", rng, "unet/.*lora_")
    folder = convert.convert(str(tmp_path / "run"), tmp_path / "out")
    merged = load_model(str(folder))[1]["unet"]
    adapted = {path.partition(".lora_")[0] for path in unet if is_lora(path)}
    assert len(adapted) >= 8
    for path, value in merged.items():
        layer = path.removesuffix(".kernel")
        if layer not in adapted:
            torch_checkpoints.assert_bit_equal({path: value}, {path: unet[path]})
            continue
        w, a, b = (
            unet[f"{layer}.{n}kernel"].astype(np.float64) for n in ("", "lora_A.", "lora_B.")
        )
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, w + 2 * a @ b, rtol=0, atol=1e-6)
    image = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    run, export = (opened(source)(image).prediction for source in (tmp_path / "run", folder))
    np.testing.assert_array_equal(run, export)
    adapter = convert.convert(str(tmp_path / "run"), tmp_path / "adapter", format="lora")
    factors = lora.load(adapter, tiny_model.COMPONENTS["unet"])[1]
    torch_checkpoints.assert_bit_equal(factors, {p: v for p, v in unet.items() if is_lora(p)})


@pytest.mark.parametrize("more", ["unet/", "vae/decoder", "unet/conv_in.*"])
def test_an_adapter_that_is_not_all_of_the_training_is_refused(more, tmp_path, rng):
    save_adapted(tmp_path / "run", rng, "unet/.*lora_", more)
    with pytest.raises(UserError, match=rf"trained {more[:11]}.*, too, .* orbax or diffusers"):
        convert.convert(str(tmp_path / "run"), tmp_path / "out", format="lora")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_stablehlo_runs_without_this_package_for_any_batch(trained, tmp_path, rng):
    folder = convert.convert(str(trained), tmp_path / "out", format="stablehlo")
    program = jax.export.deserialize((folder / "model.stablehlo").read_bytes())
    weights = load_file(folder / "weights.safetensors")
    pipe = opened(trained)
    predict = jax.jit(program.call)
    for batch in (1, 3):
        images = rng.integers(0, 256, (batch, *SIZE, 3)).astype(np.uint8)
        ours = pipe(images).prediction
        np.testing.assert_allclose(predict(weights, images), ours, atol=2e-5)
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["kind"] == "affine_depth"
    assert set(signature["platforms"]) >= {"cpu", "cuda", "tpu"}


def test_stablehlo_of_a_model_that_starts_from_noise(tmp_path, rng):
    family = families.FAMILIES["marigold_depth_v1_1"](tmp_path / "source", 3)
    folder = convert.convert(
        str(family.folder), tmp_path / "out", format="stablehlo", size=(32, 64)
    )
    program = jax.export.deserialize((folder / "model.stablehlo").read_bytes())
    weights = load_file(folder / "weights.safetensors")
    images = rng.integers(0, 256, (2, 32, 64, 3)).astype(np.uint8)
    noise = rng.standard_normal((2, 16, 32, 4), np.float32)
    ours = opened(family.folder)(images, latents=noise).prediction
    np.testing.assert_allclose(jax.jit(program.call)(weights, images, noise), ours, atol=2e-5)


def test_card_says_where_the_model_is_from(trained, tmp_path):
    cards = {}
    for format in ("orbax", "diffusers", "stablehlo"):
        folder = convert.convert(str(trained), tmp_path / format, format=format)
        cards[format] = (folder / "README.md").read_text()
    for format, card in cards.items():
        assert "license: openrail++" in card
        assert "stable-diffusion" in card
        assert '"batch_size": 2' in card
        assert "Data: scenes" in card
        assert "abs_rel 0.1250" in card
        assert f'"{format}' in card  # how to open it
        hashes = {line for line in card.splitlines() if line.startswith(("| unet", "| vae"))}
        assert hashes <= set(cards["orbax"].splitlines())
        assert len(hashes) == 2


def test_weights_restore_to_any_mesh(trained, tmp_path):
    folder = convert.convert(str(trained), tmp_path / "out") / orbax.WEIGHTS
    whole = flat(orbax.load_params(folder))
    for fsdp in (1, 4, 8):
        mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
        placed = orbax.load_sharded(folder, lambda s, mesh=mesh: sharding.tree_shardings(s, mesh))
        spread = [
            array
            for weights in placed.values()
            for array in weights.values()
            if not array.is_fully_replicated
        ]
        assert bool(spread) == (fsdp > 1)
        torch_checkpoints.assert_bit_equal(flat(jax.tree.map(np.asarray, placed)), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "diffusers", "base": "nowhere"}, "no text encoder.*--base"),
        ({"format": "stablehlo", "size": (31, 48)}, "multiples of 2"),
        ({"format": "pickle"}, "orbax, diffusers, stablehlo"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(trained, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        convert.convert(str(trained), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_text_to_image_models_have_no_program(base, tmp_path):
    with pytest.raises(UserError, match="fine-tune it"):
        convert.convert(str(base), tmp_path / "out", format="stablehlo", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert.convert(str(trained), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_card", full)
    with pytest.raises(UserError, match="No space left"):
        convert.convert(str(trained), tmp_path / "out")
    assert not list(tmp_path.iterdir())
