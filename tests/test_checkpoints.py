"""Reading and writing diffusers folders, against the real diffusers and transformers classes."""

import dataclasses
import fnmatch
import json
import shutil
import struct
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import torch_checkpoints
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch_checkpoints import assert_bit_equal, assert_holds, state
from transformers import CLIPTextModel

from jaxpercept.checkpoints import diffusers, diffusers_write, rules, weights, widen
from jaxpercept.checkpoints.rules import to_torch
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional

KINDS = ("sd1", "sd2", "marigold")
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def kind_folder(request, tmp_path_factory):
    """(folder, torch modules) of each kind, not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, torch_checkpoints.write_checkpoint(folder, request.param)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """(folder, torch modules) of one checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("sd2")
    return folder, torch_checkpoints.write_checkpoint(folder, "sd2")


# Reading folders.


def test_load_and_write_back(kind_folder, tmp_path):
    """torch -> here -> torch: the same bits, the same configs as diffusers sees them."""
    folder, modules = kind_folder
    checkpoint = diffusers.load(folder)
    assert_holds(checkpoint, modules)
    assert checkpoint.scheduler["beta_schedule"] == "scaled_linear"
    assert checkpoint.tokenizer_dir == folder / "tokenizer"
    assert checkpoint.model_index["_class_name"] == "StableDiffusionPipeline"
    assert checkpoint.source == str(folder)

    diffusers_write.save(tmp_path / "out", checkpoint)
    for name, module in modules.items():
        loaded, info = CLASSES[name].from_pretrained(
            tmp_path / "out" / name, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_bit_equal(state(name, loaded), state(name, module))
        ours, theirs = (
            loaded.config.to_dict() if name == "text_encoder" else dict(loaded.config),
            {},
        )
        theirs = module.config.to_dict() if name == "text_encoder" else dict(module.config)
        for key, value in theirs.items():
            if not key.startswith("_") and key != "dtype":
                assert ours[key] == value or list(ours[key]) == list(value), key

    again = diffusers.load(tmp_path / "out")
    assert again.configs == checkpoint.configs
    assert_holds(again, modules)


def test_written_folder_is_a_diffusers_pipeline(sd2, tmp_path, capfd):
    """The pipeline loads without a word of warning and its parts compute the same."""
    folder, modules = sd2
    diffusers_write.save(
        tmp_path / "out", dataclasses.replace(diffusers.load(folder), model_index={})
    )
    capfd.readouterr()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert "key" not in capfd.readouterr().err.lower()
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    ids = torch.tensor([pipeline.tokenizer("a red cube")["input_ids"]])
    sample, timestep = torch.randn(1, 4, 5, 7), torch.tensor([17])
    with torch.no_grad():
        text = modules["text_encoder"](ids).last_hidden_state
        assert torch.equal(pipeline.text_encoder(ids).last_hidden_state, text)
        expected = modules["unet"](sample, timestep, text).sample
        assert torch.equal(pipeline.unet(sample, timestep, text).sample, expected)
        image = modules["vae"].decode(sample).sample
        assert torch.equal(pipeline.vae.decode(sample).sample, image)
    unknown = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert unknown["safety_checker"] == [None, None]


def test_loaded_networks_compute_what_torch_computes(sd2, rng):
    """The checkpoint drives the networks here to diffusers' and transformers' outputs."""
    folder, modules = sd2
    checkpoint = diffusers.load(folder)

    def apply(name, *inputs):
        network = functional(checkpoint.configs[name])
        return jax.jit(lambda p, *x: network.bind(p)(*x))(checkpoint.params[name], *inputs)

    ids = rng.integers(0, 90, (2, 9), dtype=np.int32)
    sample = rng.standard_normal((2, 5, 6, checkpoint.configs["unet"].in_channels), np.float32)
    timesteps = np.array([3, 801], np.int32)
    with torch.no_grad():
        text = modules["text_encoder"](torch.tensor(ids)).last_hidden_state
        noise = modules["unet"](
            torch.tensor(sample).permute(0, 3, 1, 2), torch.tensor(timesteps), text
        ).sample
    np.testing.assert_allclose(apply("text_encoder", ids), text.numpy(), atol=1e-5)
    ours = apply("unet", sample, timesteps, text.numpy())
    np.testing.assert_allclose(ours, noise.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(tmp_path, variant):
    modules = torch_checkpoints.write_checkpoint(
        tmp_path, "sd2", variant=variant, max_shard_size="40KB"
    )
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 3
    assert_holds(diffusers.load(tmp_path), modules)
    assert_holds(diffusers.load(tmp_path, variant=variant), modules)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["fp16"], "fp16"),
        (["fp16", "bf16"], "bf16"),
        (["fp16", None, "bf16"], None),
        (["non_ema"], "non_ema"),
    ],
)
def test_variants(tmp_path, present, expected):
    """Without a wish the most precise one is read; with one, that."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for seed, variant in enumerate(present):
        modules = torch_checkpoints.write_checkpoint(
            tmp_path, variant=variant, dtype=dtypes.get(variant, torch.float32), seed=10 * seed
        )
        assert_holds(diffusers.load(tmp_path, variant=variant or ""), modules)
        if variant == expected:
            wanted = {name: state(name, module) for name, module in modules.items()}
    for name, params in diffusers.load(tmp_path).params.items():
        assert_bit_equal(to_torch(params), wanted[name])


def test_dtype_of_the_parameters(tmp_path):
    torch_checkpoints.write_checkpoint(tmp_path, dtype=torch.bfloat16)
    for dtype, expected in ((None, "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        params = diffusers.load(tmp_path, components=["unet"], dtype=dtype).params["unet"]
        assert {value.dtype.name for value in params.values()} == {expected}


def test_only_the_wanted_components_are_needed(sd2, tmp_path):
    broken = shutil.copytree(sd2[0], tmp_path / "part")
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(broken / name)
    (broken / "model_index.json").unlink()
    checkpoint = diffusers.load(broken, components=("unet", "vae"))
    assert set(checkpoint.params) == {"unet", "vae"}
    assert checkpoint.scheduler == checkpoint.model_index == {}
    assert checkpoint.tokenizer_dir is None
    with pytest.raises(ValueError, match="unknown components"):
        diffusers.load(broken, components=["dpt"])


def test_no_torch_at_run_time(sd2):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from jaxpercept.checkpoints import diffusers
from jaxpercept.checkpoints.tokenizer import load_tokenizer, tokenize
checkpoint = diffusers.load({str(sd2[0])!r})
tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
print(tokenize(tokenizer, [""], None).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "(1, 2)", result.stderr


# The hub.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: `hub.remote` is the repository, downloads go to a cache folder."""

    class Hub:
        remote = tmp_path / "remote"
        cache = tmp_path / "snapshots" / "abc123"

        def snapshot_download(self, repo, allow_patterns, revision=None):
            assert revision in (None, "abc123")
            for path in self.remote.rglob("*"):
                name = str(path.relative_to(self.remote))
                if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                    (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, self.cache / name)
            return str(self.cache)

        def list_repo_files(self, repo, revision):
            return [str(p.relative_to(self.remote)) for p in self.remote.rglob("*") if p.is_file()]

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_hub_fetches_only_what_is_needed(hub):
    modules = torch_checkpoints.write_checkpoint(hub.remote, seed=5)
    torch_checkpoints.write_checkpoint(hub.remote, variant="fp16", max_shard_size="40KB")
    (hub.remote / "v1-5-pruned.ckpt").touch()
    (hub.remote / "unet" / "diffusion_pytorch_model.bin").touch()
    checkpoint = diffusers.load("owner/model")
    assert_holds(checkpoint, modules)
    assert checkpoint.source == "owner/model"
    fetched = {str(p.relative_to(hub.cache)) for p in hub.cache.rglob("*.*")}
    assert not any(name.endswith((".ckpt", ".bin")) or "-of-" in name for name in fetched)
    diffusers.load("owner/model", variant="fp16")
    assert list(hub.cache.rglob("*fp16-00001-of-*"))


@pytest.mark.parametrize("head", ["dpt_head_identity", "dpt_head"])
def test_hub_fetches_the_head_beside_a_unet(hub, head):
    torch_checkpoints.unet("sd2").save_pretrained(hub.remote / "run" / "unet")
    for name in (head, f"not_{head}"):
        (hub.remote / "run" / name).mkdir()
        (hub.remote / "run" / name / "model.safetensors").touch()
    top, inside, places = diffusers.fetch_parts("owner/model/run", ("unet",))
    assert (top, inside, places) == (hub.cache, "run", {"unet": "run/unet"})
    assert diffusers.find_head(top / places["unet"]).parent == hub.cache / "run" / head
    assert not list(hub.cache.glob("*/not_*"))


def test_hub_repository_with_pickles_or_gaps(hub):
    torch_checkpoints.write_checkpoint(hub.remote)
    (hub.remote / UNET_FILE).rename(hub.remote / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="owner/model/unet holds its weights as a pickle"):
        diffusers.load("owner/model")
    shutil.rmtree(hub.remote / "unet")
    shutil.rmtree(hub.cache)
    with pytest.raises(UserError, match=r"lacks unet/config.json, unet/diffusion_pytorch_model\.s"):
        diffusers.load("owner/model")


def test_hub_out_of_reach():
    with pytest.raises(UserError, match=r"no-owner/no-model is no local folder.*HF_HUB_OFFLINE"):
        diffusers.load("no-owner/no-model")


# Writing.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_save_in_half_precision(sd2, tmp_path, dtype):
    checkpoint = diffusers.load(sd2[0])
    diffusers_write.save(tmp_path / "out", checkpoint, dtype=dtype)
    assert load_file(tmp_path / "out" / UNET_FILE)["conv_in.weight"].dtype == getattr(torch, dtype)
    for name, params in diffusers.load(tmp_path / "out").params.items():
        for path, value in params.items():
            expected = checkpoint.params[name][path].astype(rules.DTYPES[dtype]).astype(np.float32)
            np.testing.assert_array_equal(value, expected)
    UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")


def test_file_is_what_the_library_writes(rng, tmp_path):
    """Same header fields and data; pt metadata; data aligned."""
    tensors = {
        "b": rng.standard_normal((3, 5), np.float32),
        "a": rng.standard_normal(7, np.float32),
    }
    weights.write_weights(tmp_path / "w.safetensors", tensors, np.dtype(np.float32))
    loaded = load_file(tmp_path / "w.safetensors")
    assert_bit_equal({k: v.numpy() for k, v in loaded.items()}, tensors)
    with weights.safe_open(tmp_path / "w.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert struct.unpack("<Q", (tmp_path / "w.safetensors").read_bytes()[:8])[0] % 8 == 0


def test_values_that_cannot_be_written(sd2, tmp_path):
    checkpoint = diffusers.load(sd2[0], components=["unet"])
    checkpoint.params["unet"]["conv_in.bias"][2] = 1e6
    with pytest.raises(UserError, match=r"Tensor conv_in\.bias holds .* not finite in float16"):
        diffusers_write.save(tmp_path / "half", checkpoint, dtype="float16")
    checkpoint.params["unet"]["conv_in.bias"][2] = np.nan
    with pytest.raises(UserError, match=r"Tensor conv_in\.bias"):
        diffusers_write.save(tmp_path / "full", checkpoint)


def test_save_leaves_other_folders_alone(sd2, tmp_path):
    checkpoint = diffusers.load(sd2[0])
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no diffusers checkpoint"):
        diffusers_write.save(tmp_path, checkpoint)
    with pytest.raises(UserError, match=r"thesis.txt is a file"):
        diffusers_write.save(tmp_path / "thesis.txt", checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_save_replaces_a_checkpoint_whole(sd2, tmp_path):
    """No shard or variant of the former weights stays to be read instead of the new ones."""
    torch_checkpoints.write_checkpoint(tmp_path, variant="fp16", max_shard_size="40KB", seed=9)
    torch_checkpoints.write_checkpoint(tmp_path, max_shard_size="40KB", seed=8)
    (tmp_path / "tokenizer" / "tokenizer.json").touch()  # transformers would prefer it
    diffusers_write.save(tmp_path, diffusers.load(sd2[0]))
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()
    assert sorted(p.name for p in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_holds(diffusers.load(tmp_path), sd2[1])
    diffusers_write.save(tmp_path, diffusers.load(tmp_path))  # onto itself
    assert_holds(diffusers.load(tmp_path), sd2[1])


def test_interrupted_save(sd2, tmp_path, monkeypatch):
    """What was there stays whole, nothing half-written is left, and saving again works."""
    checkpoint = diffusers.load(sd2[0])
    diffusers_write.save(tmp_path / "old", checkpoint)
    changed = dataclasses.replace(checkpoint, params=dict(checkpoint.params))
    changed.params["unet"] = {k: v + 1 for k, v in checkpoint.params["unet"].items()}

    def full_disk(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", full_disk)
        for folder in ("old", "new"):
            with pytest.raises(OSError, match="No space"):
                diffusers_write.save(tmp_path / folder, changed)
    assert not list(tmp_path.rglob("*.partial"))
    assert_holds(diffusers.load(tmp_path / "old"), sd2[1])
    diffusers_write.save(tmp_path / "new", checkpoint)
    assert_holds(diffusers.load(tmp_path / "new"), sd2[1])


# Widening the first convolution.


def test_widened_unet_computes_the_same_on_a_repeated_input(sd2, tmp_path):
    folder, modules = sd2
    wide = diffusers.load(folder, components=["unet"])
    wide.configs["unet"] = dataclasses.replace(wide.configs["unet"], in_channels=8)
    wide.params["unet"] = widen.widen_conv_in(wide.params["unet"])
    diffusers_write.save(tmp_path / "out", wide)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert unet.config.in_channels == 8
    assert torch.equal(unet.conv_in.bias, modules["unet"].conv_in.bias)
    sample, text = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = modules["unet"](sample, 1, text).sample
        torch.testing.assert_close(
            unet(torch.cat([sample, sample], 1), 1, text).sample, expected, atol=1e-5, rtol=0
        )


def test_widening_touches_the_first_kernel_alone(rng):
    params = {
        "conv_in.kernel": rng.standard_normal((3, 3, 4, 16), np.float32),
        "conv_in.bias": rng.standard_normal(16, np.float32),
        "conv_out.bias": rng.standard_normal(4, np.float32),
    }
    wide = widen.widen_conv_in(params)
    for i in range(2):
        group = wide["conv_in.kernel"][:, :, 4 * i : 4 * i + 4]
        np.testing.assert_array_equal(group, params["conv_in.kernel"] / np.float32(2))
    assert wide["conv_in.kernel"].shape == (3, 3, 8, 16)
    assert wide["conv_in.kernel"].dtype == np.float32
    assert wide.keys() == params.keys()
    for path in ("conv_in.bias", "conv_out.bias"):
        assert wide[path] is params[path]
    assert params["conv_in.kernel"].shape == (3, 3, 4, 16)
