"""What the doctor says of this machine, sound and broken."""

import importlib.metadata
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkup import door, restore_logging  # noqa: F401

from jaxpercept import doctor
from jaxpercept.diagnosis import probes
from jaxpercept.models import attention

pytestmark = pytest.mark.usefixtures("restore_logging")

SMALL = {"tokens": 96, "heads": 2, "head_size": 8}


@pytest.fixture(scope="module")
def machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(probes._SHAPES, "cpu", SMALL)
        patch.setitem(probes._SIDES, "cpu", 128)
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
    for ours, theirs in zip(probes.plain_attention(*inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().transpose(1, 2).numpy(), atol=1e-5)


def probe(name="chunked", dtype="float32"):
    inputs = probes.attention_inputs(**SMALL)
    return probes.probe_attention(name, dtype, inputs, probes.plain_attention(*inputs))


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

    monkeypatch.setitem(probes._SHAPES, "cpu", SMALL)
    for name in ("probe_matmul", "probe_compile", "probe_workers"):
        monkeypatch.setattr(probes, name, sound)
    monkeypatch.setattr(probes, "probe_attention", broken)
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

    monkeypatch.setattr(probes, "prefetched", fail)
    assert probes.probe_workers()["error"] == "no shared memory"
    monkeypatch.setattr(probes, "prefetched", lambda records, workers: [{"number": 1}])
    assert probes.probe_workers()["error"] == "they hand over [1]"

    end = threading.Event()
    monkeypatch.setattr(probes, "_PATIENCE", 0.1)
    monkeypatch.setattr(probes, "prefetched", lambda records, workers: iter(end.wait, True))
    result = probes.probe_workers()
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
    assert not probes._widens(native, "bfloat16")
    for dtype in ("bfloat16", "float16"):
        x = jnp.ones((8, 8), dtype)
        assert probes._widens(jax.jit(widened).lower(x, x).compile().as_text(), dtype)
    x = jnp.ones((8, 8))
    assert not probes._widens(jax.jit(widened).lower(x, x).compile().as_text(), "float32")


def test_cudnn_head_sizes(monkeypatch):
    def sound(*_):
        return {"probe": "it", "works": True, "required": True, "error": None}

    for name in ("probe_attention", "probe_matmul", "probe_compile", "probe_workers"):
        monkeypatch.setattr(probes, name, sound)
    monkeypatch.setitem(probes._SHAPES, "other", SMALL)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        attention, "_cudnn_compiles", lambda dtype, size: (dtype, size) != ("float16", 40)
    )
    sizes = doctor.doctor()["machine"]["cudnn_head_sizes"]
    assert sizes == {"bfloat16": [40, 64, 80], "float16": [64, 80]}
