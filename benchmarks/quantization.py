"""Whether int8 or fp8 pays at inference: layers of SD 2.1, as they are and quantised by qwix.

    python benchmarks/quantization.py                       # a minute
    python benchmarks/quantization.py --device gpu --types bfloat16 int8 float8_e4m3fn

Weights are quantised beforehand, for each output channel; activations in the program, for each row
or image. Milliseconds, and the largest error over the largest value. Wants the package qwix.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

try:
    import qwix
except ImportError:
    sys.exit("This benchmark wants the package qwix: install it beside jaxpercept.")

QUANTISED = ("int8", "float8_e4m3fn")
# tokens, channels in, channels out: the UNet's feed-forward layers and projections at 512 px
PRODUCTS = ((4096, 320, 320), (4096, 320, 2560), (1024, 640, 5120), (256, 1280, 10240))
# side, channels: of one image, 3x3
CONVOLUTIONS = ((64, 320), (32, 640), (16, 1280), (128, 256))
PRODUCT = (((1,), (0,)), ((), ()))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(function: Callable, x: Any, kernel: Any) -> jax.Array:
    return function(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def call(x: np.ndarray, weight: np.ndarray, kind: str) -> Callable[[], jax.Array]:
    """The layer of a type, compiled: a product of matrices, or a convolution of images."""
    images = x.ndim == 4
    if kind not in QUANTISED:
        plain = functools.partial(convolve, jax.lax.conv_general_dilated) if images else jnp.matmul
        program = jax.jit(plain)
        arrays = [jnp.asarray(a, kind) for a in (x, weight)]
    else:
        arrays = [
            jnp.asarray(x),
            qwix.quantize(jnp.asarray(weight), kind, channelwise_axes=(weight.ndim - 1,)),
        ]

        @jax.jit
        def program(x: jax.Array, weight: Any) -> jax.Array:
            x = qwix.quantize(x, kind, channelwise_axes=(0,))
            if images:
                return convolve(qwix.conv_general_dilated, x, weight)
            return qwix.dot_general(x, weight, PRODUCT)

    return lambda: jax.block_until_ready(program(*arrays))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    types = ("float32", "bfloat16", *QUANTISED)
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where")
    p.add_argument("--types", choices=types, nargs="+", default=types[:3], help="columns")
    p.add_argument("--repeats", type=int, default=10, help="timed runs of each, in turns")
    args = p.parse_args()
    common.use_device(args.device)

    rng, rows = np.random.default_rng(0), []
    shapes = [((m, k), (k, n)) for m, k, n in PRODUCTS]
    shapes += [((1, s, s, c), (3, 3, c, c)) for s, c in CONVOLUTIONS]
    for shape, weights in shapes:
        x = rng.standard_normal(shape, np.float32)
        weight = rng.standard_normal(weights, np.float32)
        calls = {kind: call(x, weight, kind) for kind in args.types}
        exact = np.asarray(call(x, weight, "float32")())
        times = common.interleave(calls, args.repeats)
        row = {"": f"{' x '.join(map(str, shape))} by {' x '.join(map(str, weights))}"}
        for kind, seconds in times.items():
            error = (
                np.abs(np.asarray(calls[kind](), np.float32) - exact).max() / np.abs(exact).max()
            )
            row[kind] = f"{1e3 * min(seconds):.3g} ({error:.0e})"
        rows.append(row)
    common.print_table(rows)
    common.finish({"machine": common.machine(args.device)}, None)


if __name__ == "__main__":
    main()
