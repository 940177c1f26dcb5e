"""Tasks whose prediction is the decoded image itself, rescaled to [0, 1]."""

import dataclasses
from typing import ClassVar

from jaxpercept.tasks.base import AffineTask, Task


@dataclasses.dataclass(frozen=True)
class DisparityTask(AffineTask):
    """Affine-invariant disparity: 0 = far, 1 = near."""

    name: ClassVar[str] = "disparity"
    kind: ClassVar[str] = "affine_disparity"


@dataclasses.dataclass(frozen=True)
class DichotomousTask(Task):
    """The most salient object's mask (dichotomous segmentation)."""

    name: ClassVar[str] = "dis"
    kind: ClassVar[str] = "mask"


@dataclasses.dataclass(frozen=True)
class MattingTask(Task):
    """The foreground's opacity."""

    name: ClassVar[str] = "matting"
    kind: ClassVar[str] = "alpha"


@dataclasses.dataclass(frozen=True)
class ColoursTask(Task):
    """Semantic segmentation painted in a palette's colours (GenPercept's mode "seg")."""

    name: ClassVar[str] = "seg"
    kind: ClassVar[str] = "colors"
    channels: ClassVar[int] = 3


@dataclasses.dataclass(frozen=True)
class IntrinsicsTask(Task):
    """Intrinsic images, such as albedo and shading: three channels for each target.

    What the targets are called is in the checkpoint's model_index.json, as `target_properties`.
    """

    name: ClassVar[str] = "intrinsics"
    kind: ClassVar[str] = "intrinsics"
    channels: ClassVar[int] = 3
