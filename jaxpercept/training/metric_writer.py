"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, `pictures/`, Weights & Biases."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxpercept.training.dashboard import Dashboard


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard; the first process alone writes.

    Args:
        workdir: the run's folder.
        start: the step the run goes on from. What was written of later steps, which are about to
            be trained again, is removed.
        project: of Weights & Biases; "": it is not used.
        config: what to tell it of the run.
    """

    def __init__(
        self,
        workdir: Path,
        start: int = 0,
        *,
        project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._dashboard: Dashboard | None = None
        if self._active:
            self._workdir, self._pictures = workdir, workdir / "pictures"
            self._pictures.mkdir(parents=True, exist_ok=True)
            if project:
                self._dashboard = Dashboard(project, workdir, config or {})
            self._open(start)

    def _open(self, start: int) -> None:
        _forget_after(self._workdir / "metrics.jsonl", start)
        self._lines = (self._workdir / "metrics.jsonl").open("a", buffering=1)
        self._board = _summary_writer()(str(self._workdir / "tensorboard"), purge_step=start + 1)

    def go_back(self, step: int) -> None:
        """Forget what was written of later steps."""
        if self._active:
            self._close_files()
            self._open(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One JSON line, and one TensorBoard point a value. Values that are not finite are null."""
        if not self._active:
            return
        plain = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, **plain}) + "\n")
        for name, value in plain.items():
            self._board.add_scalar(name, np.nan if value is None else value, step)
        if self._dashboard is not None:
            self._dashboard.scalars(step, plain)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A PNG in `workdir/pictures`, and the same in TensorBoard."""
        if not self._active:
            return
        Image.fromarray(image).save(self._pictures / f"{name}_{step:06d}.png")
        self._board.add_image(name, image, step, dataformats="HWC")
        if self._dashboard is not None:
            self._dashboard.picture(step, name, image)

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._close_files()
            if self._dashboard is not None:
                self._dashboard.close()

    def _close_files(self) -> None:
        self._lines.close()
        self._board.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of later steps, and a line that was cut off when the run was killed."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)


def _summary_writer() -> type:
    """tensorboardX's writer, imported late, for it takes a second, and without torch.

    Where torch is installed tensorboardX would import it, which takes seconds and memory.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter
