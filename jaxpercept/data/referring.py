"""Pictures with phrases that name things in them: a record is about one phrase of its picture.

A source gives `instance` int32 [h, w, 1], `phrases` (pairs of text and instance) and, where it
knows them, `kinds` (what the instances 1, 2, ... are). Phrases may also name instances that the
raster does not show: other things of the picture, which serve as distractors.
"""

from typing import Any

import numpy as np

from jaxpercept.data.readers import EmptyMaskError

Record = dict[str, Any]


def refer(record: Record, place: float) -> Record:
    """The record made to be about one phrase, of those that name something in its `instance`.

    Args:
      record: with `name`, `instance`, `phrases` and perhaps `kinds`.
      place: which phrase: a number in [0, 1), from the first to the last.

    Returns:
      The record with `caption`, the phrase; `referred` float32 [h, w, 1], 1 where the instance is
      that it names; and `distractors`, the phrases of all other instances, those of the same kind
      first.

    Raises:
      EmptyMaskError: no phrase names anything that `instance` shows.
    """
    instance = record["instance"]
    seen = np.bincount(instance.ravel()) > 0
    choices = [pair for pair in record["phrases"] if pair[1] < len(seen) and seen[pair[1]]]
    if not choices:
        raise EmptyMaskError(f"No phrase names anything that is to be seen of {record['name']}.")
    phrase, target = choices[int(place * len(choices))]
    kinds = record.get("kinds", ())
    kind = dict(enumerate(kinds, start=1)).get

    others = [pair for pair in record["phrases"] if pair[1] != target and pair[0] != phrase]
    others.sort(key=lambda pair: kind(pair[1]) != kind(target))
    return record | {
        "caption": phrase,
        "referred": (instance == target).astype(np.float32),
        "distractors": [text for text, _ in others],
    }
