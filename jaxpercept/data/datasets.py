"""Opening datasets of the table: records in one convention, whatever the files say."""

import dataclasses
import hashlib
import inspect
import logging
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxpercept.data import prepared
from jaxpercept.data.crops import CROPS, EVAL_CROPS
from jaxpercept.data.layouts import Request
from jaxpercept.data.readers import VOID, EmptyMaskError
from jaxpercept.data.referring import refer
from jaxpercept.data.row import TARGETS, Dataset
from jaxpercept.data.rows import DATASETS
from jaxpercept.data.rows.own import TEST_SCENES, TRAIN_SCENES
from jaxpercept.data.sources import Example, FileSource, names_hash, place_of
from jaxpercept.data.transforms import crop
from jaxpercept.errors import UserError

__all__ = [
    "DATASETS",
    "TARGETS",
    "TEST_SCENES",
    "TRAIN_SCENES",
    "Dataset",
    "EmptyMaskError",
    "Record",
    "Records",
    "open_dataset",
    "options_of",
]

Record = dict[str, Any]

_log = logging.getLogger(__name__)


class Records:
    """Random-access records of one dataset split, opened for some targets.

    A record is a dict: `name` str; `rgb` uint8 [h, w, 3]; `valid` bool [h, w, 1], where all targets
    are; and the targets:
    - `depth` float32 [h, w, 1] metres, 0 where invalid: outside of the row's range, or masked;
    - `normals` float32 [h, w, 3] unit vectors, x right, y up, z towards the viewer, 0 where
      invalid;
    - `alpha` float32 [h, w, 1] in [0, 1]: masks and mattes, valid everywhere; with it `trimap`
      uint8 [h, w, 1] (0 background, 128 unknown, 255 foreground) where the dataset has one;
    - `classes` int32 [h, w, 1], numbers into the row's `class_names`, 255 where void, i.e. invalid;
      with it `labels`, the row's, if it has some;
    - `keypoints` float32 [k, 3] of one person, (x, y, visibility): pixels of this picture with the
      middle of the first at 0.5; 0 absent (then x = y = 0), 1 occluded, 2 visible; with it `box`
      float32 [4] (left, top, right, bottom) and `flip_pairs` (see the row);
    - `referred` float32 [h, w, 1], 1 on what the phrase `caption` names and 0 elsewhere, invalid
      where the dataset does not know; with it `distractors`, a list of phrases that name other
      things of the picture, those of the same kind first;
    - `instances`: `instance` int32 [h, w, 1], 0 where nothing is, and `kinds`, the names of what
      the instances from 1 on are.
    Where they exist also: `caption` str, `instance` int32 [h, w, 1], `phrases` (pairs of text and
    instance), `kinds` (of the instances from 1 on), `intrinsics` (fx, fy, cx, cy) in pixels; with
    depth `unmasked_depth`, metres as the file has them. Rendered scenes have everything they know,
    asked for or not. Sizes are those of the file, after the dataset's crop.

    Which phrase a record is about depends on its name alone. In evaluation that is the end of it;
    for training `phrases` stay, and `transforms.prepare` draws one of them anew every time.

    Attributes:
      dataset: the row, with the options it was opened with.
      source: where the examples come from.
      split, targets, evaluation: what it was opened for.

    Raises (on indexing):
      UnreadableFileError: the file is damaged.
      EmptyMaskError: no pixel of the record is valid, or no phrase names anything in it.
    """

    def __init__(
        self,
        dataset: Dataset,
        source: Any,
        *,
        split: str,
        targets: tuple[str, ...],
        evaluation: bool,
    ):
        self.dataset, self.source = dataset, source
        self.split, self.targets, self.evaluation = split, targets, evaluation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.record_of(self.source[index])

    def provenance(self) -> dict[str, Any]:
        """Which examples these are, for the record: plain JSON.

        Where they have names, `names_sha256` is of these, one a line and in order: the same for a
        folder and for what was prepared of it.
        """
        facts = {"dataset": self.dataset.name, "split": self.split, "examples": len(self)}
        facts["source"] = repr(self.source)
        if hasattr(self.source, "names"):
            facts["names_sha256"] = names_hash(self.source.names)
        return facts

    def record_of(self, example: Example) -> Record:
        """The record of an example of the source.

        Raises:
          EmptyMaskError: as on indexing.
        """
        record: Record = dict(example)
        row = self.dataset
        if row.camera is not None and {"depth", "normals"} & {*self.targets}:
            intrinsics = row.camera.at(record["rgb"].shape)
            if intrinsics is not None:
                record.setdefault("intrinsics", intrinsics)
        if row.crop is not None:
            rows, columns = CROPS[row.crop](*record["rgb"].shape[:2])
            size = rows.stop - rows.start, columns.stop - columns.start
            record = crop(record, rows.start, columns.start, *size)
        masks = {}
        if "depth" in record:
            masks["depth"] = _make_metric(record, row)
        if "normals" in record:
            if row.depth_masks_normals and "depth" in masks:
                record["normals"] = np.where(masks["depth"], record["normals"], np.float32(0))
            masks["normals"] = record["normals"].any(axis=-1, keepdims=True)
        if "classes" in record:
            masks["classes"] = record["classes"] != VOID
            if row.labels is not None:
                record["labels"] = row.labels
        if "referred" in self.targets:
            record = refer(record, place_of(record["name"]))
            if self.evaluation:
                del record["phrases"]
            if "mask" in record:
                masks["referred"] = record.pop("mask")
        if "instances" in self.targets and "mask" in record:
            masks["instances"] = record.pop("mask")
        if "keypoints" in record and row.flip_pairs:
            record.setdefault("flip_pairs", row.flip_pairs)
        if row.depth_masks_normals and "depth" not in self.targets:
            record.pop("depth", None)
            record.pop("unmasked_depth", None)
        return record | {"valid": self._valid(record, masks)}

    def _valid(
        self, record: Record, masks: dict[str, Bool[np.ndarray, "h w 1"]]
    ) -> Bool[np.ndarray, "h w 1"]:
        """Where all targets are valid."""
        row, size = self.dataset, record["rgb"].shape[:2]
        valid = np.ones((*size, 1), bool)
        for target in self.targets:
            valid &= masks.get(target, True)
        if self.evaluation and row.eval_crop is not None and "depth" in self.targets:
            inside = np.zeros_like(valid)
            inside[EVAL_CROPS[row.eval_crop](*size)] = True
            valid &= inside
        if not valid.any():
            wanted = [target for target in self.targets if target in masks]
            guilty = [target for target in wanted if not masks[target].any()]
            wanted = guilty[:1] or wanted
            if wanted == ["depth"]:
                raise EmptyMaskError(
                    f"No depth of {record['name']} lies between {row.min_depth} and "
                    f"{row.max_depth} m; remove it or check depth_scale."
                )
            raise EmptyMaskError(
                f"No pixel of {record['name']} has valid {' and '.join(wanted)}; remove it."
            )
        return valid

    def names_sha256(self) -> str:
        """Hash of the names of all examples in their order, by which lists can be compared.

        Raises:
          UserError: the examples have no names before they are read.
        """
        names = getattr(self.source, "names", None)
        if names is None:
            raise UserError(f"The examples of dataset {self.dataset.name} come from no list.")
        return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _make_metric(record: Record, row: Dataset) -> Bool[np.ndarray, "h w 1"]:
    """Turns a record's depth into metres, 0 where invalid; returns where it is valid."""
    unmasked = record["depth"] / np.float32(row.depth_scale)
    # The comparisons are false for nan, and inf is never below max_depth = inf.
    valid = (unmasked > row.min_depth) & (unmasked < row.max_depth)
    if "mask" in record:
        valid &= record.pop("mask")
    record["depth"] = np.where(valid, unmasked, np.float32(0))
    record["unmasked_depth"] = unmasked
    return valid


# What a config or a command line may change about a row.
_OVERRIDES = ("depth_scale", "min_depth", "max_depth", "crop", "eval_crop")
# What a source factory takes that is not an option.
_FIXED_BY_ROW = {"request", "layouts", "lists", "subject", "alike"}


def open_dataset(
    name: str,
    *,
    split: str | None = None,
    data_dir: str | Path | None = None,
    resolution: tuple[int, int] = (480, 640),
    evaluation: bool = False,
    targets: Collection[str] | None = None,
    held_out: float = 0.0,
    **options: Any,
) -> Records:
    """Opens one split of a dataset of the table and checks that its files are there.

    Args:
      name: key of `DATASETS`.
      split: one of the row's splits; None means, of those that have the targets, the first for
        training and the last for evaluation.
      data_dir: folder of the files.
      resolution: (height, width) of datasets that have none of their own (procedural scenes).
      evaluation: whether `valid` is restricted to the evaluation crop (of depth), and whether the
        number of examples must be, or should be, the published one.
      targets: of `TARGETS`: which files are read, and what `valid` is the intersection of; none at
        all reads images. None means depth if the dataset has it, else all that it has.
      held_out: of files that nobody has split: evaluation gets about this share of the images and
        training the others; 0 gives all to both. An image's name alone decides, so that it does not
        change sides when others are added.
      options: values that replace those of the row (`depth_scale`, `min_depth`, `max_depth`,
        `crop`, `eval_crop`) or that its source takes (`list_file`, `normals_axes`, `size`, ...).

    Raises:
      UserError: unknown dataset, split, target or option, or missing files.
    """
    if name not in DATASETS:
        raise UserError(f"Unknown dataset {name!r}; known are {', '.join(sorted(DATASETS))}.")
    row = DATASETS[name]
    if row.needs_data_dir and not data_dir:
        raise UserError(f"Dataset {name} needs a folder; set data_dir.")
    targets = _checked_targets(row, targets)
    folder = prepared.find(data_dir, name)
    splits = row.splits_with(targets) or tuple(row.splits)
    if folder is not None:
        splits = prepared.splits_of(folder, splits)
    split = split or splits[-1 if evaluation else 0]
    # A list file of one's own needs no known split; TFDS splits may be slices.
    if split not in row.splits and name != "tfds" and "list_file" not in options and not folder:
        raise UserError(f"Dataset {name} has no split {split!r}, only {', '.join(row.splits)}.")
    changes = {k: _override(k, options.pop(k)) for k in _OVERRIDES if k in options}
    accepted = options_of(name)
    for option in sorted(options.keys() - accepted.keys()):
        raise UserError(
            f"Dataset {name} has no option {option!r}; it takes {', '.join(sorted(accepted))}."
        )
    for option, value in options.items():
        _check_kind(row, option, value)
    masked = row.depth_masks_normals and "normals" in targets and "depth" not in targets
    request = Request(
        name=name,
        split=split,
        data_dir=data_dir,
        resolution=tuple(resolution),
        targets=targets,
        wished=("depth",) if masked else (),
        layout=row.layout,
        evaluation=evaluation,
    )
    if folder is None:
        source = row.open_source(request, **options)
        row = dataclasses.replace(row, **getattr(source, "facts", {}))
    else:
        # Configs name all options of a row, most with their defaults.
        for option in sorted(key for key in options if options[key] != accepted[key]):
            raise UserError(
                f"{folder} is prepared: leave {option} away, or prepare it again with that."
            )
        source, facts = prepared.open_prepared(folder, request)
        row = dataclasses.replace(row, **facts)
    if held_out:
        source = _one_side(source, name, held_out, evaluation)
    row = _checked(dataclasses.replace(row, **changes))
    if row.depth_scale is None:
        row = dataclasses.replace(row, depth_scale=_scale_of_format(source))
    if evaluation:
        _check_length(row, source, split)
    return Records(row, source, split=split, targets=targets, evaluation=evaluation)


def options_of(name: str) -> dict[str, Any]:
    """The options of a dataset beside `data_dir`, and their defaults; None: what its row says."""
    row = DATASETS[name]
    own = inspect.signature(row.open_source).parameters
    options = {
        key: parameter.default
        for key, parameter in own.items()
        if key not in _FIXED_BY_ROW and parameter.kind is not parameter.VAR_KEYWORD
    }
    for layout in row.layouts:
        options |= layout.options
    return {**dict.fromkeys(_OVERRIDES), "held_out": 0.0, **options}


def _check_kind(row: Dataset, option: str, value: Any) -> None:
    """Whether a value is of the kind that a row's source says it takes, if it says so."""
    own = inspect.signature(row.open_source).parameters
    kind = own[option].annotation if option in own else type(options_of(row.name)[option])
    if kind is inspect.Parameter.empty or not isinstance(kind, type | types.UnionType):
        return
    if not isinstance(value, int | float if kind is float else kind):
        kind = getattr(kind, "__name__", kind)
        raise UserError(f"{option} of dataset {row.name} must be {kind}, got {value!r}.")


def _one_side(source: Any, name: str, held_out: float, evaluation: bool) -> Any:
    """The images that are held out for evaluation, or the others."""
    if not 0 < held_out < 1:
        raise UserError(f"held_out of dataset {name} is a share from 0 to below 1, not {held_out}.")
    if not isinstance(source, FileSource | prepared.PreparedSource):
        raise UserError(f"Dataset {name} has splits of its own; leave held_out away.")
    side = source.subset(lambda image: (place_of(image) < held_out) == evaluation)
    if not len(side):
        kind = "evaluation" if evaluation else "training"
        raise UserError(
            f"held_out={held_out} leaves none of the {len(source)} images of dataset {name} to "
            f"{kind}; change the share or add images."
        )
    return side


def _checked_targets(row: Dataset, targets: Collection[str] | None) -> tuple[str, ...]:
    if targets is None:
        return ("depth",) if "depth" in row.provides else row.targets
    targets = {targets} if isinstance(targets, str) else set(targets)
    for target in sorted(targets - set(TARGETS)):
        raise UserError(f"Unknown target {target!r}; known are {', '.join(TARGETS)}.")
    for target in sorted(targets - set(row.targets)):
        raise UserError(
            f"Dataset {row.name} has no {target}; it has {', '.join(row.targets) or 'no target'}."
        )
    return tuple(target for target in TARGETS if target in targets)


def _check_length(row: Dataset, source: Any, split: str) -> None:
    """Whether an evaluation may carry the published name of the split."""
    count = len(source)
    expected = row.expected[split] if split in row.exact else getattr(source, "expected", None)
    if expected is None or count == expected:
        return
    if split in row.exact:
        raise UserError(
            f"{row.name} is {expected} images, this list names {count}: its results could not be "
            "compared with any published ones. Take the published list, or evaluate yours with "
            f"--dataset=list --options=list_file=FILE,crop={row.crop} --eval_crop={row.eval_crop} "
            f"--depth_scale={row.depth_scale:g} --min_depth={row.min_depth:g} "
            f"--max_depth={row.max_depth:g}."
        )
    _log.warning(
        "The split %s of %s has %d examples here and %d as published: do not compare results with "
        "published ones.",
        split, row.name, count, expected,
    )  # fmt: skip


def _override(key: str, value: Any) -> Any:
    if value is None or key in ("crop", "eval_crop"):
        return None if value == "none" else value
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
    is_png = {path.lower().endswith(".png") for path in source.columns.get("depth", ())}
    if len(is_png) > 1:
        raise UserError(
            f"{source} mixes PNG and floating-point depth; use one format or set depth_scale."
        )
    return 1000.0 if True in is_png else 1.0
