"""How the fields of a prepared example are stored: as features of TensorFlow Datasets.

Each way of storing is exact, what is read is what was written to the bit, but for the half
precision that is chosen by name only. TFDS writes and parses the records, without TensorFlow;
pictures are decoded by the readers that decode files.
"""

from __future__ import annotations

import abc
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxpercept.data.readers import decode_rgb
from jaxpercept.errors import UserError


class Storage(abc.ABC):
    """One way to store a field."""

    @abc.abstractmethod
    def fits(self, value: Any) -> bool:
        """Whether a value comes back as it was."""

    @abc.abstractmethod
    def feature(self, *, decoded: bool) -> Any:
        """The TFDS feature; with `decoded` False, pictures are the bytes of their files."""

    @abc.abstractmethod
    def encode(self, value: Any) -> Any:
        """What the TFDS feature takes."""

    @abc.abstractmethod
    def decode(self, stored: Any, name: str) -> Any:
        """The value of what the undecoded feature gives; `name` is what errors call it.

        Raises:
          UnreadableFileError: a picture is damaged.
        """


class _Picture(Storage):
    """A PNG of one channel: whole numbers, or multiples of 1 / `unit` up to 1."""

    def __init__(self, largest: int, dtype: type, unit: int = 0):
        self.largest, self.dtype, self.unit = largest, np.dtype(dtype), unit

    def fits(self, value: Any) -> bool:
        if not _is_array(value, 3) or value.shape[-1] != 1 or value.dtype != self.dtype:
            return False
        # Comparisons with nan are false.
        if not ((value >= 0) & (value <= (1 if self.unit else self.largest))).all():
            return False
        return bool((self._decoded(self._whole(value)) == value).all())

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        if not decoded:
            return features.Text()
        dtype = np.uint8 if self.largest <= 255 else np.uint16
        return features.Image(shape=(None, None, 1), dtype=dtype, encoding_format="png")

    def encode(self, value: np.ndarray) -> bytes:
        return _png(self._whole(value)[..., 0])

    def decode(self, stored: bytes, name: str) -> np.ndarray:
        with Image.open(io.BytesIO(stored)) as image:
            return self._decoded(np.asarray(image))[..., None]

    def _whole(self, value: np.ndarray) -> np.ndarray:
        whole = np.round(value * self.unit) if self.unit else value
        return whole.astype(np.uint8 if self.largest <= 255 else np.uint16)

    def _decoded(self, whole: np.ndarray) -> np.ndarray:
        value = whole.astype(self.dtype)
        return value / self.dtype.type(self.unit) if self.unit else value


class _Rgb(Storage):
    """A PNG, or the JPEG file that the pixels came from."""

    def fits(self, value: Any) -> bool:
        return _is_array(value, 3) and value.shape[-1] == 3 and value.dtype == np.uint8

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        return features.Image(shape=(None, None, 3)) if decoded else features.Text()

    def encode(self, value: np.ndarray | bytes) -> bytes:
        return value if isinstance(value, bytes) else _png(value)

    def decode(self, stored: bytes, name: str) -> np.ndarray:
        return decode_rgb(stored, name=name)


class _Numbers(Storage):
    """An array of floating-point numbers, compressed."""

    def __init__(self, dtype: type, rank: int, channels: int | None):
        self.dtype, self.rank, self.channels = np.dtype(dtype), rank, channels

    def fits(self, value: Any) -> bool:
        return (
            _is_array(value, self.rank)
            and value.dtype == np.float32
            and (self.channels is None or value.shape[-1] == self.channels)
        )

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        shape = (*(None,) * (self.rank - 1), self.channels)
        return features.Tensor(shape=shape, dtype=self.dtype, encoding=features.Encoding.ZLIB)

    def encode(self, value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value, self.dtype)

    def decode(self, stored: np.ndarray, name: str) -> np.ndarray:
        return np.array(stored, np.float32)


class _Text(Storage):
    def fits(self, value: Any) -> bool:
        return isinstance(value, str)

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        return features.Text()

    def encode(self, value: str) -> str:
        return value

    def decode(self, stored: bytes, name: str) -> str:
        return stored.decode()


class _Texts(Storage):
    def fits(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        return features.Sequence(features.Text())

    def encode(self, value: Any) -> list[str]:
        return list(value)

    def decode(self, stored: Any, name: str) -> tuple[str, ...]:
        return tuple(text.decode() for text in stored)


class _Phrases(Storage):
    """Pairs of a phrase and the instance that it names."""

    def fits(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and all(
            isinstance(pair, tuple) and isinstance(pair[0], str) for pair in value
        )

    def feature(self, *, decoded: bool) -> Any:
        from tensorflow_datasets import features

        return features.Sequence({"text": features.Text(), "instance": np.int32})

    def encode(self, value: Any) -> list[dict[str, Any]]:
        return [{"text": text, "instance": instance} for text, instance in value]

    def decode(self, stored: Any, name: str) -> list[tuple[str, int]]:
        pairs = zip(stored["text"], stored["instance"], strict=True)
        return [(text.decode(), int(instance)) for text, instance in pairs]


STORAGES: dict[str, Storage] = {
    "rgb": _Rgb(),
    "mask": _Picture(1, bool),
    "uint8": _Picture(255, np.uint8),
    "int8": _Picture(255, np.int32),
    "int16": _Picture(65535, np.int32),
    "unit8": _Picture(255, np.float32, unit=255),
    "unit16": _Picture(65535, np.float32, unit=65535),
    "whole16": _Picture(65535, np.float32),
    "float32": _Numbers(np.float32, 3, 1),
    "float16": _Numbers(np.float16, 3, 1),
    "vectors32": _Numbers(np.float32, 3, 3),
    "vectors16": _Numbers(np.float16, 3, 3),
    "row": _Numbers(np.float32, 1, None),
    "table": _Numbers(np.float32, 2, None),
    "text": _Text(),
    "texts": _Texts(),
    "phrases": _Phrases(),
}

# What a field may be stored as, the smallest first.
_OF_FIELD = {
    "name": ("text",),
    "rgb": ("rgb",),
    "depth": ("whole16", "float32"),
    "normals": ("vectors32",),
    "alpha": ("unit8", "unit16", "float32"),
    "trimap": ("uint8",),
    "classes": ("int8", "int16"),
    "instance": ("int8", "int16"),
    "mask": ("mask",),
    "keypoints": ("table",),
    "box": ("row",),
    "intrinsics": ("row",),
    "caption": ("text",),
    "phrases": ("phrases",),
    "kinds": ("texts",),
}


def choose(field: str, values: Sequence[Any]) -> str:
    """The name of the smallest way to store all values of a field.

    Raises:
      UserError: there is none.
    """
    for name in _OF_FIELD.get(field, ()):
        if all(STORAGES[name].fits(value) for value in values):
            return name
    kinds = sorted({f"{getattr(v, 'dtype', type(v).__name__)}" for v in values})
    raise UserError(f"The field {field} of {', '.join(kinds)} has no way to be stored exactly.")


def features_of(storages: Mapping[str, str], *, decoded: bool) -> Any:
    """What TFDS makes of fields stored in these ways; `decoded` as of `Storage.feature`."""
    from tensorflow_datasets import features

    return features.FeaturesDict(
        {field: STORAGES[name].feature(decoded=decoded) for field, name in storages.items()}
    )


def _is_array(value: Any, rank: int) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == rank


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
