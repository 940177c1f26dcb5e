"""Surface normals: unit vectors, +x right, +y up, +z towards the viewer."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpercept import losses
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Task, Terms

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class NormalsTask(Task):
    """Normals in camera coordinates; a channel of the image in [-1, 1] is a component.

    Attributes:
      full_z_range: the image's third channel is z in [-1, 1]. False: z is never negative and the
        channel's range stands for [0, 1] (`use_full_z_range` of diffusers' Marigold).
      uncertainty: a head gives a fourth channel, the concentration kappa of Bae et al.
        (arXiv 2109.09881), which the loss "angular_kappa" learns.
    """

    full_z_range: bool = True
    uncertainty: bool = False

    name: ClassVar[str] = "normals"
    kind: ClassVar[str] = "normals"
    channels: ClassVar[int] = 3
    merge: ClassVar[str] = "normals"
    fields: ClassVar[tuple[str, ...]] = ("normals", "valid")
    loss_names: ClassVar[tuple[str, ...]] = ("angular", "angular_kappa", "mse", "l1")
    # GenPercept's main run.
    default_weights: ClassVar[Mapping[str, float]] = {"angular": 1.0}

    @property
    def head_channels(self) -> int:
        """Three, and one for the concentration."""
        return 4 if self.uncertainty else 3

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """The normals as an image; pixels without one (length 0) are masked.

        Args:
          batch: `normals` [b,h,w,3], `valid` [b,h,w,1].
        """
        normals = batch["normals"].astype(jnp.float32)
        mask = batch["valid"] & jnp.any(normals != 0, axis=-1, keepdims=True)
        image = self._image(jnp.where(mask, normals, 0))
        return Target(jnp.clip(image, -1, 1), mask)

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Angles are taken between vectors, the other losses between images."""
        decoded, image, mask = decoded.astype(jnp.float32), target.image, target.mask
        vectors, truth = self._vectors(decoded), self._vectors(image)
        return {
            "angular": lambda: losses.angular(vectors[..., :3], truth, mask),
            "angular_kappa": lambda: losses.angular_kappa(vectors, truth, mask),
            "mse": lambda: losses.mse(decoded[..., :3], image, mask),
            "l1": lambda: losses.l1(decoded[..., :3], image, mask),
        }

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Also refuses a loss of the concentration where none is predicted."""
        super().check_weights(weights)
        if "angular_kappa" in weights and not self.uncertainty:
            raise UserError(
                "config.method.pixel_weights has 'angular_kappa', which needs "
                "config.task_options.uncertainty=True and a DPT head."
            )

    def _vectors(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Of any length."""
        if self.full_z_range:
            return image
        return image.at[..., 2].multiply(0.5).at[..., 2].add(0.5)

    def _image(self, vectors: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What `_vectors` undoes."""
        if self.full_z_range:
            return vectors
        return vectors.at[..., 2].multiply(2).at[..., 2].add(-1)

    def to_prediction(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        """Clipped to [-1, 1] and brought to unit length."""
        return normalize(self._vectors(jnp.clip(decoded[..., :3].astype(jnp.float32), -1, 1)))

    def from_head(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        """Brought to unit length before they are clipped: a head's vectors have any."""
        return self._image(normalize(self._vectors(decoded[..., :3])))

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
