"""The table of datasets: one row says where the examples are and what their numbers mean.

Facts of the rows (units, valid ranges, crops) are those of the Marigold and GenPercept loaders,
which agree. To add a dataset, add a row to `DATASETS`; if its files are listed in a text file or
lie in `rgb/` and `depth/`, that is all.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpercept.data.crops import CROPS, EVAL_CROPS
from jaxpercept.data.readers import RawFloat32Reader, read_depth
from jaxpercept.data.sources import (
    FolderSource,
    ImageZipSource,
    ListSource,
    SceneExamples,
    TFDSSource,
)
from jaxpercept.data.transforms import crop
from jaxpercept.errors import UserError

Record = dict[str, Any]


class EmptyMaskError(UserError):
    """A record without a single valid pixel; training skips it, evaluation refuses it."""


# ---- where examples come from: (split, data_dir=, resolution=, **options) -> source --------------

# Scene indices of the two splits never meet; both stay below 2**31.
TRAIN_SCENES = range(0, 2**24)
TEST_SCENES = range(2**30, 2**30 + 1000)


def _scenes(split: str, *, data_dir: Any, resolution: tuple[int, int], size: int | None = None,
            scene_seed: int = 0, furnished: bool = False) -> SceneExamples:  # fmt: skip
    from jaxpercept.data.scenes import SceneSource  # only who renders scenes pays for the import

    indices = TRAIN_SCENES if split == "train" else TEST_SCENES
    height, width = resolution
    size = len(indices) if size is None else min(size, len(indices))
    shape = {"height": height, "width": width, "furnished": furnished}
    return SceneExamples(SceneSource(scene_seed, size, indices.start, **shape))


def _folder(split: str, *, data_dir: Any, resolution: Any) -> FolderSource:
    return FolderSource(data_dir)


def _listed(
    split: str,
    *,
    data_dir: Any,
    resolution: Any,
    lists: Mapping[str, str],
    columns: Sequence[str],
    depth_reader: Callable[[str], np.ndarray] = read_depth,
    list_file: str | None = None,
) -> ListSource:
    return ListSource(data_dir, list_file or lists[split], columns, depth_reader)


def _image_zip(split: str, *, data_dir: Any, resolution: Any) -> ImageZipSource:
    # 125 images of each class lie next to each other: the last of every 25 is held out.
    held_out = split == "test"
    return ImageZipSource(data_dir, keep=lambda i: (i % 25 == 24) == held_out)


def _tfds(split: str, *, data_dir: Any, resolution: Any, builder: str = "", rgb: str = "image",
          depth: str = "depth") -> TFDSSource:  # fmt: skip
    if not builder:
        raise UserError("Dataset tfds needs the option `builder`, the name of a TFDS dataset.")
    return TFDSSource(builder, split, data_dir, rgb=rgb, depth=depth)


# ---- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row.

    Attributes:
      name: what configs and commands call it.
      open_source: factory of the source; extra keywords are options a config may give.
      splits: names of the splits, the training split first, the one to evaluate last.
      provides: what a record has besides rgb: "depth" (with valid), "caption".
      depth_scale: units of the file per metre; None means 1000 for PNG and 1 for NPY and EXR.
      min_depth, max_depth: metres; valid means strictly between them.
      eval_range: metres that evaluation clips predictions to; None means (min_depth, max_depth).
      crop: key of `CROPS`, cut out of image and depth in training and evaluation.
      eval_crop: key of `EVAL_CROPS`; evaluation counts only the pixels inside.
      eval_resolution: long side at which the papers process the images; None means native.
      alignment: how evaluation fits a prediction to the truth ("least_square").
      alignment_max_resolution: long side of the grid on which the fit is solved; None means all.
      needs_data_dir: whether files are read.
      licence: one line on the terms of the data.
    """

    name: str
    open_source: Callable[..., Any]
    splits: Sequence[str]
    licence: str
    provides: frozenset[str] = frozenset({"depth"})
    depth_scale: float | None = 1.0
    min_depth: float = 0.0
    max_depth: float = math.inf
    eval_range: tuple[float, float] | None = None
    crop: str | None = None
    eval_crop: str | None = None
    eval_resolution: int | None = None
    alignment: str = "least_square"
    alignment_max_resolution: int | None = None
    needs_data_dir: bool = True

    @property
    def clip_range(self) -> tuple[float, float]:
        """Metres that evaluation clips aligned predictions to."""
        return self.eval_range or (self.min_depth, self.max_depth)


def _list_rows(*columns: str, depth_reader: Any = read_depth, **lists: str) -> dict[str, Any]:
    """The fields of a row whose examples are named in one text file per split."""
    source = functools.partial(_listed, lists=lists, columns=columns, depth_reader=depth_reader)
    return {"open_source": source, "splits": tuple(lists)}


_ROWS = (
    Dataset(
        "scenes",
        _scenes,
        splits=("train", "test"),
        provides=frozenset({"depth", "caption"}),
        needs_data_dir=False,
        licence="generated by this package (Apache-2.0)",
    ),
    Dataset(
        "furnished",
        functools.partial(_scenes, furnished=True),
        splits=("train", "test"),
        provides=frozenset({"depth", "caption"}),
        needs_data_dir=False,
        licence="generated by this package (Apache-2.0)",
    ),
    Dataset(
        "folder",
        _folder,
        splits=("all",),
        depth_scale=None,
        licence="yours",
    ),
    Dataset(
        "list",
        **_list_rows("rgb", "depth", train="train.txt", test="test.txt"),
        depth_scale=None,
        licence="yours",
    ),
    Dataset(
        "tfds",
        _tfds,
        splits=("train", "validation"),
        licence="that of the TFDS dataset",
    ),
    Dataset(
        "nyuv2",
        **_list_rows("rgb", "depth", train="train.txt", test="test.txt"),
        depth_scale=1000.0,
        min_depth=1e-3,
        max_depth=10.0,
        eval_crop="nyu",
        licence="NYU Depth v2, research use",
    ),
    Dataset(
        "hypersim",
        **_list_rows(
            "rgb",
            "depth",
            train="filename_list_train_filtered.txt",
            val="filename_list_val_filtered.txt",
            test="filename_list_test_filtered.txt",
        ),
        depth_scale=1000.0,
        min_depth=1e-5,
        max_depth=65.0,
        licence="Hypersim, CC BY-SA 3.0",
    ),
    Dataset(
        "vkitti",
        **_list_rows("rgb", "depth", train="vkitti_train.txt", val="vkitti_val.txt"),
        depth_scale=100.0,
        min_depth=1e-5,
        max_depth=80.0,
        crop="kitti_benchmark",
        eval_crop="eigen",
        licence="Virtual KITTI 2, CC BY-NC-SA 3.0",
    ),
    Dataset(
        "taskonomy",
        **_list_rows("rgb", "depth", train="train.txt", test="test.txt"),
        depth_scale=512.0,
        min_depth=1e-5,
        max_depth=65.0,
        licence="Taskonomy, non-commercial research use",
    ),
    Dataset(
        "cityscapes",
        **_list_rows("rgb", "depth", train="train.txt", test="test.txt"),
        depth_scale=300.0,
        min_depth=1e-5,
        max_depth=80.0,
        licence="Cityscapes, non-commercial research use",
    ),
    Dataset(
        "kitti_eigen",
        **_list_rows(
            "rgb",
            "depth",
            val="eigen_val_from_train_800.txt",
            test="eigen_test_files_with_gt.txt",
        ),
        depth_scale=256.0,
        min_depth=1e-5,
        max_depth=80.0,
        crop="kitti_benchmark",
        eval_crop="eigen",
        licence="KITTI, CC BY-NC-SA 3.0",
    ),
    Dataset(
        "scannet",
        **_list_rows("rgb", "depth", test="scannet_val_sampled_list_800_1.txt"),
        depth_scale=1000.0,
        min_depth=1e-3,
        max_depth=10.0,
        licence="ScanNet terms of use, non-commercial",
    ),
    Dataset(
        "eth3d",
        **_list_rows(
            "rgb",
            "depth",
            depth_reader=RawFloat32Reader(4032, 6048),
            test="eth3d_filename_list.txt",
        ),
        min_depth=1e-5,
        eval_resolution=756,
        alignment_max_resolution=1024,
        licence="ETH3D, CC BY-NC-SA 4.0",
    ),
    Dataset(
        "diode",
        **_list_rows("rgb", "depth", "mask", test="diode_val_all_filename_list.txt"),
        eval_range=(0.6, 350.0),
        eval_resolution=640,
        licence="DIODE, MIT",
    ),
    Dataset(
        "tiny_imagenet",
        _image_zip,
        splits=("train", "test"),
        provides=frozenset({"caption"}),
        licence="ImageNet terms, non-commercial research use",
    ),
)

DATASETS: dict[str, Dataset] = {row.name: row for row in _ROWS}

# What a config or a command line may change about a row.
_OVERRIDES = ("depth_scale", "min_depth", "max_depth", "crop", "eval_crop")
# What a source factory takes that is not an option.
_FIXED_BY_ROW = {"split", "data_dir", "resolution", "lists", "columns", "depth_reader"}


class Records:
    """Random-access records of one dataset split, in metres and with a valid mask.

    A record is a dict: `rgb` uint8 [h, w, 3]; `depth` float32 [h, w, 1] metres, 0 where invalid;
    `valid` bool [h, w, 1]; `name` str; and `caption` str where the dataset has one. Sizes are those
    of the file, after the dataset's crop. Scenes also have `normals` float32 [h, w, 3] (x right,
    y up, z towards the viewer), `instance` and `classes` int32 [h, w, 1], `phrases` (pairs of text
    and instance) and `intrinsics` (fx, fy, cx, cy) in pixels.

    Raises (on indexing):
      UnreadableFileError: the file is damaged.
      EmptyMaskError: no pixel of the record is valid.
    """

    def __init__(self, dataset: Dataset, source: Any, *, evaluation: bool):
        self.dataset, self.source, self.evaluation = dataset, source, evaluation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        example = self.source[index]
        if self.dataset.crop is not None:
            rows, columns = CROPS[self.dataset.crop](*example["rgb"].shape[:2])
            size = rows.stop - rows.start, columns.stop - columns.start
            example = crop(example, rows.start, columns.start, *size)
        if "depth" not in self.dataset.provides:
            return example
        return self._with_metric_depth(example)

    def _with_metric_depth(self, example: Record) -> Record:
        row = self.dataset
        depth = example["depth"] / np.float32(row.depth_scale)
        # The comparisons are false for nan, and inf is never below max_depth = inf.
        valid = (depth > row.min_depth) & (depth < row.max_depth)
        if "mask" in example:
            valid &= example["mask"]
        if self.evaluation and row.eval_crop is not None:
            inside = np.zeros_like(valid)
            inside[EVAL_CROPS[row.eval_crop](*valid.shape[:2])] = True
            valid &= inside
        if not valid.any():
            raise EmptyMaskError(
                f"No depth of {example['name']} lies between {row.min_depth} and {row.max_depth} m;"
                " remove it or check depth_scale."
            )
        record = {k: v for k, v in example.items() if k != "mask"}
        return record | {"depth": np.where(valid, depth, np.float32(0)), "valid": valid}


def open_dataset(
    name: str,
    *,
    split: str | None = None,
    data_dir: str | Path | None = None,
    resolution: tuple[int, int] = (480, 640),
    evaluation: bool = False,
    **options: Any,
) -> Records:
    """Opens one split of a dataset of the table and checks that its files are there.

    Args:
      name: key of `DATASETS`.
      split: one of the row's splits; None means the first for training, the last for evaluation.
      data_dir: folder of the files.
      resolution: (height, width) of datasets that have none of their own (procedural scenes).
      evaluation: whether `valid` is restricted to the evaluation crop.
      options: values that replace those of the row (`depth_scale`, `min_depth`, `max_depth`,
        `crop`, `eval_crop`) or that its source takes (`list_file`, `size`, `builder`, ...).

    Raises:
      UserError: unknown dataset, split or option, or missing files.
    """
    if name not in DATASETS:
        raise UserError(f"Unknown dataset {name!r}; known are {', '.join(sorted(DATASETS))}.")
    row = DATASETS[name]
    if row.needs_data_dir and not data_dir:
        raise UserError(f"Dataset {name} needs a folder; set data_dir.")
    split = split or row.splits[-1 if evaluation else 0]
    # A list file of one's own needs no known split; TFDS splits may be slices.
    if split not in row.splits and name != "tfds" and "list_file" not in options:
        raise UserError(f"Dataset {name} has no split {split!r}, only {', '.join(row.splits)}.")
    changes = {k: _override(k, options.pop(k)) for k in _OVERRIDES if k in options}
    accepted = set(inspect.signature(row.open_source).parameters) - _FIXED_BY_ROW
    for option in sorted(options.keys() - accepted):
        raise UserError(
            f"Dataset {name} has no option {option!r}; it takes "
            f"{', '.join(sorted(accepted | set(_OVERRIDES)))}."
        )
    source = row.open_source(split, data_dir=data_dir, resolution=resolution, **options)
    row = _checked(dataclasses.replace(row, **changes))
    if row.depth_scale is None:
        row = dataclasses.replace(row, depth_scale=_scale_of_format(source))
    return Records(row, source, evaluation=evaluation)


def _override(key: str, value: Any) -> Any:
    if value is None or key in ("crop", "eval_crop"):
        return value
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} must be a number, got {value!r}.") from error


def _checked(row: Dataset) -> Dataset:
    if row.depth_scale is not None and not row.depth_scale > 0:
        raise UserError(f"depth_scale must be positive, got {row.depth_scale}.")
    if not row.min_depth < row.max_depth:
        raise UserError(
            f"min_depth must be below max_depth, got {row.min_depth} and {row.max_depth}."
        )
    for field, known in (("crop", CROPS), ("eval_crop", EVAL_CROPS)):
        value = getattr(row, field)
        if value is not None and value not in known:
            raise UserError(f"Unknown {field} {value!r}; known are {', '.join(known)} and None.")
    return row


def _scale_of_format(source: Any) -> float:
    """16-bit PNG holds millimetres unless said otherwise, floating-point formats hold metres."""
    is_png = {path.lower().endswith(".png") for path in source.columns["depth"]}
    if len(is_png) > 1:
        raise UserError(
            f"{source} mixes PNG and floating-point depth; use one format or set depth_scale."
        )
    return 1000.0 if is_png.pop() else 1.0
