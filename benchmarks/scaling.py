"""What a training step holds and sends on many devices, and what that leaves of their speed.

    python benchmarks/scaling.py                 # the default config on 1 to 8 simulated devices
    python benchmarks/scaling.py --pods          # SD 2.1 on pods, on paper

The first table compiles the trainer's own step for every mesh and reads its memory and collectives
from the program; "at least" is what the gradients and the split weights need by any program
(jaxpercept/training/dry_run.py). The second multiplies: the operations of SD 2.1's step, traced and
not compiled, over a chip's peak at an assumed share of it, and the least bytes over the network's
speed. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import common
import jax
import jax.numpy as jnp

from jaxpercept.config import base_config
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.methods.one_step import OneStep
from jaxpercept.presets import load
from jaxpercept.tasks.depth import DEPTH
from jaxpercept.training import sharding
from jaxpercept.training.clock import PEAK
from jaxpercept.training.dry_run import dry_run, sent_by_axis
from jaxpercept.training.flops import count_flops
from jaxpercept.training.optim import make_optimizer
from jaxpercept.training.step import init_state, make_train_step

MB = 1e6


@dataclasses.dataclass(frozen=True)
class Pod:
    """A machine on paper: bytes a second that a chip can send, within a slice or node and beyond.

    Attributes:
        kind: the chip, as its peak is listed by.
        memory: bytes of a chip.
        fast: within a slice (TPU, all links of a chip, one direction) or a node (NVLink).
        slow: between slices or nodes, per chip.
        group: chips of a slice or node.
    """

    kind: str
    memory: float
    fast: float
    slow: float
    group: int


# From the makers' data sheets. TPU: inter-chip links in one direction; 25 GB/s a host of four chips
# between slices. H100: NVLink 450 GB/s in one direction, a 400 Gbit/s card a GPU between nodes.
PODS = {
    "TPU v5e": Pod("TPU v5e", 16e9, 200e9, 6.25e9, 256),
    "TPU v5p": Pod("TPU v5", 95e9, 600e9, 6.25e9, 8960),
    "H100": Pod("H100", 80e9, 450e9, 50e9, 8),
}
ASSUMED_MFU = 0.4


def simulated() -> list[dict[str, str]]:
    """The default config's step, compiled for meshes of up to eight devices."""
    rows = []
    for preset in ("ddp", "fsdp", "fsdp_tensor", "2 x fsdp"):
        for count in (1, 2, 4, 8):
            devices = jax.devices()[:count]
            # "hybrid" where there are two slices.
            slices = {"data": 2, "fsdp": count // 2}
            sizes = slices if preset == "2 x fsdp" else {"preset": preset}
            if (count == 1 and preset != "ddp") or 0 in sizes.values():
                continue
            config = load("configs/depth.py").get_config()
            facts = dry_run(config, mesh=sharding.make_mesh(**sizes, devices=devices))
            sent, least = (sum(facts[f"{k}sent_bytes"].values()) for k in ("", "expected_"))
            held = facts["held_bytes"]
            rows.append(
                {
                    "mesh": preset,
                    "devices": str(count),
                    "arrays, MB": f"{(sum(held.values()) - held['temporary']) / MB:.1f}",
                    "temporary, MB": f"{held['temporary'] / MB:.1f}",
                    "GFLOP a device": f"{facts['flops'] / 1e9:.1f}",
                    "sent, MB": f"{sent / MB:.1f}",
                    "at least, MB": f"{least / MB:.1f}",
                    "ratio": f"{sent / least:.2f}" if least else "",
                }
            )
    return rows


def sd21_step(height: int, width: int) -> tuple[float, int, int]:
    """SD 2.1's training step on one image: its operations, bytes of trained and frozen weights.

    Counted in the traced program (jaxpercept/training/flops.py).
    """
    model = common.jax_model("sd21", "bfloat16")
    weights = tuple(DEPTH.default_weights.items())
    policy = TimestepPolicy.constant(1)
    method = OneStep(model, DEPTH, policy, latent_weight=1.0, pixel_weights=weights)
    trained = {"unet": dict(model.unet.shapes)}
    prompt = jax.ShapeDtypeStruct(common.prompt(model).shape, jnp.float32)
    frozen = {"vae": dict(model.vae.shapes), "prompt": {"embedding": prompt}}
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    optimizer, schedule = make_optimizer(base_config().optimizer)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, ema=False), trained)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = make_train_step(
        method.loss,
        optimizer,
        mesh=mesh,
        state_sharding=sharding.tree_shardings(state, mesh),
        schedule=schedule,
        seed=0,
    )
    image = {
        "rgb": jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8),
        "depth": jax.ShapeDtypeStruct((1, height, width, 1), jnp.float32),
        "valid": jax.ShapeDtypeStruct((1, height, width, 1), jnp.bool_),
        "depth_range": jax.ShapeDtypeStruct((1, 2), jnp.float32),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    flops = count_flops(step.trace(state, frozen, image).jaxpr)
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (trained, frozen)]
    return flops, *sizes


def on_paper() -> list[dict[str, str]]:
    """SD 2.1's step at 480 x 640 on pods, one to four images a chip."""
    flops, trained, frozen = sd21_step(480, 640)
    print(
        f"SD 2.1, one image of 480 x 640: {flops / 1e12:.2f} TFLOP, weights of "
        f"{trained / MB:.0f} MB trained, {frozen / MB:.0f} MB frozen; {ASSUMED_MFU:.0%} of the peak"
    )
    rows = []
    for name, pod in PODS.items():
        for chips in (8, 64, 512):
            fsdp = min(chips, pod.group)
            data = chips // fsdp
            fast, slow = sent_by_axis(trained, data, fsdp).values()
            talk = fast / pod.fast + slow / pod.slow
            for images in (1, 4):
                work = images * flops / (PEAK[pod.kind] * ASSUMED_MFU)
                # Weights, two moments, gradients.
                arrays = 4 * trained / fsdp + frozen
                rows.append(
                    {
                        "": name,
                        "chips": str(chips),
                        "data x fsdp": f"{data} x {fsdp}",
                        "images a chip": str(images),
                        "arrays, GB": f"{arrays / 1e9:.1f}",
                        "compute, ms": f"{1e3 * work:.0f}",
                        "sent within / between, MB": f"{fast / MB:.0f} / {slow / MB:.0f}",
                        "sending, ms": f"{1e3 * talk:.0f}",
                        "efficiency, overlapped": f"{work / max(work, talk):.2f}",
                        "not overlapped": f"{work / (work + talk):.2f}",
                    }
                )
    return rows


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--pods", action="store_true", help="SD 2.1 on pods, on paper")
    common.print_table(on_paper() if p.parse_args().pods else simulated())


if __name__ == "__main__":
    main()
