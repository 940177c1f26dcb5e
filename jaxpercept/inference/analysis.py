"""How the quality of a prediction grows along the timesteps of a model that denoises.

ADDP (arXiv 2504.11457, figure 1a) shows quality against the timestep and takes from such curves how
much each timestep contributes. Its text, as far as known, does not say what was measured (a
reviewer asks whether it is x̂_0 of partial sampling). What is here is OUR estimator. It has two
curves, both scored by the evaluator's protocol:

trajectory  of noise to a prediction in n steps; each step's estimate of x_0 is decoded as if it
            were the result. `inference.factors` makes contribution factors of it.
finished    from some of these steps on: the true latent, noised to the level of step i with the
            same noise, is finished with the steps that remain. What it loses against the truth was
            still to be decided at t_i, what it gains over the whole trajectory was decided before.
            (At the first step it sees the truth only as far as the schedule has ᾱ_T > 0.)

and beside them, in the latent,

drift       the RMS distance of the trajectory's samples x_t from those that training shows with the
            same noise ε, √ᾱ z_0 + √(1−ᾱ) ε, z_0 being the true latent: how far sampling has left
            what the network knows. Solvers that add noise add the same to both. A perfect network
            has none but that of a first sample without any trace of the image, where ᾱ_T > 0.
x0_error    the RMS error of each estimate of x_0,

over those latent cells that the truth covers whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpercept.data.augment import Augment
from jaxpercept.data.datasets import Record
from jaxpercept.data.transforms import prepare
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluation import Model
from jaxpercept.inference.evaluator import Evaluator
from jaxpercept.inference.factors import Band, Table, band, fit_gains, make_table, time_spent
from jaxpercept.inference.measures import is_detail
from jaxpercept.inference.outputs import save_json
from jaxpercept.inference.predictor import Prediction, processing_size
from jaxpercept.inference.report import kept_report
from jaxpercept.inference.tracing import Tracer

FAMILIES = ("marigold", "rgb_blending", "instruct_pix2pix")
"""Whose models denoise."""
ERRORS = frozenset(
    {
        *("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "i_rmse"),
        *("mean", "median", "mae", "hce", "sad", "mse", "mad", "grad", "conn"),
    }
)
"""Metrics of which less is better, by their names without a protocol's title."""
PREFERRED = ("delta1", "per_image_a11.25", "oiou", "miou", "max_f", "mad", "pck@0.1")
"""The quality of each kind: the first of these that it has."""

_UNCHANGED = Augment(flip=0.0, photometric=0.0, fit="stretch")
# Fields of the truth go to the devices under names of their own.
_TRUE = "true_"


@dataclasses.dataclass(frozen=True)
class Course:
    """What one seed gave, by each metric that is finite throughout.

    Attributes:
        trajectory: after each step.
        finished: of trajectories that began at each of the starts.
        ceiling: of the truth, encoded and decoded.
        baseline: of the trivial prediction.
        drift, x0_error: of each step; empty where the truth covers no latent cell.
        covered: the share of latent cells that it covers.
    """

    trajectory: dict[str, list[float]]
    finished: dict[str, list[float]]
    ceiling: dict[str, float]
    baseline: dict[str, float]
    drift: list[float]
    x0_error: list[float]
    covered: float


def check_denoises(model: Model) -> None:
    """Raises a UserError where a model's prediction has no course."""
    perception = model.perception
    recipe, schedule = perception.recipe, perception.solver.schedule
    if recipe.family not in FAMILIES or not schedule.alphas_cumprod.any():
        raise UserError(
            f"{model.checkpoint} predicts in one step ({recipe.family}), so that no timestep adds "
            f"anything: analyze a model that denoises, of {', '.join(FAMILIES)}."
        )


class Analysis:
    """The courses of a model's predictions on one dataset, seed by seed.

    Args:
        model: what predicts; its options but the number of steps and the seed are kept.
        dataset, data_dir, overrides, options: as of `Evaluator`.
        steps: of a trajectory.
        starts: at how many of these, spread evenly from the first to the last, trajectories are
            also begun from the truth; 0: none.
        bins: equal bins of the schedule, which these steps must tell apart.

    Attributes:
        timesteps: of the steps, descending.
        spent: from `factors.time_spent`.
        starts: the numbers of the steps.
        protocol: what is measured, and how.

    Raises:
        UserError: the model does not denoise, or the dataset or an option does not fit.
    """

    def __init__(
        self,
        model: Model,
        dataset: str,
        *,
        steps: int,
        starts: int,
        bins: int,
        data_dir: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        check_denoises(model)
        if starts < 0:
            raise UserError(f"starts is {starts}: give 0 or more.")
        self.model, self._perception = model, model.perception
        table = self._perception.steps(steps)
        self.timesteps = table.table.timestep.astype(np.float64)
        self.alphas = table.table.alpha.astype(np.float64)
        total = self._perception.solver.schedule.num_train_timesteps
        self.spent = time_spent(self.timesteps, bins, total)
        places = np.linspace(0, steps - 1, min(starts, steps)).round().astype(int)
        self.starts = [int(place) for place in np.unique(places)]
        self._options = dataclasses.replace(model.options, num_steps=steps)
        self._tracer = Tracer(self._perception, model.mesh, pad_multiple=model.predictor.multiple)
        self._evaluator = Evaluator(
            self._perception,
            dataset,
            mesh=model.mesh,
            resolution=model.resolution,
            options=self._options,
            predictor=self._tracer,
            tokenize=model.tokenize,
            data_dir=data_dir,
            overrides=overrides,
            pictures=0,
            more=self._truth,
            **options,
        )
        self.protocol = {k: x for k, x in self._evaluator.protocol.items() if k != "seed"}
        self._request = {
            **model.identity,
            **self.protocol,
            "data_dir": None if data_dir is None else str(Path(data_dir).resolve()),
            "overrides": dict(overrides or {}),
            "starts": self.starts,
        }

    @property
    def metrics(self) -> list[str]:
        """The names of what is measured."""
        return self._evaluator.metrics

    def sign(self, metric: str) -> int:
        """1 where more is better, -1 where less is."""
        for part in self.protocol["parts"]:
            metric = metric.removeprefix(f"{part}_") if part else metric
        return -1 if metric in ERRORS else 1

    def run(self, seed: int) -> Course:
        """Measure the course of the predictions with this seed.

        Raises:
            UserError: a prediction is not finite.
        """
        options = dataclasses.replace(self._options, seed=seed)
        params, tracer, sums = self.model.weights, self._tracer, []

        def predict(items: list[int], arrays: Mapping[str, Array]) -> Iterator[Prediction]:
            batch = tracer.open(
                params,
                arrays["rgb"],
                {k.removeprefix(_TRUE): x for k, x in arrays.items() if k.startswith(_TRUE)},
                resolution=self._evaluator.resolution,
                options=options,
                first=items[0],
                **self._evaluator.texts(arrays),
            )
            latents, *found = tracer.trace(params, batch, options, len(items))
            sums.append(found)  # still being computed
            for number in range(len(latents)):
                yield tracer.estimate(params, batch, latents, number, options)
            del latents
            for first in self.starts:
                yield tracer.finish(params, batch, first, options)

        steps = len(self.timesteps)
        count = steps + 1 + len(self.starts)
        found, baseline = self._evaluator.measure(predict, count, title=f"seed {seed}")
        drift, error, seen, of_all = (
            sum(np.asarray(value, np.float64) for value in values)
            for values in zip(*sums, strict=True)
        )
        return Course(
            trajectory=_columns(found[:steps]),
            finished=_columns(found[steps + 1 :]),
            ceiling=_finite(found[steps]),
            baseline=_finite(baseline),
            drift=np.sqrt(drift / seen).tolist() if seen else [],
            x0_error=np.sqrt(error / seen).tolist() if seen else [],
            covered=float(seen / of_all),
        )

    def kept_run(self, seed: int, folder: Path) -> Course:
        """As `run`, but `folder/SEED.json` of the same model and protocol is taken as it is.

        Where there are several processes they share the folder.
        """
        path, request = folder / f"{seed}.json", {**self._request, "seed": seed}
        report = kept_report(path, request)
        if report is not None:
            return Course(**{f.name: report[f.name] for f in dataclasses.fields(Course)})
        course = self.run(seed)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_json(path, {**dataclasses.asdict(course), "request": request})
        return course

    def _truth(self, record: Record, resolution: int) -> dict[str, np.ndarray]:
        """A record's target as training sees it, at the size where the network works."""
        size = processing_size(record["rgb"].shape[:2], resolution)
        seen = prepare(record, np.random.default_rng(0), _UNCHANGED, size)
        return {f"{_TRUE}{name}": seen[name] for name in ("rgb", *self._perception.task.fields)}


# ---- over seeds ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Findings:
    """What all seeds say together.

    Attributes:
        quality: what higher is better of, "-" before an error.
        timesteps: of the steps, descending.
        starts: which of them the finished trajectories began at.
        trajectory, finished: their quality.
        drift, x0_error: of the steps; None where there is none.
        ceiling, trivial: the quality of the truth, encoded and decoded, and of the trivial
            prediction.
        gains: of each bin, low to high timesteps, fitted seed by seed.
        table: weights of the bins, from the mean gains.
    """

    quality: str
    timesteps: Float[np.ndarray, " n"]
    starts: Int[np.ndarray, " m"]
    trajectory: Band
    finished: Band | None
    drift: Band | None
    x0_error: Band | None
    ceiling: float
    trivial: float
    gains: Band
    table: Table


def find(analysis: Analysis, courses: Sequence[Course], metric: str, floor: float) -> Findings:
    """Curves with bands over seeds, and the contribution factors.

    Args:
        courses: of the seeds.
        metric: one of `analysis.metrics`.
        floor: see `factors.make_table`.

    Raises:
        UserError: the metric is not finite throughout, or the floor does not fit.
    """
    sign = analysis.sign(metric)
    for course in courses:
        parts = course.trajectory, course.ceiling, course.baseline, course.finished
        if any(metric not in part for part in (parts if analysis.starts else parts[:3])):
            raise UserError(f"{metric} is not finite on this dataset: choose another --metric.")

    def quality(values: Sequence[Sequence[float]]) -> Float[np.ndarray, "s n"]:
        return sign * np.asarray(values, np.float64)

    def spread(name: str) -> Band | None:
        values = [getattr(course, name) for course in courses]
        return band(np.asarray(values, np.float64)) if all(map(len, values)) else None

    curves = quality([course.trajectory[metric] for course in courses])
    trivial = sign * courses[0].baseline[metric]
    gains = band(np.stack([fit_gains(curve, trivial, analysis.spent) for curve in curves]))
    begun = [course.finished[metric] for course in courses] if analysis.starts else None
    return Findings(
        quality=metric if sign > 0 else f"-{metric}",
        timesteps=analysis.timesteps,
        starts=np.asarray(analysis.starts, np.int64),
        trajectory=band(curves),
        finished=band(quality(begun)) if begun else None,
        drift=spread("drift"),
        x0_error=spread("x0_error"),
        ceiling=sign * courses[0].ceiling[metric],
        trivial=trivial,
        gains=gains,
        table=make_table(gains, floor),
    )


def _columns(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """By metric; of those that are finite everywhere."""
    finite = [_finite(metrics) for metrics in found]
    names = [name for name in (finite[0] if finite else ()) if all(name in x for x in finite)]
    return {name: [metrics[name] for metrics in finite] for name in names}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: x for k, x in metrics.items() if not is_detail(k) and np.isfinite(x)}
