"""Affine-invariant depth: the target image, its losses and its prediction (near −1, far +1)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpercept import losses
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import AffineTask


@dataclasses.dataclass(frozen=True)
class DepthTask(AffineTask):
    """Depth up to scale and shift, as GenPercept and Marigold train it.

    Attributes:
      vertical_gradient: reproduce GenPercept's gradient loss as released, which compares rows only.
    """

    vertical_gradient: bool = False

    name: ClassVar[str] = "depth"
    kind: ClassVar[str] = "affine_depth"
    loss_names: ClassVar[tuple[str, ...]] = ("mse", "l1", "ssi", "grad")
    # GenPercept's main depth runs.
    default_weights: ClassVar[Mapping[str, float]] = {"mse": 1.0, "ssi": 0.5, "grad": 2.0}

    def encode_target(
        self, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, "b h w 3"], Bool[Array, "b h w 1"]]:
        """The training image and where it is defined.

        d' = clip(2 (d − q02) / (q98 − q02) − 1, −1, 1), repeated to three channels, with the 2 %
        and 98 % quantiles of valid depth (`src/util/depth_transform.py`, Marigold and GenPercept).

        Args:
          batch: `depth` [b,h,w,1] metres, `valid` [b,h,w,1], `depth_range` [b,2] = (q02, q98).

        Returns:
          target in [−1, 1] and its mask. Constant depth (q02 = q98) has no affine-invariant
          content: its target is 0 and its mask empty. The target is finite everywhere.
        """
        depth = batch["depth"].astype(jnp.float32)
        near, far = batch["depth_range"].astype(jnp.float32).T[:, :, None, None, None]
        usable = far > near  # False for NaN as well.
        span = jnp.where(usable, far - near, 1)
        scaled = jnp.clip((depth - jnp.where(usable, near, 0)) / span * 2 - 1, -1, 1)
        target = jnp.where(usable & jnp.isfinite(depth), scaled, 0)
        return jnp.repeat(target, 3, axis=-1), batch["valid"] & usable

    def decode(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        """Mean of a decoded image's channels, float32, not clamped."""
        return image.astype(jnp.float32).mean(axis=-1, keepdims=True)

    def pixel_losses(
        self,
        decoded: Float[Array, "b h w c"],
        target: Float[Array, "b h w 3"],
        mask: Bool[Array, "b h w 1"],
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Weighted loss terms by name; their sum is the pixel loss.

        Args:
          decoded: image from the VAE decoder (or a one-channel map), nominally in [−1, 1].
          target, mask: from `encode_target`.
          weights: by loss name, of `loss_names`; `default_weights` if None.

        Raises:
          UserError: a weight is given for a loss that this task does not have.
        """
        weights = self.default_weights if weights is None else weights
        if unknown := sorted(set(weights) - set(self.loss_names)):
            known = ", ".join(self.loss_names)
            raise UserError(f"The depth task has no loss {unknown[0]!r}; choose from {known}.")
        pred, truth = self.decode(decoded), target[..., :1].astype(jnp.float32)
        terms = {
            "mse": lambda: losses.mse(pred, truth, mask),
            "l1": lambda: losses.l1(pred, truth, mask),
            # In [1, 3] as GenPercept has them. The shift cancels in the least-squares fit, but the
            # median alignment of inverted predictions divides by a median that must be positive.
            "ssi": lambda: losses.ssi(pred + 2, truth + 2, mask),
            "grad": lambda: losses.gradient(pred, truth, mask, self.vertical_gradient),
        }
        return {name: weight * terms[name]() for name, weight in weights.items()}


DEPTH = DepthTask()
