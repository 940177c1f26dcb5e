"""Referring segmentation: the object that a sentence speaks of, painted over or as a mask.

InstructPix2Pix (arXiv 2211.09800) edits images by instructions; ADDP (arXiv 2504.11457) trains it
to paint the object that is spoken of red, and reads the mask off the colours
[`refseg_dataset.py`, `evaluate.py`].
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpercept import losses
from jaxpercept.diffusion.corruption import corrupt_colour, corrupt_mask
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Terms, image_terms, to_signed
from jaxpercept.tasks.masks import ForegroundTask

RED = np.array([1, 0, 0], np.float32)
"""What the object is painted in, in [0, 1]."""
NEAR = 50 / 255
"""How far a pixel of the object may be from it, as ADDP has it."""


@dataclasses.dataclass(frozen=True)
class ReferringTask(ForegroundTask):
    """The object that the prompt refers to.

    Attributes:
      paint: the target is the image with the object in solid red. False: a mask, white on black,
        as of the other foreground tasks.
      emphasis: a latent's cell weighs 1 + emphasis in its loss where the object fills it: what is
        referred to is small, and the rest of the picture is soon learned. ADDP has none.
    """

    paint: bool = True
    emphasis: float = 0.0

    name: ClassVar[str] = "referring"
    kind: ClassVar[str] = "mask"
    fields: ClassVar[tuple[str, ...]] = ("referred", "valid")
    reads_text: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """Of what `to_prediction` gives and resizing keeps: colours, or the mask."""
        return 3 if self.paint else 1

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """The image, painted, or the mask as a grey image; background where it is invalid.

        Args:
          batch: `referred` [b,h,w,1] in [0, 1], `valid` [b,h,w,1]; to be painted, `rgb` [b,h,w,3].
        """
        if not self.paint:
            return super().encode_target(batch)
        red = jnp.asarray(RED)[None]
        return Target(painted(batch["rgb"], self.foreground(batch), red), batch["valid"])

    def cell_weights(
        self, batch: Mapping[str, Array], factor: int
    ) -> Float[Array, "b i j 1"] | None:
        """By the share of each cell that the object fills."""
        if not self.emphasis:
            return None
        share = losses.cells(self.foreground(batch), factor).mean(axis=(2, 4))[..., None]
        return 1 + self.emphasis * share

    def corrupt(
        self, batch: Mapping[str, Array], strength: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        """The mask moved and cut; what is painted has another colour, too."""
        if not self.paint:
            return super().corrupt(batch, strength, keys)
        keys = jax.vmap(jax.random.split)(keys)
        mask = corrupt_mask(self.foreground(batch), strength, keys[:, 0])
        return painted(batch["rgb"], mask, corrupt_colour(RED, strength, keys[:, 1]))

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Between colours, or as of the other foreground tasks."""
        if not self.paint:
            return super().loss_terms(decoded, target, keys)
        return image_terms(decoded, target)

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Also refuses losses of masks where colours are predicted."""
        super().check_weights(weights)
        if self.paint and (wrong := sorted(set(weights) - {"mse", "l1"})):
            raise UserError(
                f"config.method.pixel_weights has {wrong[0]!r}, which a painted image has not: use "
                "mse or l1, or set config.task_options.paint=False."
            )

    def finish(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        """A painted image's score, see `closeness`; a mask as it is."""
        return closeness(prediction, RED) if self.paint else prediction


def closeness(
    colours: Float[Array, "b h w 3"], colour: Float[np.ndarray, "3"]
) -> Float[Array, "b h w 1"]:
    """clip(1 − d / 100, 0, 1), d the distance to a colour in 8-bit colours.

    Above 0.5 is ADDP's rule, d < 50; the rest of the range says how clear the case is.

    Args:
      colours, colour: in [0, 1].
    """
    away = colours - jnp.asarray(colour)[None, None, None]
    return jnp.clip(1 - jnp.linalg.norm(away, axis=-1, keepdims=True) / (2 * NEAR), 0, 1)


def painted(
    rgb: Array, mask: Float[Array, "b h w 1"], colour: Float[Array, "#b 3"]
) -> Float[Array, "b h w 3"]:
    """The image in [-1, 1] with a colour of [0, 1] where the mask is."""
    return mask * (colour * 2 - 1)[:, None, None] + (1 - mask) * to_signed(rgb)
