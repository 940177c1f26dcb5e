"""What a step costs: compilation, arithmetic, memory, time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from jaxpercept.training.communication import sent_by_kind
from jaxpercept.training.flops import count_flops

# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets.
PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def compile_step(step_fn: Any, state: Any, frozen: Any, batch: Any, mesh: Mesh):
    """Compile the step once, ahead of time, and say what it costs.

    Returns:
        The compiled step, and the facts for `run.json`: FLOP and bytes are per device and step.
    """
    began = time.perf_counter()
    traced = step_fn.trace(state, frozen, batch)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    trained = sum(x.size for x in jax.tree.leaves(state["params"]))
    sent = sent_by_kind(compiled.as_text(), mesh.size) if mesh.size > 1 else {}
    facts = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": int(mesh.size),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "compile_seconds": seconds,
        "flops": count_flops(traced.jaxpr) / mesh.size,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", 0),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", 0),
        "sent_bytes": sent,
        "trained_weights": trained,
        "all_weights": trained + sum(x.size for x in jax.tree.leaves(frozen)),
    }
    logging.info(
        "compiled in %.1f s: %.1f M of %.1f M weights trained, %.2f GFLOP and %.0f MB of "
        "temporary memory a step and device",
        seconds,
        facts["trained_weights"] / 1e6,
        facts["all_weights"] / 1e6,
        facts["flops"] / 1e9,
        facts["temporary_bytes"] / 1e6,
    )
    if sent:
        logging.info(
            "each device sends %.1f MB a step: %s",
            sum(sent.values()) / 1e6,
            ", ".join(f"{size / 1e6:.1f} MB {kind}" for kind, size in sent.items()),
        )
    return compiled, facts


class Clock:
    """Times of the steps since the last reading."""

    def __init__(self, batch_size: int, flops: float):
        self._batch_size, self._flops = batch_size, flops
        kind = jax.devices()[0].device_kind
        self._peak = next((peak for name, peak in PEAK.items() if name in kind), 0.0)
        self.start()

    def start(self) -> None:
        """Forget what was before."""
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()

    def tick(self) -> None:
        """A step is done."""
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within: nothing but waiting for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """What a step took since the last reading.

        Returns:
            `step_seconds`, `images_per_second`; `input_wait`, the share of the time in which the
            host waited for a batch, which the devices cannot have idled longer than for want of
            data; `mfu`, the share of their peak, on known devices.
        """
        elapsed = time.perf_counter() - self._began
        seconds, waited = elapsed / max(self._steps, 1), self._waited / elapsed
        self.start()
        values = {
            "step_seconds": seconds,
            "images_per_second": self._batch_size / seconds,
            "input_wait": waited,
        }
        if self._peak and self._flops:
            values["mfu"] = self._flops / seconds / self._peak
        return values
