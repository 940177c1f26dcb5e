"""Hypersim as it is downloaded: HDF5 files of radiance, distance, normals, classes and entities.

Images, depth and normals are made of them as Marigold makes them (its
script/depth/dataset_preprocess/hypersim and script/normals/dataset_preprocess/hypersim), so that
its lists name the same examples. Where we differ: depth beyond 65.535 m is none, and a frame
whose depth has nan is refused; Marigold writes both into 16 bits as they wrap around, and leaves
such frames out of its "filtered" lists afterwards.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt8

from jaxpercept.data.layouts import Files, Layout, Meaning, Request
from jaxpercept.data.readers import VOID, UnreadableFileError, read_hdf5
from jaxpercept.data.sources import Example
from jaxpercept.errors import UserError

SPLITS_FILE = "metadata_images_split_scene_v1.csv"
ORIENTATIONS = ("positions", "rays", "none")

_KINDS = {"depth": "depth_meters", "normals": "normal_cam", "classes": "semantic"}
_FOCAL, _WIDTH = 886.81, 1024  # of the cameras, in pixels of pictures so wide
_GAMMA = 1 / 2.2
_BRIGHT, _PERCENTILE, _DARK = 0.8, 90, 1e-4
_LARGEST = 65535  # millimetres
_FACING = -1e-3


class Frame(NamedTuple):
    """One picture."""

    scene: str
    camera: str
    number: int

    @property
    def name(self) -> str:
        """As Marigold names it."""
        return f"{self.scene}/rgb_{self.camera}_fr{self.number:04d}.png"

    def file(self, kind: str) -> str:
        """Where something of it lies, relative to the data folder."""
        group = "final" if kind == "color" else "geometry"
        folder = f"{self.scene}/images/scene_{self.camera}_{group}_hdf5"
        return f"{folder}/frame.{self.number:04d}.{kind}.hdf5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HypersimFiles(Layout):
    """The downloaded files.

    Attributes:
      orientation: what says on which side of a surface the camera is; the normals point to either.
        "positions" of the points and of the camera (Marigold), which are files of their own;
        "rays", the direction in which a pixel looks (E2E-FT, Lotus), by the usual intrinsics;
        "none" leaves the normals as they are.
      list_file: only the images that a list names, such as Marigold's filtered ones.
    """

    OPTIONS: ClassVar = ("orientation",)

    splits: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {split: split for split in ("train", "val", "test")}
    )
    orientation: str = "positions"
    list_file: str | None = None

    def __post_init__(self) -> None:
        if self.orientation not in ORIENTATIONS:
            raise UserError(
                f"Unknown orientation {self.orientation!r}; known are {', '.join(ORIENTATIONS)}."
            )

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(_KINDS)

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        return any(files.root.glob("ai_*/images"))

    def listed(self, files: Files, split: str, list_file: str) -> HypersimFiles | None:
        there = self.is_there(files, split, ())
        return dataclasses.replace(self, list_file=list_file) if there else None

    def open(self, files: Files, request: Request, meaning: Meaning) -> HypersimSource:
        meaning.refuse("Hypersim's own files")
        frames = _frames(files, request.split)
        if self.list_file is not None:
            frames = _listed(frames, files.root / self.list_file)
        first = {field: frames[0].file(kind) for field, kind in _KINDS.items()}
        there = {field for field, path in first.items() if files.find(path) is not None}
        for field in request.targets:
            if field not in there:
                raise UserError(
                    f"{files.root / first[field]} is missing; download it or leave {field} out of "
                    "the targets."
                )
        fields = {*request.targets, *(there & {*request.wished})}
        if "normals" in fields and self.orientation == "positions":
            _require_positions(files.root, frames[0])
        return HypersimSource(files.root, frames, fields, self.orientation)


class HypersimSource:
    """Examples of downloaded frames: `rgb`, `depth` in millimetres, `normals`, NYU's 40 `classes`,
    and with depth or normals `intrinsics`, the usual ones (a few scenes tilt the lens).
    """

    def __init__(self, root: Path, frames: Sequence[Frame], fields: set[str], orientation: str):
        self.root, self.frames, self.orientation = str(root), list(frames), orientation
        self.fields = sorted(fields)
        self.expected = None  # the published numbers are those of filtered lists
        self.names = [frame.name for frame in frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Example:
        frame = self.frames[index]
        entities = self._read(frame, "render_entity_id")
        height, width = size = entities.shape
        if (entities == 0).any():
            raise UnreadableFileError(f"{frame.name} has pixels of entity 0: a broken scene.")
        focal = _FOCAL * width / _WIDTH
        example: Example = {
            "name": frame.name,
            "rgb": tone_mapped(self._read(frame, "color", (*size, 3)), entities != -1),
        }
        if {"depth", "normals"} & {*self.fields}:
            centre = width / 2, height / 2
            example["intrinsics"] = np.array([focal, focal, *centre], np.float32)
        if "depth" in self.fields:
            planar = planar_depth(self._read(frame, "depth_meters", size), focal)
            if np.isnan(planar).any():
                raise UnreadableFileError(f"The depth of {frame.name} has nan; remove it.")
            example["depth"] = _millimetres(np.where(entities[..., None] == -1, 0, planar))
        if "normals" in self.fields:
            example["normals"] = self._normals(frame, size, focal)
        if "classes" in self.fields:
            example["classes"] = nyu40_classes(self._read(frame, "semantic", size))
        return example

    def files_of(self, index: int) -> list[str]:
        """The files that an example is read from, the image first."""
        kinds = ["color", "render_entity_id", *(_KINDS[field] for field in self.fields)]
        return [os.path.join(self.root, self.frames[index].file(kind)) for kind in kinds]

    def _normals(
        self, frame: Frame, size: tuple[int, int], focal: float
    ) -> Float32[np.ndarray, "h w 3"]:
        normals = self._read(frame, "normal_cam", (*size, 3)).astype(np.float32)
        if np.isnan(normals).any():
            raise UnreadableFileError(f"The normals of {frame.name} have nan; remove it.")
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.divide(normals, length, where=length > 0, out=np.zeros_like(normals))
        if self.orientation == "none":
            return normals
        if self.orientation == "rays":
            away = (normals * _rays(*size, focal)).sum(-1) > 0
        else:
            away = self._faces_away(frame, (*size, 3))
        return np.where(away[..., None], -normals, normals) + np.float32(0)

    def _faces_away(self, frame: Frame, shape: tuple[int, int, int]) -> Bool[np.ndarray, "h w"]:
        """Where the normals in the world point away from the camera."""
        positions = filled(self._read(frame, "position", shape).astype(np.float32))
        to_camera = _camera_position(self.root, frame) - positions
        to_camera /= np.linalg.norm(to_camera, axis=-1, keepdims=True)
        normals = self._read(frame, "normal_world", shape).astype(np.float32)
        normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
        return (normals * to_camera).sum(-1) < _FACING

    def _read(self, frame: Frame, kind: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = read_hdf5(os.path.join(self.root, frame.file(kind)))
        if array.shape != shape if shape else array.ndim != 2:
            raise UnreadableFileError(
                f"{os.path.join(self.root, frame.file(kind))} holds {array.shape}, "
                f"not {shape or 'height and width'}; replace the file."
            )
        return array

    def __repr__(self) -> str:
        return f"HypersimSource({self.root}, {len(self)} frames)"


# ---- pixels --------------------------------------------------------------------------------------


def tone_mapped(
    colour: Float[np.ndarray, "h w 3"], known: np.ndarray
) -> UInt8[np.ndarray, "h w 3"]:
    """Radiance as a picture: the 90th percentile of its brightness becomes 0.8, gamma is 2.2.

    Args:
      known: bool [h, w]: where something is to be seen; the brightness is that of these pixels.
    """
    colour = np.nan_to_num(colour.astype(np.float32), nan=0.0)
    brightness = colour @ np.array([0.3, 0.59, 0.11], np.float32)
    scale = 1.0
    if known.any():
        bright = float(np.percentile(brightness[known], _PERCENTILE))
        scale = 0.0 if bright < _DARK else _BRIGHT ** (1 / _GAMMA) / bright
    shown = np.power(np.maximum(scale * colour, 0), _GAMMA)
    return (np.clip(shown, 0, 1) * 255).astype(np.uint8)


def planar_depth(distance: Float[np.ndarray, "h w"], focal: float) -> Float32[np.ndarray, "h w 1"]:
    """Distances from the camera's centre as distances from its plane."""
    rays = _rays(*distance.shape, focal)
    return (distance * -rays[..., 2]).astype(np.float32)[..., None]


def filled(positions: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """Points at infinity take the place of the nearest point above, or else below."""
    positions = positions.copy()
    for rows in (range(1, len(positions)), range(len(positions) - 2, -1, -1)):
        step = -1 if rows.step > 0 else 1
        for row in rows:
            absent = ~np.isfinite(positions[row]).all(-1)
            positions[row][absent] = positions[row + step][absent]
    return positions


def nyu40_classes(labels: Int[np.ndarray, "h w"]) -> Int32[np.ndarray, "h w 1"]:
    """Hypersim's labels, NYU's 40 classes from 1 on; -1, and whatever else, is void."""
    known = (labels >= 1) & (labels <= 40)
    return np.where(known, labels - 1, VOID).astype(np.int32)[..., None]


def _rays(height: int, width: int, focal: float) -> Float[np.ndarray, "h w 3"]:
    """Unit vectors in which pixels look: x right, y up, z towards the viewer."""
    x = np.arange(width) + 0.5 - width / 2
    y = height / 2 - 0.5 - np.arange(height)
    x, y = np.meshgrid(x, y)
    rays = np.stack([x, y, np.full_like(x, -focal)], axis=-1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def _millimetres(metres: Float32[np.ndarray, "h w 1"]) -> Float32[np.ndarray, "h w 1"]:
    """Whole ones, as a file of 16 bits has them; 0 where they do not fit."""
    whole = np.trunc(metres * np.float32(1000))
    return np.where((whole >= 0) & (whole <= _LARGEST), whole, np.float32(0))


# ---- files ---------------------------------------------------------------------------------------


def _frames(files: Files, split: str) -> list[Frame]:
    """The frames of a split, of those that are public, whose images are there.

    Raises:
      UserError: the list of frames is missing or damaged, or names none that is there.
    """
    path = files.root / SPLITS_FILE
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        frames = [
            Frame(row["scene_name"], row["camera_name"], int(row["frame_id"]))
            for row in rows
            if row["included_in_public_release"] == "True" and row["split_partition_name"] == split
        ]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"Cannot read {path} ({type(error).__name__}: {error}); put Hypersim's "
            "evermotion_dataset/analysis/" + SPLITS_FILE + " there."
        ) from error
    frames = [frame for frame in frames if files.find(frame.file("color")) is not None]
    if not frames:
        raise UserError(
            f"{files.root} has no image of split {split!r} of {SPLITS_FILE}, such as "
            "ai_001_001/images/scene_cam_00_final_hdf5/frame.0000.color.hdf5; check data_dir."
        )
    return frames


def _listed(frames: Sequence[Frame], path: Path) -> list[Frame]:
    try:
        names = [words[0] for line in path.read_text().splitlines() if (words := line.split())]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the list {path}; put it there or name another one."
        ) from error
    by_name = {frame.name: frame for frame in frames}
    for name in names:
        if name not in by_name:
            raise UserError(f"{path} names {name}, which is not among the frames of this split.")
    if not names:
        raise UserError(f"The list {path} names no files; check that it is the right one.")
    return [by_name[name] for name in names]


def _require_positions(root: Path, frame: Frame) -> None:
    for path in (
        frame.file("position"),
        frame.file("normal_world"),
        _keyframes(frame, "positions"),
    ):
        if not (root / path).is_file():
            raise UserError(
                f"{root / path} is missing, by which normals are turned to the camera; download it "
                "or set orientation=rays."
            )


def _camera_position(root: str, frame: Frame) -> Float[np.ndarray, 3]:
    numbers: Int[np.ndarray, " n"] = read_hdf5(
        os.path.join(root, _keyframes(frame, "frame_indices"))
    )
    places = np.flatnonzero(numbers == frame.number)
    if not len(places):
        raise UnreadableFileError(f"The camera of {frame.name} has no such keyframe; remove it.")
    return read_hdf5(os.path.join(root, _keyframes(frame, "positions")))[places[0]].astype(
        np.float32
    )


def _keyframes(frame: Frame, what: str) -> str:
    return f"{frame.scene}/_detail/{frame.camera}/camera_keyframe_{what}.hdf5"
