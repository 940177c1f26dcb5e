"""What every task says about its prediction, whichever model made it."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Task:
    """The meaning of a predicted image.

    Subclasses that can be trained also have `encode_target`, `pixel_losses` and `loss_names`.

    Attributes:
      name: as in configs and `--task`.
      kind: a key of `inference.outputs.KINDS`.
      channels: of the prediction: 1 takes the mean of an image's three.
      merge: how several predictions for an image become one: "affine" (each has a scale and a shift
        of its own), "normals" or "average" (a median, pixel by pixel).
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    channels: ClassVar[int] = 1
    merge: ClassVar[str] = "average"

    def to_prediction(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The decoded image, not clamped, as a map in [0, 1]."""
        decoded = decoded.astype(jnp.float32)
        if self.channels == 1:
            decoded = decoded.mean(axis=-1, keepdims=True)
        return (jnp.clip(decoded, -1, 1) + 1) / 2

    def after_resize(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What resizing has spoilt, put right."""
        return prediction

    def mirror(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The prediction for the image mirrored left-right, from that for the image."""
        return prediction[:, :, ::-1]

    @property
    def merge_options(self) -> dict[str, Any]:
        """Options of `merge` that the model's training decides."""
        return {}


@dataclasses.dataclass(frozen=True)
class AffineTask(Task):
    """A map whose scale and shift mean nothing, unless the model says so.

    Attributes:
      scale_invariant, shift_invariant: whether each prediction has a scale and a shift of its own,
        which ensembles then align.
    """

    scale_invariant: bool = True
    shift_invariant: bool = True

    merge: ClassVar[str] = "affine"

    @property
    def merge_options(self) -> dict[str, Any]:
        """What an ensemble may align."""
        return {
            "scale_invariant": self.scale_invariant,
            "shift_invariant": self.shift_invariant,
        }
