"""Tasks: what the predicted image means. A new task is one file and one row here."""

from jaxpercept.errors import UserError
from jaxpercept.tasks.depth import DEPTH, DepthTask

TASKS = {task.name: task for task in (DEPTH,)}


def get_task(name: str) -> DepthTask:
    """The task of that name.

    Raises:
      UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}; choose one of: {', '.join(sorted(TASKS))}.")
    return TASKS[name]
