"""One picture, many tasks: what an instruction asks for, as one map of the picture's truth.

InstructCV (arXiv 2310.00390) words vision tasks as instructions that edit an image, so that one
model learns them all. Here a record becomes one of five:

| task        | truth of the record | instruction names | map                             |
|-------------|---------------------|-------------------|---------------------------------|
| `depth`     | `depth`             |                   | metres                          |
| `normals`   | `normals`           |                   | unit vectors                    |
| `segment`   | `classes`           | a class           | 1 where it is                   |
| `detect`    | `instances`         | a kind of things  | their boxes, see `draw_boxes`   |
| `referring` | `referred`          | one thing         | 1 where it is                   |
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxpercept.data.palettes import PALETTES
from jaxpercept.data.readers import EmptyMaskError
from jaxpercept.data.row import Dataset

Record = dict[str, Any]

TRUTHS = {
    "depth": "depth",
    "normals": "normals",
    "segment": "classes",
    "detect": "instances",
    "referring": "referred",
}
"""Tasks, and which of `data.row.TARGETS` each needs; their order numbers them in batches."""

INSTRUCTIONS = {
    "depth": ("show the depth", "draw a depth map", "how far is it"),
    "normals": ("show the normals", "draw the surface normals", "which way does it face"),
    "segment": ("paint every {}", "segment every {}", "colour all of the {}"),
    "detect": ("box every {}", "detect every {}", "draw a box on each {}"),
    "referring": ("paint {}", "mark {}", "segment {}"),
}
"""What is asked, with what the record names at {}. Predictions use the first, training any."""

SEEN = 0.004
"""The share of the picture from which a class or a thing is worth asking for."""


def tasks_of(row: Dataset, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that a dataset has the truth of."""
    provided = row.provides if row.labels else row.provides - {"classes"}  # classes need names
    return [task for task in tasks if TRUTHS[task] in provided]


def instruct(record: Record, task: str, rng: np.random.Generator) -> Record:
    """An example of a task from a record with its truth, all rasters of one size.

    A record for `referring` is about a phrase already (`referring.refer`).

    Returns:
      The record's `rgb` and `valid`, and `truth` float32 [h, w, 3], the map (one of one channel in
      the first); `subtask` int32, the task's number in `TRUTHS`; `depth_range` float32 [2];
      `caption`, the whole instruction.

    Raises:
      EmptyMaskError: nothing in the picture is worth asking for.
    """
    place, wording = rng.random(), rng.random()
    if task == "segment":
        record = choose_class(record, place)
    elif task == "detect":
        record = choose_kind(record, place)
        record["boxed"] = draw_boxes(record["boxes"], record["rgb"].shape[:2])
    field = {"segment": "referred", "detect": "boxed"}.get(task, TRUTHS[task])
    truth = np.zeros((*record["rgb"].shape[:2], 3), np.float32)
    truth[..., : record[field].shape[-1]] = record[field]
    wordings = INSTRUCTIONS[task]
    return {
        "name": record["name"],
        "rgb": record["rgb"],
        "source": record["source"],
        "valid": record["valid"],
        "truth": truth,
        "subtask": np.int32(list(TRUTHS).index(task)),
        "depth_range": record.get("depth_range", np.array([0, 1], np.float32)),
        "caption": wordings[int(wording * len(wordings))].format(record.get("caption", "")),
    }


def choose_class(record: Record, place: float) -> Record:
    """The record made to be about one of the classes in it.

    Args:
      record: with `classes` int32 [h, w, 1] and `labels`, the key of `PALETTES` of their names.
      place: which of those that are seen: a number in [0, 1), from the first to the last.

    Returns:
      The record with `caption`, the class's name; `referred` float32 [h, w, 1], 1 where it is;
      `distractors`, the names of the other classes that are seen.

    Raises:
      EmptyMaskError: no class fills as much as `SEEN` of the picture.
    """
    names, classes = PALETTES[record["labels"]].names, record["classes"]
    counts = np.bincount(classes[classes < len(names)], minlength=len(names))
    chosen, others = _one_of(np.flatnonzero(counts > SEEN * classes.size), place, record)
    return record | {
        "caption": names[chosen],
        "referred": (classes == chosen).astype(np.float32),
        "distractors": [names[other] for other in others],
    }


def choose_kind(record: Record, place: float) -> Record:
    """The record made to be about all things of one kind in it.

    Args:
      record: with `instance` int32 [h, w, 1] and `kinds`, of the instances from 1 on.
      place: as of `choose_class`.

    Returns:
      The record with `caption`, the kind; `boxes` float32 [n, 4] in pixels (left, top, right,
      bottom) around what is seen of each of its things; `distractors`, the other kinds.

    Raises:
      EmptyMaskError: nothing fills as much as `SEEN` of the picture.
    """
    instance, kinds = record["instance"][..., 0], list(record["kinds"])
    counts = np.bincount(instance.ravel(), minlength=len(kinds) + 1)[1:]
    seen = [n for n, count in enumerate(counts, start=1) if count > SEEN * instance.size]
    known = sorted({kinds[n - 1] for n in seen})
    chosen, others = _one_of(known, place, record)
    boxes = [box_around(instance == n) for n in seen if kinds[n - 1] == chosen]
    return record | {
        "caption": chosen,
        "boxes": np.array(boxes, np.float32),
        "distractors": list(others),
    }


def box_around(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a mask [h, w] that is not empty; the last two excluded."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def draw_boxes(
    boxes: Float32[np.ndarray, "n 4"], size: tuple[int, int]
) -> Float32[np.ndarray, "h w 1"]:
    """1 inside of boxes and -1 on their frames, which keep those apart that touch; 0 elsewhere.

    Frames lie inside, a 40th of the picture's height thick; small boxes are over large ones.
    """
    drawn = np.zeros((*size, 1), np.float32)
    thick = frame_width(size[0])
    for left, top, right, bottom in sorted(boxes.astype(int).tolist(), key=_area, reverse=True):
        drawn[top:bottom, left:right] = -1
        # What is too small for a frame has none.
        across, down = (thick if n > 4 * thick else 0 for n in (right - left, bottom - top))
        drawn[top + down : bottom - down, left + across : right - across] = 1
    return drawn


def frame_width(height: int) -> int:
    """Of the boxes in a picture of that height, in pixels."""
    return max(1, round(height / 40))


def _area(box: Sequence[int]) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _one_of(
    options: Sequence[Any] | Int[np.ndarray, " n"], place: float, record: Record
) -> tuple[Any, list[Any]]:
    """One of them, and the others."""
    options = list(options)
    if not options:
        raise EmptyMaskError(f"Nothing in {record['name']} is large enough to be asked for.")
    chosen = options.pop(int(place * len(options)))
    return chosen, options
