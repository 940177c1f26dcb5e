"""What the parity tests share: random torch weights, and the same weights in this package."""

from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx

from jaxpercept.checkpoints import rules
from jaxpercept.models.functional import abstract, bind


def quick_jit(function: Callable) -> Callable:
    """jit for whole networks: the same arithmetic, compiled in half the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def randomise(module: torch.nn.Module, rng: np.random.Generator) -> torch.nn.Module:
    """Fresh values for every parameter, so that no zero or one hides a missing term.

    Kernels: normal, std 1 / sqrt(fan_in), which keeps activations of order one; norm scales around
    one, all biases around zero.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("_embedding.weight"):
                p.copy_(noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


def params_of(module: torch.nn.Module, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict:
    """A torch module's weights as {path: array}, through the package's own rule table."""
    return rules.to_jax(shapes, {k: t.detach().numpy() for k, t in module.state_dict().items()})


def port(make: Callable[[], nnx.Module], module: torch.nn.Module) -> tuple[Callable, dict]:
    """`(apply, params)`: the block that `make` builds, with a torch module's weights.

    `apply(params, *inputs)` is jitted.
    """
    graphdef, shapes = abstract(make)
    apply = jax.jit(lambda params, *inputs: bind(graphdef, shapes, params)(*inputs))
    return apply, params_of(module, shapes)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """NHWC array to NCHW tensor; other arrays as they are."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    """NCHW tensor to NHWC array; other tensors as they are."""
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def max_abs(a, b) -> float:
    """Largest absolute difference of two arrays of one shape; a tensor counts as NHWC."""
    a, b = (from_torch(x) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max())


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)
