"""Conversion between formats: nothing is lost, and torch predicts what jaxpercept predicts."""

import dataclasses
import json
import shutil

import families
import jax
import numpy as np
import pytest
import torch
import torch_checkpoints
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MarigoldDepthPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families_torch import quiet
from safetensors.numpy import load_file
from tiny_model import one_device, quick_compile  # noqa: F401

from jaxpercept import PerceptionPipeline, convert
from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.load import load_model
from jaxpercept.errors import UserError
from jaxpercept.inference.stablehlo import flat
from jaxpercept.training import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

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


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A one-step depth model as a training run leaves it: no text encoder, no tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "depth"
    description, params = load_model(str(base))
    networks = ("unet", "vae")
    description = dataclasses.replace(
        description,
        components={name: description.components[name] for name in networks},
        method={"name": "one_step", "inference_timestep": 7},
        task="depth",
        resolution=SIZE,
        model_index={},
        config={"steps": 5, "batch_size": 2, "data": {"mixture": {"scenes": 1.0}}},
    )
    kept = {name: params[name] for name in (*networks, "prompt")}
    orbax.save_export(folder, description, kept)
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


def test_marigold_pipeline_of_diffusers_runs_a_one_step_model(trained, base, tmp_path, rng):
    folder = convert.convert(
        str(trained), tmp_path / "out", format="diffusers", layout="marigold", base=str(base)
    )
    image = rng.random((37, 45, 3), np.float32)  # neither the training's size nor divisible
    ours = opened(trained)(image).prediction
    with quiet():
        pipe = MarigoldDepthPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(torch.from_numpy(image).permute(2, 0, 1)[None]).prediction
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    again = opened(folder)
    assert again.perception.recipe.family == "marigold"
    np.testing.assert_allclose(again(image).prediction, ours, atol=1e-5)


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
