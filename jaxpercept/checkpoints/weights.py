"""safetensors on disk: finding a component's weight files, reading them lazily, writing them."""

import json
import os
import re
import struct
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError

FLOAT_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".bin.index.json")

# Plain file names first: they hold float32, or whatever the author thought best.
_PREFERENCE = ("", "fp32", "bf16", "fp16")

# Far beyond any JSON file that is read whole; the index of a thousand shards has a few MB.
_MAX_JSON_BYTES = 2**26
_MAX_JSON_DEPTH = 32
_MAX_NAME = 300


class StoredTensor:
    """A float tensor inside a safetensors file: its shape now, its values at `np.asarray`."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        self.shape: tuple[int, ...] = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None):
        values = self._file.get_tensor(self._name)
        return values if dtype is None else values.astype(dtype, copy=False)


def weight_file(names: Collection[str], stem: str, variant: str | None, where: str) -> str | None:
    """Name of the single file or of the index of shards to read, None where there is none.

    Args:
      names: the component folder's file names.
      stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
      variant: "fp16" for `STEM.fp16.safetensors`, "" for `STEM.safetensors` only; None takes the
        first there is of no variant, fp32, bf16, fp16, any other if it is the only one.
      where: names the folder in the error message.

    Raises:
      UserError: `variant` is None and the choice is between several unknown variants.
    """
    found = {}
    for pattern in (  # a later match wins: one file before its shards
        rf"{stem}\.(?:(?P<variant>\w+)\.)?safetensors\.index\.json",
        rf"{stem}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json",
        rf"{stem}(?:\.(?P<variant>\w+))?\.safetensors",
    ):
        for name in sorted(names):
            if match := re.fullmatch(pattern, name):
                found[match["variant"] or ""] = name
    if variant is not None:
        return found.get(variant)
    for preferred in _PREFERENCE:
        if preferred in found:
            return found[preferred]
    if len(found) > 1:
        raise UserError(
            f"{where} has weights in the variants {', '.join(sorted(found))}; choose one of them."
        )
    return next(iter(found.values()), None)


def shard_names(index: Path) -> list[str]:
    """File names listed by a `*.safetensors.index.json`.

    Raises:
      UserError: the index is damaged, or names a file outside its folder or a pickle. (The file
        itself may be a symbolic link to anywhere, as all files of the hub's cache are: it is only
        read, and only as safetensors.)
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again.")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == PurePosixPath(name).name
        plain = plain and name == PureWindowsPath(name).name and name not in ("", ".", "..")
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} names {in_short(repr(name))}, which is not a safetensors file of its own "
                "folder; do not use this checkpoint."
            )
    return sorted(set(weight_map.values()))


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, or of all shards of an index; nothing is read yet.

    Raises:
      UserError: a file is missing, truncated or no safetensors; a tensor is not floating point,
        comes twice, or is listed in the index and in no shard.
    """
    if path.suffix != ".json":
        return _open_file(path)
    tensors: dict[str, StoredTensor] = {}
    for name in shard_names(path):
        shard = _open_file(path.parent / name)
        if twice := tensors.keys() & shard.keys():
            raise UserError(f"{path.parent / name} repeats tensor {min(twice)} of another shard.")
        tensors |= shard
    if absent := read_json(path)["weight_map"].keys() - tensors.keys():
        raise UserError(
            f"{path} lists {len(absent)} tensors that its shards do not hold, the first being "
            f"{in_short(min(absent))}; download the checkpoint again."
        )
    return tensors


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; download the checkpoint again.")
    try:
        file = safe_open(path, framework="numpy")
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({_first_line(error)}); download it again."
        ) from None
    tensors = {}
    for name, kind in kinds.items():
        if len(name) > _MAX_NAME or not name.isprintable():
            raise UserError(
                f"{path} has a tensor named {in_short(repr(name), 80)}, which is no layer's name; "
                "do not use this checkpoint."
            )
        # Integer buffers pass when their name says so; the strict rules drop them unread.
        if kind not in FLOAT_TYPES and not name.endswith("position_ids"):
            raise UserError(
                f"Tensor {name} of {path} has type {kind}; only "
                f"{', '.join(FLOAT_TYPES)} can be read: export the weights unquantised."
            )
        tensors[name] = StoredTensor(file, name)
    return tensors


def write_weights(
    path: Path, tensors: Mapping[str, Shaped[np.ndarray, "..."]], dtype: np.dtype | None
) -> None:
    """Writes one safetensors file with PyTorch's metadata, copying a few rows at a time.

    With no dtype each tensor keeps its own.

    The library's own writer holds two copies of all tensors: 7 GB for SD 2.1's UNet.

    Raises:
      UserError: a value is not finite, or becomes infinite in `dtype` (the tensor is named).
    """
    kinds = {value: name for name, value in FLOAT_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        own = np.dtype(dtype or tensor.dtype)
        start, end = end, end + tensor.size * own.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": kinds[own], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: it starts at a multiple of 8

    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in sorted(tensors.items()):
            own = np.dtype(dtype or tensor.dtype)
            # The tensors are transposed views; a few rows at a time bound the memory of a copy.
            rows = 32 if tensor.ndim > 1 else max(tensor.size, 1)
            for start in range(0, tensor.shape[0], rows):
                with np.errstate(over="ignore"):
                    values = np.ascontiguousarray(tensor[start : start + rows], own)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"Tensor {name} holds values that are not finite in "
                        f"{own.name}; save it as float32, or check the training if it "
                        "was NaN before."
                    )
                file.write(values.reshape(-1).view(np.uint8))


@contextmanager
def atomic_write(path: Path):
    """A binary file that appears under its name complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a UserError names the file where it is damaged.

    Refused as well are files that no part of a checkpoint is: huge ones, and those nested so deep
    that code which follows them would end in a recursion error.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if _deeper(content, _MAX_JSON_DEPTH):
            raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} deep")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({_first_line(error)}); download it again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; download it again.")
    return content


def _deeper(content: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(limit + 1):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _first_line(error: Exception) -> str:
    return in_short((str(error).splitlines() or [type(error).__name__])[0])
