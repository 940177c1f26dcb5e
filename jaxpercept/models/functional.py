"""A network without its weights: the form in which models leave this room.

Everything above handles plain dicts {path: array} whose paths are diffusers' state-dict keys, and
calls `functional.bind(params)` inside a jitted function to get a module it can call.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Key

from jaxpercept.models.attention import IMPLEMENTATIONS
from jaxpercept.models.config import (
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNetConfig,
    VAEConfig,
)
from jaxpercept.models.dpt import DPTConfig, DPTHead
from jaxpercept.models.layers import DType
from jaxpercept.models.lora import LoraConfig, adapted, initial, is_lora

Config = UNetConfig | VAEConfig | AutoencoderTinyConfig | CLIPTextConfig | DPTConfig

REMATS = ("none", "block")


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module's structure. Equal and hashable by what it was made from; holds no arrays.

    config: the network's config; dtype, remat, attention, head, lora: see `functional`.
    graphdef: NNX's static description. shapes: {path: jax.ShapeDtypeStruct}, parameters in float32.
    """

    config: Config
    dtype: np.dtype
    remat: str
    attention: str
    head: bool
    lora: LoraConfig | None
    graphdef: Any = dataclasses.field(compare=False, repr=False)
    shapes: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(compare=False, repr=False)

    def bind(self, params: Mapping[str, Any]) -> nnx.Module:
        """The callable module with these parameters; cheap, made to be called while tracing.

        Raises ValueError listing missing and unexpected paths, and those of a wrong shape.
        """
        return bind(self.graphdef, self.shapes, params)

    def init(
        self, key: Key[Array, ""] | int, paths: Collection[str] | None = None
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """Random parameters as a fresh torch module has them: float32 arrays on the host.

        Kernels and biases of convolutions and linear layers: uniform within 1/sqrt(fan_in)
        (kaiming-uniform with a = sqrt(5)); norms: one and zero; embeddings: normal with std 0.02,
        as CLIP; LoRA factors: see `lora.initial`. A parameter depends on the key and on its own
        path only; `paths` are those wanted, all by default.

        NumPy draws them, so the values are the same on every backend and mesh, and nothing is
        compiled: XLA takes about a second per random op on a CPU. Not for use under jit.
        """
        seed = [key] if isinstance(key, int) else np.asarray(jax.random.key_data(key)).tolist()
        wanted = self.shapes if paths is None else paths
        return {path: self._init_one(path, seed) for path in wanted}

    def _init_one(self, path: str, seed: list[int]) -> Float[np.ndarray, "..."]:
        rng = np.random.default_rng([*seed, zlib.crc32(path.encode())])
        shape = self.shapes[path].shape
        if is_lora(path):
            return initial(path, shape, rng)
        module, _, leaf = path.rpartition(".")
        if leaf == "scale":
            return np.ones(shape, np.float32)
        if leaf == "embedding":
            return np.float32(0.02) * rng.standard_normal(shape, np.float32)
        kernel = self.shapes.get(f"{module}.kernel")
        if kernel is None:  # the bias of a norm
            return np.zeros(shape, np.float32)
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        return np.float32(2 * bound) * (rng.random(shape, np.float32) - np.float32(0.5))


def functional(
    config: Config,
    *,
    dtype: DType = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    head: bool = True,
    lora: LoraConfig | None = None,
) -> Functional:
    """The network of a config, without weights or memory; the config's type picks the class.

    dtype: compute dtype; parameters are cast to it where used, statistics stay float32.
    remat: "none", or "block" to recompute each block in the backward pass.
    attention: see `attention.dot_product_attention`.
    head: False for a UNet without conv_norm_out and conv_out, whose `features` alone can be called.
    lora: adds low-rank factors to some layers, as further parameters; see `lora.LoraConfig`.

    Raises ValueError for an unknown remat or attention, and for another network without its head;
    UserError for a LoRA target that is no layer of the network.
    """
    if remat not in REMATS:
        raise ValueError(f"remat {remat!r} is none of {', '.join(REMATS)}")
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"attention {attention!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if not head and not isinstance(config, UNetConfig):
        raise ValueError("head=False is for a UNetConfig")
    return _build(config, jnp.dtype(dtype), remat, attention, head, lora)


@functools.cache
def _build(
    config: Config,
    dtype: np.dtype,
    remat: str,
    attention: str,
    head: bool,
    lora: LoraConfig | None,
) -> Functional:
    options = {"dtype": dtype, "remat": remat, "attention": attention}
    if not head:
        options["head"] = False
    make = functools.partial(_module_class(config), config, **options)
    if lora is not None:
        make = adapted(make, lora)
    return Functional(config, dtype, remat, attention, head, lora, *abstract(make))


def abstract(make: Callable[[], nnx.Module]) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Graphdef and {path: shape} of the module that `make` builds, without allocating it."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    shapes = {
        ".".join(map(str, keys)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for keys, leaf in nnx.to_flat_state(state)
    }
    return graphdef, shapes


def bind(
    graphdef: Any, shapes: Mapping[str, jax.ShapeDtypeStruct], params: Mapping[str, Any]
) -> nnx.Module:
    """The module of `abstract`'s answer with parameters {path: array}.

    Raises ValueError listing missing and unexpected paths, and those of a wrong shape.
    """
    missing, extra = shapes.keys() - params.keys(), params.keys() - shapes.keys()
    problems = [f"missing {path}" for path in sorted(missing)]
    problems += [f"unexpected {path}" for path in sorted(extra)]
    problems += [
        f"{path} has shape {np.shape(params[path])}, not {shapes[path].shape}"
        for path in sorted(shapes.keys() & params.keys())
        if np.shape(params[path]) != shapes[path].shape
    ]
    if problems:
        raise ValueError("these parameters do not fit the network: " + "; ".join(problems))
    flat = {_keys(path): jnp.asarray(params[path]) for path in shapes}
    return nnx.merge(graphdef, traverse_util.unflatten_dict(flat))


def _keys(path: str) -> tuple[str | int, ...]:
    """NNX's keys of a path: list indices are integers."""
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def _module_class(config: Config) -> type[nnx.Module]:
    # Imported here because those modules' pure functions take a Functional.
    from jaxpercept.models.clip import CLIPTextModel
    from jaxpercept.models.unet import UNet2DConditionModel
    from jaxpercept.models.vae import AutoencoderKL
    from jaxpercept.models.vae_tiny import AutoencoderTiny

    classes = {
        UNetConfig: UNet2DConditionModel,
        VAEConfig: AutoencoderKL,
        AutoencoderTinyConfig: AutoencoderTiny,
        CLIPTextConfig: CLIPTextModel,
        DPTConfig: DPTHead,
    }
    return classes[type(config)]
