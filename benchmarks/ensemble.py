"""Merging ensembles beside diffusers' Marigold pipelines.

    python benchmarks/ensemble.py
    python benchmarks/ensemble.py --resolution 768 --members 10 --repeats 3

One image, float32, on CPUs. Depth in closed form is compared with diffusers' search, for which it
stands in. `--threads-of-torch 1` spares torch's threads, which wait for each other at each of the
search's thousands of small operations, on a machine that does other work, too.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from jaxpercept.inference.ensemble import ensemble

WAYS = {
    "depth, diffusers' search": ("affine", {"alignment": "diffusers"}),
    "depth, closed form": ("affine", {"alignment": "closed_form"}),
    "normals, closest": ("normals", {"reduction": "closest"}),
    "intrinsics, median": ("average", {"reduction": "median"}),
}


def members(kind: str, count: int, resolution: int) -> np.ndarray:
    """[1, e, h, w, c]: a wavy surface with scales, shifts and noise, or its noisy normals."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:resolution, 0:resolution] / resolution
    surface = 0.5 + 0.2 * (np.sin(7 * x + 2 * y) + np.cos(5 * y - x))
    noise = rng.normal(0, 0.02, (count, resolution, resolution, 3))
    if kind == "affine":
        scale, shift = (
            rng.normal(0.9, 0.05, (count, 1, 1, 1)),
            rng.normal(0.05, 0.02, (count, 1, 1, 1)),
        )
        return np.clip(scale * surface[..., None] + shift + noise[..., :1], 0, 1)[None]
    if kind == "average":
        return np.clip(surface[..., None] + noise, 0, 1)[None]
    slopes = np.stack([*np.gradient(-surface, 1 / resolution), np.ones_like(surface)], axis=-1)
    normals = slopes + 5 * noise
    return (normals / np.linalg.norm(normals, axis=-1, keepdims=True))[None]


def ours(kind: str, options: dict[str, Any], maps: np.ndarray) -> Callable[[], Any]:
    array = jax.device_put(maps)
    return lambda: jax.block_until_ready(ensemble(kind, array, **options))


def theirs(kind: str, maps: np.ndarray) -> Callable[[], Any]:
    """diffusers' defaults; its members are the first axis."""
    import torch
    from diffusers import MarigoldDepthPipeline, MarigoldIntrinsicsPipeline, MarigoldNormalsPipeline

    functions = {
        "affine": MarigoldDepthPipeline.ensemble_depth,
        "normals": MarigoldNormalsPipeline.ensemble_normals,
        "average": MarigoldIntrinsicsPipeline.ensemble_intrinsics,
    }
    x = torch.from_numpy(np.ascontiguousarray(maps[0].transpose(0, 3, 1, 2)))
    x = x[:, None] if kind == "average" else x
    return functools.partial(functions[kind], x, output_uncertainty=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--resolution", type=int, nargs="+", default=[256, 768], help="square images")
    p.add_argument("--members", type=int, nargs="+", default=[4, 10], help="of an ensemble")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each, in turns")
    p.add_argument("--threads-of-torch", type=int, help="all cores by default")
    p.add_argument("--output", type=Path, help="write all figures here, as JSON")
    args = p.parse_args()
    common.use_device("cpu")
    common.use_torch_threads()
    if args.threads_of_torch:
        import torch

        torch.set_num_threads(args.threads_of_torch)
    warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's line search in diffusers' call.
    results: dict[str, Any] = {"machine": common.machine("cpu"), "seconds": {}}
    rows = []
    for resolution in args.resolution:
        for count in args.members:
            for name, (kind, options) in WAYS.items():
                maps = members(kind, count, resolution).astype(np.float32)
                calls = {"jaxpercept": ours(kind, options, maps), "torch": theirs(kind, maps)}
                times = common.interleave(calls, args.repeats)
                label = f"{resolution} px, {count} members: {name}"
                results["seconds"][label] = times
                rows.append(common.times_row(label, times))
    common.print_table(rows)
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
