"""Intrinsic images, such as albedo and shading."""

import dataclasses
from typing import ClassVar

from jaxpercept.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class IntrinsicsTask(Task):
    """Three channels for each target.

    What the targets are called is in the checkpoint's model_index.json, as `target_properties`.
    """

    name: ClassVar[str] = "intrinsics"
    kind: ClassVar[str] = "intrinsics"
    channels: ClassVar[int] = 3
