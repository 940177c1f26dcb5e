"""Traces of some steps, to look at where their time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxpercept.errors import UserError

FOLDER = "profile"


def traced_steps(text: str) -> range:
    """ "10:15" as the steps from 10 to 15, both included; "" as none.

    Raises:
        UserError: it is nothing of these.
    """
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()) or not 1 <= int(first) <= int(last):
        raise UserError(
            f"config.profile {text!r} is not FIRST:LAST: write it as 10:15 to trace six steps."
        )
    return range(int(first), int(last) + 1)


class Trace:
    """Traces the steps that `config.profile` names, once, into `workdir/profile`.

    Every process writes its own trace: for XProf and TensorBoard, and `perfetto_trace.json.gz` for
    ui.perfetto.dev.
    """

    def __init__(self, steps: str, workdir: Path):
        self._steps, self._folder = traced_steps(steps), workdir / FOLDER
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within: this step is dispatched."""
        if number in self._steps and not self._running:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def done(self, number: int, outputs: Any) -> None:
        """End the trace where this step was its last, once the devices are through with it."""
        if self._running and number >= self._steps[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """End the trace, if one is running."""
        if self._running:
            self._running, self._steps = False, range(0)
            jax.profiler.stop_trace()
            logging.info("traces of the steps in %s", self._folder)
