"""ScanNet as it is downloaded: recordings in `.sens` files, read at random without unpacking them.

A file of version 4 is a header (a sensor's name, four 4 x 4 matrices, the compressions, the sizes,
how many units of depth make a metre, the number of frames), then one frame after the other: the
pose, two times, two lengths, and so many bytes of colour and of depth. Nothing says where a frame
begins; its header is found by going from length to length, which is done as far as needed.
"""

from __future__ import annotations

import array
import dataclasses
import logging
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from jaxpercept.data.cameras import of_matrix
from jaxpercept.data.geometry import resize_rgb
from jaxpercept.data.layouts import Files, Layout, Meaning, Request
from jaxpercept.data.readers import UnreadableFileError, decode_rgb
from jaxpercept.data.sources import Example
from jaxpercept.errors import UserError

_VERSION = 4
_COLOURS = {1: "PNG", 2: "JPEG"}
_DEPTHS = {0: "raw", 1: "zlib"}
_NAME = struct.Struct("<IQ")  # version, length of the name
_HEADER = struct.Struct("<64f2i4IfQ")
_FRAME = struct.Struct("<16f4Q")  # pose, times of colour and depth, lengths of colour and depth
_LONGEST_NAME = 1 << 16
# A line of a list: a scene, or a picture of it as Marigold's list has it.
_LINE = re.compile(r"(?:.*/)?(scene\d{4}_\d\d)(?:/color/(\d+)\.\w+)?")

_log = logging.getLogger(__name__)


class Frame(NamedTuple):
    """One frame; `pose` takes the camera's coordinates to the world's, -inf where it was lost."""

    rgb: UInt8[np.ndarray, "H W 3"]
    depth: Float32[np.ndarray, "h w 1"]
    pose: Float32[np.ndarray, "4 4"]


class Recording:
    """The frames of a `.sens` file. It can be pickled; the file is open only while it is read.

    Attributes:
      intrinsics: (fx, fy, cx, cy) of depth, in pixels with the middle of the first at 0.5.
      size: (height, width) of depth.
      units: of depth in a metre.

    Raises:
      UserError: the file is missing, or no such file of version 4 with colours as JPEG or PNG and
        depth as it is or by zlib.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        try:
            with open(path, "rb") as file:
                version, length = _NAME.unpack(file.read(_NAME.size))
                if version != _VERSION or length > _LONGEST_NAME:
                    raise ValueError(f"version {version}, not {_VERSION}")
                file.seek(length, os.SEEK_CUR)
                *matrices, colour, depth, _, _, width, height, units, count = _HEADER.unpack(
                    file.read(_HEADER.size)
                )
                start = file.tell()
            if colour not in _COLOURS or depth not in _DEPTHS:
                raise ValueError(f"colours are compressed by method {colour}, depth by {depth}")
            if not (units > 0 and 0 < width < 1 << 16 and 0 < height < 1 << 16):
                raise ValueError(f"depth of {height} x {width}, {units} units in a metre")
            self.intrinsics = of_matrix(np.array(matrices, np.float32).reshape(4, 4, 4)[2])
        except (OSError, ValueError, struct.error) as error:
            raise UserError(
                f"Cannot read {path} as a recording of ScanNet ({error}); download it again."
            ) from error
        self.size, self.units, self._count = (height, width), units, count
        self._compressed = _DEPTHS[depth] == "zlib"
        self._starts = array.array("Q", [start])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Frame:
        """Raises an UnreadableFileError that names the frame if it is damaged or not there."""
        what = f"frame {number} of {self.path}"
        if not 0 <= number < self._count:
            raise UnreadableFileError(f"There is no {what}, which has {self._count}.")
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start(file, number))
                *pose, _, _, colour_size, depth_size = _FRAME.unpack(file.read(_FRAME.size))
                colour, depth = _exactly(file, colour_size), _exactly(file, depth_size)
            pixels = np.frombuffer(zlib.decompress(depth) if self._compressed else depth, "<u2")
            metric = pixels.reshape(*self.size, 1).astype(np.float32)
        except (OSError, ValueError, OverflowError, struct.error, zlib.error) as error:
            raise UnreadableFileError(f"Cannot read {what}: {error}; download it again.") from error
        return Frame(
            decode_rgb(colour, name=what), metric, np.array(pose, np.float32).reshape(4, 4)
        )

    def _start(self, file: Any, number: int) -> int:
        """Where a frame begins; where the ones before it begin is remembered."""
        while len(self._starts) <= number:
            file.seek(self._starts[-1])
            *_, colour_size, depth_size = _FRAME.unpack(file.read(_FRAME.size))
            self._starts.append(self._starts[-1] + _FRAME.size + colour_size + depth_size)
        return self._starts[number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensFiles(Layout):
    """Recordings, of which lists name scenes, or single pictures of them.

    Attributes:
      every: of a scene that a list names, every so manieth frame is an example.
    """

    OPTIONS: ClassVar = ("every",)

    every: int = 100

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"depth"})

    def is_there(self, files: Files, split: str, fields: Sequence[str]) -> bool:
        return (files.root / self.splits[split]).is_file() and bool(_recordings(files.root))

    def listed(self, files: Files, split: str, list_file: str) -> SensFiles | None:
        if not _recordings(files.root):
            return None
        return dataclasses.replace(self, splits={split: list_file}, expected={})

    def open(self, files: Files, request: Request, meaning: Meaning) -> SensSource:
        meaning.refuse("Recordings")
        if self.every < 1:
            raise UserError(
                f"every of dataset {request.name} must be at least 1, got {self.every}."
            )
        path = files.root / self.splits[request.split]
        scenes, pictures = _lines(path)
        there = _recordings(files.root)
        for scene in [scene for scene, _ in pictures if scene not in there][:1]:
            raise UserError(
                f"{path} names a picture of {scene}, whose recording {scene}.sens is not in "
                f"{files.root}; download it."
            )
        absent = [scene for scene in scenes if scene not in there]
        if absent:
            _log.warning(
                "%d of the %d scenes of %s are not in %s, such as %s.",
                len(absent), len(scenes), path, files.root, absent[0],
            )  # fmt: skip
        kept = dict.fromkeys(s for s in (*scenes, *dict(pictures)) if s in there)
        if not kept:
            raise UserError(f"{files.root} holds no recording of a scene of {path}; check both.")
        recordings = {scene: Recording(there[scene]) for scene in kept}
        for scene, number in pictures:
            if number >= len(recordings[scene]):
                raise UserError(
                    f"{path} names frame {number} of {scene}, which has {len(recordings[scene])}; "
                    "check the list."
                )
        items = [
            (s, n) for s in scenes if s in kept for n in range(0, len(recordings[s]), self.every)
        ]
        expected = self.expected.get(request.split)
        return SensSource(
            files.root, recordings, [*items, *pictures], "depth" in request.targets, expected
        )


class SensSource:
    """Examples of recordings: `rgb`, brought to the size of depth, `depth` in millimetres, 0 where
    there is none, and `intrinsics` of depth. The cameras were made to look alike by ScanNet.
    """

    def __init__(
        self,
        root: Path,
        recordings: Mapping[str, Recording],
        items: Sequence[tuple[str, int]],
        depth: bool,
        expected: int | None,
    ):
        self.root, self.recordings, self.items = str(root), dict(recordings), list(items)
        self.depth, self.expected = depth, expected
        self.names = [f"{scene}/color/{number:06d}.jpg" for scene, number in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        scene, number = self.items[index]
        recording = self.recordings[scene]
        frame = recording[number]
        example: Example = {
            "name": self.names[index],
            "rgb": resize_rgb(frame.rgb, recording.size),
        }
        if self.depth:
            example["depth"] = frame.depth * np.float32(1000 / recording.units)
            example["intrinsics"] = recording.intrinsics
        return example

    def __repr__(self) -> str:
        return f"SensSource({self.root}, {len(self)} frames)"


def _recordings(root: Path) -> dict[str, Path]:
    """Scene -> its recording: scans/SCENE/SCENE.sens as it is downloaded, or SCENE/SCENE.sens."""
    patterns = ("scene*/*.sens", "scans*/scene*/*.sens")
    return {path.stem: path for pattern in patterns for path in sorted(root.glob(pattern))}


def _lines(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """The scenes that a list names, and the pictures."""
    try:
        words = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the list {path}; put it there or name another one."
        ) from error
    scenes, pictures = [], []
    for word in words:
        found = _LINE.fullmatch(word)
        if found is None:
            raise UserError(
                f"{path} names {word}, which is no scene like scene0191_00 and no picture like "
                "scene0568_00/color/000100.jpg."
            )
        scene, number = found.groups()
        if number is None:
            scenes.append(scene)
        else:
            pictures.append((scene, int(number)))
    return scenes, pictures


def _exactly(file: Any, size: int) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell()
    data = file.read(size) if size <= left else b""
    if len(data) < size:
        raise ValueError("the file is cut off")
    return data
