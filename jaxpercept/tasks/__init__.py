"""Tasks: what the predicted image means. A new task is one file and one row here."""

import dataclasses
from typing import Any

from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Target, Task
from jaxpercept.tasks.depth import DepthTask, DisparityTask
from jaxpercept.tasks.generalist import GENERALIST
from jaxpercept.tasks.intrinsics import IntrinsicsTask
from jaxpercept.tasks.masks import DichotomousTask, MattingTask
from jaxpercept.tasks.normals import NormalsTask
from jaxpercept.tasks.pose import PoseTask
from jaxpercept.tasks.referring import ReferringTask
from jaxpercept.tasks.segmentation import ColoursTask, SegmentationTask

__all__ = ["TASKS", "Target", "Task", "get_task", "reads_text"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        DepthTask,
        DisparityTask,
        NormalsTask,
        DichotomousTask,
        MattingTask,
        ReferringTask,
        SegmentationTask,
        PoseTask,
        ColoursTask,
        IntrinsicsTask,
        *GENERALIST,
    )
}


def reads_text(name: str) -> bool:
    """Whether there is a task of that name whose images each come with a text."""
    return name in TASKS and TASKS[name].reads_text


def get_task(name: str, /, **options: Any) -> Task:
    """The task of that name.

    Args:
      options: the task's attributes, as JSON gives them.

    Raises:
      UserError: there is no such task, or it has no such option.
    """
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}; choose one of: {', '.join(sorted(TASKS))}.")
    defaults = {field.name: field.default for field in dataclasses.fields(TASKS[name])}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"The task {name!r} has no option {option!r}.")
        kind = type(defaults[option])
        if not isinstance(value, kind):
            raise UserError(
                f"The option {option!r} of the task {name!r} is {value!r}: give a {kind.__name__}."
            )
    return TASKS[name](**options)
