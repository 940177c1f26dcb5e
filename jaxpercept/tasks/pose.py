"""Human pose: the joints of one person as heat maps.

The paper's first version names the task; no code for it was released, so this is our design. A head
with a channel for each joint learns Gaussian heat maps (Xiao et al., arXiv 1804.06208), since the
autoencoder's three channels cannot tell seventeen joints apart reliably.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpercept import losses
from jaxpercept.data.joints import FLIP_PAIRS, KEYPOINTS
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Task, Terms

# The other side of each joint.
_OTHER = dict(FLIP_PAIRS) | {right: left for left, right in FLIP_PAIRS}
_MIRRORED = np.array([_OTHER.get(joint, joint) for joint in range(len(KEYPOINTS))])


@dataclasses.dataclass(frozen=True)
class PoseTask(Task):
    """COCO's 17 joints.

    Attributes:
      sigma: standard deviation of a joint's blob, as a share of the image's height (2 of 64 cells
        in the paper above).
    """

    sigma: float = 1 / 32

    name: ClassVar[str] = "pose"
    kind: ClassVar[str] = "keypoints"
    channels: ClassVar[int] = len(KEYPOINTS)
    fields: ClassVar[tuple[str, ...]] = ("keypoints",)
    loss_names: ClassVar[tuple[str, ...]] = ("mse", "l1", "location")
    default_weights: ClassVar[Mapping[str, float]] = {"mse": 1.0, "location": 0.02}

    def __post_init__(self) -> None:
        if not 0 < self.sigma < 1:
            raise UserError(f"config.task_options.sigma is {self.sigma}: give a share above 0.")

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """exp(−r² / 2σ²) around each joint, in [-1, 1]; absent joints have no blob.

        Joints outside of the picture or not annotated count as absent: their map is learnt to be
        empty, so that its height tells whether there is one.

        Args:
          batch: `keypoints` [b,k,3] (x, y in pixels, visibility 0 = absent), `rgb` [b,h,w,3].

        Returns:
          The heat maps as `values`; the image shows their maximum.
        """
        height, width = batch["rgb"].shape[1:3]
        points = batch["keypoints"].astype(jnp.float32)[:, None, None]
        x = jnp.arange(width)[None, None, :, None] + 0.5 - points[..., 0]
        y = jnp.arange(height)[None, :, None, None] + 0.5 - points[..., 1]
        blobs = jnp.exp(-(x**2 + y**2) / (2 * (self.sigma * height) ** 2))
        maps = jnp.where(points[..., 2] > 0, blobs, 0) * 2 - 1
        image = jnp.repeat(maps.max(axis=-1, keepdims=True), 3, axis=-1)
        return Target(image, jnp.ones((*maps.shape[:3], 1), bool), maps)

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Between heat maps in [-1, 1]."""
        return {
            "mse": lambda: losses.mse(decoded, target.values, target.mask),
            "l1": lambda: losses.l1(decoded, target.values, target.mask),
            "location": lambda: losses.location(decoded, target.values, target.mask),
        }

    def mirror(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Mirrored; left and right joints change places."""
        return prediction[:, :, ::-1, _MIRRORED]
