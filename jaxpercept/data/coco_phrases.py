"""Phrases about the annotations of a COCO folder: `refs.json`, `instances.json` and `images/`.

`refs.json` is a list of {"image", "image_id", "phrase", "ann_ids", "kind"}. A phrase may name
several annotations; `kind` tells how it came about ("human", or the name of a template).
"""

import json
from typing import Any

from jaxpercept.data.layouts import Files, Request, no_layout
from jaxpercept.data.references import (
    Annotated,
    Annotations,
    FileReferences,
    Reference,
    cleaned,
    naming,
)
from jaxpercept.data.sources import existing_folder, place_of
from jaxpercept.errors import UserError

_TEST = 0.2


def is_test(image: str) -> bool:
    """Whether an image is of the fifth that is tested on; its name alone decides."""
    return place_of(image) < _TEST


def open_coco_phrases(request: Request, *, kinds: str = "") -> FileReferences:
    """The phrases of a fifth of the images for test, those of the others for training.

    An image's name alone decides, so that it does not change sides when others are added. Every
    phrase is an example, in training too: phrases are what there is little of, and an image with
    many things deserves more turns than one with a single thing.

    Crowds of a category that a phrase names, and that are not meant themselves, are where nobody
    knows: `valid` is false there.

    Args:
      kinds: words: only phrases of these kinds; "" takes all.

    Raises:
      NoLayoutError: the files are not there.
      UserError: a file is missing or not such a file, or there is no phrase of these kinds.
    """
    root = existing_folder(request.data_dir)
    path = root / "refs.json"
    if not path.is_file():
        raise no_layout(request)
    coco = Annotations(root / "instances.json")
    wanted = set(kinds.split())
    with naming(path, f"a list of phrases that fits {coco.path.name}"):
        entries = json.loads(path.read_bytes())
        known = {entry["kind"] for entry in entries}
        for kind in sorted(wanted - known):
            raise UserError(
                f"{path} has no phrase of the kind {kind!r}, only {', '.join(sorted(known))}."
            )
        crowds: dict[int, list[dict[str, Any]]] = {}
        for annotation in coco.annotations.values():
            if annotation.get("iscrowd"):
                crowds.setdefault(annotation["image_id"], []).append(annotation)
        references = [
            _reference(number, entry, coco, crowds.get(entry["image_id"], []))
            for number, entry in enumerate(entries)
            if not wanted or entry["kind"] in wanted
            if is_test(entry["image"]) == (request.split == "test")
        ]
    return FileReferences(Files(root), path, references, flat=False)


def _reference(
    number: int, entry: dict[str, Any], coco: Annotations, crowds: list[dict[str, Any]]
) -> Reference:
    image = coco.images[entry["image_id"]]
    named = [coco.annotations[number] for number in entry["ann_ids"]]
    if any(annotation["image_id"] != image["id"] for annotation in named) or not named:
        raise ValueError(f"entry {number} names annotations of other images, or none")
    categories = {annotation["category_id"] for annotation in named}
    return Reference(
        name=f"{entry['image']}#{number}",
        image=image["id"],
        things=frozenset(entry["ann_ids"]),
        kind=" ".join(sorted(coco.kinds[category] for category in categories)),
        phrases=cleaned([entry["phrase"]]),
        where=Annotated(
            f"images/{entry['image']}",
            tuple(annotation["segmentation"] for annotation in named),
            (image["height"], image["width"]),
            tuple(c["segmentation"] for c in crowds if c["category_id"] in categories),
        ),
    )
