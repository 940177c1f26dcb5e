"""What the benchmarks share: networks with equal random weights, timing, memory, tables.

torch and diffusers are imported where they are used, so that the process in which jaxpercept's
memory is measured holds neither.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks, one GPU

import jax
import jax.numpy as jnp
import numpy as np

from jaxpercept.checkpoints import rules
from jaxpercept.checkpoints.load import describe
from jaxpercept.methods.latent_model import LatentModel
from jaxpercept.models.config import AutoencoderTinyConfig, UNetConfig, VAEConfig
from jaxpercept.models.functional import functional

FRAMEWORKS = ("jaxpercept", "torch")
SD_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
SD21_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
NETWORKS = {
    "sd21": {"unet": SD21_UNET, "vae": SD_VAE},
    "sd15": {"unet": {"attention_head_dim": 8, "cross_attention_dim": 768}, "vae": SD_VAE},
    # SD 2.1's structure, heads of 64 channels included, with 55 M parameters and with 20.
    "50m": {
        "unet": SD21_UNET
        | {"block_out_channels": [64, 128, 320, 320], "attention_head_dim": [1, 2, 5, 5]},
        "vae": SD_VAE,
    },
    "20m": {
        "unet": SD21_UNET
        | {"block_out_channels": [32, 64, 160, 160], "attention_head_dim": [1, 2, 5, 5]},
        "vae": SD_VAE | {"block_out_channels": [32, 64, 128, 128]},
    },
}
"""The config.json of each; those of "tiny" are sd-tiny's."""
PROMPT_TOKENS = 2  # the empty prompt, not padded: start and end


# ---- the same networks twice ---------------------------------------------------------------------


def configs(size: str, tiny_decoder: bool = False, **unet: Any) -> dict[str, Any]:
    """The configs of the networks of a size; unet: changes of its config."""
    networks = NETWORKS.get(size) or {
        part: describe("sd-tiny").components[part].to_dict() for part in ("unet", "vae")
    }
    vae = VAEConfig.from_dict(networks["vae"])
    found = {"unet": UNetConfig.from_dict(networks["unet"] | unet), "vae": vae}
    return found | ({"decoder": AutoencoderTinyConfig.beside(vae)} if tiny_decoder else {})


def jax_model(size: str, dtype: str, remat: str = "none", **options: Any) -> LatentModel:
    """jaxpercept's networks, without weights; options: those of `configs`."""
    networks = configs(size, **options)
    return LatentModel(
        **{k: functional(config, dtype=dtype, remat=remat) for k, config in networks.items()},
        text_encoder=None,
        schedule=None,
    )


def torch_model(size: str, **options: Any) -> dict[str, Any]:
    """diffusers' networks in float32 with random weights, norms and biases included."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    use_torch_threads()
    generator = torch.Generator().manual_seed(0)
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "decoder": AutoencoderTiny}
    modules = {}
    for part, config in configs(size, **options).items():
        with torch.device("meta"):
            module = classes[part].from_config(config.to_dict())
        modules[part] = module.to_empty(device="cpu").eval()
        for name, weight in modules[part].named_parameters():
            # Activations stay of order one: normal kernels with std 1 / sqrt(fan_in).
            noise = weight.data.normal_(generator=generator)
            if weight.ndim > 1:
                noise /= weight[0].numel() ** 0.5
            else:
                noise *= 0.1
                noise += "norm" in name and name.endswith("weight")
    return modules


def jax_weights(
    model: LatentModel, modules: Mapping[str, Any] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """The weights of torch modules by the package's own rules; random ones without modules."""
    params = {}
    for part in ("unet", "vae", *(["decoder"] if model.decoder else [])):
        network = getattr(model, part)
        if modules is None:
            params[part] = network.init(0)
        else:
            tensors = {k: t.detach().numpy() for k, t in modules[part].state_dict().items()}
            params[part] = rules.to_jax(network.shapes, tensors)
    return {**params, "prompt": {"embedding": prompt(model)}}


def prompt(model: LatentModel) -> np.ndarray:
    """A random embedding of the empty prompt, [1, 2, d]."""
    width = model.unet.config.per_level("cross_attention_dim")[0]
    return np.random.default_rng(1).standard_normal((1, PROMPT_TOKENS, width), np.float32)


def put(params: Any, dtype: str) -> Any:
    """Weights of {component: {path: array}} to the device, the host's copies given up one by one.

    `dtype`: what they are kept in on the device.
    """
    for weights in params.values():
        for path in weights:
            weights[path] = jnp.array(weights[path], jnp.dtype(dtype))
    return jax.block_until_ready(params)


def to_numpy(x: Any) -> np.ndarray:
    """Any array as float32 NHWC; a torch tensor of rank 4 is NCHW."""
    if isinstance(x, jax.Array | np.ndarray):
        return np.asarray(x, np.float32)
    array = x.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


# ---- command line --------------------------------------------------------------------------------


def parser(description: str, sizes: Sequence[str]) -> argparse.ArgumentParser:
    """The options that both comparisons have. The first size is the default."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--size", choices=sizes, default=sizes[0], help="the networks")
    p.add_argument("--resolution", type=int, nargs="+", help="sides of square images in pixels")
    p.add_argument("--batch", type=int, default=1, help="images at a time")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="for both frameworks")
    p.add_argument("--repeats", type=int, default=5, help="timed runs of each framework, in turns")
    p.add_argument("--compile", action="store_true", help="time torch.compile too")
    p.add_argument("--channels-last", action="store_true", help="torch in its NHWC memory format")
    p.add_argument("--no-memory", action="store_true", help="skip the memory of single processes")
    p.add_argument("--output", type=Path, help="write all figures here, as JSON")
    p.add_argument("--memory-of", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    return p


def threads() -> int:
    """Cores this process may use, as XLA counts them: `taskset` limits both frameworks."""
    return len(os.sched_getaffinity(0))


def use_torch_threads() -> None:
    """Give torch the cores that XLA takes."""
    import torch

    torch.set_num_threads(threads())


def use_device(device: str) -> None:
    """Call before anything computes. float32 is allowed TF32 on a GPU in both frameworks."""
    jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda")


def torch_device(device: str) -> str:
    """torch's name of the device, checked, TF32 switched on."""
    import torch

    if device == "gpu":
        if not torch.cuda.is_available():
            sys.exit("this torch sees no CUDA device: install a CUDA build, or use --device cpu.")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return "cpu" if device == "cpu" else "cuda"


# ---- timing --------------------------------------------------------------------------------------


def interleave(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in turns, every second round backwards.

    A call must wait for its result. What disturbs the machine meanwhile disturbs all alike.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            gc.collect()
            began = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - began)
    return times


def times_row(label: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A row of the table: least and median seconds of each, and jaxpercept's share of torch's."""
    row: dict[str, Any] = {"": label}
    for name, values in times.items():
        row[f"{name} s"] = f"{min(values):.4g} / {median(values):.4g}"
    for name in times:
        if name != FRAMEWORKS[0]:
            least, middle = (f(times[FRAMEWORKS[0]]) / f(times[name]) for f in (min, median))
            row[f"ratio to {name}"] = f"{least:.2f} / {middle:.2f}"
    return row


# ---- memory --------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], Any], framework: str, device: str) -> dict[str, float]:
    """MiB held at most while `call` runs for the second time: `peak`, and `before` it.

    CPU: resident memory of the whole process, from the kernel's high-water mark (VmHWM), which is
    set back before the call. It holds libraries, weights and, of jaxpercept, the compiled program,
    but not what compiling took. GPU: the framework's own count of what it allocated.
    """
    call()
    gc.collect()
    if device == "gpu":
        return _gpu_memory(call, framework)
    ctypes.CDLL(None).malloc_trim(0)  # what the first call gave back counts no more
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return {"before": before, "peak": _status("VmHWM")}


def _gpu_memory(call: Callable[[], Any], framework: str) -> dict[str, float]:
    mib = 2**20
    if framework == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return {"before": before / mib, "peak": torch.cuda.max_memory_allocated() / mib}
    before = jax.devices()[0].memory_stats()["bytes_in_use"]
    call()
    # Cannot be set back: the choice of kernels while compiling counts as well.
    return {
        "before": before / mib,
        "peak": jax.devices()[0].memory_stats()["peak_bytes_in_use"] / mib,
    }


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def in_child(framework: str, resolution: int) -> dict[str, dict[str, float]]:
    """Run this very command in a new process that only measures the memory of one framework.

    A later --resolution takes the place of an earlier one. The child's last line is JSON.
    """
    own = [*sys.argv, "--resolution", str(resolution), "--memory-of", framework]
    done = subprocess.run([sys.executable, *own], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_rows(peaks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, str]]:
    """Rows of {framework: {label: peak_memory}}: MiB at most, and how much the call added."""
    rows = []
    for label in peaks[FRAMEWORKS[0]]:
        ours, theirs = (peaks[name][label] for name in FRAMEWORKS)
        row = {"": label}
        for name, p in zip(FRAMEWORKS, (ours, theirs), strict=True):
            row[f"{name} MiB"] = f"{p['peak']:.0f} (+{p['peak'] - p['before']:.0f})"
        row["ratio to torch"] = f"{ours['peak'] / theirs['peak']:.2f}"
        rows.append(row)
    return rows


# ---- reports -------------------------------------------------------------------------------------


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """A Markdown table; the first row's keys are the heading."""
    lines = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)) + " |")
    print(flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((s.split(": ", 1)[1] for s in lines if s.startswith("model name")), cpu)
    return {
        "device": jax.devices()[0].device_kind if device == "gpu" else cpu,
        "threads": threads(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "diffusers")},
    }


def finish(results: dict[str, Any], output: Path | None) -> None:
    """Name the machine and write the JSON file, if one is asked for."""
    print(json.dumps(results["machine"]))
    if results["machine"]["load"] > threads() + 1:
        print("Other programs kept this machine busy: the figures say little.")
    if output:
        output.write_text(json.dumps(results, indent=1, default=str) + "\n")
