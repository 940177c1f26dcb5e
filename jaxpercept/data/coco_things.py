"""The things of a COCO folder, `instances.json` and `images/`: all annotations of an image."""

import os
from typing import Any

import numpy as np

from jaxpercept.data.coco_masks import import_coco, mask_of
from jaxpercept.data.coco_phrases import is_test
from jaxpercept.data.layouts import Files, Request, no_layout
from jaxpercept.data.readers import read_rgb
from jaxpercept.data.references import Annotations, naming
from jaxpercept.data.sources import Example, existing_folder
from jaxpercept.errors import UserError


class CocoThings:
    """Images with what is annotated in them.

    An example has `instance`, in which small things lie over large ones, and `kinds`. Where a crowd
    is, `mask` is false: it is one annotation of many things.

    Args:
      coco: the annotations.
      files: of the folder that `images/` is in.
      images: COCO's numbers of the images.

    Raises:
      UserError: an image is missing, or pycocotools is.
    """

    expected = None

    def __init__(self, coco: Annotations, files: Files, images: list[int]):
        import_coco()
        self._root = str(files.root)
        of_image: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in coco.annotations.values():
            if annotation["image_id"] in of_image:
                of_image[annotation["image_id"]].append(annotation)
        self._items = [
            (coco.images[number], sorted(things, key=lambda thing: (-thing["area"], thing["id"])))
            for number, things in of_image.items()
            if any(not thing.get("iscrowd") for thing in things)
        ]
        self._kinds = coco.kinds
        self.names = [f"images/{image['file_name']}" for image, _ in self._items]
        if not self.names:
            raise UserError(f"{coco.path} has no annotated image in this split; check the file.")
        for name in self.names:
            if files.find(name) is None:
                raise UserError(f"{coco.path} names {name}, which is not in {self._root}; add it.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        (image, annotations), name = self._items[index], self.names[index]
        size = image["height"], image["width"]
        instance, known = np.zeros((*size, 1), np.int32), np.ones((*size, 1), bool)
        kinds: list[str] = []
        for annotation in annotations:
            mask = mask_of([annotation["segmentation"]], size, f"{annotation['id']} in {name}")
            if annotation.get("iscrowd"):
                known &= ~mask
            else:
                kinds.append(self._kinds[annotation["category_id"]])
                instance[mask] = len(kinds)
        rgb = read_rgb(os.path.join(self._root, name))
        return {
            "name": name,
            "rgb": rgb,
            "instance": instance,
            "kinds": tuple(kinds),
            "mask": known | (instance > 0),
        }

    def __repr__(self) -> str:
        return f"CocoThings({self._root}, {len(self)} images)"


def open_coco_things(request: Request) -> CocoThings:
    """A fifth of the images for test, the others for training, as of `coco_phrases`.

    Raises:
      NoLayoutError: the files are not there.
      UserError: a file is missing or not such a file, or nothing is annotated.
    """
    root = existing_folder(request.data_dir)
    if not (root / "instances.json").is_file():
        raise no_layout(request)
    coco = Annotations(root / "instances.json")
    with naming(coco.path, "an annotation file of COCO"):
        side = request.split == "test"
        images = [
            number
            for number, image in sorted(coco.images.items())
            if is_test(image["file_name"]) == side
        ]
        return CocoThings(coco, Files(root), images)
