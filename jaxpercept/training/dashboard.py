"""Weights & Biases, for those who want it: the same numbers and pictures as in the run's folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxpercept.errors import UserError

ID_FILE = "wandb_id.txt"


class Dashboard:
    """A run of a project at Weights & Biases; continued where the training is continued.

    WANDB_MODE=offline keeps everything below `workdir/wandb`, for `wandb sync`.

    Args:
        project: its name.
        workdir: the run's folder, which keeps the id.
        config: what the run was told, for the project's tables.

    Raises:
        UserError: wandb is not installed, or does not start.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "config.wandb needs Weights & Biases: pip install 'jaxpercept[wandb]', or leave "
                "config.wandb empty."
            ) from error
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                dir=workdir,
                name=workdir.name,
                id=_identity(workdir),
                resume="allow",
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not start ({error}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave config.wandb empty."
            ) from error
        # A run that goes back to a checkpoint has some steps twice; by our own count they agree.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point a value; those that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        self._run.log({"step": step, **known})

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture."""
        self._run.log({"step": step, f"pictures/{name}": self._image(image)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _identity(workdir: Path) -> str:
    file = workdir / ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()
