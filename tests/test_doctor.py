"""The doctor's command, and what it says of sound and of incomplete checkpoints."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers as torch_diffusers
import families
import jax
import pytest
import torch_checkpoints
from checkup import WEIGHTS, check, door, refused_alike, restore_logging  # noqa: F401
from safetensors.torch import load_file
from test_checkpoints import hub  # noqa: F401

from jaxpercept import doctor
from jaxpercept.checkpoints.load import resolve

pytestmark = pytest.mark.usefixtures("restore_logging")


def test_help_teaches(capsys):
    assert door("--help") == 0
    text = capsys.readouterr().out
    assert "python -m jaxpercept.doctor --checkpoint=" in text
    for name in doctor.OWN_FLAGS:
        assert f"--{name}: " in text


def test_the_built_in_checkpoint(capsys):
    before = len(jax.live_arrays())
    report = check("sd-tiny")
    assert len(jax.live_arrays()) <= before  # garbage of other tests may be gone
    assert report["kind"] == "diffusers folder"
    assert report["unused_files"] == report["warnings"] == report["problems"] == []
    folder = Path(resolve("sd-tiny"))
    for name, stem in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        part, tensors = report["components"][name], load_file(folder / name / stem)
        assert part["tensors"] == len(tensors)
        assert part["parameters"] == sum(t.numel() for t in tensors.values())
        assert part["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert part["dtypes"] == {"float16": len(tensors)}
        assert part["files"] == [f"{name}/config.json", f"{name}/{stem}"]
    unet = report["components"]["unet"]["architecture"]
    assert (unet["class"], unet["levels"]) == ("UNet2DConditionModel", 3)
    assert report["scheduler"]["zero_snr"]
    assert report["tokenizer"]["tokens"] == 1024
    assert report["pipeline"]["role"] == "text-to-image model"
    assert not report["pipeline"]["runs"]
    assert "fine-tune it" in report["pipeline"]["reason"]

    assert door("--checkpoint=sd-tiny", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == report
    assert door("--checkpoint=sd-tiny") == 0
    out = capsys.readouterr().out
    assert "4,614,924" in out
    assert "float16: 326" in out
    assert door("--checkpoint=sd-tiny", "--task=depth") == 1
    assert "may be a text-to-image model" in capsys.readouterr().out
    assert door("--task=depth") == 1
    assert capsys.readouterr().err.startswith("error: --task is about a checkpoint")


def test_torch_stays_out():
    code = "from jaxpercept.doctor import doctor; doctor('sd-tiny'); import sys; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@dataclasses.dataclass
class Expected:
    """What a family's checkpoint should be said to do; None: as torch's scheduler does."""

    starts_from: str
    unet_inputs: dict[str, int]
    timesteps: list[int] | None
    ensemble: bool
    named: dict[str, str] = dataclasses.field(default_factory=dict)
    resolution: int = families.RESOLUTION
    decoded: str = "the last x_0"
    decoder: str = "vae"


NOISE = {"starts_from": "noise", "ensemble": True, "decoded": "the last sample"}
EXPECTED = {
    "marigold_depth_v1_0": Expected(**NOISE, unet_inputs={"image": 4, "x": 4}, timesteps=None),
    "marigold_depth_v1_0_old": Expected(
        **NOISE, unet_inputs={"image": 4, "x": 4}, timesteps=None, resolution=768
    ),
    "marigold_depth_lcm": Expected(**NOISE, unet_inputs={"image": 4, "x": 4}, timesteps=None),
    "marigold_iid_lighting": Expected(**NOISE, unet_inputs={"image": 4, "x": 12}, timesteps=None),
    "genpercept_bare_depth": Expected("image", {"x": 4}, [1], False, resolution=768),
    "genpercept_dpt_disparity": Expected(
        *("image", {"x": 4}, [1], False),
        resolution=768,
        decoded="the UNet's features",
        decoder="DPT head",
    ),
    "rgb_blending": Expected("image", {"x": 4}, None, False),
    "e2e_ft_depth_rgb": Expected(
        "zeros", {"image": 4}, [999], False, {"family": "e2e_ft"}, resolution=768
    ),
    "lotus_g_normals": Expected("noise", {"image": 4, "x": 4}, [999], True, resolution=768),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_families(name, tmp_path):
    family, expected = families.FAMILIES[name](tmp_path / "checkpoint"), EXPECTED[name]
    named = dict(expected.named)
    if family.base_folder is not None:
        named["base"] = str(family.base_folder)
    if family.needs_task:
        assert refused_alike(family.folder, **named)
        named["task"] = family.task
    report = check(family.folder, **named)
    assert report["problems"] == report["warnings"] == []
    plan = report["pipeline"]
    assert (plan["role"], plan["runs"]) == ("perception model", True)
    assert plan["family"] == family.method.replace("dpt", "genpercept")
    assert plan["task"] == family.task
    for key in ("starts_from", "unet_inputs", "ensemble", "decoded", "decoder"):
        assert plan[key] == getattr(expected, key)
    assert plan["processing_resolution"] == expected.resolution
    timesteps = expected.timesteps
    if timesteps is None:
        index = json.loads((family.folder / "model_index.json").read_text())
        kind = getattr(torch_diffusers, index["scheduler"][1])
        scheduler = kind.from_pretrained(family.folder / "scheduler")
        # The old index says no number; the authors' is 10.
        scheduler.set_timesteps(index.get("default_denoising_steps", 10))
        timesteps = scheduler.timesteps.tolist()
    assert plan["timesteps"] == timesteps
    assert plan["steps"] == len(timesteps)
    modules = {"dpt_head": "head"}
    for torch_name, module in family.modules.items():
        part = report["components"][modules.get(torch_name, torch_name)]
        # The published text tower and the networks have no other parameters.
        assert part["parameters"] == sum(p.numel() for p in module.parameters())
    with_text = family.base_folder or family.folder
    assert report["components"]["text_encoder"]["source"] == str(with_text)


def test_what_must_be_named(tmp_path):
    bare = families.FAMILIES["genpercept_bare_depth"](tmp_path / "bare")
    assert "--base" in refused_alike(bare.folder, task="depth")
    shutil.copytree(bare.folder.parent / "vae", tmp_path / "base/vae")
    sentence = refused_alike(bare.folder, base=str(tmp_path / "base"))
    assert "holds no text_encoder: give a complete one" in sentence
    assert check(bare.folder)["problems"] == [check(bare.folder)["pipeline"]["reason"]]

    base = bare.base_folder
    assert "fine-tune it with" in refused_alike(base)
    assert "--family" in refused_alike(base, task="depth")
    assert "input channels" in refused_alike(base, task="depth", family="marigold")
    assert "unknown" in refused_alike(base, task="depth", family="midas")
    assert "holds no UNet" in refused_alike(bare.folder.parent, base=str(base))


def test_networks_of_two_versions_of_stable_diffusion(tmp_path):
    torch_checkpoints.write_checkpoint(tmp_path / "base")
    narrow = torch_checkpoints.unet("sd2", cross_attention_dim=16)
    narrow.save_pretrained(tmp_path / "unet_depth")
    named = {"base": str(tmp_path / "base"), "task": "depth"}
    sentence = refused_alike(tmp_path / "unet_depth", **named)
    assert " 32 channels" in sentence
    assert " 16: " in sentence
    assert check(tmp_path / "unet_depth", **named)["problems"] == [sentence]


def test_an_autoencoder_alone(tmp_path):
    torch_checkpoints.vae().save_pretrained(tmp_path)
    report = check(tmp_path)
    assert report["kind"] == "autoencoder folder"
    assert report["problems"] == []
    assert list(report["components"]) == ["vae"]
    assert "--vae" in report["pipeline"]["reason"]


def test_a_hub_id(hub):  # noqa: F811
    families.FAMILIES["marigold_depth_v1_1"](hub.remote)
    (hub.remote / "unet/diffusion_pytorch_model.bin").touch()
    report = check("owner/model")
    assert report["pipeline"]["runs"]
    assert report["folder"] == str(hub.cache)
    assert not list(hub.cache.rglob("*.bin"))
    shutil.rmtree(hub.remote / "vae")
    shutil.rmtree(hub.cache)
    assert "holds no vae" in check("owner/model")["problems"][0]


def test_nothing_there(tmp_path):
    (tmp_path / "sd.ckpt").touch()
    for source, sentence in [
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "sd.ckpt", "is a single file"),
        (tmp_path / "no", "is no folder"),
    ]:
        report = check(source)
        assert report["kind"] is None
        assert len(report["problems"]) == 1
        assert sentence in report["problems"][0]
