"""The one rule table between diffusers' PyTorch tensors and this package's parameters.

The module tree is the same on both sides, so a parameter differs from its tensor by the last name
of its path and by the order of its axes, and both follow from that last name and the rank.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxpercept.checkpoints.fit import Differences, differences
from jaxpercept.errors import UserError

# (name here, rank) -> (name in PyTorch, axes of the tensor in the order they have here).
RULES: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {
    ("kernel", 4): ("weight", (2, 3, 1, 0)),  # convolution: OIHW -> HWIO
    ("kernel", 2): ("weight", (1, 0)),  # linear: [out, in] -> [in, out]
    ("scale", 1): ("weight", (0,)),  # group and layer norm
    ("embedding", 2): ("weight", (0, 1)),
    ("bias", 1): ("bias", (0,)),
}

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Buffers that older transformers versions stored; they hold 0, 1, 2, ... and no weights.
_BUFFERS = re.compile(r"(text_model\.)?embeddings\.position_ids")

# The VAE's one attention layer had other names before diffusers 0.17, and files converted from the
# original Stable Diffusion repository keep its projections as 1x1 convolutions.
_OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_VAE_ATTENTION = re.compile(
    rf"(.*mid_block\.attentions\.\d+)\.({'|'.join(_OLD_VAE_NAMES)})\.(weight|bias)"
)
_VAE_PROJECTION = re.compile(r".*mid_block\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")

# Part of every name in CLIPTextModel's files, except in those that transformers 5 writes; all
# versions read both.
_TEXT_PREFIX = "text_model."


def torch_name(path: str, rank: int) -> str:
    """Name of the tensor behind parameter `path`: `conv_in.kernel`, 4 -> `conv_in.weight`."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{_rule(path, leaf, rank)[0]}"


def match(
    shapes: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> tuple[dict[str, str], Differences]:
    """Finds one component's tensors, under today's names or older ones; arguments of `to_jax`.

    Returns:
      The state-dict key of every parameter, also of one that has no tensor, and how the tensors
      differ from what the parameters need, in PyTorch's names and layouts.

    Raises:
      UserError: a tensor is there under its old and its new name.
    """
    paths = {torch_name(path, len(s.shape)): path for path, s in shapes.items()}
    stored = _current_names(tensors, paths, where)
    keys = {path: stored.get(name, name) for name, path in paths.items()}
    wanted = {key: _torch_shape(tuple(shapes[path].shape), path) for path, key in keys.items()}
    have = {
        key: _flat_projection(name, tuple(tensors[key].shape), wanted.get(key, ()))
        for name, key in stored.items()
    }
    return keys, differences(wanted, have)


def to_jax(
    shapes: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    where: str = "the checkpoint",
    dtype: str | None = "float32",
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Turns one component's tensors into its parameters, strictly.

    Args:
      shapes: `path -> anything with .shape`, the parameters the module needs (HWIO and so on).
      tensors: `state-dict key -> tensor` in PyTorch's layout; a tensor has `.shape` and is read by
        `np.asarray`, so that one can be a promise to read a file.
      where: names the source in error messages.
      dtype: of the result; None keeps each tensor's own.

    Returns:
      `path -> array`, exactly the keys of `shapes`, each contiguous and in host memory.

    Raises:
      UserError: tensors are missing, not expected, or of another shape (all are counted and the
        first ten named), or a tensor holds NaN or infinity (named).
    """
    keys, found = match(shapes, tensors, where)
    if any(found):
        raise UserError(
            f"The tensors of {where} do not fit its config.json: {found.in_words()}; "
            "use the weights and the config.json of the same model."
        )

    params = {}
    for path, key in keys.items():
        tensor = np.asarray(tensors[key])
        tensor = tensor.reshape(_torch_shape(shapes[path].shape, path))
        params[path] = _transposed(tensor, _axes(path, tensor.ndim))
        if dtype is not None:
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                params[path] = params[path].astype(DTYPES[dtype], copy=False)
        if not np.isfinite(params[path]).all():
            raise UserError(
                f"Tensor {key} of {where} holds NaN or infinite values; "
                "the file is damaged, download or export it again."
            )
    return params


def to_torch(params: Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Turns one component's parameters into PyTorch's names and layouts: the inverse of `to_jax`.

    Returns:
      `state-dict key -> array`; the arrays are transposed views of the parameters, not copies.
    """
    tensors = {}
    for path, value in params.items():
        value = np.asarray(value)
        axes = np.argsort(_axes(path, value.ndim))
        tensors[torch_name(path, value.ndim)] = value.transpose(axes)
    return tensors


def _rule(path: str, leaf: str, rank: int) -> tuple[str, tuple[int, ...]]:
    if (leaf, rank) not in RULES:
        raise ValueError(f"No conversion rule for parameter {path!r} of rank {rank}.")
    return RULES[leaf, rank]


def _axes(path: str, rank: int) -> tuple[int, ...]:
    return _rule(path, path.rpartition(".")[2], rank)[1]


def _torch_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    return tuple(shape[i] for i in np.argsort(_axes(path, len(shape))))


def _flat_projection(name: str, have: tuple[int, ...], want: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a 1x1 convolution that stands for a linear layer of the VAE's attention."""
    is_conv = len(want) == 2 and have[2:] == (1, 1) and _VAE_PROJECTION.fullmatch(name)
    return have[:2] if is_conv else have


def _current_names(tensors: Iterable[str], wanted: Mapping[str, str], where: str) -> dict[str, str]:
    """`today's name -> stored name`, without the buffers that are no weights."""
    stored: dict[str, str] = {}
    for key in tensors:
        if _BUFFERS.fullmatch(key):
            continue
        name = key
        if (old := _OLD_VAE_ATTENTION.fullmatch(key)) and key not in wanted:
            name = f"{old[1]}.{_OLD_VAE_NAMES[old[2]]}.{old[3]}"
        elif key not in wanted and _TEXT_PREFIX + key in wanted:
            name = _TEXT_PREFIX + key
        if name in stored:
            raise UserError(
                f"{where} holds {name} twice, as {stored[name]} and as {key}; remove one of them."
            )
        stored[name] = key
    return stored


def _transposed(x: Shaped[np.ndarray, "..."], axes: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """Contiguous `x.transpose(axes)`.

    Reading 32 output channels at a time keeps the strided side in cache: six times as fast as one
    `np.ascontiguousarray` for a 1280 x 1280 x 3 x 3 kernel.
    """
    if axes == tuple(range(x.ndim)):
        return np.ascontiguousarray(x)
    out = np.empty([x.shape[i] for i in axes], x.dtype)
    for start in range(0, x.shape[0], 32):  # every rule that moves axes moves the first one last
        out[..., start : start + 32] = x[start : start + 32].transpose(axes)
    return out
