"""The layers that are written in more ways than one: each way, and torch's, on this machine.

    python benchmarks/layers.py                 # some minutes
    python benchmarks/layers.py --only attention

Prints the tables behind the choices in jaxpercept/models/layers.py and attention.py: float32, the
forward pass / forward and backward pass. Ways take turns; the least time of each counts.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
from jax import lax

from jaxpercept.models import layers
from jaxpercept.models.attention import dot_product_attention

PADDING = ((1, 1), (1, 1))
# batch, height, width, channels in and out
CONVOLUTIONS = (
    *((16, 24, 32, 64), (16, 12, 16, 128), (8, 96, 128, 32), (1, 32, 32, 320)),
    *((1, 64, 64, 320), (1, 16, 16, 1280), (1, 8, 8, 1280), (1, 256, 256, 128)),
)
UPSAMPLINGS = ((1, 8, 8, 1280), (1, 16, 16, 1280), (1, 32, 32, 512), (1, 128, 128, 256))
# batch, tokens, heads, channels a head: the UNet at 256 and 512 px, training, the VAE likewise
ATTENTIONS = (
    *((1, 1024, 5, 64), (1, 4096, 5, 64), (8, 768, 2, 32)),
    *((1, 1024, 1, 512), (1, 4096, 1, 512), (8, 768, 1, 64)),
)


def conv_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Every window as a row of one matrix product."""
    return layers._patches(x, kernel.shape[:2], 1, PADDING) @ kernel.reshape(-1, kernel.shape[-1])


def upsample_resize(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest neighbours, then the convolution."""
    return layers.conv2d(layers.resize_nearest(x, _doubled(x)), kernel, padding=PADDING)


def upsample_chosen(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The package's choice: sub-pixel convolutions where there are enough pixels."""
    return layers.upsample_conv2d(x, kernel, _doubled(x))


def _doubled(x: Any) -> tuple[int, int]:
    return 2 * x.shape[1], 2 * x.shape[2]


def torch_conv(x: Any, kernel: Any) -> Any:
    import torch

    return torch.nn.functional.conv2d(x, kernel, padding=1)


def torch_upsample(x: Any, kernel: Any) -> Any:
    import torch

    return torch_conv(torch.nn.functional.interpolate(x, scale_factor=2.0), kernel)


def torch_attention(q: Any, k: Any, v: Any) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def jax_calls(function: Callable, inputs: tuple[np.ndarray, ...]) -> tuple[Callable, Callable]:
    """Forward, and forward and backward with a given gradient, compiled."""
    arrays = jax.device_put(inputs)
    forward = jax.jit(function)

    @jax.jit
    def both(gradient: jax.Array, *arrays: jax.Array) -> Any:
        y, backward = jax.vjp(function, *arrays)
        return y, backward(gradient)

    gradient = forward(*arrays)
    return (
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(both(gradient, *arrays)),
    )


def torch_calls(function: Callable, inputs: tuple[np.ndarray, ...]) -> tuple[Callable, Callable]:
    """The same in torch, whose images are NCHW, kernels OIHW and tokens [b, heads, t, d]."""
    import torch

    def layout(x: np.ndarray) -> Any:
        axes = (
            (0, 2, 1, 3) if len(inputs) == 3 else (3, 2, 0, 1) if x.shape[0] == 3 else (0, 3, 1, 2)
        )
        return torch.from_numpy(np.ascontiguousarray(x.transpose(axes)))

    tensors = [layout(x) for x in inputs]
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        gradient = function(*tensors)

    def forward() -> None:
        with torch.inference_mode():
            function(*tensors)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return forward, both


def table(
    title: str,
    ways: dict[str, Callable],
    cases: tuple[tuple[int, ...], ...],
    make_inputs: Callable[..., tuple[np.ndarray, ...]],
    repeats: int,
) -> None:
    """Least milliseconds of each way in each case."""
    rows = []
    for case in cases:
        inputs = make_inputs(case)
        calls = {
            name: (torch_calls if name == "torch" else jax_calls)(way, inputs)
            for name, way in ways.items()
        }
        row = {title: ", ".join(map(str, case))}
        passes = [
            common.interleave({name: call[i] for name, call in calls.items()}, repeats, warmup=2)
            for i in range(2)
        ]
        for name in ways:
            row[name] = " / ".join(f"{1e3 * min(times[name]):.3g}" for times in passes)
        rows.append(row)
    print("\nms, forward / forward and backward")
    common.print_table(rows)


def convolution_inputs(case: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng, channels = np.random.default_rng(0), case[-1]
    kernel = rng.standard_normal((3, 3, channels, channels), np.float32)
    return rng.standard_normal(case, np.float32), kernel / np.float32(3 * channels**0.5)


def attention_inputs(case: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(case, np.float32) for _ in range(3))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("convolution", "upsampling", "attention")
    p.add_argument("--only", choices=kinds, nargs="+", default=kinds, help="these tables")
    p.add_argument("--repeats", type=int, default=10, help="timed runs of each way, in turns")
    args = p.parse_args()
    common.use_device("cpu")
    common.use_torch_threads()
    attention = functools.partial(functools.partial, dot_product_attention)
    ways = {
        "convolution": {"XLA": conv_xla, "patches": conv_patches, "torch": torch_conv},
        "upsampling": {
            "resize, convolution": upsample_resize,
            "as chosen": upsample_chosen,
            "torch": torch_upsample,
        },
        "attention": {
            "whole matrix": attention(implementation="xla"),
            "in blocks": attention(implementation="chunked"),
            "torch": torch_attention,
        },
    }
    cases = dict(zip(kinds, (CONVOLUTIONS, UPSAMPLINGS, ATTENTIONS), strict=True))
    for kind in args.only:
        title = "batch, " + (
            "tokens, heads, width" if kind == "attention" else "height, width, channels"
        )
        make = attention_inputs if kind == "attention" else convolution_inputs
        table(f"{kind}: {title}", ways[kind], cases[kind], make, args.repeats)
    common.finish({"machine": common.machine("cpu")}, None)


if __name__ == "__main__":
    main()
