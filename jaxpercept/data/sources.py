"""Random-access sources: an index in, the decoded arrays of one example out.

A source is anything with `__len__` and `__getitem__(index) -> dict` that can be pickled to a worker
process. The dict holds `name` (str), `rgb` uint8 [h, w, 3] and, where there is one, `depth` float32
[h, w, 1] in the units of the file, `mask` bool [h, w, 1] and `caption` (str). What the numbers mean
(units, valid range, crop) is the business of `datasets.py`. Paths are checked when a source is
built, so that a wrong one is reported before anything is compiled.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpercept.data.readers import (
    DEPTH_SUFFIXES,
    RGB_SUFFIXES,
    UnreadableFileError,
    decode_rgb,
    read_depth,
    read_mask,
    read_rgb,
)
from jaxpercept.errors import UserError

Example = dict[str, Any]


class FileSource:
    """Examples made of one file per field.

    Args:
      root: folder that the paths are relative to.
      names: one name per example.
      columns: field -> one relative path per example; fields `rgb`, `depth`, `mask`.
      depth_reader: decoder of the depth files, `read_depth` unless the format is unusual.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        columns: Mapping[str, Sequence[str]],
        depth_reader: Callable[[str], np.ndarray] = read_depth,
    ):
        self.root = str(root)
        self.names = list(names)
        self.columns = {field: list(paths) for field, paths in columns.items()}
        self._readers = {"rgb": read_rgb, "depth": depth_reader, "mask": read_mask}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"name": self.names[index]}
        for field, paths in self.columns.items():
            example[field] = self._readers[field](os.path.join(self.root, paths[index]))
            if example[field].shape[:2] != example["rgb"].shape[:2]:
                raise UnreadableFileError(
                    f"{field} of {self.names[index]} has size {example[field].shape[:2]} but its "
                    f"image has {example['rgb'].shape[:2]}; both must be the same."
                )
        return example

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root}, {len(self)} examples)"


class FolderSource(FileSource):
    """`rgb/NAME.*` with `depth/NAME.{png,npy,exr}` and, if the folder exists, `mask/NAME.*`.

    NAME may contain sub-folders. Examples are ordered by name.

    Raises:
      UserError: a folder is missing or empty, or a file has no partner.
    """

    def __init__(self, folder: str | Path):
        folder = _existing_folder(folder)
        rgb = _files_by_stem(folder / "rgb", RGB_SUFFIXES)
        depth = _files_by_stem(folder / "depth", DEPTH_SUFFIXES)
        columns = {"rgb": rgb, "depth": depth}
        if (folder / "mask").is_dir():
            columns["mask"] = _files_by_stem(folder / "mask", RGB_SUFFIXES | {".npy"})
        for field, files in columns.items():
            _require_partners(folder, field, files, rgb)
        names = sorted(rgb)
        super().__init__(
            folder, names, {field: [files[n] for n in names] for field, files in columns.items()}
        )


class ListSource(FileSource):
    """Lines `rgb depth [...]` of a split file, paths relative to `data_dir`.

    Args:
      data_dir: folder that holds the files.
      list_file: the split file, absolute or relative to `data_dir`; words are separated by white
        space, empty lines are ignored, and so are lines whose depth is the word None (KITTI).
      columns: what the first words of a line are.
      depth_reader: decoder of the depth files.

    Raises:
      UserError: the folder or the list is missing, the list is empty, a line is too short, or it
        names a file that does not exist.
    """

    def __init__(
        self,
        data_dir: str | Path,
        list_file: str | Path,
        columns: Sequence[str] = ("rgb", "depth"),
        depth_reader: Callable[[str], np.ndarray] = read_depth,
    ):
        data_dir = _existing_folder(data_dir)
        list_path = data_dir / list_file
        try:
            lines = list_path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read the list {list_path}; put the split file there or name another one."
            ) from error
        rows = []
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or (len(words) > 1 and words[1] == "None"):
                continue
            if len(words) < len(columns):
                raise UserError(
                    f"Line {number} of {list_path} has {len(words)} words; it must name "
                    f"{', '.join(columns)}."
                )
            rows.append(words[: len(columns)])
        if not rows:
            raise UserError(f"The list {list_path} names no files; check that it is the right one.")
        paths = {field: [row[i] for row in rows] for i, field in enumerate(columns)}
        for column in paths.values():
            _require_files(data_dir, column, list_path)
        super().__init__(data_dir, paths["rgb"], paths, depth_reader)


class ImageZipSource:
    """Captioned images of an archive: `images.zip` with `CLASS/name.JPEG`, `classes.json`.

    `classes.json` maps CLASS to a name in words; the caption is "a photo of a NAME" (or "an"). The
    archive is opened once per process, when first read, so that the source can be pickled.

    Args:
      data_dir: folder with the two files.
      keep: which positions of the sorted list of images belong to this split.

    Raises:
      UserError: a file is missing, is not a zip archive or JSON, or holds no captioned image.
    """

    def __init__(self, data_dir: str | Path, keep: Callable[[int], bool] = lambda _: True):
        data_dir = _existing_folder(data_dir)
        self.path = str(data_dir / "images.zip")
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            self.classes: dict[str, str] = json.loads((data_dir / "classes.json").read_text())
            members = sorted(self._archive().namelist())
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{data_dir} needs a readable images.zip and classes.json ({error}); "
                "check the data folder."
            ) from error
        images = [m for m in members if m.split("/")[0] in self.classes and not m.endswith("/")]
        self.names = [member for i, member in enumerate(images) if keep(i)]
        if not self.names:
            raise UserError(f"{self.path} holds no image of a class that classes.json names.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        member = self.names[index]
        try:
            data = self._archive().read(member)
        except Exception as error:  # zlib.error, BadZipFile, OSError ...: the member is damaged
            raise UnreadableFileError(
                f"Cannot read {member} in {self.path}: {error}; replace the archive."
            ) from error
        return {
            "name": member,
            "rgb": decode_rgb(data, name=f"{self.path}:{member}"),
            "caption": _caption(self.classes[member.split("/")[0]]),
        }

    def _archive(self) -> zipfile.ZipFile:
        # A handle inherited through fork would share its file position with the parent process.
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.path))
        return self._handle[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}

    def __repr__(self) -> str:
        return f"ImageZipSource({self.path}, {len(self)} examples)"


def _caption(name: str) -> str:
    return f"a photo of {'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class SceneExamples:
    """A `SceneSource` with the names, shapes and keys of the other sources."""

    def __init__(self, scenes: Any):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Example:
        scene = dict(self.scenes[index])
        scene["name"] = f"scene_{scene.pop('index'):010d}"
        scene["mask"] = scene.pop("valid")
        return scene | {key: scene[key][..., None] for key in ("instance", "classes")}


class TFDSSource:
    """A prepared TensorFlow Datasets dataset, read without TensorFlow.

    Args:
      builder: TFDS name, e.g. "nyu_depth_v2"; it must be prepared in a random-access format
        (`tfds build --file_format=array_record`).
      split: TFDS split, slices allowed ("train[:90%]").
      data_dir: TFDS folder; None for the default one.
      rgb, depth: the feature names of the image and of the depth map (None: no depth).

    Raises:
      UserError: the dataset is unknown or not prepared.
    """

    def __init__(
        self,
        builder: str,
        split: str,
        data_dir: str | Path | None = None,
        rgb: str = "image",
        depth: str | None = "depth",
    ):
        self.builder, self.split, self.data_dir = builder, split, data_dir
        self.rgb, self.depth = rgb, depth
        self._source: Any = None
        try:
            self._length = len(self._open())
        except Exception as error:
            raise UserError(
                f"TFDS dataset {builder!r} (split {split!r}, folder {data_dir}) cannot be opened; "
                f"prepare it with `tfds build {builder} --file_format=array_record`."
            ) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        name = f"{self.builder}/{self.split}/{index}"
        try:
            features = self._open()[index]
            rgb = np.asarray(features[self.rgb], np.uint8)
            height, width, _ = rgb.shape
            example = {"name": name, "rgb": np.broadcast_to(rgb[..., :3], (height, width, 3))}
            if self.depth is not None:
                depth = np.asarray(features[self.depth], np.float32)
                example["depth"] = depth.reshape(*depth.shape[:2], 1)
        except Exception as error:
            raise UnreadableFileError(f"Cannot read {name}: {error}; prepare it again.") from error
        return example

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            self._source = tfds.data_source(
                self.builder, split=self.split, data_dir=self.data_dir, download=False
            )
        return self._source

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def __repr__(self) -> str:
        return f"TFDSSource({self.builder}, {self.split}, {len(self)} examples)"


def _existing_folder(folder: str | Path) -> Path:
    if not os.path.isdir(folder):
        raise UserError(f"The data folder {folder} does not exist; set data_dir to one that does.")
    return Path(folder)


def _files_by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    """Relative path of every data file below `folder`, by its name without the suffix."""
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is missing; put the {folder.name} files there.")
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in files:
            raise UserError(f"{folder} has two files named {stem}; keep one of them.")
        files[stem] = str(path.relative_to(folder.parent))
    if not files:
        raise UserError(
            f"The folder {folder} holds no file that ends in {', '.join(sorted(suffixes))}."
        )
    return files


def _require_partners(
    folder: Path, field: str, files: Mapping[str, str], rgb: Mapping[str, str]
) -> None:
    for name in sorted(rgb.keys() - files.keys())[:1]:
        raise UserError(
            f"{folder / rgb[name]} has no {field}; add {folder / field / name}.* or remove it."
        )
    for name in sorted(files.keys() - rgb.keys())[:1]:
        raise UserError(
            f"{folder / files[name]} has no image; add {folder / 'rgb' / name}.* or remove it."
        )


def _require_files(root: Path, paths: Sequence[str], list_path: Path) -> None:
    """One directory listing instead of one stat per file: lists have tens of thousands of lines."""
    listings: dict[str, set[str]] = {}
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in listings:
            folder = root / parent
            listings[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        if name not in listings[parent]:
            raise UserError(
                f"{list_path} names {path}, which is not in {root}; check data_dir or the list."
            )
