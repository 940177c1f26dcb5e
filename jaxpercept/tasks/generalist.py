"""One model for many tasks, told by an instruction which (after InstructCV, arXiv 2310.00390).

Training mixes the tasks of `data.instructions`; each has its own target image, made as a model of
that task alone would have it. Prediction and evaluation are of one of `parts`, which words the
instruction itself: "paint every {}" asks for a class by its name.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpercept import losses
from jaxpercept.data.instructions import INSTRUCTIONS, TRUTHS
from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Task, Terms, image_terms, to_signed
from jaxpercept.tasks.depth import DepthTask
from jaxpercept.tasks.normals import NormalsTask
from jaxpercept.tasks.referring import ReferringTask, closeness, painted

# Pure blue, green or magenta do not come back from an autoencoder as small as `sd-tiny`'s.
_AZURE, _WHITE = np.array([0, 0.5, 1], np.float32), np.array([1, 1, 1], np.float32)


@dataclasses.dataclass(frozen=True)
class _EditingTask(Task):
    """An image in colours, told by a text."""

    channels: ClassVar[int] = 3
    reads_text: ClassVar[bool] = True
    loss_names: ClassVar[tuple[str, ...]] = ("mse", "l1")
    default_weights: ClassVar[Mapping[str, float]] = {"mse": 1.0}

    def loss_terms(
        self,
        decoded: Float[Array, "b h w c"],
        target: Target,
        keys: Key[Array, " b"] | None = None,
    ) -> Terms:
        """Between images."""
        return image_terms(decoded, target)


@dataclasses.dataclass(frozen=True)
class InstructedDepth(DepthTask):
    """Depth, asked for in words."""

    name: ClassVar[str] = "generalist:depth"
    reads_text: ClassVar[bool] = True
    instruction: ClassVar[str] = INSTRUCTIONS["depth"][0]


@dataclasses.dataclass(frozen=True)
class InstructedNormals(NormalsTask):
    """Normals, asked for in words."""

    name: ClassVar[str] = "generalist:normals"
    reads_text: ClassVar[bool] = True
    instruction: ClassVar[str] = INSTRUCTIONS["normals"][0]


@dataclasses.dataclass(frozen=True)
class InstructedReferring(ReferringTask):
    """The thing that a phrase names, painted red."""

    name: ClassVar[str] = "generalist:referring"
    instruction: ClassVar[str] = INSTRUCTIONS["referring"][0]


@dataclasses.dataclass(frozen=True)
class InstructedSegmentation(ReferringTask):
    """All of a class, painted red."""

    name: ClassVar[str] = "generalist:segment"
    fields: ClassVar[tuple[str, ...]] = ("classes", "valid")
    instruction: ClassVar[str] = INSTRUCTIONS["segment"][0]


@dataclasses.dataclass(frozen=True)
class InstructedDetection(_EditingTask):
    """Boxes around all things of a kind, painted azure with a white frame."""

    name: ClassVar[str] = "generalist:detect"
    kind: ClassVar[str] = "boxes"
    fields: ClassVar[tuple[str, ...]] = ("instances", "valid")
    instruction: ClassVar[str] = INSTRUCTIONS["detect"][0]

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """The image with the boxes over it.

        Args:
          batch: `rgb` [b,h,w,3], `valid` [b,h,w,1], `instances` [b,h,w,1] as
            `data.instructions.draw_boxes` draws their boxes.
        """
        boxed = batch["instances"]
        framed = painted(batch["rgb"], (boxed != 0).astype(jnp.float32), jnp.asarray(_WHITE)[None])
        inside = jnp.asarray(_AZURE) * 2 - 1
        return Target(jnp.where(boxed > 0, inside[None, None, None], framed), batch["valid"])

    def finish(self, prediction: Float[Array, "b h w 3"]) -> Float[Array, "b h w 1"]:
        """How azure it is, see `closeness`."""
        return closeness(prediction, _AZURE)


_PARTS: dict[str, type[Task]] = {
    "depth": InstructedDepth,
    "normals": InstructedNormals,
    "segment": InstructedSegmentation,
    "detect": InstructedDetection,
    "referring": InstructedReferring,
}


_PAINTED = {"segment", "detect", "referring"}


@dataclasses.dataclass(frozen=True)
class GeneralistTask(_EditingTask):
    """Whatever the instruction asks for, as an image.

    Attributes:
      depth, normals, segment, detect, referring: which tasks it learns.
      emphasis: a latent's cell weighs 1 + emphasis in its loss where it is painted all over.
    """

    depth: bool = True
    normals: bool = True
    segment: bool = True
    detect: bool = True
    referring: bool = True
    emphasis: float = 0.0

    name: ClassVar[str] = "generalist"
    kind: ClassVar[str] = "colors"
    fields: ClassVar[tuple[str, ...]] = ("truth", "subtask", "depth_range", "valid")

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("config.task_options leaves a generalist no task: set one to True.")

    @property
    def parts(self) -> Mapping[str, Task]:
        """Its tasks by their names."""
        return {name: part() for name, part in _PARTS.items() if getattr(self, name)}

    def encode_target(self, batch: Mapping[str, Array]) -> Target:
        """Each example's target as its task has it.

        Args:
          batch: `rgb` [b,h,w,3], `valid` [b,h,w,1], `depth_range` [b,2]; `truth` [b,h,w,3] and
            `subtask` [b] from `data.instructions.instruct`.
        """
        image, mask = to_signed(batch["rgb"]), batch["valid"]
        for name, part in self.parts.items():
            # Each finds the one map in the place of its own truth.
            truth = batch["truth"] if name == "normals" else batch["truth"][..., :1]
            target = part.encode_target({**batch, part.fields[0]: truth})
            asked = (batch["subtask"] == list(TRUTHS).index(name))[:, None, None, None]
            image = jnp.where(asked, target.image, image)
            mask = jnp.where(asked, target.mask, mask)
        return Target(image, mask)

    def cell_weights(
        self, batch: Mapping[str, Array], factor: int
    ) -> Float[Array, "b i j 1"] | None:
        """As of `referring`: by the share of each cell that is painted; 1 where nothing is."""
        if not self.emphasis:
            return None
        paints = jnp.asarray([name in _PAINTED for name in TRUTHS])[batch["subtask"]]
        there = paints[:, None, None, None] & (batch["truth"][..., :1] != 0) & batch["valid"]
        share = losses.cells(there, factor).mean(axis=(2, 4))[..., None]
        return 1 + self.emphasis * share


GENERALIST: tuple[type[Task], ...] = (GeneralistTask, *_PARTS.values())
"""The model, and what it can be asked for."""
