"""The tasks that can be trained, with their options."""

from typing import Any

from jaxpercept.tasks import Task, get_task

TRAINED: dict[str, dict[str, Any]] = {
    "depth": {},
    "disparity": {"vertical_gradient": True},
    "normals": {},
    "normals, with kappa": {"uncertainty": True},
    "normals, half range": {"full_z_range": False},
    "dis": {},
    "matting": {},
    "referring": {},
    "referring, mask": {"paint": False},
    "semantic": {"palette": "camvid"},
    "semantic, logits": {"palette": "camvid", "logits": True},
    "pose": {},
}


def task_of(case: str) -> Task:
    """The task, whose name comes first in the case's."""
    return get_task(case.partition(",")[0], **TRAINED[case])
