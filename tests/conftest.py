"""Strict settings: eight CPU devices, no silent broadcasting, warnings are errors."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Most of the time goes into compiling programs that run once: these halve it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_llvm_enable_alias_scope_metadata=false"
    " --xla_llvm_enable_noalias_metadata=false",
)

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


def pytest_collection_finish() -> None:
    """Half a million objects of imported libraries are not looked through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh random inputs on every run; the seed is printed so that a failure can be repeated."""
    seed = np.random.SeedSequence().entropy
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
