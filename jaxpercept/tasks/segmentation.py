"""Semantic segmentation, painted in a palette's colours or as class logits."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpercept import losses
from jaxpercept.data.palettes import PALETTES
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Task, Terms


@dataclasses.dataclass(frozen=True)
class SegmentationTask(Task):
    """Class numbers of a palette.

    GenPercept paints classes and reads the colours through the autoencoder (its mode "seg"); which
    colours, and how they become classes again, is not released. Here the palette is one of
    `data.palettes`, and a pixel is of the class whose colour is nearest.

    Attributes:
      palette: name of the classes and their colours.
      logits: a head gives one channel for each class, in the autoencoder's place.
    """

    palette: str = ""
    logits: bool = False

    name: ClassVar[str] = "semantic"
    kind: ClassVar[str] = "classes"
    fields: ClassVar[tuple[str, ...]] = ("classes", "valid")
    loss_names: ClassVar[tuple[str, ...]] = ("mse", "l1", "cross_entropy")

    def __post_init__(self) -> None:
        if self.palette not in PALETTES:
            raise UserError(
                f"The palette {self.palette!r} is unknown: use one of {', '.join(PALETTES)}."
            )

    @property
    def default_weights(self) -> Mapping[str, float]:
        """The only loss of class logits; GenPercept's of colours."""
        return {"cross_entropy": 1.0} if self.logits else {"mse": 1.0}

    @property
    def channels(self) -> int:
        """Of what `to_prediction` gives and resizing keeps: colours, or a probability a class."""
        return self.num_classes if self.logits else 3

    @property
    def num_classes(self) -> int:
        """The palette's."""
        return len(PALETTES[self.palette].names)

    @property
    def colours(self) -> Float[np.ndarray, "k 3"]:
        """In [-1, 1]."""
        return np.asarray(PALETTES[self.palette].colours, np.float32) / 127.5 - 1

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """Classes painted in the palette's colours; void is masked.

        Args:
          batch: `classes` int32 [b,h,w,1], 255 for void, `valid` [b,h,w,1].
        """
        classes = batch["classes"]
        mask = batch["valid"] & (classes >= 0) & (classes < self.num_classes)
        classes = jnp.where(mask, classes, 0)
        image = jnp.where(mask, jnp.asarray(self.colours)[classes[..., 0]], -1)
        return Target(image, mask, classes)

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Between colours, or between logits and classes."""
        decoded = decoded.astype(jnp.float32)
        if self.logits:
            return {
                "cross_entropy": lambda: losses.cross_entropy(decoded, target.values, target.mask)
            }
        return {
            "mse": lambda: losses.mse(decoded, target.image, target.mask),
            "l1": lambda: losses.l1(decoded, target.image, target.mask),
        }

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Also refuses losses of the other way to predict."""
        super().check_weights(weights)
        if wrong := [name for name in weights if (name == "cross_entropy") != self.logits]:
            raise UserError(
                f"config.method.pixel_weights has {wrong[0]!r}, which "
                f"{'class logits have' if self.logits else 'painted classes have'} not."
            )

    def to_prediction(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Probabilities, or colours in [0, 1]: what can be resized and averaged."""
        if self.logits:
            return jax.nn.softmax(decoded.astype(jnp.float32))
        return super().to_prediction(decoded)

    def finish(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        """The class numbers, as float32; NaN where the prediction is not finite."""
        if self.logits:
            classes = prediction.argmax(axis=-1, keepdims=True)
        else:
            classes = nearest_colour(prediction * 2 - 1, self.colours)[..., None]
        finite = jnp.isfinite(prediction).all(axis=-1, keepdims=True)
        return jnp.where(finite, classes.astype(jnp.float32), jnp.nan)


@dataclasses.dataclass(frozen=True)
class ColoursTask(Task):
    """Classes painted in colours of which nothing is known (GenPercept's published "seg")."""

    name: ClassVar[str] = "seg"
    kind: ClassVar[str] = "colors"
    channels: ClassVar[int] = 3


def nearest_colour(
    image: Float[Array, "b h w 3"], colours: Float[np.ndarray, "k 3"]
) -> Int[Array, "b h w"]:
    """The number of the nearest colour; colour after colour, so that no [b, h, w, k] is needed."""
    table = jnp.asarray(colours)

    def closer(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        distance = jnp.sum(jnp.square(image - table[k][None, None, None]), axis=-1)
        return jnp.where(distance < best[0], distance, best[0]), jnp.where(
            distance < best[0], k, best[1]
        )

    start = jnp.full(image.shape[:3], jnp.inf), jnp.zeros(image.shape[:3], jnp.int32)
    return jax.lax.fori_loop(0, len(colours), closer, start)[1]
