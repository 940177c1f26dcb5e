"""COCO's annotations of people: one example per person, cut out of its image."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxpercept.data.geometry import crop
from jaxpercept.data.layouts import Files, Request
from jaxpercept.data.readers import read_rgb
from jaxpercept.data.sources import Example, existing_folder
from jaxpercept.errors import UserError

_SPLITS = {"train": "train2017", "val": "val2017"}


class CocoKeypoints:
    """People of a COCO keypoint file `person_keypoints_*.json`.

    Crowds are left out, and so are people with fewer labelled keypoints than `min_keypoints`.
    Keypoints and boxes are in pixels with the middle of the first one at 0.5; keypoints that are
    not labelled are zeros.

    Args:
      root: folder of the files.
      annotations: the JSON file, relative to it.
      images: folder of the images, relative to it.
      persons: "crop": every person is an example, its box enlarged by `margin` cut out of the
        image; "largest": every image is one, of the person with the largest box.
      margin: factor on the box's height and width.
      min_keypoints: see above.

    Raises:
      UserError: a file is missing, or the annotations are not of this kind; it names which.
    """

    expected = None

    def __init__(
        self,
        root: str | os.PathLike,
        annotations: str,
        images: str,
        *,
        persons: str = "crop",
        margin: float = 1.25,
        min_keypoints: int = 5,
    ):
        if persons not in ("crop", "largest"):
            raise UserError(f"persons must be 'crop' or 'largest', got {persons!r}.")
        if margin < 1 or min_keypoints < 1:
            raise UserError(
                f"margin and min_keypoints must be at least 1, got {margin} and {min_keypoints}."
            )
        self.root, self.persons, self.margin = str(root), persons, margin
        files = Files(existing_folder(root))
        path = files.root / annotations
        people, names = _read(path)
        people = [p for p in people if p["num_keypoints"] >= min_keypoints and not p["iscrowd"]]
        if persons == "largest":
            largest: dict[int, dict[str, Any]] = {}
            for person in people:
                held = largest.setdefault(person["image_id"], person)
                if _area(person) > _area(held):
                    largest[person["image_id"]] = person
            people = list(largest.values())
        people.sort(key=lambda person: (person["image_id"], person["id"]))
        if not people:
            raise UserError(f"{path} holds nobody with {min_keypoints} keypoints or more.")
        self._images = [f"{images}/{names[person['image_id']]}" for person in people]
        for image in self._images:
            if files.find(image) is None:
                raise UserError(f"{path} names {image}, which is not in {root}; add the image.")
        self._keypoints = np.array([p["keypoints"] for p in people], np.float32).reshape(-1, 17, 3)
        self._boxes = np.array([p["bbox"] for p in people], np.float32)  # x, y, width, height
        self.names = [
            image if persons == "largest" else f"{image}#{person['id']}"
            for image, person in zip(self._images, people, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        keypoints = self._keypoints[index].copy()
        keypoints[:, :2] += 0.5  # COCO counts pixels from 0: their middle is half a pixel further
        keypoints[keypoints[:, 2] == 0] = 0
        left, top, width, height = self._boxes[index]
        example: Example = {
            "name": self.names[index],
            "rgb": read_rgb(os.path.join(self.root, self._images[index])),
            "keypoints": keypoints,
            "box": np.array([left, top, left + width, top + height], np.float32),
        }
        if self.persons == "largest":
            return example
        window = _around(example["box"], self.margin, example["rgb"].shape[:2])
        return crop(example, *window)

    def __repr__(self) -> str:
        return f"CocoKeypoints({self.root}, {len(self)} people)"


def open_coco_keypoints(
    request: Request, *, persons: str = "crop", margin: float = 1.25, min_keypoints: int = 5
) -> CocoKeypoints:
    """The people of COCO 2017 as published."""
    folder = _SPLITS[request.split]
    annotations = f"annotations/person_keypoints_{folder}.json"
    root = existing_folder(request.data_dir)
    if not (root / annotations).is_file():
        raise UserError(f"{root} has no {annotations}; expected {request.layout}.")
    return CocoKeypoints(
        root, annotations, folder, persons=persons, margin=margin, min_keypoints=min_keypoints
    )


def _read(path: os.PathLike) -> tuple[list[dict[str, Any]], Mapping[int, str]]:
    """The annotations of people and the file name of every image."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        names = {image["id"]: image["file_name"] for image in data["images"]}
        people = [
            {"num_keypoints": 0, "iscrowd": 0} | annotation
            for annotation in data["annotations"]
            if len(annotation.get("keypoints", ())) == 51 and annotation["image_id"] in names
        ]
        for person in people:
            person["bbox"], person["id"] = [float(x) for x in person["bbox"]], int(person["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a COCO keypoint file ({type(error).__name__}: {error}); check the file."
        ) from error
    return people, names


def _area(person: Mapping[str, Any]) -> float:
    return person["bbox"][2] * person["bbox"][3]


def _around(
    box: Float32[np.ndarray, "4"], margin: float, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the box, enlarged about its middle, inside of the image."""
    left, top, right, bottom = box.tolist()
    wide, high = (right - left) * (margin - 1) / 2, (bottom - top) * (margin - 1) / 2
    first_row, last_row = _span(top - high, bottom + high, size[0])
    first_column, last_column = _span(left - wide, right + wide, size[1])
    return first_row, first_column, last_row - first_row, last_column - first_column


def _span(low: float, high: float, limit: int) -> tuple[int, int]:
    first = min(max(0, int(np.floor(low))), limit - 1)
    return first, max(first + 1, min(limit, int(np.ceil(high))))
