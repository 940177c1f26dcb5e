"""The doctor: what it says of this machine and of sound, incomplete and damaged checkpoints."""

import dataclasses
import importlib.metadata
import json
import logging as python_logging
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import diffusers as torch_diffusers
import families
import grain
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_run
import torch
import torch_checkpoints
from absl import logging
from safetensors.torch import load_file, save_file
from test_checkpoints import hub  # noqa: F401
from tiny_model import quick_compile  # noqa: F401

from jaxpercept import PerceptionPipeline, cli, doctor
from jaxpercept.checkpoints import diffusers, orbax
from jaxpercept.checkpoints.load import load_model, resolve
from jaxpercept.errors import UserError
from jaxpercept.inference.stablehlo import save_stablehlo
from jaxpercept.models import attention
from jaxpercept.training.checkpointing import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compile", "restore_logging")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"tokens": 96, "heads": 2, "head_size": 8}


@pytest.fixture
def restore_logging():
    """A command sets up logging for the whole process."""
    handler = logging.get_absl_handler()
    root = python_logging.getLogger()
    before = logging.get_verbosity(), handler.formatter, list(handler.filters), list(root.handlers)
    yield
    logging.set_verbosity(before[0])
    handler.setFormatter(before[1])
    handler.filters[:], root.handlers[:] = before[2], before[3]


def door(*arguments: str) -> int:
    """Run the command as the shell would, in this process."""
    doctor.FLAGS.unparse_flags()
    argv = ["doctor", *arguments]
    return cli.call(doctor.main, argv, required=doctor.REQUIRED, flag_values=doctor.FLAGS)


def check(folder, **named):
    """The report on a checkpoint, which JSON can hold."""
    report = doctor.doctor(str(folder), **named)
    assert report["ok"] == (not report["problems"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    doctor.render(report)
    return report["checkpoint"]


# ---- the machine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(quick_compile):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(doctor._SHAPES, "cpu", SMALL)
        patch.setitem(doctor._SIDES, "cpu", 128)
        return doctor.doctor()


def test_machine(machine):
    report = machine["machine"]
    for name in ("jaxpercept", "jax", "orbax-checkpoint", "grain", "torch"):
        assert report["versions"][name] == importlib.metadata.version(name)
    assert report["jax"]["backend"] == "cpu"
    assert report["jax"]["processes"] == 1
    assert len(report["devices"]) == jax.device_count()
    assert report["host"]["cpus"] == len(os.sched_getaffinity(0))
    assert report["host"]["memory_bytes"] > report["host"]["free_memory_bytes"] > 0

    probes = {p["probe"]: p for p in report["attention"]}
    assert len(probes) == len(attention.IMPLEMENTATIONS) * 3
    exact = {"float32": (0, 1e-5), "float16": (1e-5, 5e-3), "bfloat16": (1e-4, 3e-2)}
    for dtype, (least, most) in exact.items():
        for name in ("auto", "chunked"):
            probe = probes[f"attention {name} {dtype}"]
            assert probe["works"], probe
            assert least < probe["deviation"] < most
            assert probe["milliseconds"] > 0
        assert probes[f"attention auto {dtype}"]["chosen"] == "chunked"
        assert not probes[f"attention cudnn {dtype}"]["works"]
        assert "cuDNN" in probes[f"attention cudnn {dtype}"]["error"]
    for dtype in ("float32", "bfloat16"):
        assert probes[f"attention xla {dtype}"]["works"]

    for probe in report["matmul"]:
        assert probe["works"]
        assert probe["tflops"] > 0
    assert report["matmul"][0]["native"]
    assert [probe["works"] for probe in report["others"]] == [True, True]
    assert machine["ok"]
    assert machine["problems"] == []
    json.dumps(machine, allow_nan=False)


def test_the_reference_is_torch_s(rng):
    inputs = [rng.standard_normal((1, 21, 3, 8), np.float32) for _ in range(4)]
    q, k, v, cotangent = (torch.tensor(x).transpose(1, 2) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = [out, *torch.autograd.grad(out, (q, k, v), cotangent)]
    for ours, theirs in zip(doctor._plain_attention(*inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().transpose(1, 2).numpy(), atol=1e-5)


def probe(name="chunked", dtype="float32"):
    inputs = doctor._attention_inputs(**SMALL)
    return doctor.probe_attention(name, dtype, inputs, doctor._plain_attention(*inputs))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda attend: lambda q, k, v, causal: attend(q, k, v, causal) * 1.01, "off by 0.0"),
        # The same value, another gradient.
        (lambda attend: lambda q, k, v, causal: attend(q, jax.lax.stop_gradient(k), v, causal),
         "off by 1 of"),
        (lambda attend: lambda q, k, v, causal: attend(q, k, v, causal) / 0, "not finite"),
        # Only the gradient of the values is NaN.
        (lambda attend: lambda q, k, v, causal: attend(q, k, v, causal) + jnp.sqrt(v - v),
         "not finite"),
        (lambda attend: lambda q, k, v, causal: jnp.linalg.inv(q), "must have shape"),
    ],
)  # fmt: skip
def test_a_broken_implementation_shows(monkeypatch, damage, error):
    assert probe()["works"]
    monkeypatch.setattr(attention, "_chunked_attention", damage(attention._chunked_attention))
    for name in ("chunked", "auto"):
        result = probe(name)
        assert not result["works"]
        assert result["required"]
        assert error in result["error"]
        json.dumps(result, allow_nan=False)
    assert probe("xla")["works"]


def test_what_fails_makes_the_command_fail(machine, monkeypatch, capsys):
    def broken(name, dtype, *_):
        fine = {"probe": f"{name} {dtype}", "works": True, "required": True, "error": None}
        return fine | ({} if name == "xla" else {"works": False, "error": "no kernel"})

    def sound(*_):
        return {"probe": "it", "works": True, "required": True, "error": None}

    monkeypatch.setitem(doctor._SHAPES, "cpu", SMALL)
    for name in ("probe_matmul", "probe_compile", "probe_workers"):
        monkeypatch.setattr(doctor, name, sound)
    monkeypatch.setattr(doctor, "probe_attention", broken)
    assert door() == 1
    out = capsys.readouterr().out
    assert "problem: auto bfloat16 does not work: no kernel." in out
    assert "xla" not in "".join(line for line in out.splitlines() if "problem" in line)

    monkeypatch.setattr(doctor, "examine_machine", lambda: machine["machine"])
    assert door("--json") == 0
    assert json.loads(capsys.readouterr().out) == machine
    assert door() == 0
    out = capsys.readouterr().out
    assert out.endswith("No problems.\n")
    start = out.index("attention\n")
    table = out[start : out.index("matmul\n")].splitlines()[1:14]
    assert table[0].split() == ["probe", "works", "required", "deviation", "milliseconds", "chosen"]
    column = table[0].index("required")
    assert {line[column : column + 3].strip() for line in table[1:]} == {"yes", "no"}


def test_a_machine_without_devices(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    report = doctor.doctor()
    assert report["problems"] == [
        "jax finds no device: Unable to initialize backend 'cuda': no driver."
    ]
    doctor.render(report)


def test_workers_that_do_not_start(monkeypatch):
    def fail(records, workers):
        raise OSError("no shared memory")

    monkeypatch.setattr(doctor, "prefetched", fail)
    assert doctor.probe_workers()["error"] == "no shared memory"
    monkeypatch.setattr(doctor, "prefetched", lambda records, workers: [{"number": 1}])
    assert doctor.probe_workers()["error"] == "they hand over [1]"

    end = threading.Event()
    monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
    monkeypatch.setattr(doctor, "prefetched", lambda records, workers: iter(end.wait, True))
    result = doctor.probe_workers()
    end.set()
    assert not result["works"]
    assert result["error"] == "no answer for 0 s"


def test_a_product_in_another_type_is_seen():
    def widened(x, y):
        return (x.astype(jnp.float32) @ y.astype(jnp.float32)).astype(x.dtype)

    # The sum in float32 and its rounding are no widened factors.
    native = """
ENTRY %main.1 (a.1: bf16[8,8], b.1: bf16[8,8]) -> bf16[8,8] {
  %a.1 = bf16[8,8]{1,0} parameter(0), metadata={op_name="a"}
  %b.1 = bf16[8,8]{1,0} parameter(1), metadata={op_name="b"}
  %dot.2 = f32[8,8]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %convert.1 = bf16[8,8]{1,0} convert(%dot.2)
}
"""
    assert not doctor._widens(native, "bfloat16")
    for dtype in ("bfloat16", "float16"):
        x = jnp.ones((8, 8), dtype)
        assert doctor._widens(jax.jit(widened).lower(x, x).compile().as_text(), dtype)
    x = jnp.ones((8, 8))
    assert not doctor._widens(jax.jit(widened).lower(x, x).compile().as_text(), "float32")


def test_cudnn_head_sizes(monkeypatch):
    def sound(*_):
        return {"probe": "it", "works": True, "required": True, "error": None}

    for name in ("probe_attention", "probe_matmul", "probe_compile", "probe_workers"):
        monkeypatch.setattr(doctor, name, sound)
    monkeypatch.setitem(doctor._SHAPES, "other", SMALL)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        attention, "_cudnn_compiles", lambda dtype, size: (dtype, size) != ("float16", 40)
    )
    sizes = doctor.doctor()["machine"]["cudnn_head_sizes"]
    assert sizes == {"bfloat16": [40, 64, 80], "float16": [64, 80]}


# ---- sound checkpoints ---------------------------------------------------------------------------


def test_the_built_in_checkpoint(capsys):
    before = len(jax.live_arrays())
    report = check("sd-tiny")
    assert len(jax.live_arrays()) == before
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


def refused_alike(folder, **named) -> str:
    """The sentence with which a checkpoint is refused, here as by the pipeline."""
    report = check(folder, **named)
    with pytest.raises(UserError) as error:
        PerceptionPipeline.from_pretrained(folder, **named)
    assert report["pipeline"]["reason"] == str(error.value)
    assert not report["pipeline"]["runs"]
    return str(error.value)


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


# ---- damaged diffusers folders -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    families.FAMILIES["marigold_depth_v1_1"](folder)
    return folder


@pytest.fixture
def broken(sound, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


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


# ---- what this package writes --------------------------------------------------------------------


def test_an_orbax_export(tmp_path, rng):
    folder = tiny_model.save(tmp_path / "export", rng)
    report = check(folder)
    assert report["kind"] == "Orbax export"
    assert report["problems"] == report["unused_files"] == []
    description, params = load_model(str(folder))
    assert report["components"].keys() == params.keys() == {"unet", "vae", "prompt"}
    for name, weights in params.items():
        assert report["components"][name]["tensors"] == len(weights)
        assert report["components"][name]["bytes"] == sum(w.nbytes for w in weights.values())
    plan = report["pipeline"]
    assert plan["runs"]
    assert (plan["family"], plan["task"], plan["timesteps"]) == ("genpercept", "depth", [1])
    assert plan["processing_resolution"] == max(description.resolution)
    assert "leave --task out" in refused_alike(folder, task="normals")

    params["unet"]["conv_in.kernel"][0, 0] = np.nan
    params["prompt"]["embedding"][0, 0, :3] = np.inf
    del params["vae"]["quant_conv.bias"]
    params["vae"]["extra.bias"] = np.ones(2, np.float32)
    params["vae"]["encoder.conv_in.bias"] = np.ones(3, np.float32)
    orbax.save_params(folder / orbax.WEIGHTS, params)
    parts = check(folder)["components"]
    assert parts["unet"]["non_finite"] == {"conv_in.kernel": {"nan": 32, "infinite": 0}}
    assert parts["prompt"]["non_finite"] == {"embedding": {"nan": 0, "infinite": 3}}
    assert parts["vae"]["missing"] == ["quant_conv.bias"]
    assert parts["vae"]["unexpected"] == ["extra.bias"]
    assert parts["vae"]["misshaped"] == ["encoder.conv_in.bias [3] instead of [8]"]

    orbax.save_params(folder / orbax.WEIGHTS, {k: v for k, v in params.items() if k != "prompt"})
    assert "lacks prompt" in check(folder)["pipeline"]["reason"]
    for content in ("[1]", '{"format": 99}'):
        (folder / "jaxpercept.json").write_text(content)
        assert "jaxpercept.json" in check(folder)["problems"][0]
    (folder / "jaxpercept.json").unlink()
    report = check(folder)
    assert "which says what the model is" in "".join(report["problems"])
    assert report["components"]["unet"]["tensors"] == len(params["unet"])


def test_arrays_that_cannot_be_read_are_named(tmp_path, rng):
    folder = tiny_model.save(tmp_path / "export", rng)
    files = [path for path in (folder / orbax.WEIGHTS).rglob("d/*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()
    report = check(folder)
    parts = report["components"].values()
    lost = [problem for part in parts for problem in part["problems"]]
    assert lost
    assert all("cannot be read" in problem for problem in lost)
    assert sum(part["tensors"] for part in parts) + len(lost) == 289
    assert report["problems"] == [
        f"{name}: {problem}"
        for name, part in report["components"].items()
        for problem in part["problems"]
    ]
    assert not report["pipeline"]["runs"]


def test_a_damaged_index_of_arrays_is_one_sentence(tmp_path, rng, capfd):
    folder = tiny_model.save(tmp_path / "export", rng)
    for file in (folder / orbax.WEIGHTS / "d").iterdir():
        file.unlink()
    report = check(folder)
    assert len(report["problems"]) == 1
    assert "holds no complete Orbax checkpoint" in report["problems"][0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_training_workdir(tmp_path, rng):
    base, workdir = tiny_run.base(tmp_path / "base"), tmp_path / "run"
    description, params = load_model(str(base))
    checkpoints = Checkpoints(workdir, keep=3)
    description.save(workdir)
    # A run that trains a part of the UNet.
    trained = {"unet": {k: v for k, v in params["unet"].items() if "up_blocks" in k}}
    total = len(params["unet"])
    params["unet"] = {k: v for k, v in params["unet"].items() if "up_blocks" not in k}
    orbax.save_params(workdir / "frozen", params)

    class Position(grain.DatasetIterator):
        def __next__(self):
            raise StopIteration

        def get_state(self):
            return {"next_example": 0}

        def set_state(self, state):
            pass

    for step in (3, 12):
        state = {"params": jax.tree.map(jnp.asarray, trained), "step": jnp.int32(step)}
        checkpoints.save(step, state, Position())
    checkpoints.close()
    (workdir / "metrics.jsonl").touch()
    (workdir / "checkpoints/20.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints/13").mkdir()
    report = check(workdir)
    assert report["kind"] == "training workdir"
    assert (report["newest_step"], report["steps"]) == (12, [3, 12])
    assert report["problems"] == report["unused_files"] == []
    assert "checkpoints/13 is a save that was not finished" in report["warnings"][0]
    assert "20.orbax-checkpoint-tmp" in report["warnings"][1]
    assert report["pipeline"]["runs"]
    assert report["components"].keys() == {"unet", "vae", "prompt"}
    assert report["components"]["unet"]["files"] == ["frozen", "checkpoints/12/params"]
    assert report["components"]["unet"]["tensors"] == total
    assert report["components"]["vae"]["files"] == ["frozen"]

    (workdir / "checkpoints/12/params/_METADATA").unlink()
    report = check(workdir)
    assert "remove it where a run has an earlier one" in report["problems"][0]
    assert report["components"]["vae"]["problems"] == []
    shutil.rmtree(workdir / "checkpoints")
    assert "holds no finished checkpoint yet" in check(workdir)["problems"][0]


def test_a_stablehlo_export(tmp_path, rng, monkeypatch):
    # jax writes programs with the package flatbuffers, which is not everywhere.
    kept = {}

    def serialize(self):
        kept[b"program"] = self
        return b"program"

    monkeypatch.setattr(jax.export.Exported, "serialize", serialize)
    monkeypatch.setattr(jax.export, "deserialize", lambda content: kept[bytes(content)])
    folder = tmp_path / "program"
    description = tiny_model.description()
    save_stablehlo(folder, description, tiny_model.params(rng), size=(32, 48))
    description.save(folder)
    report = check(folder)
    assert report["kind"] == "StableHLO export"
    assert report["problems"] == report["unused_files"] == []
    assert report["pipeline"]["role"] == "program"
    assert report["components"].keys() == {"unet", "vae", "prompt"}

    def change(tensors):
        tensors["vae/quant_conv.bias"][1] = np.nan
        tensors["unet/conv_in.bias"] = torch.ones(3)

    edit(folder / "weights.safetensors", change)
    parts = check(folder)["components"]
    assert parts["vae"]["non_finite"] == {"quant_conv.bias": {"nan": 1, "infinite": 0}}
    assert parts["unet"]["misshaped"] == ["conv_in.bias [3] instead of [8]"]
    (folder / "model.stablehlo").write_bytes(b"progr")
    assert "model.stablehlo cannot be read" in check(folder)["problems"][0]

    def deserialize(content):
        raise ImportError("Please install 'flatbuffers'")

    monkeypatch.setattr(jax.export, "deserialize", deserialize)
    report = check(folder)
    assert "'flatbuffers'" in report["warnings"][0]
    assert [problem.partition(":")[0] for problem in report["problems"]] == ["vae"]


def test_a_diffusers_folder_with_a_description(tmp_path):
    """As convert writes it of a one-step model: the description says what it predicts."""
    torch_checkpoints.write_checkpoint(tmp_path)
    components = diffusers.read_configs(tmp_path).configs
    tiny_model.description(components=components).save(tmp_path)
    report = check(tmp_path)
    assert report["kind"] == "diffusers folder"
    assert report["pipeline"]["runs"]
    assert report["pipeline"]["family"] == "genpercept"
    assert report["problems"] == report["unused_files"] == []


def test_help_teaches(capsys):
    assert door("--help") == 0
    text = capsys.readouterr().out
    assert "python -m jaxpercept.doctor --checkpoint=" in text
    for name in doctor.OWN_FLAGS:
        assert f"--{name}: " in text
