"""Strict settings: eight CPU devices, no silent broadcasting, warnings are errors."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Most of the time goes into compiling programs that run once, here and in processes started from
# here: these make it five times as quick. HLO is optimised as ever, machine code is not.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_llvm_enable_alias_scope_metadata=false"
    " --xla_llvm_enable_noalias_metadata=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Workers of pytest-xdist share the cores: torch's threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

# How long an example takes says more about the machine than about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's multi-process workers refuse to start before absl's flags are parsed.
flags.FLAGS(["pytest"])


def pytest_collection_finish(session) -> None:
    """Half a million objects of imported libraries are not looked through again and again."""
    if all(item.get_closest_marker("slow") for item in session.items):
        # Networks of full size compute for longer than they compile.
        jax.config.update("jax_disable_most_optimizations", False)
        os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory) -> None:
    """A program of several tests is compiled for the first; each worker keeps its own."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh random inputs on every run; the seed is printed so that a failure can be repeated."""
    seed = np.random.SeedSequence().entropy
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
