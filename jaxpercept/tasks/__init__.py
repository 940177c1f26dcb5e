"""Tasks: what the predicted image means. A new task is one file and one row here."""

import dataclasses
from typing import Any

from jaxpercept.errors import UserError
from jaxpercept.tasks.base import Task
from jaxpercept.tasks.depth import DepthTask
from jaxpercept.tasks.maps import (
    ColoursTask,
    DichotomousTask,
    DisparityTask,
    IntrinsicsTask,
    MattingTask,
)
from jaxpercept.tasks.normals import NormalsTask

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        DepthTask,
        DisparityTask,
        NormalsTask,
        DichotomousTask,
        MattingTask,
        ColoursTask,
        IntrinsicsTask,
    )
}
TRAINABLE = tuple(name for name, task in TASKS.items() if hasattr(task, "encode_target"))
"""The tasks that have losses."""


def get_task(name: str, **options: Any) -> Task:
    """The task of that name.

    Args:
      options: the task's attributes, as JSON gives them.

    Raises:
      UserError: there is no such task, or it has no such option.
    """
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}; choose one of: {', '.join(sorted(TASKS))}.")
    known = {field.name for field in dataclasses.fields(TASKS[name])}
    if unknown := sorted(set(options) - known):
        raise UserError(f"The task {name!r} has no option {unknown[0]!r}.")
    return TASKS[name](**options)
