"""Contribution factors from curves: how much quality each part of the schedule adds.

ADDP (arXiv 2504.11457) estimates the contribution factors c_t of timesteps "by a linear regression"
and draws training timesteps in proportion to c_t². Neither the regression nor the curve it is of
is known to us: its text could not be read, its released code holds finished tables only, and a
reviewer notes that it does not say how quality between the steps was measured. This estimator is
OURS, from what a trained model does; its tables have the form of the released ones, so that they
can be compared and used in the same place (`diffusion.timesteps`). `diffusion.contribution` has
factors that need no model.

Let q_i be the quality of what step i of n predicts, higher being better, and q_{-1} that of the
trivial prediction. Step i is all that a trajectory knows of the timesteps t_{i+1} < t <= t_i, the
first step of all above too, the last of all below. With a_ik the time, in timesteps, that step i
spends in bin k of the schedule, the regression is

    q_i − q_{i−1} = Σ_k s_k a_ik + noise of a variance in proportion to Σ_k a_ik,

whose slope s_k is the mean gain per timestep: a piecewise-linear curve through the bins' edges. (A
regression of q_i itself would smear the leap of the first step over all bins.) The gain of a bin is
its slope times its width. Where edges of bins are edges of steps, gains are differences of the
curve and sum to q_{n−1} − q_{−1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy.special import stdtrit

from jaxpercept.diffusion.contribution import step_of_timestep
from jaxpercept.errors import UserError

CONFIDENCE = 0.95
"""Of all bands."""
# Beyond, a bin's slope is noise: some bin is all but unseen.
_WORST_CONDITION = 10.0


class Band(NamedTuple):
    """A mean over seeds and its confidence interval, NaN where there is but one seed."""

    mean: Float[np.ndarray, "*n"]
    low: Float[np.ndarray, "*n"]
    high: Float[np.ndarray, "*n"]

    def to_json(self) -> dict[str, Any]:
        """Lists; None for NaN."""
        return {name: _plain(value) for name, value in self._asdict().items()}


def band(values: Float[np.ndarray, " s *n"]) -> Band:
    """The mean over seeds, and Student's interval of `CONFIDENCE` around it."""
    seeds, mean = len(values), values.mean(axis=0)
    if seeds == 1:
        return Band(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    reach = stdtrit(seeds - 1, (1 + CONFIDENCE) / 2) / np.sqrt(seeds) * values.std(axis=0, ddof=1)
    return Band(mean, mean - reach, mean + reach)


def time_spent(timesteps: Num[np.ndarray, " n"], bins: int, total: int) -> Float[np.ndarray, "n k"]:
    """a_ik: how many training timesteps of each bin, low to high, each step covers.

    Args:
        timesteps: of the steps, descending; they need not be whole.
        bins: equal ones; bin k covers k T // bins <= t < (k+1) T // bins.
        total: T.

    Raises:
        UserError: the steps do not tell the bins apart.
    """
    if not 1 <= bins <= total:
        raise UserError(f"{bins} bins do not fit: give from 1 to the {total} training timesteps.")
    edges = np.arange(bins + 1) * total // bins
    bin_of = np.searchsorted(edges, np.arange(total), side="right") - 1
    spent = np.zeros((len(timesteps), bins))
    np.add.at(spent, (step_of_timestep(timesteps, total), bin_of), 1.0)
    if len(timesteps) < bins or np.linalg.cond(_scaled(spent)) > _WORST_CONDITION:
        raise UserError(
            f"{len(timesteps)} steps do not tell {bins} bins of the schedule apart: take more "
            "steps, or fewer bins."
        )
    return spent


def fit_gains(
    quality: Float[np.ndarray, " n"], trivial: float, spent: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """The gain of each bin, by the regression of the module's text.

    Args:
        quality: q_i, of the first step to the last.
        trivial: q_{-1}.
        spent: from `time_spent`.
    """
    gains = np.diff(quality, prepend=trivial) / _deviation(spent)
    slopes, *_ = np.linalg.lstsq(_scaled(spent), gains, rcond=None)
    return slopes * spent.sum(axis=0)


def _deviation(spent: np.ndarray) -> np.ndarray:
    """Of each step's noise, up to a factor."""
    return np.sqrt(np.maximum(spent.sum(axis=1), 1))


def _scaled(spent: np.ndarray) -> np.ndarray:
    return spent / _deviation(spent)[:, None]


def check_floor(floor: float, bins: int) -> None:
    """Raises a UserError where a floor leaves nothing to share out."""
    if not 0 <= floor < 1 / bins:
        raise UserError(f"the floor {floor:g} of {bins} bins does not fit: give 0 to {1 / bins:g}.")


class Table(NamedTuple):
    """Relative weights of the bins, low to high timesteps, that sum to 100.

    Attributes:
        weights: no less than the floor.
        low, high: what they would be at the ends of the gains' bands; NaN with one seed.
    """

    weights: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]

    def to_json(self) -> dict[str, Any]:
        """Lists; None for NaN."""
        return {name: _plain(value) for name, value in self._asdict().items()}


def make_table(gains: Band, floor: float) -> Table:
    """Weights in proportion to the gains where these exceed the floor.

    The released tables of ADDP have a least entry of 1 of a sum of 106 and 108. Gains that are
    smaller, or negative, get the floor: no timestep goes untrained. Without any gain all weights
    are equal.

    Args:
        gains: of the bins.
        floor: the least weight, as a share of the sum.

    Raises:
        UserError: as `check_floor`.
    """
    bins = len(gains.mean)
    check_floor(floor, bins)
    positive = np.maximum(gains.mean, 0)
    raised = positive <= 0
    total = 0.0
    for _ in range(bins):  # raising some to the floor can push others below it
        total = positive[~raised].sum() / (1 - floor * raised.sum())
        below = raised | (positive < floor * total)
        if (below == raised).all():
            break
        raised = below
    if not total > 0:
        equal = np.full(bins, 100 / bins)
        return Table(equal, np.full(bins, np.nan), np.full(bins, np.nan))

    def weigh(gain: np.ndarray) -> np.ndarray:
        most = 1 - (bins - 1) * floor  # where all other bins have the floor
        return 100 * np.clip(gain, floor * total, most * total) / total  # NaN stays NaN

    return Table(*map(weigh, gains))


def _plain(values: Float[np.ndarray, " n"]) -> list[float | None]:
    """As JSON has it: None for NaN."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
