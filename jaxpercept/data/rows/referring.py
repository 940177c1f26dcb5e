"""Rows of things in pictures, and of phrases that name them."""

from jaxpercept.data.coco_phrases import open_coco_phrases
from jaxpercept.data.coco_things import open_coco_things
from jaxpercept.data.refcoco import RELEASES, open_refcoco
from jaxpercept.data.row import Dataset

_PHRASES = frozenset({"referred", "caption"})


def _refcoco(name: str, training: int) -> Dataset:
    """A row of the RefCOCO family; `training` is how many objects its training split has."""
    first = next(iter(RELEASES[name]))
    usual = RELEASES[name][first]
    return Dataset(
        name,
        open_refcoco,
        splits=("train", *usual.sentences),
        provides=_PHRASES,
        layout=f"{name}/refs({first}).p and {name}/instances.json of REFER with "
        "images/mscoco/images/train2014/, or CRIS's "
        f"anns/{usual.cris}/*.json and masks/{usual.cris}/*.png with images/train2014/, or TFDS's "
        f"ref_coco/{usual.tfds}/",
        expected={"train": training} | usual.sentences,
        licence="REFER, Apache-2.0 (phrases); COCO 2014, CC BY 4.0 (annotations), Flickr terms "
        "(images)",
    )


ROWS = (
    _refcoco("refcoco", 42404),
    _refcoco("refcoco+", 42278),
    _refcoco("refcocog", 42226),
    Dataset(
        "coco_phrases",
        open_coco_phrases,
        splits=("train", "test"),
        provides=_PHRASES,
        layout="refs.json, instances.json and images/*.jpg",
        licence="COCO 2017, CC BY 4.0 (annotations), Flickr terms (images); the phrases' own",
    ),
    Dataset(
        "coco_things",
        open_coco_things,
        splits=("train", "test"),
        provides=frozenset({"instances"}),
        layout="instances.json and images/*.jpg",
        licence="COCO 2017, CC BY 4.0 (annotations), Flickr terms (images)",
    ),
)
