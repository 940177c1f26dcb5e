"""What the table of datasets says about one of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpercept.data.cameras import Camera
from jaxpercept.data.layouts import Layout
from jaxpercept.data.palettes import PALETTES, Colour

TARGETS = ("depth", "normals", "alpha", "classes", "keypoints", "referred", "instances")
"""What a record may be opened for."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row.

    Attributes:
      name: what configs and commands call it.
      open_source: factory of the source: (Request, **options a config may give) -> source.
      splits: names of the splits, the training split first, the one to evaluate last.
      licence: one line on the terms of the data.
      provides: what a record can have besides rgb and valid: of `TARGETS`, and "caption".
      layout: in words, what the folder must hold.
      depth_scale: units of the file per metre; None means 1000 for PNG and 1 for NPY and EXR.
      min_depth, max_depth: metres; valid means strictly between them.
      eval_range: metres that evaluation clips predictions to; None means (min_depth, max_depth).
      crop: key of `CROPS`, cut out of image and targets in training and evaluation.
      eval_crop: key of `EVAL_CROPS`; evaluation of depth counts only the pixels inside.
      eval_resolution: long side at which the papers process the images; None means native.
      alignment: how evaluation fits a prediction to the truth ("least_square").
      alignment_max_resolution: long side of the grid on which the fit is solved; None means all.
      depth_masks_normals: normals are 0 where the depth is invalid (GenPercept), wherever depth is
        at hand.
      camera: of all pictures, where they share one and their files do not say it.
      labels: key of `PALETTES`: what the classes are.
      keypoint_names, flip_pairs: of the keypoints, and which of them a mirror exchanges.
      expected: split -> how many examples it has as published (other lists of the same data have
        other lengths; `layouts.Layout.expected` holds them).
      exact: the splits whose name may not be used for any other number of examples.
      needs_data_dir: whether files are read.
    """

    name: str
    open_source: Callable[..., Any]
    splits: Sequence[str]
    licence: str
    provides: frozenset[str] = frozenset({"depth"})
    layout: str = ""
    depth_scale: float | None = 1.0
    min_depth: float = 0.0
    max_depth: float = math.inf
    eval_range: tuple[float, float] | None = None
    crop: str | None = None
    eval_crop: str | None = None
    eval_resolution: int | None = None
    alignment: str = "least_square"
    alignment_max_resolution: int | None = None
    depth_masks_normals: bool = False
    camera: Camera | None = None
    labels: str | None = None
    keypoint_names: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    exact: tuple[str, ...] = ()
    needs_data_dir: bool = True

    @property
    def clip_range(self) -> tuple[float, float]:
        """Metres that evaluation clips aligned predictions to."""
        return self.eval_range or (self.min_depth, self.max_depth)

    @property
    def targets(self) -> tuple[str, ...]:
        """What it can be opened for."""
        return tuple(target for target in TARGETS if target in self.provides)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in their order; empty where nobody knows them."""
        return PALETTES[self.labels].names if self.labels else ()

    @property
    def palette(self) -> tuple[Colour, ...]:
        """The classes' colours, 8-bit RGB."""
        return PALETTES[self.labels].colours if self.labels else ()

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """In which its files may lie, where `layouts.open_layouts` opens them."""
        return tuple(getattr(self.open_source, "keywords", {}).get("layouts", ()))

    def splits_with(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The splits that have these targets."""
        if not self.layouts:
            return tuple(self.splits)
        fitting = [x for x in self.layouts if set(targets) <= x.fields]
        return tuple(s for s in self.splits if any(s in x.splits for x in fitting))
