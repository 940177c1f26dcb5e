"""Affine-invariant depth and disparity: target images from metres, and back."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept.tasks.base import AffineTask, Target


@dataclasses.dataclass(frozen=True)
class DepthTask(AffineTask):
    """Depth up to scale and shift, as GenPercept and Marigold train it: near -1, far +1."""

    name: ClassVar[str] = "depth"
    kind: ClassVar[str] = "affine_depth"
    fields: ClassVar[tuple[str, ...]] = ("depth", "valid", "depth_range")

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """d' = clip(2 (d − q02) / (q98 − q02) − 1, −1, 1), repeated to three channels.

        q02 and q98 are the 2 % and 98 % quantiles of the valid depth
        [`src/util/depth_transform.py`, Marigold and GenPercept].

        Args:
          batch: `depth` [b,h,w,1] metres, `valid` [b,h,w,1], `depth_range` [b,2] = (q02, q98).

        Returns:
          Constant depth (q02 = q98) has no affine-invariant content: its target is 0 and its mask
          empty. The target is finite everywhere.
        """
        return _between(batch["depth"], batch["depth_range"], batch["valid"])


@dataclasses.dataclass(frozen=True)
class DisparityTask(AffineTask):
    """Inverse depth up to scale and shift: far -1, near +1.

    Attributes:
      min_max: reproduce GenPercept's normalisation as released, between the least and the largest
        disparity, where a single near pixel decides. By default the range is that of the depth's
        quantiles, as Lotus has it ("trunc_disparity").
    """

    min_max: bool = False

    name: ClassVar[str] = "disparity"
    kind: ClassVar[str] = "affine_disparity"
    fields: ClassVar[tuple[str, ...]] = ("depth", "valid", "disparity_range")

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """u = clip(2 (1/d − low) / (high − low) − 1, −1, 1), repeated to three channels.

        low and high are 1/q98 and 1/q02 [Lotus `utils/hypersim_dataset.py`], or with `min_max` the
        least and the largest 1/d [`src/util/depth_transform.py`, GenPercept: the quantiles there
        cancel out]. Invalid pixels are −1, as far as anything.

        Args:
          batch: `depth` [b,h,w,1] metres, `valid` [b,h,w,1], `disparity_range` [b,4] in 1/metres,
            see `data.transforms.disparity_range`.
        """
        depth, valid = batch["depth"].astype(jnp.float32), batch["valid"]
        usable = valid & (depth > 0)
        disparity = jnp.where(usable, 1 / jnp.where(usable, depth, 1), 0)
        limits = batch["disparity_range"]
        return _between(disparity, limits[:, 2:] if self.min_max else limits[:, :2], usable)


def _between(values: Float[Array, "b h w 1"], limits: Float[Array, "b 2"], valid: Array) -> Target:
    """Values between the limits as a grey image in [-1, 1]."""
    values = values.astype(jnp.float32)
    low, high = limits.astype(jnp.float32).T[:, :, None, None, None]
    usable = high > low  # False for NaN as well.
    span = jnp.where(usable, high - low, 1)
    scaled = jnp.clip((values - jnp.where(usable, low, 0)) / span * 2 - 1, -1, 1)
    image = jnp.where(usable & jnp.isfinite(values), scaled, 0)
    return Target(jnp.repeat(image, 3, axis=-1), valid & usable)


DEPTH = DepthTask()
