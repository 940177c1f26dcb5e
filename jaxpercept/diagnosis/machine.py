"""Versions, devices and memory of this machine, and what of the package works on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jaxpercept.diagnosis import probes
from jaxpercept.diagnosis.text import first_line
from jaxpercept.environment import host, versions


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
