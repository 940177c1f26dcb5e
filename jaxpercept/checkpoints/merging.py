"""Adding LoRA's factors to the weights they belong to."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError
from jaxpercept.models.lora import LoraConfig, factor_of, is_lora, merged_kernel

__all__ = ["adapted_layers", "merge", "merged_tensors"]

Params = dict[str, dict[str, Any]]

_INSIDE = re.compile(r"(.+)\.(base_layer|lora_[AB](?:\.\w+)?)\.weight")


def merge(params: Params, lora: LoraConfig) -> Params:
    """The weights of the same model without LoRA: W + alpha / rank A B where there was one.

    The sums are float32, whatever W's type is: in half precision an addition of a thousandth of W
    would be lost to rounding. All other weights are passed on.

    Raises:
      UserError: a merged weight is not finite.
      ValueError: the factors in `params` are not those of `lora`.
    """
    weights = params[lora.component]
    merged = {path: value for path, value in weights.items() if not is_lora(path)}
    for layer in adapted_layers({p: v for p, v in weights.items() if is_lora(p)}, lora):
        kernel, a, b = (
            np.asarray(weights[f"{layer}.{name}kernel"]) for name in ("", "lora_A.", "lora_B.")
        )
        with np.errstate(over="ignore", invalid="ignore"):
            kernel = merged_kernel(kernel, a, b, lora.scale)
        if not np.isfinite(kernel).all():
            raise UserError(
                f"{lora.component}/{layer}.kernel with its LoRA addition is not finite: check the "
                "training, or use another adapter."
            )
        merged[f"{layer}.kernel"] = kernel
    return {**params, lora.component: merged}


def merged_tensors(tensors: Mapping[str, Any], alpha: int | float | None = None) -> dict[str, Any]:
    """A state dict saved with an adapter inside, merged; one without is given back as it is.

    That is what `save_pretrained` of a network with an adapter writes, and GenPercept's LoRA runs
    are: `X.base_layer.weight`, `X.lora_A.default.weight` and `X.lora_B.default.weight` stand for
    `X.weight`. Nothing is computed before a tensor is read; the sums are float32, as `merge`'s.

    Args:
      tensors: `state-dict key -> tensor`, in PyTorch's layout; see `rules.to_jax`.
      alpha: the rank (so in GenPercept) where it is None; such a file does not say it.

    Raises:
      UserError: a layer has not just these three, or their shapes do not fit.
    """
    merged: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if found := _INSIDE.fullmatch(key):
            layers.setdefault(found[1], {})[found[2]] = tensor
        else:
            merged[key.replace(".base_layer.bias", ".bias")] = tensor
    for layer, parts in layers.items():
        merged[f"{layer}.weight"] = _MergedTensor(layer, parts, alpha)
    return merged


class _MergedTensor:
    """W + alpha / rank B A in PyTorch's layout, computed by `np.asarray`."""

    def __init__(self, layer: str, parts: Mapping[str, Any], alpha: int | float | None):
        shapes = [tuple(parts[name].shape) for name in sorted(parts)]  # of W, A and B
        w, a, b = shapes if len(shapes) == 3 else ((), (), ())
        rank = a[0] if a else 0
        if not (w and rank and a[1:] == w[1:] and b == (w[0], rank, *(1,) * len(w[2:]))):
            found = in_short(", ".join(sorted(parts)))
            raise UserError(
                f"The layer {in_short(layer)} has {found} of the shapes {in_short(shapes)}, which "
                "is no layer with LoRA; download the checkpoint again."
            )
        self.shape, self._scale = w, 1.0 if alpha is None else alpha / rank
        self._parts = [parts[name] for name in sorted(parts)]

    def __array__(self, dtype=None, copy=None):
        w, a, b = (np.asarray(part) for part in self._parts)
        a, b = (x.astype(np.float32).reshape(x.shape[0], -1) for x in (a, b))
        merged = w.astype(np.float32) + np.float32(self._scale) * (b @ a).reshape(w.shape)
        return merged if dtype is None else merged.astype(dtype)


def adapted_layers(factors: Mapping[str, Any], lora: LoraConfig) -> list[str]:
    """The layers that have factors.

    Raises:
      ValueError: these are not what `lora` says, or there are none.
    """
    found = {factor_of(path): np.shape(value) for path, value in factors.items()}
    layers = sorted({layer for layer, _ in found})
    for layer in layers:
        a, b = found.get((layer, "A"), ()), found.get((layer, "B"), ())
        if a[-1:] != (lora.rank,) or b[-2:-1] != (lora.rank,) or not lora.covers(layer):
            raise ValueError(f"the LoRA factors of {layer}, {a} and {b}, are not those of {lora}")
    if not layers:
        raise ValueError(f"there are no LoRA factors in the {lora.component}")
    return layers
