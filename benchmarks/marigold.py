"""Marigold depth: PerceptionPipeline beside diffusers' MarigoldDepthPipeline, same random weights.

    python benchmarks/marigold.py                             # SD 2.1; 1 and 4 steps; 256, 512 px
    python benchmarks/marigold.py --channels-last             # torch in its NHWC memory format
    python benchmarks/marigold.py --small --ensemble 10       # 20 M parameters at 128 px
    python benchmarks/marigold.py --size tiny --resolution 64 --repeats 2         # in a minute

Timed is the whole call of each pipeline, from a uint8 image to its prediction, with the same noise
to start from. What published checkpoints hold beside the random weights is that of Marigold 1.1:
DDIM with zero terminal SNR. The empty prompt's embedding, two random tokens, is given to both, so
that neither needs a text tower. torch is eager, in float32.

`--ensemble N` merges N predictions of the image: N calls of one row and one call of N rows, aligned
by diffusers' search or in closed form; diffusers always searches. The search magnifies rounding
errors (see `jaxpercept.inference.ensemble`), so there the members' latents say whether both
pipelines compute the same.

"compile s" is the first call less the median one; what an earlier row compiled does not come again.

Weights are made by torch and go through `jaxpercept.checkpoints.rules`: both copies together take
8 GB for SD 2.1. Wants the extra `torch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import jax
import numpy as np
from common import FRAMEWORKS

from jaxpercept import PerceptionPipeline
from jaxpercept.checkpoints.description import Description
from jaxpercept.methods.families import recognise

LIMIT = 1e-4
"""Predictions, or an ensemble's latents, that differ by more are not the same."""
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
Answer = tuple[np.ndarray, np.ndarray]
"""A prediction [n, h, w, 1] and the latents it was decoded from [n e, i, j, k]."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: denoising steps, members of the ensemble, of which `batch` at a time.

    alignment: of jaxpercept's members; diffusers has one way.
    """

    steps: int
    members: int = 1
    batch: int = 1
    alignment: str = ""

    @property
    def label(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if self.members == 1:
            return steps
        return f"{steps}, {self.members} members, {self.batch} at a time, {self.alignment}"


def cases(args: argparse.Namespace) -> list[Case]:
    """The rows of each resolution's table."""
    if args.ensemble == 1:
        return [Case(steps) for steps in args.steps]
    return [
        Case(steps, args.ensemble, batch, alignment)
        for steps in args.steps
        for batch in (1, args.ensemble)
        for alignment in ("diffusers", "closed_form")
    ]


# ---- the same model twice ------------------------------------------------------------------------


def jax_pipeline(size: str, modules: dict[str, Any] | None = None) -> PerceptionPipeline:
    """jaxpercept's pipeline with the weights of torch modules; random ones without modules."""
    model = common.jax_model(size, "float32", in_channels=8)
    params = common.jax_weights(model, modules)
    if jax.default_backend() == "cpu":
        common.put(params, "float32")  # where the pipeline can use it: no third copy
    index = {"_class_name": "MarigoldDepthPipeline", "prediction_type": "depth"}
    found = recognise("marigold", index, model.unet.config, SCHEDULER)
    description = Description(
        components=common.configs(size, in_channels=8),
        scheduler=SCHEDULER,
        model_index=index,
        recipe=found.recipe,
        task=found.task,
        resolution=found.resolution,
    )
    return PerceptionPipeline(description, params)


def torch_pipeline(args: argparse.Namespace, modules: dict[str, Any]) -> Any:
    """diffusers' pipeline around the modules, on the device."""
    import torch
    from diffusers import DDIMScheduler, MarigoldDepthPipeline

    device = common.torch_device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    pipe = MarigoldDepthPipeline(
        **{name: m.to(device, memory_format=layout) for name, m in modules.items()},
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        text_encoder=None,
        tokenizer=None,
        prediction_type="depth",
    )
    pipe.empty_text_embedding = torch.from_numpy(
        common.prompt(common.jax_model(args.size, "float32"))
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- one call of each ----------------------------------------------------------------------------


def make_inputs(args: argparse.Namespace, resolution: int) -> dict[str, np.ndarray]:
    """A random image, `rgb` uint8 [1, H, W, 3], and `noise` float32 [members, h, w, 4]."""
    rng = np.random.default_rng(2)
    downscale = common.configs(args.size)["vae"].downsampling
    cells = (args.ensemble, resolution // downscale, resolution // downscale, 4)
    return {
        "rgb": rng.integers(0, 256, (1, resolution, resolution, 3)).astype(np.uint8),
        "noise": rng.standard_normal(cells, np.float32),
    }


def jax_call(
    pipe: PerceptionPipeline, inputs: dict[str, np.ndarray], case: Case
) -> Callable[[], Answer]:
    """jaxpercept's prediction; what must be compiled is compiled by the first call."""
    ensembling = {"alignment": case.alignment} if case.members > 1 else None

    def call() -> Answer:
        out = pipe(
            inputs["rgb"],
            num_inference_steps=case.steps,
            ensemble_size=case.members,
            processing_resolution=inputs["rgb"].shape[1],
            latents=inputs["noise"],
            batch_size=case.batch,
            ensembling=ensembling,
        )
        return out.prediction, out.latent

    return call


def torch_call(pipe: Any, inputs: dict[str, np.ndarray], case: Case) -> Callable[[], Answer]:
    """diffusers' prediction."""
    import torch

    # A tensor: of an array diffusers reads the size from the wrong axes when it checks the noise.
    rgb = torch.from_numpy(inputs["rgb"]).permute(0, 3, 1, 2)
    noise = torch.from_numpy(inputs["noise"]).permute(0, 3, 1, 2).contiguous().to(pipe.device)

    def call() -> Answer:
        out = pipe(
            rgb,
            num_inference_steps=case.steps,
            ensemble_size=case.members,
            processing_resolution=rgb.shape[-1],
            latents=noise,
            batch_size=case.batch,
            output_latent=True,
            # As jaxpercept, which always gives it; diffusers has none for fewer than three.
            output_uncertainty=case.members > 2,
        )
        return out.prediction, common.to_numpy(out.latent)

    return call


# ---- comparison ----------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> None:
    """The child process: print the peak of each case as JSON."""
    inputs = make_inputs(args, args.resolution[0])
    if args.memory_of == "torch":
        pipe, make = torch_pipeline(args, common.torch_model(args.size, in_channels=8)), torch_call
    else:
        pipe, make = jax_pipeline(args.size), jax_call
    peaks = {
        case.label: common.peak_memory(make(pipe, inputs, case), args.memory_of, args.device)
        for case in cases(args)
    }
    print(json.dumps(peaks))


def compare(
    ours: PerceptionPipeline, theirs: Any, inputs: dict[str, np.ndarray], case: Case, repeats: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """A row of the table, and its figures."""
    calls = {"jaxpercept": jax_call(ours, inputs, case), "torch": torch_call(theirs, inputs, case)}
    began = time.perf_counter()
    calls["jaxpercept"]()
    first = time.perf_counter() - began
    answers = [calls[name]() for name in FRAMEWORKS]
    prediction, latent = (float(np.abs(a - b).max()) for a, b in zip(*answers, strict=True))
    times = common.interleave(calls, repeats)
    compiling = max(first - median(times["jaxpercept"]), 0.0)
    row = common.times_row(case.label, times)
    row["compile s"] = f"{compiling:.1f}"
    low, high = np.quantile(answers[1][0], (0.01, 0.99))
    row["difference: prediction"] = f"{prediction:.1e} of {low:.2f} to {high:.2f}"
    row["latents"] = f"{latent:.1e} of {np.abs(answers[1][1]).max():.1f}"
    figures = {"seconds": times, "compile_seconds": compiling}
    return row, figures | {"max_difference": prediction, "max_latent_difference": latent}


def main() -> None:
    args = parse()
    limit_threads(args.threads)
    common.use_device(args.device)
    warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's line search in diffusers' call
    if args.memory_of:
        measure_memory(args)
        return

    memory = {}
    if not args.no_memory:
        for resolution in args.resolution:
            memory[resolution] = {name: common.in_child(name, resolution) for name in FRAMEWORKS}

    modules = common.torch_model(args.size, in_channels=8)
    count = sum(p.numel() for m in modules.values() for p in m.parameters()) / 1e6
    ours = jax_pipeline(args.size, modules)
    theirs = torch_pipeline(args, modules)
    results = {"machine": common.machine(args.device), "options": vars(args), "sizes": {}}
    measured = "prediction" if args.ensemble == 1 else "latent"
    for resolution in args.resolution:
        inputs = make_inputs(args, resolution)
        rows, figures = [], {}
        for case in cases(args):
            row, figures[case.label] = compare(ours, theirs, inputs, case, args.repeats)
            print(f"{resolution} px, {case.label}: done", flush=True)
            rows.append(row)
        print(f"\n{args.size} ({count:.0f} M), {resolution} px, float32: least / median seconds")
        common.print_table(rows)
        key = "max_difference" if args.ensemble == 1 else "max_latent_difference"
        for label, figure in figures.items():
            if figure[key] >= LIMIT:
                print(f"{label}: the {measured}s DIFFER by {figure[key]:.1e}, {LIMIT} or more.\n")
        if memory:
            print("Memory at most (of it, added by the call)")
            common.print_table(common.memory_rows(memory[resolution]))
        results["sizes"][resolution] = {"cases": figures, "memory": memory.get(resolution)}
    common.finish(results, args.output)


def parse() -> argparse.Namespace:
    """The command line; --small chooses what is not given."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=("sd21", "20m", "tiny"), help="the networks; default: sd21")
    p.add_argument("--small", action="store_true", help="short for --size 20m --resolution 128")
    p.add_argument("--resolution", type=int, nargs="+", help="square images; default: 256 512")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    p.add_argument("--ensemble", type=int, default=1, help="predictions to merge; default: 1")
    p.add_argument("--threads", type=int, help="cores for both frameworks; default: all")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="for both frameworks")
    p.add_argument("--repeats", type=int, default=5, help="timed runs of each, in turns; default 5")
    p.add_argument("--channels-last", action="store_true", help="torch in its NHWC memory format")
    p.add_argument("--no-memory", action="store_true", help="skip the memory of single processes")
    p.add_argument("--output", type=Path, help="write all figures here, as JSON")
    p.add_argument("--memory-of", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.size = args.size or ("20m" if args.small else "sd21")
    args.resolution = args.resolution or ([128] if args.small else [256, 512])
    if args.ensemble < 1 or min(args.steps) < 1:
        p.error("--ensemble and --steps are at least 1")
    if args.threads is not None and not 1 <= args.threads <= common.threads():
        p.error(f"--threads {args.threads}: this process may use 1 to {common.threads()}")
    return args


def limit_threads(count: int | None) -> None:
    """Keep this process, XLA's and torch's threads to so many cores; before either starts any."""
    if count is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


if __name__ == "__main__":
    main()
