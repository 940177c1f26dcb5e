"""What the doctor says of damaged checkpoints in diffusers' layout: all that is wrong, at once."""

import json
import shutil
import tracemalloc
from pathlib import Path

import families
import numpy as np
import pytest
import tiny_model
import torch
import torch_checkpoints
from checkup import WEIGHTS, check, door, edit, restore_logging  # noqa: F401
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    families.FAMILIES["marigold_depth_v1_1"](folder)
    return folder


@pytest.fixture
def broken(sound, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def test_values_that_are_not_finite(broken, capsys):
    def unet(tensors):
        tensors["conv_in.weight"][:2, 0, 0, 0] = np.nan
        tensors["conv_in.weight"][3, 0, 0, 1] = -np.inf
        tensors["mid_block.resnets.0.conv1.bias"][:] = np.inf

    edit(broken / "unet" / WEIGHTS, unet)

    def vae(tensors):
        tensors["quant_conv.bias"].fill_(np.nan)
        tensors.update({name: x.to(torch.bfloat16) for name, x in tensors.items()})

    edit(broken / "vae" / WEIGHTS, vae)
    report = check(broken)
    parts = report["components"]
    assert parts["unet"]["non_finite"] == {
        "conv_in.weight": {"nan": 2, "infinite": 1},
        "mid_block.resnets.0.conv1.bias": {"nan": 0, "infinite": 32},
    }
    assert parts["vae"]["non_finite"] == {"quant_conv.bias": {"nan": 8, "infinite": 0}}
    assert parts["text_encoder"]["non_finite"] == {}
    assert parts["vae"]["dtypes"] == {"bfloat16": parts["vae"]["tensors"]}
    assert len(report["problems"]) == 2
    assert report["problems"][0].startswith("unet: 2 of 208 tensors hold NaN or infinite")
    # What it would do is told all the same.
    assert report["pipeline"]["family"] == "marigold"
    assert not report["pipeline"]["runs"]
    assert door(f"--checkpoint={broken}") == 1
    captured = capsys.readouterr()
    assert "mid_block.resnets.0.conv1.bias (nan: 0, infinite: 32)" in captured.out
    assert captured.err == ""


def test_every_part_is_looked_at(broken, capsys):
    """Truncated, damaged, misshaped and missing at once: all are told."""
    file = broken / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])
    (broken / "vae/config.json").write_text("{")
    edit(broken / "vae" / WEIGHTS, lambda tensors: tensors["quant_conv.bias"].fill_(np.inf))
    (broken / "tokenizer/merges.txt").unlink()
    (broken / "scheduler/scheduler_config.json").write_text("[]")

    def text(tensors):
        prefix = "text_model." if "text_model.final_layer_norm.bias" in tensors else ""
        del tensors[prefix + "final_layer_norm.bias"]
        tensors["extra"] = torch.ones(3)
        tensors[prefix + "embeddings.position_embedding.weight"] = torch.ones(7, 32)

    edit(broken / "text_encoder/model.safetensors", text)
    report = check(broken)
    parts = report["components"]
    assert f"{file} is truncated" in parts["unet"]["problems"][0]
    assert parts["unet"]["tensors"] == 0
    assert parts["unet"]["missing"] == []
    assert "config.json cannot be read as JSON" in parts["vae"]["problems"][0]
    assert parts["vae"]["non_finite"] == {"quant_conv.bias": {"nan": 0, "infinite": 8}}
    assert parts["vae"]["architecture"] is None
    encoder = parts["text_encoder"]
    assert encoder["missing"] == ["text_model.final_layer_norm.bias"]
    assert encoder["unexpected"] == ["extra"]
    assert len(encoder["misshaped"]) == 1
    assert "position_embedding.weight [7, 32] instead of [24, 32]" in encoder["misshaped"][0]
    text = "\n".join(report["problems"])
    assert "tokenizer lacks merges.txt" in text
    assert "scheduler_config.json must hold a JSON object" in text
    assert "text_encoder: The tensors do not fit" in text
    assert report["scheduler"] is None
    assert report["tokenizer"] is None
    assert not report["pipeline"]["runs"]
    assert door(f"--checkpoint={broken}") == 1
    assert "Traceback" not in "".join(capsys.readouterr())


def test_pickles(broken):
    (broken / "unet" / WEIGHTS).rename(broken / "unet/diffusion_pytorch_model.bin")
    (broken / "vae/vae.ckpt").touch()
    report = check(broken)
    unet = report["components"]["unet"]["problems"]
    assert len(unet) == 1
    assert "as a pickle (diffusion_pytorch_model.bin)" in unet[0]
    assert report["components"]["vae"]["problems"] == []
    assert report["unused_files"] == ["unet/diffusion_pytorch_model.bin", "vae/vae.ckpt"]
    assert ["pickle" in sentence for sentence in report["warnings"]] == [True, True]


def test_components_that_are_missing(broken):
    (broken / "unet/config.json").unlink()
    shutil.rmtree(broken / "vae")
    (broken / "text_encoder/model.safetensors").unlink()
    report = check(broken)
    assert "config.json is missing" in report["components"]["unet"]["problems"][0]
    assert report["components"]["unet"]["tensors"] == 208
    assert "vae" not in report["components"]
    assert "safetensors is missing" in report["components"]["text_encoder"]["problems"][0]
    assert "holds no UNet" in report["pipeline"]["reason"]


def test_shards_and_variants(tmp_path):
    folder = tmp_path / "sharded"
    torch_checkpoints.write_checkpoint(folder, max_shard_size="200KB")
    torch_checkpoints.write_checkpoint(folder, variant="fp16", dtype=torch.float16)
    report = check(folder)
    assert report["problems"] == []
    unet = report["components"]["unet"]
    index = json.loads((folder / "unet" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert unet["dtypes"] == {"float32": len(index)}
    assert len(unet["files"]) == 2 + len(set(index.values())) > 4
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in report["unused_files"]
    assert not set(unet["files"]) & set(report["unused_files"])

    shards = sorted(set(index.values()))
    listed = json.dumps({"weight_map": {**index, "conv_in.scale": shards[0]}})
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(listed)
    (problem,) = check(folder)["components"]["unet"]["problems"]
    assert "lists 1 tensors that its shards do not hold, the first being conv_in.scale" in problem

    (folder / "unet" / shards[0]).unlink()
    damaged = folder / "unet" / shards[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    unet = check(folder)["components"]["unet"]
    assert [shards[0] in unet["problems"][0], shards[1] in unet["problems"][1]] == [True, True]
    left = [name for name in index.values() if name not in shards[:2]]
    assert unet["tensors"] == len(left)


def test_values_of_wrong_types_in_small_files(broken):
    index = json.loads((broken / "model_index.json").read_text())
    for change in ({"default_denoising_steps": "four"}, {"default_processing_resolution": "big"}):
        (broken / "model_index.json").write_text(json.dumps(index | change))
        (problem,) = check(broken)["problems"]
        assert next(iter(change)) in problem
    (broken / "model_index.json").write_text(json.dumps(index))
    scheduler = json.loads((broken / "scheduler/scheduler_config.json").read_text())
    for change in ({"beta_start": "low"}, {"_class_name": "PNDMScheduler"}, {"magic": 1}):
        content = json.dumps(scheduler | change)
        (broken / "scheduler/scheduler_config.json").write_text(content)
        report = check(broken)
        assert len(report["problems"]) == 1
        assert not report["pipeline"]["runs"]


def test_a_config_of_a_thousand_million_layers(broken):
    """It is refused before a network is made of it."""
    path = broken / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 10**9}))
    report = check(broken)
    assert "layers" in report["components"]["unet"]["problems"][0]
    assert report["components"]["unet"]["tensors"] == 208
    assert not report["pipeline"]["runs"]


def test_memory_is_that_of_one_tensor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_model.COMPONENTS["unet"].to_dict()))
    large = {f"t{i}": torch.ones(2**20) for i in range(12)}
    save_file(large, tmp_path / WEIGHTS)
    tracemalloc.start()
    try:
        report = check(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["components"]["unet"]["unexpected"] == sorted(large)
    assert report["components"]["unet"]["bytes"] == 12 * 2**22
    assert peak < 6 * 2**22
