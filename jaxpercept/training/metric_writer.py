"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard; the first process alone writes."""

    def __init__(self, workdir: Path):
        self._active = jax.process_index() == 0
        if self._active:
            self._pictures = workdir / "pictures"
            self._pictures.mkdir(parents=True, exist_ok=True)
            self._lines = (workdir / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One JSON line, and one TensorBoard point a value."""
        if not self._active:
            return
        plain = {name: float(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **plain}) + "\n")
        for name, value in plain.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A PNG in `workdir/pictures`, and the same in TensorBoard."""
        if not self._active:
            return
        Image.fromarray(image).save(self._pictures / f"{name}_{step:06d}.png")
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._lines.close()
            self._board.close()
