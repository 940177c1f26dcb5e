"""One depth training step: jaxpercept against torch diffusers, same weights and batch.

    python benchmarks/train_step.py                     # 55 M parameters, SD's VAE, 256 px
    python benchmarks/train_step.py --method denoising --batch 4
    python benchmarks/train_step.py --size tiny --resolution 64 --batch 2

Trained is the UNet, with Adam; the VAE is frozen. Methods: `one_step`, GenPercept's, whose losses
are the latent MSE and, in pixels, MSE, 0.5 x scale-and-shift-invariant, 2 x gradient, through the
decoder; `latent`, the same without those in pixels; `denoising`, Marigold's with Gaussian noise,
which each framework draws for itself. jaxpercept's side is the step of its trainer; torch's is
written here. A second table has what this machine needs at least (floors.py). Wants the extra
`torch`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
from common import FRAMEWORKS
from floors import Peaks, Program, compile_program, floor_row

from jaxpercept.config import base_config
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.methods.denoising import Denoising
from jaxpercept.methods.one_step import OneStep
from jaxpercept.tasks.depth import DEPTH
from jaxpercept.training import sharding
from jaxpercept.training.optim import make_optimizer
from jaxpercept.training.step import init_state, make_train_step

TIMESTEP = 1
LEARNING_RATE = 3e-5
PIXEL_WEIGHTS = DEPTH.default_weights
METHODS = ("one_step", "latent", "denoising")
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
Batch = dict[str, np.ndarray]
Step = Callable[[], dict[str, float]]


def changes(args: argparse.Namespace) -> dict[str, int]:
    """Of the UNet's config: to denoise it sees the image beside the noisy target."""
    return {"in_channels": 8} if args.method == "denoising" else {}


def make_batch(args: argparse.Namespace) -> Batch:
    """Random images and tilted planes of depth, invalid near the border."""
    rng = np.random.default_rng(3)
    b, side = args.batch, args.resolution[0]
    rows, columns = np.meshgrid(*[np.linspace(0, 1, side, dtype=np.float32)] * 2, indexing="ij")
    tilt = rng.uniform(0.5, 2, (2, b, 1, 1)).astype(np.float32)
    depth = 1 + tilt[0] * rows + tilt[1] * columns
    valid = np.zeros((b, side, side, 1), bool)
    valid[:, side // 16 : -(side // 16), side // 16 : -(side // 16)] = True
    return {
        "rgb": rng.integers(0, 256, (b, side, side, 3)).astype(np.uint8),
        "depth": depth[..., None],
        "valid": valid,
        "depth_range": np.quantile(depth, (0.02, 0.98), axis=(1, 2)).T.astype(np.float32),
        "index": np.arange(b, dtype=np.int32),
    }


# ---- jaxpercept ----------------------------------------------------------------------------------


def jax_step(args: argparse.Namespace, params: Any, host_batch: Batch) -> Program:
    """The trainer's own step, compiled; each call takes it once and returns its metrics."""
    model = common.jax_model(args.size, args.dtype, args.remat, **changes(args))
    if args.method == "denoising":
        solver, policy = Solver.from_config(SCHEDULER), TimestepPolicy.parse("uniform")
        method: Any = Denoising(model, DEPTH, solver, policy, args.batch, noise="gaussian")
    else:
        weights = tuple(PIXEL_WEIGHTS.items()) if args.method == "one_step" else ()
        policy = TimestepPolicy.constant(TIMESTEP)
        method = OneStep(model, DEPTH, policy, latent_weight=1.0, pixel_weights=weights)
    return step_of(method, params, host_batch, args.dtype)


def step_of(method: Any, params: Any, host_batch: Batch, dtype: str) -> Program:
    """The trainer's step of a method on one device; frozen weights are kept in `dtype`."""
    config = base_config().optimizer
    config.update({"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0})
    optimizer, schedule = make_optimizer(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    trained = common.put({"unet": params.pop("unet")}, "float32")
    frozen = common.put(params, dtype)
    state = init_state(trained, optimizer, ema=False)
    shardings = sharding.tree_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    batch = sharding.put_batch(host_batch, mesh)
    step = make_train_step(
        method.loss, optimizer, mesh=mesh, state_sharding=shardings, schedule=schedule, seed=0
    )
    program = compile_program(step, state, frozen, batch)
    print(f"compiled in {program.compile_seconds:.1f} s", flush=True)
    del trained

    def call() -> dict[str, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(program.executable(state, frozen, batch))
        return {name: float(value) for name, value in metrics.items()}

    program.run = call
    return program


# ---- torch ---------------------------------------------------------------------------------------


def torch_step(
    args: argparse.Namespace, modules: dict[str, Any], host_batch: Batch, compiled: bool = False
) -> Step:
    """The same step with diffusers' modules and torch.optim.Adam.

    Its metrics are the loss and its terms; unlike jaxpercept's it does without the gradient's norm.
    """
    import torch
    from diffusers import DDIMScheduler

    device, dtype = common.torch_device(args.device), getattr(torch, args.dtype)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    unet = modules["unet"].to(device, memory_format=layout).train()
    vae = modules["vae"].to(device, dtype, memory_format=layout).requires_grad_(False)
    scale, factor = vae.config.scaling_factor, 2 ** (len(vae.config.block_out_channels) - 1)
    encoder, decoder, forward = vae.encode, vae.decode, unet.forward
    if compiled:
        encoder, decoder, forward = map(torch.compile, (encoder, decoder, forward))
    optimizer = torch.optim.Adam(unet.parameters(), lr=LEARNING_RATE, eps=1e-8)
    batch = {k: torch.from_numpy(x).to(device) for k, x in host_batch.items()}
    batch = {k: x.permute(0, 3, 1, 2) if x.ndim == 4 else x for k, x in batch.items()}
    embedding = torch.from_numpy(common.prompt(common.jax_model(args.size, args.dtype)))
    context = embedding.to(device).expand(args.batch, -1, -1)
    # Mixed precision as jaxpercept has it: trained weights in float32, cast where they are used.
    precision = contextlib.nullcontext
    if args.dtype != "float32":
        precision = lambda: torch.autocast(device, dtype)  # noqa: E731

    def encode(x: Any) -> Any:
        with torch.no_grad():
            x = x.to(dtype).contiguous(memory_format=layout)
            return encoder(x).latent_dist.mode().float() * scale

    noising = DDIMScheduler.from_config(SCHEDULER)

    def losses() -> dict[str, Any]:
        rgb = batch["rgb"].float() / 127.5 - 1
        near, far = batch["depth_range"].T[:, :, None, None, None]
        target = ((batch["depth"] - near) / (far - near) * 2 - 1).clamp(-1, 1)
        mask = batch["valid"]
        cells = -torch.nn.functional.max_pool2d(-mask.float(), factor) > 0
        with precision():
            rgb_latent = encode(rgb)
            target_latent = encode(target.expand(-1, 3, -1, -1))
            if args.method == "denoising":
                noise = torch.randn_like(target_latent)
                t = torch.randint(0, 1000, (args.batch,), device=device)
                noisy = noising.add_noise(target_latent, noise, t)
                predicted = forward(torch.cat([rgb_latent, noisy], 1), t, context).sample.float()
                wanted = noising.get_velocity(target_latent, noise, t)
                return {"latent_mse": _mean((predicted - wanted) ** 2, cells)}
            latent = -forward(rgb_latent, TIMESTEP, context).sample.float()
            terms = {"latent_mse": _mean((latent - target_latent) ** 2, cells)}
            if args.method == "latent":
                return terms
            decoded = decoder((latent / scale).to(dtype)).sample.float()
        pixel = torch_pixel_losses(decoded.mean(1, keepdim=True), target, mask)
        return terms | {name: weight * pixel[name] for name, weight in PIXEL_WEIGHTS.items()}

    def call() -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        terms = losses()
        terms["loss"] = sum(terms.values())
        terms["loss"].backward()
        optimizer.step()
        return {name: value.item() for name, value in terms.items()}

    return call


def torch_pixel_losses(pred: Any, target: Any, mask: Any) -> dict[str, Any]:
    """GenPercept's pixel losses of [b, 1, h, w], as jaxpercept.losses defines them."""
    import torch

    error = (pred - target) * mask
    down = (error[:, :, 1:] - error[:, :, :-1]).abs() * (mask[:, :, 1:] & mask[:, :, :-1])
    right = (error[..., 1:] - error[..., :-1]).abs() * (mask[..., 1:] & mask[..., :-1])

    def centred(x: Any) -> Any:
        mean = (x * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        return (x - mean[:, None, None, None]) * mask, mean

    (x, _), (y, y_mean) = centred(pred), centred(target)
    slope = (x * y).sum((1, 2, 3)) / (x * x).sum((1, 2, 3))
    aligned = slope[:, None, None, None] * x + y_mean[:, None, None, None]
    if (slope <= 0).any():  # upside down: align by medians, of values in [1, 3]
        p, t = pred + 2, target + 2
        ratios = [
            t[i][mask[i]].median() / (p[i][mask[i]].median() + 1e-8) for i in range(len(pred))
        ]
        by_median = torch.stack(ratios)[:, None, None, None] * p - 2
        aligned = torch.where((slope <= 0)[:, None, None, None], by_median, aligned)
    return {
        "mse": _mean(error**2, mask),
        "ssi": _mean((aligned - target).abs(), mask),
        "grad": (down.sum() + right.sum()) / mask.sum(),
    }


def _mean(values: Any, mask: Any) -> Any:
    mask = mask.expand_as(values)
    return (values * mask).sum() / mask.sum()


# ---- comparison ----------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> None:
    """The child process: print the peak of a step as JSON, Adam's moments included."""
    batch = make_batch(args)
    if args.memory_of == "torch":
        step = torch_step(args, common.torch_model(args.size, **changes(args)), batch)
    else:
        params = common.jax_weights(common.jax_model(args.size, args.dtype, **changes(args)))
        step = jax_step(args, params, batch)
    print(json.dumps({"step": common.peak_memory(step, args.memory_of, args.device)}))


def main() -> None:
    p = common.parser(__doc__.split("\n\n")[0], ("50m", "tiny", "sd21", "sd15"))
    p.add_argument("--method", choices=METHODS, default=METHODS[0], help="what is trained")
    p.add_argument("--remat", choices=("none", "block"), default="none", help="jaxpercept's")
    p.set_defaults(resolution=[256])
    args = p.parse_args()
    common.use_device(args.device)
    if args.memory_of:
        measure_memory(args)
        return
    if len(args.resolution) > 1:
        p.error("one --resolution at a time: each needs fresh weights")

    memory = {}
    if not args.no_memory:
        memory = {name: common.in_child(name, args.resolution[0]) for name in FRAMEWORKS}
    peaks = Peaks.measured(args.dtype)
    batch = make_batch(args)
    modules = common.torch_model(args.size, **changes(args))
    model = common.jax_model(args.size, args.dtype, **changes(args))
    program = jax_step(args, common.jax_weights(model, modules), batch)
    calls = {"jaxpercept": program}
    if args.compile:
        calls["torch.compile"] = torch_step(args, copy.deepcopy(modules), batch, compiled=True)
    calls["torch"] = torch_step(args, modules, batch)
    first = {name: call() for name, call in calls.items()}
    times = common.interleave(calls, args.repeats)
    last = {name: call() for name, call in calls.items()}

    trained = sum(p.numel() for p in modules["unet"].parameters()) / 1e6
    side = args.resolution[0]
    print(f"\n{args.method}, {args.size} ({trained:.0f} M trained), ", end="")
    print(f"{args.batch} x {side} px, {args.dtype}")
    common.print_table([common.times_row("step", times)])
    peaks = Peaks.measured(args.dtype, before=peaks)
    print(f"What is needed at least: {peaks}")
    common.print_table([floor_row("step", program, times["jaxpercept"], peaks, args.batch)])
    if memory:
        print("Memory at most (of it, added by the step)")
        common.print_table(common.memory_rows(memory))
    print(f"Losses of the first step and of step {args.repeats + 3}")
    rows = []
    for label, metrics in (("first", first), ("last", last)):
        ours, theirs = (metrics[name] for name in FRAMEWORKS)
        for term, value in theirs.items():
            name = f"{label}, {term}"
            rows.append({"": name, "jaxpercept": f"{ours[term]:.7f}", "torch": f"{value:.7f}"})
            rows[-1]["relative difference"] = f"{abs(ours[term] / value - 1):.1e}"
    common.print_table(rows)
    results = {"machine": common.machine(args.device), "options": vars(args), "seconds": times}
    results |= {"memory": memory, "first": first, "last": last}
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
