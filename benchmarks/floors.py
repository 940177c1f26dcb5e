"""What a program needs at least on this machine: its operations over the peak, its bytes over the
bandwidth, whichever takes longer.

Peak and bandwidth are measured, not read from a data sheet: the rate of a large matrix product in
the same type, and of adding to an array that no cache holds. Operations are those of the traced
program (jaxpercept/training/flops.py). The bytes are its arguments, weights above all, and its
results, each once: what lies between could stay in a cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpercept.diagnosis.probes import probe_matmul
from jaxpercept.training.flops import count_flops

REPEATS = 5


class Peaks(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, dtype: str, before: Peaks | None = None) -> Peaks:
        """The best of several tries, those of an earlier measurement among them."""
        rate = max(probe_matmul(dtype)["tflops"] for _ in range(REPEATS))
        array = jnp.zeros(2**27 if jax.default_backend() == "gpu" else 2**25, jnp.float32)
        add = jax.jit(lambda x: x + 1, donate_argnums=0)  # new pages would take time of their own
        seconds = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            array = jax.block_until_ready(add(array))
            seconds.append(time.perf_counter() - began)
        found = cls(1e12 * rate, 2 * array.nbytes / min(seconds))
        if before is None:
            return found
        return cls(*(max(pair) for pair in zip(found, before, strict=True)))

    def __str__(self) -> str:
        return f"peak {self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s"


@dataclasses.dataclass
class Program:
    """A compiled program with its arguments: a call runs it and waits.

    Attributes:
        executable: as compiled.
        run: what a call does; give it another where arguments are donated.
        flops, bytes: what it computes, and what it reads and writes at least.
        compile_seconds: tracing and lowering included.
    """

    executable: jax.stages.Compiled
    run: Callable[[], Any]
    flops: float
    bytes: float
    compile_seconds: float

    def __call__(self) -> Any:
        return self.run()

    def floor(self, peaks: Peaks) -> float:
        """Seconds that this machine needs at least."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def compile_program(function: Callable, *arguments: Any) -> Program:
    """The program of a function, jitted already or not, for these arguments."""
    began = time.perf_counter()
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*arguments)
    executable = traced.lower().compile()
    seconds = time.perf_counter() - began
    memory = executable.memory_analysis()  # arguments that are not used are not counted
    nbytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    run = lambda: jax.block_until_ready(executable(*arguments))  # noqa: E731
    return Program(executable, run, count_flops(traced.jaxpr), nbytes, seconds)


def floor_row(
    label: str, program: Program, seconds: Sequence[float], peaks: Peaks, images: int
) -> Mapping[str, str]:
    """A row: the floor, the median time over it, images a second and the share of the peak."""
    floor, middle = program.floor(peaks), median(seconds)
    bound = "operations" if floor == program.flops / peaks.flops else "bytes"
    return {
        "": label,
        "GFLOP": f"{program.flops / 1e9:.4g}",
        "MB": f"{program.bytes / 1e6:.0f}",
        "floor s": f"{floor:.3g} ({bound})",
        "time / floor": f"{middle / floor:.2f}",
        "images/s": f"{images / middle:.3g}",
        "MFU": f"{program.flops / middle / peaks.flops:.0%}",
        "compile s": f"{program.compile_seconds:.1f}",
    }
