"""Maps of the foreground: dichotomous segmentation and matting."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpercept import losses
from jaxpercept.diffusion.corruption import corrupt_mask
from jaxpercept.tasks.base import Target, Task, Terms


def drawn(mask: Float[Array, "b h w 1"]) -> Float[Array, "b h w 3"]:
    """A map in [0, 1] as a grey image in [-1, 1]."""
    return jnp.repeat(mask * 2 - 1, 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class ForegroundTask(Task):
    """A map in [0, 1], drawn from black to white."""

    fields: ClassVar[tuple[str, ...]] = ("alpha", "valid")
    loss_names: ClassVar[tuple[str, ...]] = ("mse", "l1", "bce", "iou", "grad")
    # GenPercept's main runs: of the losses here, it uses no other.
    default_weights: ClassVar[Mapping[str, float]] = {"mse": 1.0}
    corruptible: ClassVar[bool] = True

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """2 alpha − 1, repeated to three channels; background where it is invalid.

        GenPercept stretches each map to [0, 1] first, which changes only a matte that never reaches
        0 or 1; here it means what it says.

        Args:
          batch: `alpha` [b,h,w,1] in [0, 1], `valid` [b,h,w,1].
        """
        return Target(drawn(self.foreground(batch)), batch["valid"])

    def foreground(self, batch: Mapping[str, Array]) -> Float[Array, "b h w 1"]:
        """The map in [0, 1] that the first of `fields` is, 0 where it is invalid."""
        truth = batch[self.fields[0]].astype(jnp.float32)
        return jnp.clip(jnp.where(batch["valid"], truth, 0), 0, 1)

    def corrupt(
        self, batch: Mapping[str, Array], strength: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        """With the foreground moved and cut."""
        return drawn(corrupt_mask(self.foreground(batch), strength, keys))

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """In [-1, 1], but for "bce" and "iou", which read [0, 1] as probabilities."""
        pred, truth, mask = self.to_map(decoded), target.image[..., :1], target.mask
        return {
            "mse": lambda: losses.mse(pred, truth, mask),
            "l1": lambda: losses.l1(pred, truth, mask),
            "bce": lambda: losses.bce((pred + 1) / 2, (truth + 1) / 2, mask),
            "iou": lambda: losses.soft_iou((pred + 1) / 2, (truth + 1) / 2, mask),
            "grad": lambda: losses.gradient(pred, truth, mask),
        }


@dataclasses.dataclass(frozen=True)
class DichotomousTask(ForegroundTask):
    """The most salient object's mask (dichotomous segmentation)."""

    name: ClassVar[str] = "dis"
    kind: ClassVar[str] = "mask"


@dataclasses.dataclass(frozen=True)
class MattingTask(ForegroundTask):
    """The foreground's opacity."""

    name: ClassVar[str] = "matting"
    kind: ClassVar[str] = "alpha"
