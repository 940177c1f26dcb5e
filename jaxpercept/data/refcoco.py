"""RefCOCO, RefCOCO+ and RefCOCOg, in the three layouts that people have them in.

- "refer": as published (github.com/lichengunc/refer): `refcoco/refs(unc).p`, a pickle of Python 2,
  and `refcoco/instances.json`, annotations of COCO 2014.
- "cris": what `tools/data_process.py` of github.com/DerrickWang005/CRIS.pytorch makes of it, which
  ADDP reads too: `anns/refcoco/val.json` and `masks/refcoco/SEGMENT_ID.png`.
- "tfds": `ref_coco` of TensorFlow Datasets, prepared (`refcoco_tfds.py`).

All three list objects with several sentences each. Training draws one of an object's sentences,
evaluation takes every sentence (ADDP's `val_flatten`).
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpercept.data.layouts import Files, Request, no_layout
from jaxpercept.data.plain_pickle import load_plain
from jaxpercept.data.refcoco_tfds import TFDSReferences
from jaxpercept.data.references import (
    Annotated,
    Annotations,
    FileReferences,
    Reference,
    ReferringSource,
    cleaned,
    naming,
)
from jaxpercept.data.sources import existing_folder
from jaxpercept.errors import UserError

_log = logging.getLogger(__name__)


class Release(NamedTuple):
    """One way in which a dataset is split.

    Attributes:
      cris: its folder in CRIS's layout.
      tfds: its configuration in TensorFlow Datasets.
      sentences: evaluation split -> how many sentences it has as published.
    """

    cris: str
    tfds: str
    sentences: Mapping[str, int]


RELEASES: dict[str, dict[str, Release]] = {
    "refcoco": {
        "unc": Release("refcoco", "refcoco_unc", {"testA": 5657, "testB": 5095, "val": 10834})
    },
    "refcoco+": {
        "unc": Release("refcoco+", "refcocoplus_unc", {"testA": 5726, "testB": 4889, "val": 10758})
    },
    "refcocog": {
        "umd": Release("refcocog_u", "refcocog_umd", {"test": 9602, "val": 4896}),
        "google": Release("refcocog_g", "refcocog_google", {"val": 9536}),
    },
}
"""Dataset -> `split_by` -> what is known of it, the usual one first."""

# Where people keep the images; REFER's own place first, then CRIS's.
_IMAGES = ("images/mscoco/images/train2014", "images/train2014", "images/mscoco/train2014",
           "train2014")  # fmt: skip


def open_refcoco(request: Request, *, split_by: str = "", layout: str = "") -> ReferringSource:
    """A split of the dataset that the request names, in the layout that lies in its folder.

    Where an evaluation split shares images with the training split, as it does in RefCOCOg's
    "google", which splits objects, the log says how many.

    Args:
      split_by: who split it: a key of `RELEASES`; "" is the usual one.
      layout: "refer", "cris" or "tfds", where several lie in the folder; "" is the first of these.

    Raises:
      NoLayoutError: the folder holds none of the layouts.
      UserError: an unknown option, no such split, or a file that is missing or no such list.
    """
    name, split = request.name, request.split
    split_by = split_by or next(iter(RELEASES[name]))
    if split_by not in RELEASES[name]:
        known = " or ".join(RELEASES[name])
        raise UserError(f"split_by of dataset {name} must be {known}, got {split_by!r}.")
    release = RELEASES[name][split_by]
    if split not in ("train", *release.sentences):
        raise UserError(
            f"Dataset {name} as split by {split_by} has no {split}, only train, "
            f"{', '.join(release.sentences)}."
        )
    if layout not in ("", *_LAYOUTS):
        known = ", ".join(_LAYOUTS)
        raise UserError(f"layout of dataset {name} must be one of {known}, got {layout!r}.")
    root = existing_folder(request.data_dir)
    wanted = [layout] if layout else list(_LAYOUTS)
    copies = [_LAYOUTS[key](root, name, split_by, release) for key in wanted]
    copy = next((copy for copy in copies if copy.is_there(split)), None)
    if copy is None:
        raise no_layout(request)
    expected = release.sentences.get(split) if request.evaluation else None
    source = copy.open(split, flat=request.evaluation, expected=expected)
    if request.evaluation and split != "train":
        shared = source.images & copy.images_of_training()
        if shared:
            _log.warning(
                "%d of the %d images of the split %s of %s by %s are images of its training split "
                "too: who trains on it has seen them.",
                len(shared), len(source.images), split, name, split_by,
            )  # fmt: skip
    return source


def _folder_of_images(root: Path) -> str:
    for folder in _IMAGES:
        if (root / folder).is_dir():
            return folder
    raise UserError(f"{root} has no folder {_IMAGES[0]} or {_IMAGES[1]}; put COCO's images there.")


class _Refer:
    """The published files; both are read once for all splits."""

    def __init__(self, root: Path, name: str, split_by: str, release: Release):
        self.root, self.path = root, root / name / f"refs({split_by}).p"
        self._read: dict[str, list[Reference]] = {}

    def is_there(self, split: str) -> bool:
        return self.path.is_file()

    def open(self, split: str, *, flat: bool, expected: int | None) -> FileReferences:
        references = self._splits().get(split, [])
        return FileReferences(Files(self.root), self.path, references, flat=flat, expected=expected)

    def images_of_training(self) -> set[int]:
        return {reference.image for reference in self._splits().get("train", [])}

    def _splits(self) -> dict[str, list[Reference]]:
        if not self._read:
            folder = _folder_of_images(self.root)
            coco = Annotations(self.path.with_name("instances.json"))
            with naming(self.path, f"a list of REFER that fits {coco.path.name}"):
                for entry in load_plain(self.path):
                    image = coco.images[entry["image_id"]]
                    annotation = coco.annotations[entry["ann_id"]]
                    self._read.setdefault(entry["split"], []).append(
                        Reference(
                            name=f"{image['file_name']}#{entry['ref_id']}",
                            image=image["id"],
                            things=frozenset([annotation["id"]]),
                            kind=coco.kinds[annotation["category_id"]],
                            phrases=cleaned([s["sent"] for s in entry["sentences"]]),
                            where=Annotated(
                                f"{folder}/{image['file_name']}",
                                (annotation["segmentation"],),
                                (image["height"], image["width"]),
                            ),
                        )
                    )
        return self._read


class _Cris:
    """A list of objects per split, and a mask file per object."""

    def __init__(self, root: Path, name: str, split_by: str, release: Release):
        self.root, self.name = root, release.cris

    def is_there(self, split: str) -> bool:
        return self._list(split).is_file()

    def open(self, split: str, *, flat: bool, expected: int | None) -> FileReferences:
        references = self._references(split)
        return FileReferences(
            Files(self.root), self._list(split), references, flat=flat, expected=expected
        )

    def images_of_training(self) -> set[int]:
        if not self.is_there("train"):
            return set()
        return {reference.image for reference in self._references("train")}

    def _list(self, split: str) -> Path:
        return self.root / "anns" / self.name / f"{split}.json"

    def _references(self, split: str) -> list[Reference]:
        path, folder = self._list(split), _folder_of_images(self.root)
        with naming(path, "a list of CRIS"):
            return [
                Reference(
                    name=f"{entry['img_name']}#{entry['segment_id']}",
                    image=int(re.findall(r"\d+", entry["img_name"])[-1]),
                    things=frozenset([entry["segment_id"]]),
                    kind=str(entry["cat"]),
                    phrases=cleaned([s["sent"] for s in entry["sentences"]]),
                    where=Annotated(
                        f"{folder}/{entry['img_name']}",
                        f"masks/{self.name}/{entry['segment_id']}.png",
                    ),
                )
                for entry in json.loads(path.read_bytes())
            ]


class _Tfds:
    """A prepared dataset of TensorFlow Datasets."""

    def __init__(self, root: Path, name: str, split_by: str, release: Release):
        self.root, self.config = root, release.tfds

    def is_there(self, split: str) -> bool:
        return (self.root / "ref_coco" / self.config).is_dir()

    def open(self, split: str, *, flat: bool, expected: int | None) -> TFDSReferences:
        return TFDSReferences(self.root, self.config, split, flat=flat, expected=expected)

    def images_of_training(self) -> frozenset[int]:
        return self.open("train", flat=False, expected=None).images


_LAYOUTS: dict[str, Callable[..., Any]] = {"refer": _Refer, "cris": _Cris, "tfds": _Tfds}
