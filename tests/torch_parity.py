"""Weights and arrays between torch modules and this package, for parity tests."""

import numpy as np
import torch


def randomise(module: torch.nn.Module, rng: np.random.Generator, scale: float = 1.0) -> None:
    """Fresh values for every parameter, so that no zero or one hides a missing term.

    Kernels: normal, std scale / sqrt(fan_in), which keeps activations of order one; norm scales
    around one, all biases around zero.
    """
    seed = int(rng.integers(2**31))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("weight") and p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            elif "embedding.weight" in name and p.ndim == 2:
                p.copy_(noise)
            elif p.ndim > 1:
                p.copy_(scale * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise)


def params_of(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """A torch module's state dict as {path: array} in this package's names and layouts."""
    params = {}
    for name, tensor in module.state_dict().items():
        path, leaf = prefix + name.rpartition(".")[0], name.rpartition(".")[2]
        value = tensor.detach().numpy()
        if leaf == "weight":
            if value.ndim == 4:
                leaf, value = "kernel", value.transpose(2, 3, 1, 0)
            elif value.ndim == 2 and path.endswith("_embedding"):
                leaf = "embedding"
            elif value.ndim == 2:
                leaf, value = "kernel", value.T
            else:
                leaf = "scale"
        params[f"{path}.{leaf}"] = value
    return params


def to_torch(x: np.ndarray) -> torch.Tensor:
    """NHWC array to NCHW tensor; other arrays as they are."""
    x = np.asarray(x)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    """NCHW tensor to NHWC array; other tensors as they are."""
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max())
