"""What a call of the pipeline returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpercept.errors import UserError


@dataclasses.dataclass(frozen=True)
class PerceptionOutput:
    """Predictions of N images, and what they are.

    Attributes:
        prediction: float32 [N, h, w, c], diffusers' Marigold conventions; [N T, h, w, 3] of a
            model of T intrinsic images; class numbers [N, h, w, 1]; heat maps [N, h, w, k].
        uncertainty: float32 [N, h, w, d], only where several predictions were merged.
        latent: float32 [N E, i, j, k], what the E predictions for each image were decoded from,
            padding included.
        kind: the kind of prediction, a key of `outputs.KINDS`.
        range: least and largest value.
        convention: what the values mean.
        processing_resolution: long side in pixels the network worked at; 0: the images' own.
        checkpoint: what was opened.
        step: the training step, where the checkpoint is a training workdir.
        seed: the seed given; deterministic models do not use it.
        num_inference_steps: denoising steps made.
        ensemble_size: predictions merged for each image.
        target_properties: of a model of intrinsic images, what its targets are.
        legend: what files and pictures need to know of classes (`palette`, a key of
            `data.palettes.PALETTES`) and joints (`keypoint_names`); empty for other kinds.
    """

    prediction: Float[np.ndarray, "n h w c"]
    uncertainty: Float[np.ndarray, "n h w d"] | None
    latent: Float[np.ndarray, "m i j k"]
    kind: str
    range: tuple[float, float]
    convention: str
    processing_resolution: int
    checkpoint: str
    step: int | None
    seed: int
    num_inference_steps: int = 1
    ensemble_size: int = 1
    target_properties: dict[str, Any] | None = None
    legend: dict[str, Any] = dataclasses.field(default_factory=dict)


def check_finite(prediction: Float[np.ndarray, "n h w c"], checkpoint: str) -> None:
    """Raises a UserError where a prediction is no number."""
    if not np.isfinite(prediction).all():
        raise UserError(
            f"{checkpoint or 'the model'} predicts values that are not finite: its weights are "
            "damaged, or need dtype float32 or bfloat16."
        )


def targets_apart(maps: Float[np.ndarray, "n h w c"], targets: int) -> Float[np.ndarray, "m h w d"]:
    """[n, h, w, t c] to [n t, h, w, c], as diffusers returns several targets."""
    if targets == 1:
        return maps
    n, h, w, c = maps.shape
    apart = maps.reshape(n, h, w, targets, c // targets).transpose(0, 3, 1, 2, 4)
    return apart.reshape(n * targets, h, w, c // targets)
