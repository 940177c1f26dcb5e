"""Versions, devices and memory of this machine, and what of the package works on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxpercept.diagnosis import probes
from jaxpercept.diagnosis.text import first_line

_PACKAGES = ("jaxpercept", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PACKAGES += ("transformers",)
# Listed where they are installed.
_OPTIONAL = ("diffusers", "torch", "jax-cuda12-plugin", "jax-cuda13-plugin")
_OPTIONAL += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")


def examine_machine() -> dict[str, Any]:
    """Versions and devices, and what works here."""
    report: dict[str, Any] = {"versions": versions(), "host": host()}
    try:
        report["devices"] = [_device(device) for device in jax.devices()]
    except RuntimeError as error:  # no driver, or a platform asked for that is not there
        reason = first_line(error)
        return {**report, "warnings": [], "problems": [f"jax finds no device: {reason}."]}
    backend = jax.default_backend()
    report["jax"] = {
        "backend": backend,
        "runtime": first_line(jax.devices()[0].client.platform_version),
        "processes": jax.process_count(),
        "compilation_cache": jax.config.jax_compilation_cache_dir or "off",
    }
    warnings = []
    if backend == "cpu" and Path("/proc/driver/nvidia/version").exists():
        warnings.append(
            "There is an NVIDIA driver, but jax works on the CPU: pip install 'jaxpercept[cuda]'."
        )
    report |= probes.probe_all()
    if backend == "gpu":
        report["cudnn_head_sizes"] = probes.cudnn_head_sizes()
    problems = [
        f"{probe['probe']} does not work: {probe['error']}."
        for probe in (*report["attention"], *report["matmul"], *report["others"])
        if probe["required"] and not probe["works"]
    ]
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


def host() -> dict[str, Any]:
    """The system, its processors and its memory in bytes; None where it does not say."""

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
