"""What a result was made with: versions, the host, the revision of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("jaxpercept", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PACKAGES += ("transformers",)
# Listed where they are installed.
_OPTIONAL = ("diffusers", "torch", "jax-cuda12-plugin", "jax-cuda13-plugin")
_OPTIONAL += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu")


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


def revision() -> str | None:
    """The git commit of the package's checkout, with "+" where it was changed since.

    None where it is no checkout, as once installed, or git is not there.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A checkout of something else may hold an installed package.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
