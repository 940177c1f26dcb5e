"""Sources of images in which phrases name annotated things, as RefCOCO's do."""

import abc
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from jaxpercept.data.coco_masks import Segmentation, import_coco, mask_of
from jaxpercept.data.layouts import Files
from jaxpercept.data.readers import UnreadableFileError, read_mask, read_rgb
from jaxpercept.data.sources import Example
from jaxpercept.errors import UserError


class Reference(NamedTuple):
    """What some phrases of an image name.

    Attributes:
      name: of the reference, unique in its source.
      image: number of the image in COCO.
      things: numbers of the annotations that are named, all of them by every phrase.
      kind: what the things are.
      phrases: at least one.
      where: how a source finds the image and the mask.
    """

    name: str
    image: int
    things: frozenset[int]
    kind: str
    phrases: tuple[str, ...]
    where: Any


class Seen(NamedTuple):
    """What a source reads of a reference: the image, the mask, and where that is known."""

    rgb: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w 1"]
    known: Bool[np.ndarray, "h w 1"] | None = None


class ReferringSource(abc.ABC):
    """Examples of references: all phrases of one at a time, or each phrase on its own.

    Phrases of the same image that name other annotations become distractors.

    Args:
      references: in the order of the examples.
      flat: whether every phrase is an example (evaluation), not every reference (training).
      expected: how many examples there are as published, where that is known.
    """

    def __init__(self, references: Iterable[Reference], *, flat: bool, expected: int | None = None):
        self.references = list(references)
        self.expected = expected
        self._items = [
            (number, sentence)
            for number, reference in enumerate(self.references)
            for sentence in (range(len(reference.phrases)) if flat else (None,))
        ]
        self._of_image: dict[int, list[int]] = {}
        for number, reference in enumerate(self.references):
            self._of_image.setdefault(reference.image, []).append(number)
        self.names = [
            self.references[number].name + ("" if sentence is None else f"/{sentence}")
            for number, sentence in self._items
        ]

    @property
    def images(self) -> frozenset[int]:
        """COCO's numbers of the images."""
        return frozenset(self._of_image)

    def __len__(self) -> int:
        return len(self._items)

    def reference_of(self, index: int) -> Reference:
        """The reference of an example."""
        return self.references[self._items[index][0]]

    def __getitem__(self, index: int) -> Example:
        number, sentence = self._items[index]
        reference = self.references[number]
        own = reference.phrases if sentence is None else (reference.phrases[sentence],)
        phrases, kinds = [(phrase, 1) for phrase in own], [reference.kind]
        for other in (self.references[n] for n in self._of_image[reference.image]):
            if not other.things & reference.things:
                kinds.append(other.kind)
                phrases += [(phrase, len(kinds)) for phrase in other.phrases]
        rgb, mask, known = self._read(reference)
        if mask.shape[:2] != rgb.shape[:2]:
            raise UnreadableFileError(
                f"The mask of {reference.name} has size {mask.shape[:2]} but its image has "
                f"{rgb.shape[:2]}; both must be the same."
            )
        example = {
            "name": self.names[index],
            "rgb": rgb,
            "instance": mask.astype(np.int32),
            "phrases": phrases,
            "kinds": tuple(kinds),
        }
        return example if known is None else example | {"mask": known}

    @abc.abstractmethod
    def _read(self, reference: Reference) -> Seen:
        """Raises an UnreadableFileError that names the file."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} examples)"


@contextlib.contextmanager
def naming(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns what goes wrong with a file's contents into a UserError: it is not `what`."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not {what} ({type(error).__name__}: {error}); check the file."
        ) from error


class Annotations:
    """An annotation file of COCO.

    Attributes:
      path: of the file.
      images, annotations: their entries by their numbers.
      kinds: names of the categories by their numbers.

    Raises:
      UserError: the file is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        with naming(path, "an annotation file of COCO"):
            data = json.loads(path.read_bytes())
            self.images: dict[int, dict[str, Any]] = {x["id"]: x for x in data["images"]}
            self.annotations: dict[int, dict[str, Any]] = {x["id"]: x for x in data["annotations"]}
            self.kinds: dict[int, str] = {x["id"]: x["name"] for x in data["categories"]}


class Annotated(NamedTuple):
    """Where a `FileReferences` finds a reference.

    Attributes:
      image: path of the image.
      mask: path of a mask, above zero where the things are; or COCO's segmentations of them.
      size: (height, width) that the segmentations are made for.
      unknown: segmentations of regions that may or may not be what is named.
    """

    image: str
    mask: str | tuple[Segmentation, ...]
    size: tuple[int, int] = (0, 0)
    unknown: tuple[Segmentation, ...] = ()


class FileReferences(ReferringSource):
    """References whose images are files, and their masks too, or COCO's segmentations.

    Args:
      files: of the folder that paths are relative to.
      listed: what names the files, for errors.
      references: their `where` is an `Annotated`.
      flat, expected: as of `ReferringSource`.

    Raises:
      UserError: a file is missing, there is no reference at all, or pycocotools is missing.
    """

    def __init__(
        self,
        files: Files,
        listed: str | os.PathLike,
        references: Iterable[Reference],
        *,
        flat: bool,
        expected: int | None = None,
    ):
        super().__init__(references, flat=flat, expected=expected)
        self.root = str(files.root)
        if not self.references:
            raise UserError(f"{listed} refers to nothing in this split; check the file.")
        for reference in self.references:
            image, mask, *_ = reference.where
            for path in (image, mask) if isinstance(mask, str) else (image,):
                if files.find(path) is None:
                    raise UserError(
                        f"{listed} names {path}, which is not in {self.root}; add the file."
                    )
            if not isinstance(mask, str):
                import_coco()

    def files_of(self, index: int) -> list[str]:
        """The files that an example is read from, the image first; annotations are in one more."""
        where: Annotated = self.reference_of(index).where
        files = [where.image, *([where.mask] if isinstance(where.mask, str) else [])]
        return [os.path.join(self.root, path) for path in files]

    def _read(self, reference: Reference) -> Seen:
        where: Annotated = reference.where
        rgb = read_rgb(os.path.join(self.root, where.image))
        if isinstance(where.mask, str):
            return Seen(rgb, read_mask(os.path.join(self.root, where.mask)))
        mask = mask_of(where.mask, where.size, reference.name)
        if not where.unknown:
            return Seen(rgb, mask)
        return Seen(rgb, mask, mask | ~mask_of(where.unknown, where.size, reference.name))


def shared_images(first: Any, second: Any) -> frozenset[int]:
    """COCO's numbers of the images that two opened splits have in common.

    The three RefCOCO datasets annotate the same images and split them differently: who trains on
    one and evaluates on another sees here which images of the second are no longer unseen.

    Args:
      first, second: what `open_dataset` gave for splits of referring datasets.

    Raises:
      UserError: one of them has no numbered images.
    """
    images = []
    for records in (first, second):
        images.append(getattr(records.source, "images", None))
        if images[-1] is None:
            raise UserError(
                f"Dataset {records.dataset.name} is not made of COCO's images; compare refcoco, "
                "refcoco+, refcocog or coco_phrases."
            )
    return images[0] & images[1]


def cleaned(phrases: Sequence[str]) -> tuple[str, ...]:
    """Phrases without blanks around them, none that is empty; a ValueError if none is left."""
    kept = tuple(text for phrase in phrases if (text := phrase.strip()))
    if not kept:
        raise ValueError("a reference without a phrase")
    return kept
