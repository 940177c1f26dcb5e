"""Strict settings: eight CPU devices, no silent broadcasting, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's multi-process workers refuse to start before absl's flags are parsed.
flags.FLAGS(["pytest"])


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh random inputs on every run; the seed is printed so that a failure can be repeated."""
    seed = np.random.SeedSequence().entropy
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
