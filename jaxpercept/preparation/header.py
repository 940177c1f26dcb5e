"""The header of a prepared dataset: what its fields are, in words and in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from jaxpercept.data.prepared import FORMAT, tfds_split
from jaxpercept.data.readers import VOID
from jaxpercept.data.row import Dataset
from jaxpercept.data.storage import features_of

# What a header says of the row; `open_dataset` takes it over.
_OF_ROW = ("depth_scale", "min_depth", "max_depth", "crop", "eval_crop", "camera")
# What the numbers mean, in the words of the header.
MEANING = {
    "rgb": "8-bit sRGB, upright",
    "depth": "planar depth (along the optical axis) in units of 1 / depth_scale metres; valid "
    "strictly between min_depth and max_depth, and where mask, if there is one, is set",
    "normals": "unit vectors in the camera's frame, x right, y up, z towards the viewer; 0 where "
    "there is none",
    "alpha": "the share of the foreground; whole numbers are to be divided by their largest",
    "trimap": "0 background, 128 unknown, 255 foreground",
    "classes": "numbers into class_names; 255 is void",
    "mask": "1 where the target is valid",
    "instance": "0 where nothing is, else the number of the thing",
    "keypoints": "x, y in pixels (the middle of the first at 0.5) and 0 absent, 1 occluded, "
    "2 visible",
    "box": "left, top, right, bottom in pixels",
    "phrases": "what names which instance",
    "kinds": "what the instances from 1 on are",
    "caption": "what the picture shows, in words",
    "intrinsics": "fx, fy, cx, cy in pixels (the middle of the first at 0.5)",
    "name": "of the example in the files that it comes from",
}


def header_of(
    row: Dataset, targets: Sequence[str], fields: Mapping[str, str], splits: Mapping[str, Any]
) -> dict[str, Any]:
    """The header, of plain values that JSON has.

    Args:
      row: with the options it was opened with.
      targets: that records can be opened for.
      fields: field -> name of its storage.
      splits: split -> its examples, shards and hashes.
    """
    return {
        "format": FORMAT,
        "dataset": row.name,
        "licence": row.licence,
        "targets": list(targets),
        "fields": dict(fields),
        "meaning": {field: MEANING[field] for field in fields},
        "conventions": conventions(row, fields),
        "row": row_facts(row),
        "class_names": list(row.class_names),
        "palette": [list(colour) for colour in row.palette],
        "splits": dict(splits),
        "written_by": f"jaxpercept {installed('jaxpercept')}",
    }


def conventions(row: Dataset, fields: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a program needs to know of the fields' numbers, by field.

    All depth is planar, whatever the source measures: readers turn distances along the rays into
    distances along the optical axis.
    """
    known: dict[str, dict[str, Any]] = {
        "depth": {
            "measured": "planar",
            "units_per_metre": row.depth_scale,
            "valid_above_metres": row.min_depth,
            "valid_below_metres": _plain(row.max_depth),
            "mask": "mask" if "mask" in fields else None,
        },
        "normals": {"axes": "right_up_back", "towards": "viewer", "none": [0.0, 0.0, 0.0]},
        "classes": {"void": VOID, "names": "class_names", "colours": "palette"},
        "intrinsics": {"order": ["fx", "fy", "cx", "cy"], "unit": "pixel", "first_pixel": 0.5},
    }
    said = {field: facts for field, facts in known.items() if field in fields}
    if row.camera is not None and {"depth", "normals"} & fields.keys():
        # One camera for all pictures of its size: see "row".
        said["intrinsics"] = known["intrinsics"] | {"of_all": "row.camera"}
    return said


def row_facts(row: Dataset) -> dict[str, Any]:
    """What `open_dataset` takes over of the row."""
    return {key: _plain(getattr(row, key)) for key in _OF_ROW}


def _plain(value: Any) -> Any:
    """JSON has neither infinity nor tuples."""
    if isinstance(value, tuple):
        return list(value)
    return "inf" if value == math.inf else value


def write_metadata(folder: Path, name: str, header: Mapping[str, Any]) -> None:
    """What makes a folder with shards a dataset of TFDS; the header is its metadata."""
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=tfds_split(split),
            shard_lengths=facts["shard_lengths"],
            num_bytes=facts["bytes"],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=name,
                split=tfds_split(split),
                filetype_suffix="array_record",
            ),
        )
        for split, facts in header["splits"].items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features_of(header["fields"], decoded=True),
        split_infos=infos,
        version=folder.name,
        check_data=False,
        description=f"{header['dataset']}, prepared by {header['written_by']}. "
        f"Licence: {header['licence']}.",
        metadata=tfds.core.MetadataDict(header),
    )
