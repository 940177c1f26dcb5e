"""Contribution factors: the regression, bands over seeds, and tables of weights."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError
from jaxpercept.inference.factors import Band, band, fit_gains, make_table, time_spent

TOTAL = 1000
SEEDS = st.integers(0, 2**32 - 1)


def timesteps(spacing: str, steps: int) -> np.ndarray:
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    return schedule.timesteps(steps)


def covered(times: np.ndarray, bins: int) -> np.ndarray:
    """Timestep by timestep: step i covers those up to its own that the next step does not."""
    spent = np.zeros((len(times), bins))
    edges = [k * TOTAL // bins for k in range(bins + 1)]
    for t in range(TOTAL):
        below = [i for i, start in enumerate(times) if start >= t]
        step = max(below) if below else 0
        spent[step, next(k for k in range(bins) if edges[k] <= t < edges[k + 1])] += 1
    return spent


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("steps", "bins"), [(50, 10), (23, 7), (30, 1)])
def test_each_timestep_is_spent_by_one_step_in_one_bin(spacing, steps, bins):
    times = timesteps(spacing, steps)
    spent = time_spent(times, bins, TOTAL)
    np.testing.assert_array_equal(spent, covered(times, bins))
    assert spent.sum() == TOTAL


def test_solvers_may_stop_between_timesteps():
    spent = time_spent(np.array([999.0, 500.5, 20.25]), 2, TOTAL)
    np.testing.assert_array_equal(spent, [[0, 499], [479, 1], [21, 0]])


@given(SEEDS, st.sampled_from(["leading", "trailing", "linspace"]), st.integers(1, 12))
def test_gains_that_are_constant_in_each_bin_are_recovered(seed, spacing, bins):
    rng = np.random.default_rng(seed)
    times = timesteps(spacing, int(rng.integers(2 * bins, 100)))
    rates, trivial = rng.normal(size=bins), float(rng.normal())
    widths = np.diff(np.arange(bins + 1) * TOTAL // bins)
    rate_of = np.repeat(rates, widths)
    curve, before = [], TOTAL
    for following in [*times[1:], -1]:
        trivial_so_far = curve[-1] if curve else trivial
        curve.append(trivial_so_far + rate_of[following + 1 : before].sum())
        before = following + 1
    gains = fit_gains(np.array(curve), trivial, time_spent(times, bins, TOTAL))
    np.testing.assert_allclose(gains, rates * widths, rtol=1e-7, atol=1e-7)


@given(SEEDS, st.sampled_from(["leading", "trailing"]))
def test_the_regression_is_weighted_least_squares(seed, spacing):
    """Against NumPy's, each step repeated: a step of length L has 1 / L of the weight of one."""
    rng = np.random.default_rng(seed)
    spent = time_spent(timesteps(spacing, 40), 7, TOTAL)
    curve, trivial = rng.normal(size=40), float(rng.normal())
    gains = np.diff(np.concatenate([[trivial], curve]))
    weight = 1 / spent.sum(axis=1)
    slopes = np.linalg.solve((spent.T * weight) @ spent, (spent.T * weight) @ gains)
    root = np.diag(np.sqrt(weight))
    other, *_ = np.linalg.lstsq(root @ spent, root @ gains, rcond=None)
    np.testing.assert_allclose(slopes, other, atol=1e-10)
    found = fit_gains(curve, trivial, spent)
    np.testing.assert_allclose(found, slopes * spent.sum(axis=0), atol=1e-8)


@given(SEEDS)
def test_where_steps_fit_into_bins_gains_are_differences_of_the_curve(seed):
    rng = np.random.default_rng(seed)
    curve, trivial = rng.normal(size=50), float(rng.normal())
    gains = fit_gains(curve, trivial, time_spent(timesteps("trailing", 50), 10, TOTAL))
    edges = np.concatenate([[trivial], curve[4::5]])
    np.testing.assert_allclose(gains, np.diff(edges)[::-1], atol=1e-9)


@pytest.mark.parametrize(
    ("spacing", "steps", "bins", "words"),
    [
        ("trailing", 9, 10, "9 steps do not tell 10 bins"),
        ("leading", 10, 10, "take more steps, or fewer bins"),
        ("trailing", 20, 0, "0 bins do not fit"),
        ("trailing", 20, 1001, "1001 bins"),
    ],
)
def test_bins_that_steps_do_not_tell_apart_are_refused(spacing, steps, bins, words):
    with pytest.raises(UserError, match=words):
        time_spent(timesteps(spacing, steps), bins, TOTAL)


# ---- bands ---------------------------------------------------------------------------------------


@given(SEEDS, st.integers(2, 12))
def test_bands_are_student_s_intervals(seed, seeds):
    values = np.random.default_rng(seed).normal(size=(seeds, 4))
    found = band(values)
    for i in range(4):
        sem = scipy.stats.sem(values[:, i])
        low, high = scipy.stats.t.interval(0.95, seeds - 1, values[:, i].mean(), sem)
        np.testing.assert_allclose([found.low[i], found.high[i]], [low, high], rtol=1e-9)


@given(SEEDS, st.integers(1, 4))
def test_bands_shrink_with_seeds(seed, times):
    """The same spread, seen more often."""
    values = np.random.default_rng(seed).normal(size=(3, 5))
    few, many = band(values), band(np.tile(values, (times + 1, 1)))
    np.testing.assert_allclose(few.mean, many.mean, atol=1e-12)
    assert (many.high - many.low < few.high - few.low).all()


def test_one_seed_has_no_band():
    found = band(np.array([[1.0, 2.0]]))
    assert found.to_json() == {"mean": [1.0, 2.0], "low": [None, None], "high": [None, None]}


# ---- tables --------------------------------------------------------------------------------------


def exactly(gains) -> Band:
    return Band(*[np.asarray(gains, np.float64)] * 3)


GAIN = st.integers(-1000, 1000).map(lambda hundredths: hundredths / 100)
GAINS = st.lists(GAIN, min_size=1, max_size=12)


@given(GAINS, st.floats(0, 1))
def test_weights_sum_to_100_and_none_is_below_the_floor(gains, share):
    floor = 0.99 * share / len(gains)
    weights = make_table(exactly(gains), floor).weights
    assert weights.sum() == pytest.approx(100)
    assert (weights >= 100 * floor * (1 - 1e-12)).all()
    order = np.argsort(gains, kind="stable")
    assert (np.diff(weights[order]) >= -1e-9).all()


@given(GAINS, st.floats(0, 1), st.floats(0.01, 100))
def test_weights_above_the_floor_are_in_proportion_to_the_gains(gains, share, factor):
    assume(max(gains) > 0)
    floor = 0.99 * share / len(gains)
    weights = make_table(exactly(gains), floor).weights
    scaled = make_table(exactly(np.multiply(gains, factor)), floor).weights
    np.testing.assert_allclose(scaled, weights, rtol=1e-6, atol=1e-9)
    above = weights > 100 * floor * (1 + 1e-9)
    assert above.any()
    ratio = weights[above] / np.asarray(gains)[above]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_the_released_tables_are_of_this_form():
    """Their entries of 1 are the floor of what else is there."""
    depth = np.array([1, 1, 3, 7, 13, 14, 8, 4, 22, 33])
    gains = np.where(depth == 1, -0.2, depth) / 500
    table = make_table(exactly(gains), 1 / depth.sum())
    np.testing.assert_allclose(table.weights, depth / depth.sum() * 100, rtol=1e-12)


@given(st.lists(st.tuples(GAIN, GAIN, GAIN), min_size=2, max_size=10))
def test_the_band_of_a_weight_holds_it(gains):
    low, mean, high = np.sort(np.array(gains), axis=1).T
    table = make_table(Band(mean, low, high), 0.01)
    if np.isfinite(table.low).all():
        assert (table.low <= table.weights).all()
        assert (table.weights <= table.high).all()
        assert table.high.max() <= 100 - (len(gains) - 1) + 1e-9
    else:
        assert (mean <= 0).all()


def test_without_any_gain_all_weights_are_equal():
    table = make_table(exactly([0.0, -1.0, -2.0, 0.0]), 0.01)
    np.testing.assert_array_equal(table.weights, [25] * 4)
    assert table.to_json()["low"] == [None] * 4


@pytest.mark.parametrize("floor", [-0.1, 0.1, float("nan")])
def test_impossible_floors_are_refused(floor):
    with pytest.raises(UserError, match="floor"):
        make_table(exactly(np.ones(10)), floor)
