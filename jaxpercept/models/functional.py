"""A network without its weights: the form in which models leave this room.

Everything above handles plain dicts {path: array} whose paths are diffusers' state-dict keys, and
calls `functional.bind(params)` inside a jitted function to get a module it can call.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Key

from jaxpercept.models.attention import IMPLEMENTATIONS
from jaxpercept.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.layers import DType

Config = UNetConfig | VAEConfig | CLIPTextConfig

REMATS = ("none", "block")


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module's structure. Equal and hashable by what it was made from; holds no arrays.

    config: the network's config; dtype, remat, attention: see `functional`.
    graphdef: NNX's static description. shapes: {path: jax.ShapeDtypeStruct}, parameters in float32.
    """

    config: Config
    dtype: np.dtype
    remat: str
    attention: str
    graphdef: Any = dataclasses.field(compare=False, repr=False)
    shapes: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(compare=False, repr=False)

    def bind(self, params: Mapping[str, Any]) -> nnx.Module:
        """The callable module with these parameters; cheap, made to be called while tracing.

        Raises ValueError listing missing and unexpected paths, and those of a wrong shape.
        """
        problems = []
        if missing := sorted(self.shapes.keys() - params.keys()):
            problems.append(f"missing: {', '.join(missing)}")
        if extra := sorted(params.keys() - self.shapes.keys()):
            problems.append(f"unexpected: {', '.join(extra)}")
        problems += [
            f"{path} has shape {np.shape(params[path])}, not {struct.shape}"
            for path, struct in self.shapes.items()
            if path in params and np.shape(params[path]) != struct.shape
        ]
        if problems:
            raise ValueError(
                f"parameters do not fit {type(self.config).__name__}: " + "; ".join(problems)
            )
        tree = traverse_util.unflatten_dict({_keys(path): params[path] for path in self.shapes})
        return nnx.merge(self.graphdef, tree)

    def init(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Random parameters as a fresh torch module has them; float32, jittable.

        Kernels and biases of convolutions and linear layers: uniform within 1/sqrt(fan_in)
        (kaiming-uniform with a = sqrt(5)); norms: one and zero; embeddings: normal with std 0.02,
        as CLIP. A parameter depends on the key and on its own path only.
        """
        return {path: self._init_one(path, key) for path in self.shapes}

    def _init_one(self, path: str, key: Key[Array, ""]) -> Float[Array, "..."]:
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        shape = self.shapes[path].shape
        module, _, leaf = path.rpartition(".")
        if leaf == "scale":
            return jnp.ones(shape)
        if leaf == "embedding":
            return 0.02 * jax.random.normal(key, shape)
        kernel = self.shapes.get(f"{module}.kernel")
        if kernel is None:  # the bias of a norm
            return jnp.zeros(shape)
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def functional(
    config: Config, *, dtype: DType = jnp.float32, remat: str = "none", attention: str = "auto"
) -> Functional:
    """The network of a config, without weights or memory; the config's type picks the class.

    dtype: compute dtype; parameters are cast to it where used, statistics stay float32.
    remat: "none", or "block" to recompute each block in the backward pass.
    attention: see `attention.dot_product_attention`.

    Raises ValueError for an unknown remat or attention.
    """
    if remat not in REMATS:
        raise ValueError(f"remat {remat!r} is none of {', '.join(REMATS)}")
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"attention {attention!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return _build(config, jnp.dtype(dtype), remat, attention)


@functools.cache
def _build(config: Config, dtype: np.dtype, remat: str, attention: str) -> Functional:
    make = functools.partial(
        _module_class(config), config, dtype=dtype, remat=remat, attention=attention
    )
    graphdef, state = nnx.split(nnx.eval_shape(make))
    shapes = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(state)
    }
    return Functional(config, dtype, remat, attention, graphdef, shapes)


def _keys(path: str) -> tuple[str | int, ...]:
    """NNX's keys of a path: list indices are integers."""
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def _module_class(config: Config) -> type[nnx.Module]:
    # Imported here because those modules' pure functions take a Functional.
    from jaxpercept.models.clip import CLIPTextModel
    from jaxpercept.models.unet import UNet2DConditionModel
    from jaxpercept.models.vae import AutoencoderKL

    classes = {
        UNetConfig: UNet2DConditionModel,
        VAEConfig: AutoencoderKL,
        CLIPTextConfig: CLIPTextModel,
    }
    return classes[type(config)]
