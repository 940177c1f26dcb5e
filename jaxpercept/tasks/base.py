"""What every task says about its prediction, whichever model made it, and about its training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from jaxpercept import losses
from jaxpercept.diffusion.corruption import blur_depth
from jaxpercept.errors import UserError


class Target(NamedTuple):
    """What a prediction is trained towards.

    Attributes:
      image: in [-1, 1]: what the autoencoder encodes, and decodes from a right prediction.
      mask: where it is defined.
      values: what the decoded prediction is compared with, where that is not the image itself:
        class numbers, heat maps.
    """

    image: Float[Array, "b h w 3"]
    mask: Bool[Array, "b h w 1"]
    values: Shaped[Array, "b h w c"] | None = None


Terms = dict[str, Callable[[], Float[Array, ""]]]
"""Losses by name, each computed when it is called."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The meaning of a predicted image.

    Tasks that can be trained also define `fields`, `encode_target` and `loss_terms`.

    Attributes:
      name: as in configs and `--task`.
      kind: a key of `inference.outputs.KINDS`.
      channels: of the prediction: 1 takes the mean of an image's three.
      merge: how several predictions for an image become one: "affine" (each has a scale and a shift
        of its own), "normals" or "average" (a median, pixel by pixel).
      fields: what a batch must hold beside the image.
      loss_names: the pixel losses it knows.
      default_weights: of those that the paper trains with.
      reads_text: whether each image comes with a text that says what to predict.
      corruptible: whether there is `corrupt`.
      instruction: what the text says of an image, with the prompt or the caption at {}; without {}
        there is none, and the text is always the same.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    channels: ClassVar[int] = 1
    merge: ClassVar[str] = "average"
    fields: ClassVar[tuple[str, ...]] = ()
    loss_names: ClassVar[tuple[str, ...]] = ()
    default_weights: ClassVar[Mapping[str, float]] = {}
    reads_text: ClassVar[bool] = False
    instruction: ClassVar[str] = "{}"
    corruptible: ClassVar[bool] = False

    @property
    def needs_prompt(self) -> bool:
        """Whether there is nothing to predict before something is named."""
        return self.reads_text and "{}" in self.instruction

    @property
    def parts(self) -> Mapping[str, "Task"]:
        """The tasks by name that its model can be asked for, one at a time; none of most."""
        return {}

    # ---- training --------------------------------------------------------------------------------

    @property
    def head_channels(self) -> int:
        """Channels of a head that reads the UNet's features in the autoencoder's place."""
        return self.channels

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """The target of a batch that holds `fields`."""
        raise NotImplementedError(f"{self.name} cannot be trained")

    def cell_weights(
        self, batch: Mapping[str, Array], factor: int
    ) -> Float[Array, "b i j 1"] | None:
        """Factors of the squared errors of a batch's latents; None: all weigh the same.

        Args:
          batch: as for `encode_target`.
          factor: pixels along a latent's cell.
        """
        return None

    def corrupt(
        self, batch: Mapping[str, Array], strength: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        """The target's image as a model could have it wrong, see `diffusion.corruption`.

        Args:
          batch: as for `encode_target`.
          strength: of each example; 0 is right.
          keys: one for each example.
        """
        raise NotImplementedError(f"{self.name} cannot be corrupted")

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """The losses of a decoded prediction, by `loss_names`.

        Args:
          decoded: by the autoencoder (three channels, nominally in [-1, 1], not clamped) or by a
            head (`head_channels`).
          target: from `encode_target`.
          keys: one for each example, for losses that draw pixels at random.
        """
        raise NotImplementedError(f"{self.name} cannot be trained")

    def pixel_losses(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        weights: Mapping[str, float] | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Weighted loss terms by name; their sum is the pixel loss.

        Args:
          decoded, target, keys: as for `loss_terms`.
          weights: by name, of `loss_names`; `default_weights` if None.

        Raises:
          UserError: a weight is given for a loss that this task does not have.
        """
        weights = self.default_weights if weights is None else weights
        self.check_weights(weights)
        terms = self.loss_terms(decoded, target, keys)
        return {name: weight * terms[name]() for name, weight in weights.items()}

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Raises a UserError where a loss is named that this task does not have."""
        if unknown := sorted(set(weights) - set(self.loss_names)):
            raise UserError(
                f"config.method.pixel_weights has {unknown[0]!r}, which {self.name} has not: use "
                f"{', '.join(self.loss_names)}."
            )

    # ---- prediction ------------------------------------------------------------------------------

    def to_prediction(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The decoded image, not clamped, as a map in [0, 1]."""
        return (jnp.clip(self.to_map(decoded), -1, 1) + 1) / 2

    def to_map(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """In float32 with the prediction's channels, not clamped."""
        decoded = decoded.astype(jnp.float32)
        return decoded.mean(axis=-1, keepdims=True) if self.channels == 1 else decoded

    def from_head(self, decoded: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """A head's map as `to_prediction` takes it."""
        return decoded

    def after_resize(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What resizing has spoilt, put right."""
        return prediction

    def finish(self, prediction: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """What is handed out of the map in its last size."""
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
      vertical_gradient: reproduce GenPercept's gradient loss as released, which compares rows only.
      released_median: reproduce its median alignment as released, see `losses.ssi_median`.
    """

    scale_invariant: bool = True
    shift_invariant: bool = True
    vertical_gradient: bool = False
    released_median: bool = False

    merge: ClassVar[str] = "affine"
    corruptible: ClassVar[bool] = True
    loss_names: ClassVar[tuple[str, ...]] = (
        *("mse", "l1", "ssi", "ssi_median", "grad", "grad_multiscale", "vnl"),
        *("hdn_random", "hdsn_random"),
    )
    # GenPercept's main runs, of depth and of disparity.
    default_weights: ClassVar[Mapping[str, float]] = {"mse": 1.0, "ssi": 0.5, "grad": 2.0}

    def from_head(self, decoded: Float[Array, "b h w 1"]) -> Float[Array, "b h w 1"]:
        """Each image's map, which has no range of its own, stretched to [-1, 1].

        GenPercept takes the range over the whole batch; here no image depends on its neighbours.
        """
        low = decoded.min(axis=(1, 2, 3), keepdims=True)
        span = decoded.max(axis=(1, 2, 3), keepdims=True) - low
        return (decoded - low) / jnp.maximum(span, 1e-6) * 2 - 1

    def corrupt(
        self, batch: Mapping[str, Array], strength: Float[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        """Blurred, pixels without truth along with the others."""
        image = self.encode_target(batch).image[..., :1]
        return jnp.repeat(blur_depth(image, strength, keys), 3, axis=-1)

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Of the map's one channel, not clamped, as GenPercept has them."""
        pred, truth = self.to_map(decoded), target.image[..., :1].astype(jnp.float32)
        mask = target.mask
        return {
            "mse": lambda: losses.mse(pred, truth, mask),
            "l1": lambda: losses.l1(pred, truth, mask),
            # In [1, 3] as GenPercept has them. The shift cancels in the least-squares fit, but the
            # median alignment of inverted predictions divides by a median that must be positive.
            "ssi": lambda: losses.ssi(pred + 2, truth + 2, mask),
            "ssi_median": lambda: losses.ssi_median(
                pred + 2, truth + 2, mask, self.released_median
            ),
            "grad": lambda: losses.gradient(pred, truth, mask, self.vertical_gradient),
            "grad_multiscale": lambda: losses.gradient(pred, truth, mask, scales=4),
            "vnl": lambda: losses.vnl(pred + 2, truth + 2, mask, keys),
            "hdn_random": lambda: losses.hdn_random(pred, truth, mask, keys),
            "hdsn_random": lambda: losses.hdsn_random(pred, truth, mask, keys),
        }

    @property
    def merge_options(self) -> dict[str, Any]:
        """What an ensemble may align."""
        return {
            "scale_invariant": self.scale_invariant,
            "shift_invariant": self.shift_invariant,
        }


def image_terms(decoded: Float[Array, "b h w 3"], target: Target) -> Terms:
    """The losses between images."""
    return {
        "mse": lambda: losses.mse(decoded, target.image, target.mask),
        "l1": lambda: losses.l1(decoded, target.image, target.mask),
    }


def to_signed(rgb: Array) -> Float[Array, "b h w 3"]:
    """uint8 [0, 255] to float32 [-1, 1]; float images are already there and pass unchanged."""
    if jnp.issubdtype(rgb.dtype, jnp.floating):
        return rgb
    return rgb.astype(jnp.float32) / 127.5 - 1.0
