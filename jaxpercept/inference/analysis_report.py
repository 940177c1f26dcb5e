"""An analysis as text and as files."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.diffusion.timesteps import PRESETS, TimestepPolicy
from jaxpercept.errors import UserError
from jaxpercept.inference import plots
from jaxpercept.inference.analysis import Course, Findings
from jaxpercept.inference.factors import Band
from jaxpercept.inference.outputs import atomic, save_json

ANALYSIS, TABLE, CURVES = "analysis.json", "table.json", "curves.csv"


def summary(findings: Findings, total: int) -> str:
    """The bins with their gains and weights, from high timesteps to low ones, in lines.

    Args:
        findings: what was found.
        total: training timesteps.
    """
    gains, table = findings.gains, findings.table
    bins = len(table.weights)
    edges = np.arange(bins + 1) * total // bins
    first, last = findings.trajectory.mean[[0, -1]]
    lines = [
        f"{findings.quality}: {findings.trivial:.4f} trivial, {first:.4f} after the first step, "
        f"{last:.4f} after the last, {findings.ceiling:.4f} of the truth, encoded and decoded",
        f"{'timesteps':>12}{'gain':>10}{'weight':>10}",
    ]
    for k in range(bins)[::-1]:
        times = f"{edges[k + 1] - 1}-{edges[k]}"
        line = f"{times:>12}{gains.mean[k]:>10.4f}{table.weights[k]:>10.2f}"
        if np.isfinite(table.low[k]):
            line += f"  ({table.low[k]:.2f} to {table.high[k]:.2f})"
        lines.append(line)
    if not (gains.mean > 0).any():
        lines.append("No bin gains anything: the weights are equal. Train the model longer.")
    return "\n".join(lines)


def references(schedule: NoiseSchedule, steps: int) -> dict[str, Float[np.ndarray, " t"]]:
    """Distributions to compare with: ADDP's tables, and the closed form where it exists."""
    found = {}
    for name in (*PRESETS, f"ddim:{steps}", f"ddim_noise:{steps}"):
        try:
            found[name] = TimestepPolicy.parse(name).distribution(schedule)
        except UserError as error:
            logging.info("%s is left out: %s", name, error)
    return found


def write_analysis(
    folder: Path,
    findings: Findings,
    courses: Mapping[int, Course],
    *,
    schedule: NoiseSchedule,
    alphas: Float[np.ndarray, " n"],
    facts: Mapping[str, Any],
    protocol: Mapping[str, Any],
) -> list[Path]:
    """Write table.json, analysis.json, curves.csv and, with matplotlib, the pictures.

    `table.json` is what training reads by `config.method.timesteps=file:PATH`.

    Args:
        folder: created if missing.
        findings: of all seeds.
        courses: of each seed.
        schedule: of the training.
        alphas: ᾱ of the steps.
        facts: what was analyzed: "checkpoint", "dataset", "steps", "images", ...
        protocol: and how.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / TABLE, folder / ANALYSIS, folder / CURVES]
    common = {**facts, "metric": findings.quality, "seeds": list(courses)}
    gain = findings.gains.to_json()
    gain = {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    save_json(paths[0], {**findings.table.to_json(), **gain, **common})
    numbers = {
        "timesteps": findings.timesteps.tolist(),
        "alphas_cumprod": alphas.tolist(),
        "starts": findings.starts.tolist(),
        "ceiling": findings.ceiling,
        "trivial": findings.trivial,
        **{name: curve.to_json() for name, curve in _curves(findings).items()},
        "table": {**findings.table.to_json(), **gain},
        "courses": {str(seed): dataclasses.asdict(course) for seed, course in courses.items()},
    }
    save_json(paths[1], {**common, "protocol": protocol, **numbers})
    with atomic(paths[2]) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(_rows(findings, alphas))
    title = f"{facts['dataset']}, {facts['images']} images, {facts['steps']} steps"
    drawn = plots.draw(folder, findings, title, references(schedule, facts["steps"]))
    if not drawn:
        logging.info("No pictures without matplotlib: pip install 'jaxpercept[plots]'.")
    return [*paths, *drawn]


def _curves(findings: Findings) -> dict[str, Band]:
    names = ("trajectory", "finished", "drift", "x0_error")
    curves = {name: getattr(findings, name) for name in names}
    return {name: curve for name, curve in curves.items() if curve is not None}


def _rows(findings: Findings, alphas: Float[np.ndarray, " n"]) -> list[list[Any]]:
    """A line for each step under a line of titles; empty where there is nothing."""
    curves = _curves(findings)
    titles = ["step", "timestep", "alpha_cumprod"]
    titles += [f"{name}_{part}" for name in curves for part in Band._fields]
    rows = [
        [i, t, alpha] for i, (t, alpha) in enumerate(zip(findings.timesteps, alphas, strict=True))
    ]
    for name, curve in curves.items():
        steps = findings.starts if name == "finished" else range(len(rows))
        for part in curve.to_json().values():
            values = dict(zip(steps, part, strict=True))
            for i, row in enumerate(rows):
                row.append(values.get(i))
    return [titles, *rows]
