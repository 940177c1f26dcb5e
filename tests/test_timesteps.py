import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpercept.diffusion.timesteps import PRESETS, TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError

DRAWS = 40_000


def draw(policy, seed, total=1000, count=DRAWS):
    key, index = jax.random.key(seed), jnp.arange(count)
    return np.asarray(sample_timesteps(policy, key, index, total))


@pytest.mark.parametrize(
    ("spec", "bins"),
    [
        ("uniform", np.ones(10)),
        ("addp_depth", PRESETS["addp_depth"]),
        ("addp_ris", PRESETS["addp_ris"]),
        ("weighted:0,2,0,1,1", (0, 2, 0, 1, 1)),
    ],
)
def test_histogram_follows_the_weights(rng, spec, bins):
    t = draw(spec, int(rng.integers(2**31)))
    assert t.dtype == np.int32
    assert t.min() >= 0
    assert t.max() < 1000
    expected = np.asarray(bins) / np.sum(bins)
    observed = np.histogram(t, bins=len(expected), range=(0, 1000))[0] / DRAWS
    five_sigma = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(observed - expected) <= five_sigma).all()
    # Uniform inside a bin: the mean residue of t is that of 0..width-1.
    width = 1000 // len(expected)
    assert abs((t % width).mean() - (width - 1) / 2) < 5 * width / np.sqrt(12 * DRAWS)


def test_documented_mean_timesteps():
    for preset, mean in (("addp_depth", 709), ("addp_ris", 903)):
        distribution = TimestepPolicy.parse(preset).distribution(1000)
        assert distribution.sum() == pytest.approx(1, abs=1e-12)
        assert abs(distribution @ np.arange(1000) - mean) < 1


def test_bins_of_uneven_width(rng):
    policy = TimestepPolicy.weighted((1.0, 1.0, 1.0))
    distribution = policy.distribution(10)
    np.testing.assert_allclose(
        [distribution[:3].sum(), distribution[3:6].sum(), distribution[6:].sum()], 1 / 3
    )
    t = draw(policy, int(rng.integers(2**31)), total=10)
    np.testing.assert_allclose(np.bincount(t, minlength=10) / DRAWS, distribution, atol=0.015)


def test_fixed():
    assert (draw("fixed:1", 0, count=5) == 1).all()
    assert TimestepPolicy.parse("fixed:7") == TimestepPolicy(fixed=7)


@pytest.mark.parametrize("spec", ["uniform", "fixed:3", "addp_depth"])
def test_rows_depend_on_key_and_index_only(rng, spec):
    key = jax.random.key(int(rng.integers(2**31)))
    index = jnp.asarray(rng.permutation(1000)[:64], jnp.int32)
    jitted = jax.jit(lambda key, index: sample_timesteps(spec, key, index, 1000))
    together = jitted(key, index)
    np.testing.assert_array_equal(together[::-1], jitted(key, index[::-1]))
    np.testing.assert_array_equal(together[:16], sample_timesteps(spec, key, index[:16], 1000))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "p2",
        "fixed",
        "fixed:x",
        "fixed:-1",
        "fixed:1000",
        "uniform:3",
        "weighted:",
        "weighted:a",
    ],
)
def test_bad_policies(spec):
    with pytest.raises(UserError):
        sample_timesteps(spec, jax.random.key(0), jnp.arange(2), 1000)


@pytest.mark.parametrize(
    "spec", ["weighted:0,0", "weighted:1,-1", "weighted:nan,1", "weighted:inf"]
)
def test_bad_weights(spec):
    with pytest.raises(UserError, match="weights"):
        TimestepPolicy.parse(spec)


def test_more_bins_than_timesteps():
    with pytest.raises(UserError, match="bins"):
        sample_timesteps("addp_depth", jax.random.key(0), jnp.arange(2), 5)
