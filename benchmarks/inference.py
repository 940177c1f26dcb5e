"""One-step depth inference: jaxpercept against torch diffusers, with the same random weights.

    python benchmarks/inference.py                      # SD 2.1 at 256 and 512 px, some minutes
    python benchmarks/inference.py --size tiny --resolution 96
    python benchmarks/inference.py --device gpu --dtype bfloat16 --resolution 768

The VAE encodes the image, the UNet runs once with the empty prompt, the VAE decodes, or a TAESD in
its place. Each part and the whole are timed in turns in one process; memory comes from one process
per framework. A second table has what this machine needs at least (floors.py), and the distance to
it. Wants the extra `torch`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import FRAMEWORKS
from floors import Peaks, Program, compile_program, floor_row

from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.methods.latent_model import LatentModel, empty_prompt
from jaxpercept.methods.one_step import OneStep, to_signed
from jaxpercept.models.vae import decode_latents, encode_mean
from jaxpercept.tasks.depth import DEPTH

PARTS = ("encode", "unet", "decode", "tiny decode", "whole", "whole, tiny decoder")
TIMESTEP = 1
Inputs = dict[str, np.ndarray]
"""What each part is given: `rgb` uint8 [b,H,W,3] and `latent` float32 [b,h,w,c]."""


def make_inputs(args: Any, resolution: int) -> Inputs:
    """A random image, and a random latent for the UNet and the decoder."""
    rng = np.random.default_rng(2)
    model = common.jax_model(args.size, args.dtype)
    side = resolution // model.downscale
    channels = model.vae.config.latent_channels
    return {
        "rgb": rng.integers(0, 256, (args.batch, resolution, resolution, 3)).astype(np.uint8),
        "latent": rng.standard_normal((args.batch, side, side, channels), np.float32),
    }


def jax_parts(args: Any, params: Any, inputs: Inputs) -> dict[str, Program]:
    """Each part, compiled; `whole` is what a pipeline runs."""
    plain = common.jax_model(args.size, args.dtype)
    tiny = common.jax_model(args.size, args.dtype, tiny_decoder=True)

    def encode(params: Any, rgb: jax.Array) -> jax.Array:
        return encode_mean(plain.vae, params["vae"], to_signed(rgb))

    def unet(params: Any, latent: jax.Array) -> jax.Array:
        timesteps = jnp.full(latent.shape[:1], TIMESTEP)
        context = empty_prompt(params, latent.shape[0])
        return plain.unet.bind(params["unet"])(latent, timesteps, context)

    def whole(model: LatentModel) -> Callable:
        perception = OneStep(model, DEPTH, TimestepPolicy(), TIMESTEP).perception
        return lambda params, rgb: perception.predict(
            params, perception.encode(params, to_signed(rgb))
        )[0]

    functions = {
        "encode": encode,
        "unet": unet,
        "decode": lambda params, z: decode_latents(plain.vae, params["vae"], z),
        "tiny decode": lambda params, z: decode_latents(tiny.decoder, params["decoder"], z),
        "whole": whole(plain),
        "whole, tiny decoder": whole(tiny),
    }
    of_pixels = {"encode", "whole", "whole, tiny decoder"}
    rgb, latent = jax.device_put(inputs["rgb"]), jax.device_put(inputs["latent"])
    programs = {}
    for name, function in functions.items():
        x = rgb if name in of_pixels else latent
        programs[name] = compile_program(function, params, x)
        print(f"compiled {name} in {programs[name].compile_seconds:.1f} s", flush=True)
    return programs


def torch_parts(
    args: Any, modules: dict[str, Any], inputs: Inputs, compile_modules: bool = False
) -> dict[str, Callable[[], Any]]:
    """The same with diffusers' modules."""
    import torch

    device, dtype = common.torch_device(args.device), getattr(torch, args.dtype)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    unet, vae, tiny = (m.to(device, dtype, memory_format=layout) for m in modules.values())
    scale = vae.config.scaling_factor
    networks = (vae.encode, unet.forward, vae.decode, tiny.decode)
    if compile_modules:
        networks = map(torch.compile, networks)
    encoder, forward, decoder, tiny_decoder = networks

    rgb = torch.from_numpy(inputs["rgb"]).to(device).permute(0, 3, 1, 2)
    latent = torch.from_numpy(inputs["latent"]).to(device).permute(0, 3, 1, 2)
    latent = latent.contiguous(memory_format=layout)
    embedding = torch.from_numpy(common.prompt(common.jax_model(args.size, args.dtype)))
    context = embedding.to(device, dtype).expand(args.batch, -1, -1)

    def encode(x: Any = rgb) -> Any:
        x = (x.float() / 127.5 - 1).to(dtype).contiguous(memory_format=layout)
        return encoder(x).latent_dist.mode().float() * scale

    def run_unet(x: Any = latent) -> Any:
        return forward(x.to(dtype), TIMESTEP, context).sample

    def decode(x: Any = latent) -> Any:
        return decoder((x / scale).to(dtype)).sample.float()

    def tiny_decode(x: Any = latent) -> Any:
        return tiny_decoder(x.to(dtype)).sample.float()

    def whole(decode: Callable = decode) -> Any:
        return decode(-run_unet(encode()).float())  # with beta = 1, x0 is minus the output

    def whole_tiny() -> Any:
        return whole(tiny_decode)

    def waiting(part: Callable) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                y = part()
            if device == "cuda":
                torch.cuda.synchronize()
            return y

        return call

    parts = (encode, run_unet, decode, tiny_decode, whole, whole_tiny)
    return {name: waiting(part) for name, part in zip(PARTS, parts, strict=True)}


def measure_memory(args: Any) -> None:
    """The child process: print the peak of each part as JSON."""
    inputs = make_inputs(args, args.resolution[0])
    if args.memory_of == "torch":
        calls = torch_parts(args, common.torch_model(args.size, tiny_decoder=True), inputs)
    else:
        params = common.jax_weights(common.jax_model(args.size, args.dtype, tiny_decoder=True))
        calls = jax_parts(args, common.put(params, args.dtype), inputs)
    parts = PARTS if args.device == "cpu" else PARTS[-1:]
    peaks = {part: common.peak_memory(calls[part], args.memory_of, args.device) for part in parts}
    print(json.dumps(peaks))


def main() -> None:
    p = common.parser(__doc__.split("\n\n")[0], ("sd21", "sd15", "tiny"))
    p.set_defaults(resolution=[256, 512])
    args = p.parse_args()
    common.use_device(args.device)
    if args.memory_of:
        measure_memory(args)
        return

    memory = {}
    if not args.no_memory:
        for resolution in args.resolution:
            memory[resolution] = {name: common.in_child(name, resolution) for name in FRAMEWORKS}

    peaks = Peaks.measured(args.dtype)
    modules = common.torch_model(args.size, tiny_decoder=True)
    model = common.jax_model(args.size, args.dtype, tiny_decoder=True)
    params = common.put(common.jax_weights(model, modules), args.dtype)
    results = {"machine": common.machine(args.device), "options": vars(args), "sizes": {}}
    for resolution in args.resolution:
        inputs = make_inputs(args, resolution)
        calls = {
            "jaxpercept": jax_parts(args, params, inputs),
            "torch": torch_parts(args, modules, inputs),
        }
        if args.compile:
            calls["torch.compile"] = torch_parts(args, modules, inputs, compile_modules=True)
        rows, figures = [], {}
        for part in PARTS:
            ours, theirs = (common.to_numpy(calls[name][part]()) for name in FRAMEWORKS)
            difference = float(np.abs(ours - theirs).max())
            times = common.interleave({k: v[part] for k, v in calls.items()}, args.repeats)
            row = common.times_row(part, times)
            row["max abs difference"] = f"{difference:.1e} of {np.abs(theirs).max():.1f}"
            rows.append(row)
            figures[part] = {"seconds": times, "max_abs_difference": difference}
        print(
            f"\n{args.size}, {args.batch} x {resolution} px, {args.dtype}: least / median seconds"
        )
        common.print_table(rows)
        peaks = Peaks.measured(args.dtype, before=peaks)
        print(f"What is needed at least: {peaks}")
        common.print_table(
            [
                floor_row(part, program, figures[part]["seconds"]["jaxpercept"], peaks, args.batch)
                for part, program in calls["jaxpercept"].items()
            ]
        )
        if memory:
            print("Memory at most (of it, added by the call)")
            common.print_table(common.memory_rows(memory[resolution]))
        results["sizes"][resolution] = {"parts": figures, "memory": memory.get(resolution)}
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
