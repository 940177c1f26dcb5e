"""Random-access sources: an index in, the decoded arrays of one example out.

A source is anything with `__len__` and `__getitem__(index) -> dict` that can be pickled to a worker
process. The dict holds `name` (str), `rgb` uint8 [h, w, 3] and what else there is: `depth` float32
[h, w, 1] in the units of the file, `mask` bool [h, w, 1] (where the depth is valid), `normals`,
`alpha`, `trimap`, `classes`, `keypoints`, `box`, `caption`, `instance`, `phrases`, `kinds` and
`intrinsics` as in a record (`datasets.Records`).
What a depth means (units, valid range, crop) is the business of `datasets.py`; where the files of a
dataset lie, that of `listings.py`. Paths are checked when a source is built, so that a wrong one is
reported before anything is compiled.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpercept.data.readers import (
    ClassesReader,
    NormalsReader,
    UnreadableFileError,
    decode_rgb,
    read_alpha,
    read_depth,
    read_mask,
    read_rgb,
    read_trimap,
)
from jaxpercept.errors import UserError

Example = dict[str, Any]
Reader = Callable[[str], np.ndarray]

# A pixel counts if every mask says so.
MASKS = ("mask", "mask_transparent")
_READERS: dict[str, Reader] = {
    "rgb": read_rgb,
    "depth": read_depth,
    "normals": NormalsReader(),
    "alpha": read_alpha,
    "trimap": read_trimap,
    "classes": ClassesReader(),
    **dict.fromkeys(MASKS, read_mask),
}


class FileSource:
    """Examples made of one file per field.

    Args:
      root: folder that the paths are relative to.
      names: one name per example.
      columns: field -> one relative path per example; fields `rgb`, `depth`, `normals`, `alpha`,
        `trimap`, `classes`, `intrinsics` and those of `MASKS`, the image first.
      readers: decoders of fields whose files have an unusual format.
      expected: how many examples the split has as published, where that is known.
      facts: attributes of the dataset's row that are others for these files.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        columns: Mapping[str, Sequence[str]],
        readers: Mapping[str, Reader] | None = None,
        expected: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.root = str(root)
        self.names = list(names)
        self.columns = {field: list(paths) for field, paths in columns.items()}
        self.expected = expected
        self.facts = dict(facts or {})
        self._readers = _READERS | dict(readers or {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"name": self.names[index]}
        for field, paths in self.columns.items():
            example[field] = self._readers[field](os.path.join(self.root, paths[index]))
            if field != "intrinsics" and example[field].shape[:2] != example["rgb"].shape[:2]:
                raise UnreadableFileError(
                    f"{field} of {self.names[index]} has size {example[field].shape[:2]} but its "
                    f"image has {example['rgb'].shape[:2]}; both must be the same."
                )
        masks = [example.pop(field) for field in MASKS if field in example]
        return example | ({"mask": np.logical_and.reduce(masks)} if masks else {})

    def files_of(self, index: int) -> list[str]:
        """The files that an example is read from, the image first."""
        return [os.path.join(self.root, paths[index]) for paths in self.columns.values()]

    def subset(self, keep: Callable[[str], bool]) -> "FileSource":
        """The examples whose names are to be kept: no published number is expected of them."""
        kept = [i for i, name in enumerate(self.names) if keep(name)]
        columns = {field: [paths[i] for i in kept] for field, paths in self.columns.items()}
        names = [self.names[i] for i in kept]
        return FileSource(self.root, names, columns, self._readers, facts=self.facts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root}, {len(self)} examples)"


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
        data_dir = existing_folder(data_dir)
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
    """A `SceneSource` with the names, shapes and keys of the other sources.

    Whatever a scene has beside these keys (keypoints, a box, ...) is passed on.
    """

    def __init__(self, scenes: Any):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Example:
        scene = dict(self.scenes[index])
        scene["name"] = f"scene_{scene.pop('index'):010d}"
        scene["mask"] = scene.pop("valid")
        for key in ("instance", "classes", "alpha", "trimap"):
            if key in scene and scene[key].ndim == 2:
                scene[key] = scene[key][..., None]
        return scene

    def __repr__(self) -> str:
        return repr(self.scenes)


class TFDSRows:
    """The rows of a prepared TensorFlow Datasets dataset, read without TensorFlow.

    They are opened when first read, so that they can be pickled.

    Args:
      builder: TFDS name, with a configuration where it has some ("ref_coco/refcoco_unc"); it must
        be prepared in a random-access format (`tfds build --file_format=array_record`).
      split: TFDS split, slices allowed ("train[:90%]").
      data_dir: TFDS folder; None for the default one.
      raw: whether a row is the serialized example, not its decoded features.

    Raises:
      UserError: the dataset is unknown or not prepared.
    """

    def __init__(
        self, builder: str, split: str, data_dir: str | Path | None = None, *, raw: bool = False
    ):
        self.builder, self.split, self.data_dir, self.raw = builder, split, data_dir, raw
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

    def __getitem__(self, index: int) -> Any:
        return self._open()[index]

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            raw = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES}
            self._source = tfds.data_source(
                self.builder,
                split=self.split,
                data_dir=self.data_dir,
                download=False,
                **(raw if self.raw else {}),
            )
        return self._source

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}


class TFDSSource:
    """Images and depth of a prepared TensorFlow Datasets dataset, read without TensorFlow.

    Args:
      builder, split, data_dir: as of `TFDSRows`.
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
        self.rows = TFDSRows(builder, split, data_dir)
        self.rgb, self.depth = rgb, depth

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        name = f"{self.rows.builder}/{self.rows.split}/{index}"
        try:
            features = self.rows[index]
            rgb = np.asarray(features[self.rgb], np.uint8)
            height, width, _ = rgb.shape
            example = {"name": name, "rgb": np.broadcast_to(rgb[..., :3], (height, width, 3))}
            if self.depth is not None:
                depth = np.asarray(features[self.depth], np.float32)
                example["depth"] = depth.reshape(*depth.shape[:2], 1)
        except Exception as error:
            raise UnreadableFileError(f"Cannot read {name}: {error}; prepare it again.") from error
        return example

    def __repr__(self) -> str:
        return f"TFDSSource({self.rows.builder}, {self.rows.split}, {len(self)} examples)"


def place_of(name: str) -> float:
    """A place in [0, 1), always the same for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def names_hash(names: Sequence[str]) -> str:
    """SHA-256 of the names of examples, one a line."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def existing_folder(folder: str | Path) -> Path:
    """The folder, if it is one; a UserError that names it otherwise."""
    if not os.path.isdir(folder):
        raise UserError(f"The data folder {folder} does not exist; set data_dir to one that does.")
    return Path(folder)
