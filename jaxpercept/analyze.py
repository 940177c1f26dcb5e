"""Measure how much each timestep contributes to the predictions of a model that denoises.

    python -m jaxpercept.analyze --checkpoint=runs/marigold --dataset=scenes
    python -m jaxpercept.analyze --checkpoint=runs/marigold --dataset=nyuv2 --data_dir=DIR
    python -m jaxpercept.analyze --checkpoint=runs/marigold --dataset=scenes --metric=abs_rel

Every step's estimate of the result is decoded and scored by the dataset's protocol, along the
trajectories of --seeds, from noise to a prediction in --steps; and trajectories that begin from the
truth, noised, at --starts of these steps are finished and scored. The gains along the way become
weights of --bins equal bins of the schedule. Models that predict in one step are refused.

--output gets table.json, which training reads by --config.method.timesteps=file:PATH;
analysis.json and curves.csv with all curves and their bands over the seeds; with the extra plots
quality.png, weights.png and drift.png; and seeds/SEED.json. The same command again, also with
another --metric, --bins or --floor, takes the seeds that are there already.

ADDP (arXiv 2504.11457) has such a curve and such tables; how it made them is not published, and
what is here is an estimator of our own (docs/analysis.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxpercept import cli
from jaxpercept.errors import UserError
from jaxpercept.evaluate import dataset_overrides, default_output
from jaxpercept.inference.analysis import PREFERRED, Analysis, Findings, check_denoises, find
from jaxpercept.inference.analysis_report import summary, write_analysis
from jaxpercept.inference.evaluation import Model, open_model
from jaxpercept.inference.factors import check_floor
from jaxpercept.inference.opening import DTYPES
from jaxpercept.inference.options import check_options

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to analyze.", flag_values=FLAGS)
flags.DEFINE_string("dataset", None, "Name of the dataset.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of the dataset.", flag_values=FLAGS)
flags.DEFINE_string(
    "output",
    None,
    "Folder to write to; default: analysis/DATASET, in the checkpoint's folder if it is local.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("steps", 50, "Of a trajectory.", flag_values=FLAGS)
flags.DEFINE_integer("images", 64, "How many, spread evenly; 0: all.", flag_values=FLAGS)
flags.DEFINE_list(
    "seeds",
    None,
    "Of the noise, one trajectory each; default: 0,1,2, or 0 where there is no noise.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("bins", 10, "Equal parts of the schedule.", flag_values=FLAGS)
flags.DEFINE_float("floor", 0.01, "Least weight, as a share of their sum.", flag_values=FLAGS)
flags.DEFINE_integer(
    "starts",
    10,
    "Steps at which trajectories are also begun from the truth, each half the work of a whole one; "
    "0: none.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "metric",
    None,
    "What gains are of; errors count negatively; default: the first that there is of "
    f"{', '.join(PREFERRED)}.",
    flag_values=FLAGS,
)
flags.DEFINE_string("split", None, "Default: the dataset's test split.", flag_values=FLAGS)
flags.DEFINE_float("held_out", None, "As for evaluate.", flag_values=FLAGS)
flags.DEFINE_float("depth_scale", None, "As for evaluate.", flag_values=FLAGS)
flags.DEFINE_list("options", None, "As for evaluate.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "Images at a time.", flag_values=FLAGS)
flags.DEFINE_integer("processing_resolution", None, "As for evaluate.", flag_values=FLAGS)
cli.define_opening_flags(FLAGS)
cli.define_network_flags(FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint", "dataset")

SEEDS = (0, 1, 2)


def analyze(
    checkpoint: str,
    dataset: str,
    *,
    data_dir: str | Path | None = None,
    output: str | Path | None = None,
    steps: int = 50,
    images: int = 64,
    seeds: Sequence[int] | None = None,
    bins: int = 10,
    floor: float = 0.01,
    starts: int = 10,
    metric: str | None = None,
    split: str | None = None,
    held_out: float | None = None,
    depth_scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    processing_resolution: int | None = None,
    **opening: Any,
) -> Findings:
    """Analyze, print the table and write the files, as the module's text says.

    Args:
        checkpoint, dataset, ...: the flags of these names; those of the model as in `open_model`.
        options: of the dataset's row, by name.

    Raises:
        UserError: the checkpoint, the dataset or an option does not fit.
    """
    if images < 0:
        raise UserError(f"--images={images} does not fit: give 1 or more, or 0 for all.")
    overrides = dataset_overrides(options, held_out=held_out, depth_scale=depth_scale)
    model = open_model(checkpoint, identify=True, **opening)
    check_denoises(model)
    seeds = _checked_seeds(model, seeds)
    analysis = Analysis(
        model,
        dataset,
        steps=steps,
        starts=starts,
        bins=bins,
        data_dir=data_dir,
        overrides=overrides,
        split=split,
        batch_size=batch_size,
        processing_resolution=processing_resolution,
        limit=images,
    )
    check_floor(floor, bins)
    metric = _checked_metric(analysis, metric)
    folder = Path(output) if output else default_output(checkpoint, dataset, "analysis")
    courses = {seed: analysis.kept_run(seed, folder / "seeds") for seed in seeds}
    findings = find(analysis, list(courses.values()), metric, floor)
    if jax.process_index() == 0:
        schedule = model.perception.solver.schedule
        print(summary(findings, schedule.num_train_timesteps))
        facts = {name: analysis.protocol[name] for name in ("dataset", "split", "images")}
        facts |= {**model.facts, "steps": steps, "bins": bins, "floor": floor}
        for path in write_analysis(
            folder,
            findings,
            courses,
            schedule=schedule,
            alphas=analysis.alphas,
            facts=facts,
            protocol=analysis.protocol,
        ):
            print(path)
    return findings


def _checked_seeds(model: Model, seeds: Sequence[int] | None) -> list[int]:
    draws = model.perception.recipe.draws_noise
    seeds = list(seeds if seeds is not None else SEEDS if draws else SEEDS[:1])
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds {', '.join(map(str, seeds))} do not fit: give each one once.")
    if len(seeds) > 1 and not draws:
        raise UserError(
            "this model begins with no noise, so that all seeds are one: give --seeds=0."
        )
    for seed in seeds:
        check_options(model.perception, dataclasses.replace(model.options, seed=seed))
    return seeds


def _checked_metric(analysis: Analysis, metric: str | None) -> str:
    names = analysis.metrics
    if metric is None:
        metric = next((name for name in PREFERRED if name in names), names[0])
    if metric not in names:
        raise UserError(f"the metric {metric!r} is not measured here: use {', '.join(names)}.")
    return metric


def main() -> None:
    """Read the flags and analyze."""
    cli.initialize_distributed()
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    if values["seeds"] is not None:
        values["seeds"] = cli.integers("seeds", values["seeds"])
    values["options"] = cli.key_values("options", values["options"] or ())
    analyze(**values)


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
