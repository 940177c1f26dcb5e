"""RefCOCO as TensorFlow Datasets prepares it: `ref_coco` of version 1.1.0, which has masks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from jaxpercept.data.readers import UnreadableFileError, decode_mask, decode_rgb
from jaxpercept.data.references import Reference, ReferringSource, Seen, cleaned
from jaxpercept.data.sources import TFDSRows
from jaxpercept.errors import UserError

_SPLITS = {"val": "validation"}


class TFDSReferences(ReferringSource):
    """The objects of a prepared `ref_coco`, read without TensorFlow.

    A row is an image with all its objects, so every row is looked through once when the source is
    built: seconds for an evaluation split, up to a minute for the training split.

    Args:
      root: TFDS's folder.
      config: configuration of `ref_coco`, such as "refcoco_unc".
      split: as RefCOCO calls it ("val", not "validation").
      flat, expected: as of `ReferringSource`.

    Raises:
      UserError: it is not prepared, or has no masks.
    """

    def __init__(
        self, root: Path, config: str, split: str, *, flat: bool, expected: int | None = None
    ):
        self.rows = TFDSRows(f"ref_coco/{config}", _SPLITS.get(split, split), root, raw=True)
        try:
            references = [r for row in range(len(self.rows)) for r in self._references(row)]
        except UserError:
            raise
        except Exception as error:  # of TFDS's parser
            raise UserError(
                f"{self.rows.builder} in {root} cannot be read ({error}); prepare version 1.1.0, "
                "the first with masks, with `tfds build --file_format=array_record`."
            ) from error
        super().__init__(references, flat=flat, expected=expected)

    def _references(self, row: int) -> list[Reference]:
        parsed = _features().deserialize_example_np(self.rows[row])
        objects, image = parsed["objects"], int(parsed["image/id"])
        return [
            Reference(
                name=f"{image}#{n}",
                image=image,
                things=frozenset([int(objects["id"][n])]),
                kind=str(int(objects["label"][n])),
                phrases=cleaned([text.decode() for text in objects["refexp"]["raw"][n]]),
                where=(row, n),
            )
            for n in range(len(objects["id"]))
        ]

    def _read(self, reference: Reference) -> Seen:
        row, number = reference.where
        name = f"{self.rows.builder}/{self.rows.split}/{row}"
        try:
            parsed = _features().deserialize_example_np(self.rows[row])
            image, mask = parsed["image"], parsed["objects"]["mask"][number]
        except Exception as error:
            raise UnreadableFileError(f"Cannot read {name}: {error}; prepare it again.") from error
        return Seen(decode_rgb(image, name=name), decode_mask(mask, name=f"{name}, mask {number}"))


@functools.cache
def _features() -> Any:
    """What is wanted of a row; pictures stay encoded, so that only those needed are decoded."""
    from tensorflow_datasets import features

    text = features.Text()
    return features.FeaturesDict(
        {
            "image": text,
            "image/id": np.int64,
            "objects": features.Sequence(
                {
                    "id": np.int64,
                    "label": np.int64,
                    "mask": text,
                    "refexp": features.Sequence({"raw": text, "refexp_id": np.int64}),
                }
            ),
        }
    )
