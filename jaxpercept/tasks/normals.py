"""Surface normals: unit vectors, +x right, +y up, +z towards the viewer."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpercept.tasks.base import Task

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class NormalsTask(Task):
    """Normals in camera coordinates; a channel of the image in [-1, 1] is a component.

    Attributes:
      full_z_range: the image's third channel is z in [-1, 1]. False: z is never negative and the
        channel's range stands for [0, 1] (`use_full_z_range` of diffusers' Marigold).
    """

    full_z_range: bool = True

    name: ClassVar[str] = "normals"
    kind: ClassVar[str] = "normals"
    channels: ClassVar[int] = 3
    merge: ClassVar[str] = "normals"

    def to_prediction(self, decoded: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Clipped to [-1, 1] and brought to unit length."""
        normals = jnp.clip(decoded.astype(jnp.float32), -1, 1)
        if not self.full_z_range:
            normals = normals.at[..., 2].multiply(0.5).at[..., 2].add(0.5)
        return normalize(normals)

    def after_resize(self, prediction: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Unit length again."""
        return normalize(prediction)

    def mirror(self, prediction: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Mirrored, x negated."""
        return prediction[:, :, ::-1] * jnp.asarray([-1.0, 1.0, 1.0])[None, None, None]


def normalize(normals: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Divided by their length, which counts as at least 1e-6, as diffusers does."""
    length = jnp.linalg.norm(normals, axis=-1, keepdims=True)
    return normals / jnp.maximum(length, _EPS)
