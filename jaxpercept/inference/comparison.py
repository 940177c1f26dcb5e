"""An image, its truth and its prediction beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from jaxpercept.inference.outputs import pictures
from jaxpercept.inference.panel import colour_limits, spectral
from jaxpercept.inference.skeleton import draw_skeleton

# The colour of what is not measured.
_UNKNOWN = 40
_METRES = ("affine_depth", "affine_disparity")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a panel.

    Attributes:
        kind: a key of `outputs.KINDS`.
        rgb: the input image.
        truth: a map as the prediction is; of depth and disparity metres; of keypoints [k, 3] (x, y,
            visibility).
        valid: where `truth` is measured.
        prediction: of depth and disparity in metres, that is, aligned to the truth.
        legend: see `outputs.legend`.
    """

    kind: str
    rgb: UInt8[np.ndarray, "h w 3"]
    truth: Shaped[np.ndarray, "*shape"]
    valid: Bool[np.ndarray, "h w 1"]
    prediction: Float[np.ndarray, "h w c"]
    legend: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def pictures(self) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        """Input, truth and prediction; what is not measured is grey."""
        if self.kind in _METRES:
            truth, prediction = self._depths()
        elif self.kind == "keypoints":
            names = {"names": self.legend["keypoint_names"]} if self.legend else {}
            truth = draw_skeleton(self.truth, self.rgb, **names)
            prediction = self._drawn(self.prediction, image=self.rgb)
        else:
            drawn = self._drawn(self.truth, image=self.rgb)
            truth = np.where(self.valid, drawn, np.uint8(_UNKNOWN))
            prediction = self._drawn(self.prediction, image=self.rgb)
        return {"input": self.rgb, "truth": truth, "prediction": prediction}

    def _depths(self) -> tuple[np.ndarray, np.ndarray]:
        """In one range of colours, the 2 % to 98 % quantiles of the valid truth."""
        limits = colour_limits(self.truth, self.valid)
        truth = np.where(self.valid, self.truth, np.nan)
        return spectral(truth[..., 0], limits), spectral(self.prediction[..., 0], limits)

    def _drawn(self, values: Shaped[np.ndarray, "h w c"], **options: Any) -> np.ndarray:
        (drawn,) = pictures(self.kind, values.astype(np.float32), **self.legend, **options).values()
        return drawn
