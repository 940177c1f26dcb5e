"""Train the presets of a config file with several seeds, and make one table of them.

    python -m jaxpercept.ablate --seeds=0,1
    python -m jaxpercept.ablate --presets=baseline,dpt,lora_16 --seeds=0,1,2 --set=steps=200
    python -m jaxpercept.ablate --config=configs/ablation.py --workdir=runs/ablation --list

Each run lies in WORKDIR/PRESET/SEED, as one of `jaxpercept.train`. The same command again goes on
where it was stopped: finished runs are not trained again, and the table, WORKDIR/ablation.md and
ablation.csv, is written anew after each run. More steps (--set=steps=800) train every run on;
another config needs another --workdir. Models that start from noise are also evaluated in
ensembles (--ensembles), which takes as many times as long as their sizes say; those that look for
what a text names, with corrections instead (--corrections). All runs must be evaluated on the same
dataset.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxpercept import cli
from jaxpercept import presets as config_files
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluation import open_model, run_evaluation
from jaxpercept.inference.observers import evaluation_observer, evaluation_options
from jaxpercept.inference.report import METRICS as REPORT
from jaxpercept.tasks import reads_text
from jaxpercept.training.checkpointing import refuse_other_run
from jaxpercept.training.loop import Interrupted, train
from jaxpercept.training.setup import plain

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "config", "configs/ablation.py", "A config file with a dict PRESETS.", flag_values=FLAGS
)
flags.DEFINE_list(
    "presets", None, "Names that its get_config takes; default: all of PRESETS.", flag_values=FLAGS
)
flags.DEFINE_list("seeds", ["0", "1"], "One run each.", flag_values=FLAGS)
flags.DEFINE_list("set", [], "KEY=VALUE of the config, for all runs.", flag_values=FLAGS)
flags.DEFINE_list(
    "ensembles", ["2", "8"], "Sizes, for models that start from noise.", flag_values=FLAGS
)
flags.DEFINE_list(
    "corrections",
    ["1", "2", "3"],
    "Of models that look for what a text names: so many other things called unwanted.",
    flag_values=FLAGS,
)
flags.DEFINE_string("workdir", "runs/ablation", "Where the runs lie.", flag_values=FLAGS)
flags.DEFINE_boolean("list", False, "Print the presets and leave.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ()

METRICS = ("abs_rel", "delta1")
"""The columns, unless the config file has others."""


class Result(NamedTuple):
    """A preset with one seed: its metrics, those of the best constant, and the steps trained."""

    metrics: dict[str, float]
    constant: dict[str, float]
    steps: int


def ablate(
    config: str,
    presets: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1),
    workdir: str | Path = "runs/ablation",
    changes: Mapping[str, Any] | None = None,
    ensembles: Sequence[int] = (2, 8),
    corrections: Sequence[int] = (1, 2, 3),
) -> dict[str, list[Result]]:
    """Run what is not there yet, and write the table after each run.

    Args:
        config: path of the config file.
        presets: names that its get_config takes; None for all of its PRESETS.
        seeds, workdir, ensembles, corrections: the flags of these names.
        changes: values of the config by dotted key, for all runs.

    Returns:
        The results of each row of the table, one for each seed.

    Raises:
        UserError: a preset, a seed or a key does not fit, or as `training.loop.train`.
        Interrupted: SIGTERM came; run the same again to go on.
    """
    module, changes = _module(config), changes or {}
    names = list(presets or module.PRESETS)
    folder = Path(workdir)
    configs = {
        (name, seed): _config(module, name, seed, changes) for name in names for seed in seeds
    }
    datasets = sorted({values.evaluation.dataset for values in configs.values()})
    if len(datasets) > 1:
        raise UserError(
            f"The presets are evaluated on {' and '.join(datasets)}: make a table for each, in "
            "another --workdir."
        )
    rows: dict[str, list[Result]] = {}
    for (name, seed), values in configs.items():
        run = folder / name / str(seed)
        for title, result in _results(run, values, _variants(values, ensembles, corrections)):
            rows.setdefault(name + title, []).append(result)
        write_table(folder, rows, getattr(module, "PAPER", {}), getattr(module, "METRICS", METRICS))
        jax.clear_caches()  # the next run shares no program with this one
    return rows


def write_table(
    folder: Path,
    rows: Mapping[str, Sequence[Result]],
    paper: Mapping[str, str],
    metrics: Sequence[str] = METRICS,
) -> None:
    """`ablation.md` and `ablation.csv`: means and standard deviations over the seeds."""
    columns = ["preset", "seeds", "steps", *metrics, "paper"]
    lines = [columns, ["---"] * len(columns)]
    records = []
    for name, results in rows.items():
        shown, record = [], {"preset": name, "seeds": len(results), "steps": results[0].steps}
        for metric in metrics:
            average, spread = _spread([result.metrics[metric] for result in results])
            record |= {metric: average, f"{metric}_std": spread}
            shown.append(f"{average:.4f}" + (f" ± {spread:.4f}" if len(results) > 1 else ""))
        lines.append([name, str(len(results)), str(results[0].steps), *shown, paper.get(name, "")])
        records.append(record)
    first = next(iter(rows.values()))[0]
    constant = [f"{first.constant[metric]:.4f}" for metric in metrics]
    lines.append(["best constant", "", "", *constant, ""])
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "ablation.md").write_text(text + "\n")
    with (folder / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _module(path: str) -> Any:
    """The config file as a module."""
    module = config_files.load(path)
    if not hasattr(module, "PRESETS"):
        raise UserError(f"{path} has no dict PRESETS: give a file such as configs/ablation.py.")
    return module


def _config(module: Any, name: str, seed: int, changes: Mapping[str, Any]) -> ConfigDict:
    try:
        config = module.get_config(name)
    except ValueError as error:
        raise UserError(f"There is no config of the preset {name!r}: {error}.") from error
    try:
        config.update_from_flattened_dict({**changes, "seed": seed})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--set does not fit the config of {name} ({error}).") from error
    if not config.evaluation.dataset:
        raise UserError(f"The preset {name!r} is not evaluated: name config.evaluation.dataset.")
    return config


def _variants(
    config: ConfigDict, ensembles: Sequence[int], corrections: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Further ways to evaluate a run: title -> options."""
    if reads_text(config.task):
        return {f", {n} corrected": {"corrections": n} for n in corrections}
    if config.method.get("noise", "image") == "image":
        return {}
    return {f", ensemble of {size}": {"ensemble_size": size} for size in ensembles}


def _results(
    run: Path, config: ConfigDict, variants: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, Result]]:
    """Of one run, trained and evaluated now where it has not been, and of its variants by title."""
    now = plain(config)
    wanted = evaluation_options(now)
    dataset, step = wanted["dataset"], latest_step(run) or 0
    before = Description.load(run) if step else None
    if step > config.steps:
        raise UserError(
            f"{run} is trained for {step} steps already: give steps={step} or more, or another "
            "--workdir."
        )

    def current(report: Path) -> bool:
        """Whether it is of this many steps, and of what is wanted."""
        if before is None or not report.is_file():
            return False
        content = json.loads(report.read_text())
        return content["step"] == config.steps and content.get("evaluation") == wanted

    report = run / "evaluation" / dataset / REPORT
    if step == config.steps and current(report):
        refuse_other_run(run, dataclasses.replace(before, config=now))
    else:
        train(config, run, observer=functools.partial(evaluation_observer, workdir=run))
    yield "", _read(report)
    for title, options in variants.items():
        [(name, count)] = options.items()
        output = run / "evaluation" / f"{dataset}-{name.removesuffix('_size')}{count}"
        if not current(output / REPORT):
            opening = {"pad_multiple": wanted["pad_multiple"]}
            asked = {key: x for key, x in wanted.items() if key not in opening}
            (asked if name == "corrections" else opening)[name] = count
            model = open_model(str(run), **opening)
            run_evaluation(model, output, facts={"evaluation": wanted}, **asked)
        yield title, _read(output / REPORT)


def _read(report: Path) -> Result:
    content = json.loads(report.read_text())
    return Result(content["metrics"], content["best_constant"], content["step"])


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def main() -> int:
    """Read the flags and run; 143, as for a process that SIGTERM ended, where it came."""
    if FLAGS.list:
        module = _module(FLAGS.config)
        paper = getattr(module, "PAPER", {})
        print("\n".join(f"{name:20}{paper.get(name, '')}".rstrip() for name in module.PRESETS))
        try:  # what else its get_config takes
            module.get_config("?")
        except ValueError as error:
            print(error)
        return 0
    cli.initialize_distributed()
    try:
        ablate(
            FLAGS.config,
            FLAGS.presets,
            seeds=cli.integers("seeds", FLAGS.seeds),
            workdir=FLAGS.workdir,
            changes=cli.key_values("set", FLAGS.set),
            ensembles=cli.integers("ensembles", FLAGS.ensembles),
            corrections=cli.integers("corrections", FLAGS.corrections),
        )
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 143
    print((Path(FLAGS.workdir) / "ablation.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
