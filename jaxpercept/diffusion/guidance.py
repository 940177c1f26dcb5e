"""Guidance: what the network says under several conditions, mixed into one output.

With D a text, D⁻ one for what is not meant, ∅ nothing, and e(I, D) the output at x_t for an image
and a text, each way to guide is a weighted sum over such conditions, the weights adding up to 1:

    two scales  e(∅, ∅) + s_I (e(I, ∅) − e(∅, ∅)) + s_T (e(I, D) − e(I, ∅))
    correction  (1 + w) e(I, D) − w e(I, D⁻)

The first is InstructPix2Pix's (arXiv 2211.09800, eq. 3), with s_I = s_T = 1 for no guidance, and
with s_I = 1 classifier-free guidance of the text (arXiv 2207.12598). The second is ADDP's (arXiv
2504.11457, figure 2), which does not say how the two go together. There are two ways here, both
ours, and each is ADDP's formula where nothing else guides:

    "add"      two scales + w (e(I, D) − e(I, D⁻)); the formula for s_I = s_T = 1
    "replace"  two scales with D⁻ in the place of the empty text beside the image; the formula for
               s_I = 1 and s_T = 1 + w

Because weights add up to 1 it does not matter whether outputs are mixed as ε, v or x_0: at a given
x_t each is an affine function of the others.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxpercept.errors import UserError

COMBINE = ("add", "replace")


class Text(NamedTuple):
    """What to look for in each image of a batch, encoded.

    Attributes:
        wanted: D.
        unwanted: D⁻, None where nothing is to be corrected.
    """

    wanted: Float[Array, "b l d"]
    unwanted: Float[Array, "b l d"] | None = None


class Branch(NamedTuple):
    """A condition: which text ("wanted", "unwanted" or "empty"), and whether the image is seen."""

    text: str
    image: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Conditions, known when a program is compiled, and their weights, which are its arguments."""

    weights: Float[Array | np.ndarray, " k"]
    branches: tuple[Branch, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly text, image and correction pull; see the module.

    Attributes:
        text: s_T.
        image: s_I.
        correction: w, of "add".
        combine: "add" or "replace".

    Raises:
        UserError: a scale is not finite or negative, or an unknown way to combine.
    """

    text: float = 1.0
    image: float = 1.0
    correction: float = 1.0
    combine: str = "add"

    def __post_init__(self) -> None:
        for name in ("text", "image", "correction"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"The guidance of the {name} is {value}: give 0 or more.")
        if self.combine not in COMBINE:
            raise UserError(
                f"Corrections are combined by {self.combine!r}: use {' or '.join(COMBINE)}."
            )

    def mixture(self, *, corrected: bool = False) -> Mixture:
        """The conditions and their weights; those without weight are left out.

        Args:
            corrected: whether there is a D⁻.
        """
        text, image = self.text, self.image
        weights = {
            Branch("wanted"): text,
            Branch("empty"): image - text,
            Branch("empty", image=False): 1 - image,
        }
        if corrected and self.combine == "replace":
            weights[Branch("unwanted")] = weights.pop(Branch("empty"))
        elif corrected:
            weights[Branch("wanted")] += self.correction
            weights[Branch("unwanted")] = -self.correction
        weights = {branch: weight for branch, weight in weights.items() if weight}
        return Mixture(np.array([*weights.values()], np.float32), tuple(weights))
