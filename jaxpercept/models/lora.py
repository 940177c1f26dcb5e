"""LoRA, low-rank additions to the layers of a network (Hu et al., arXiv 2106.09685), as peft's.

A targeted layer computes x W + b + (alpha / rank) x A B, the product W + A B being formed nowhere:
a training step that keeps W frozen holds gradients and moments of A and B alone. Both are layers
without bias inside the targeted one, `lora_A` and `lora_B`; so their paths are the state-dict keys
of peft and diffusers, by the same rules as those of all other parameters, and they live in the
component they belong to: rules on names, `unet/.*lora_`, tell them from the rest.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxpercept.errors import UserError
from jaxpercept.models.config import _JsonConfig
from jaxpercept.models.layers import Conv2d, Linear

# The attention projections of a UNet; the target modules of diffusers' scripts and of GenPercept.
ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")
COMPONENTS = ("unet", "vae")

_MAX_RANK, _MAX_ALPHA = 2**14, 1e6
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_MAX_NAME, _MAX_TARGETS = 300, 10_000
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.kernel")


@dataclasses.dataclass(frozen=True)
class LoraConfig(_JsonConfig):
    """Which layers get a low-rank addition, and which one.

    rank: columns of A and rows of B; more than the layer is wide is allowed.
    alpha: the addition is scaled by alpha / rank. GenPercept has alpha = rank.
    targets: ends of layer names at a dot, as peft's target_modules: "to_q" means every linear
      layer or convolution "to_q" or "....to_q". Kept sorted.
    component: the network adapted, whose name is also that of its part of a file.
    """

    rank: int
    alpha: int | float
    targets: tuple[str, ...] = ATTENTION
    component: str = "unet"

    CLASS_NAME: ClassVar[str] = "LoRA"
    FIXED: ClassVar[dict[str, tuple]] = {}
    INERT: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LoraConfig":
        """Reads what `to_dict` gives.

        Raises UserError naming the first key that is missing, unknown or of an unsupported value.
        """
        for key in ("rank", "alpha"):
            if key not in config:
                raise UserError(f"LoRA config: key {key!r} is missing; add it.")
        return super().from_dict(config)

    def __post_init__(self):
        whole = type(self.rank) is int and 0 < self.rank <= _MAX_RANK
        self._require("rank", f"an integer of 1 to {_MAX_RANK}", whole)
        positive = type(self.alpha) in (int, float) and 0 < self.alpha <= _MAX_ALPHA  # NaN is not
        self._require("alpha", f"a positive number up to {_MAX_ALPHA:g}", positive)
        names = isinstance(self.targets, tuple | list) and 0 < len(self.targets) <= _MAX_TARGETS
        names = names and all(
            isinstance(name, str) and len(name) <= _MAX_NAME and _NAME.fullmatch(name)
            for name in self.targets
        )
        self._require("targets", "names of layers such as 'to_q' or 'to_out.0'", bool(names))
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))
        self._require("component", " or ".join(COMPONENTS), self.component in COMPONENTS)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def covers(self, layer: str) -> bool:
        """Whether the targets name this layer."""
        return f".{layer}".endswith(tuple(f".{name}" for name in self.targets))


def adapted(make: Callable[[], nnx.Module], lora: LoraConfig) -> Callable[[], nnx.Module]:
    """Makes what `make` makes, with LoRA in the targeted layers.

    Raises UserError, when called, for a target that names no layer, or something else than a linear
    layer or a convolution.
    """

    def make_adapted() -> nnx.Module:
        network = make()
        unused = set(lora.targets)
        for keys, module in list(nnx.iter_modules(network)):
            name = ".".join(map(str, keys))
            if lora.covers(name):
                if not isinstance(module, Linear | Conv2d):
                    raise UserError(
                        f"The LoRA target {name!r} is neither a linear layer nor a convolution; "
                        "name layers such as 'to_q' or 'to_out.0'."
                    )
                _add_factors(module, lora)
                unused = {target for target in unused if not f".{name}".endswith(f".{target}")}
        if unused:
            raise UserError(
                f"The LoRA target {min(unused)!r} names no layer of the {type(network).__name__}; "
                "name layers such as 'to_q' or 'to_out.0'."
            )
        return network

    return make_adapted


def _add_factors(layer: Linear | Conv2d, lora: LoraConfig) -> None:
    """For a convolution A is one like it and B, over A's outputs, a 1x1 convolution."""
    *window, inputs, outputs = layer.kernel.shape
    options = {"bias": False, "dtype": layer.dtype}
    if isinstance(layer, Linear):
        layer.lora_A = Linear(inputs, lora.rank, **options)
        layer.lora_B = Linear(lora.rank, outputs, **options)
    else:
        where = {"stride": layer.stride, "padding": layer.padding}
        layer.lora_A = Conv2d(inputs, lora.rank, window[0], **where, **options)
        layer.lora_B = Conv2d(lora.rank, outputs, 1, padding=0, **options)
    layer.lora_scale = lora.scale


def factor_of(path: str) -> tuple[str, str] | None:
    """("down_blocks....to_q", "A") of a LoRA parameter's path, None for any other."""
    found = _FACTOR.fullmatch(path)
    return (found[1], found[2]) if found else None


def is_lora(path: str) -> bool:
    """Whether a parameter is a LoRA factor."""
    return factor_of(path) is not None


def initial(
    path: str, shape: tuple[int, ...], rng: np.random.Generator
) -> Float[np.ndarray, "..."]:
    """A fresh factor, by peft's init_lora_weights="gaussian": A normal with std 1 / rank, B zero.

    With B zero the network is the one without LoRA.
    """
    _, factor = factor_of(path)
    if factor == "B":
        return np.zeros(shape, np.float32)
    return rng.standard_normal(shape, np.float32) / np.float32(shape[-1])


def targets_of(layers: Collection[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest targets that cover the layers and none of the others.

    No target begins with a list's index: "to_out.0", never "0".
    """
    taken = {end for other in others for end in _ends(other)}
    return tuple(sorted({next(e for e in _ends(name) if e not in taken) for name in layers}))


def _ends(name: str) -> list[str]:
    """Ends of a layer's name, shortest first: "to_q", "attn1.to_q", and so on."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    return [end for end in ends if not end[0].isdigit()]


def merged_kernel(
    kernel: Float[np.ndarray, "*window i o"],
    a: Float[np.ndarray, "*window i r"],
    b: Float[np.ndarray, "*ones r o"],
    scale: float,
) -> Float[np.ndarray, "*window i o"]:
    """kernel + scale A B in float32: what the layer with LoRA computes as one layer."""
    assert math.prod(b.shape[:-2]) == 1
    product = a.astype(np.float32) @ b.reshape(b.shape[-2:]).astype(np.float32)
    return kernel.astype(np.float32) + np.float32(scale) * product
