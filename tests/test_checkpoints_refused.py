"""Damaged, incomplete and hostile checkpoints: one sentence that names the culprit."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_checkpoints
from safetensors.torch import load_file, save_file

from jaxpercept.checkpoints import diffusers
from jaxpercept.errors import UserError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """A checkpoint's folder, not to be changed."""
    folder = tmp_path_factory.mktemp("sd2")
    torch_checkpoints.write_checkpoint(folder, "sd2")
    return folder


@pytest.fixture
def broken(sd2, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(sd2, tmp_path / "broken"))


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load_error(folder, **options) -> str:
    with pytest.raises(UserError) as error:
        diffusers.load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_files_are_all_listed(broken):
    (broken / "unet" / "config.json").unlink()
    (broken / UNET_FILE).unlink()
    shutil.rmtree(broken / "text_encoder")
    (broken / "tokenizer" / "merges.txt").unlink()
    assert (
        "lacks unet/config.json, unet/diffusion_pytorch_model.safetensors, "
        "text_encoder/config.json, text_encoder/model.safetensors, tokenizer/merges.txt"
    ) in load_error(broken)
    assert "lacks vae/diffusion_pytorch_model.fp16.safetensors" in load_error(
        broken, components=["vae"], variant="fp16"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-7],
        lambda raw: raw[:100],
        lambda raw: raw[:3],
        lambda raw: b"",
        lambda raw: struct.pack("<Q", 1 << 62) + raw[8:],
        lambda raw: struct.pack("<Q", 90_000_000) + raw[8:],
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda raw: raw + b"more",
        lambda raw: struct.pack("<Q", 5) + b"[1,2]",
    ],
)
def test_damaged_weights(broken, damage):
    file = broken / UNET_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} is truncated or no safetensors file" in load_error(broken)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights(broken, value):
    edit_weights(
        broken / UNET_FILE, lambda t: t["mid_block.resnets.0.conv1.weight"][3, 1, 2].fill_(value)
    )
    message = load_error(broken)
    assert "Tensor mid_block.resnets.0.conv1.weight of" in message
    assert "NaN or infinite" in message


def test_tensors_that_do_not_fit(broken):
    def edit(tensors):
        del tensors["conv_out.bias"]
        tensors["extra.weight"] = torch.ones(2)
        tensors["conv_in.weight"] = torch.ones(16, 8, 3, 3)

    edit_weights(broken / UNET_FILE, edit)
    message = load_error(broken)
    assert str(broken / UNET_FILE) in message
    for part in (
        "missing (1): conv_out.bias",
        "(1): extra.weight",
        "[16, 8, 3, 3] instead of [16, 4",
    ):
        assert part in message


def test_quantised_weights(broken):
    edit_weights(
        broken / UNET_FILE, lambda t: t.update({"conv_in.bias": torch.ones(16, dtype=torch.int8)})
    )
    assert "Tensor conv_in.bias of" in load_error(broken)
    assert "has type I8" in load_error(broken)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 100_000])
def test_damaged_config(broken, content):
    (broken / "vae" / "config.json").write_text(content)
    assert str(broken / "vae" / "config.json") in load_error(broken)


def test_config_that_is_not_supported(broken):
    edit_json(broken / "unet" / "config.json", motion_modules=True)
    message = load_error(broken)
    assert str(broken / "unet" / "config.json") in message
    assert "motion_modules" in message
    edit_json(broken / "unet" / "config.json", _class_name="UNet3DConditionModel")
    assert "describes a UNet3DConditionModel" in load_error(broken)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "x.pt", "x.pth"])
def test_pickles_are_refused(broken, name):
    (broken / UNET_FILE).rename(broken / "unet" / name)
    message = load_error(broken)
    assert f"as a pickle ({name})" in message
    assert "convert it to safetensors" in message
    (broken / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert "lacks unet/diffusion_pytorch_model.bf16.safetensors" in load_error(
        broken, components=["unet"], variant="bf16"
    )


def test_paths_that_are_no_checkpoint(broken):
    (broken / "sd.ckpt").touch()
    assert "is a single file" in load_error(broken / "sd.ckpt")
    for name in ("/no/such/folder", "./missing", "a/b/c", "no such name"):
        assert load_error(name).startswith(f"{name} is no folder")
    assert "lacks unet/config.json" in load_error(broken / "tokenizer")


@pytest.fixture
def index(tmp_path):
    torch_checkpoints.write_checkpoint(tmp_path, max_shard_size="40KB")
    return tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "name",
    ["../vae/x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "..", "", "x.bin", 7, None],
)  # fmt: skip
def test_index_names_only_files_of_its_folder(index, name):
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(content))
    assert f"names {name!r}, which is not a safetensors file of its own folder" in load_error(
        index.parent.parent
    )


def test_damaged_index(index):
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {}}))
    assert "has no weight_map" in load_error(index.parent.parent)
    index.write_text(
        json.dumps(
            {"weight_map": good["weight_map"] | {"ghost": good["weight_map"]["conv_in.bias"]}}
        )
    )
    assert "1 tensors that its shards do not hold, the first being ghost" in load_error(
        index.parent.parent
    )
    index.write_text(json.dumps(good))
    shard = index.parent / good["weight_map"]["conv_in.bias"]
    shutil.copy(shard, index.parent / good["weight_map"]["conv_out.bias"])
    assert "repeats tensor" in load_error(index.parent.parent)
    shard.unlink()
    assert f"{shard} is missing" in load_error(index.parent.parent)


def test_choice_between_unknown_variants(broken):
    for variant in ("ema", "non_ema"):
        shutil.copy(
            broken / UNET_FILE, broken / f"unet/diffusion_pytorch_model.{variant}.safetensors"
        )
    diffusers.load(broken)
    (broken / UNET_FILE).unlink()
    assert f"{broken / 'unet'} has weights in the variants ema, non_ema; choose" in load_error(
        broken
    )
    diffusers.load(broken, components=["unet"], variant="ema")
