"""An evaluation as a table on the screen and as files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from jaxpercept.inference.evaluator import EvalResult
from jaxpercept.inference.measures import MEASURES, entry, is_detail
from jaxpercept.inference.outputs import atomic, save_json, save_png
from jaxpercept.inference.panel import panel

METRICS, ROWS, PICTURE = "metrics.json", "per_image.csv", "predictions.png"

Scores = Mapping[str, float | None]


def table(result: EvalResult) -> str:
    """The metrics, and under them those of the trivial prediction; one pair for each protocol."""
    facts = result.protocol
    lines = [describe(facts)]
    titles, body = rows_of(facts, result.means, result.baseline)
    width = max(14, *(len(label) + 2 for label, _ in body))
    lines.append(" " * width + "".join(f"{title:>10}" for title in titles))
    lines += [label.ljust(width) + "".join(f"{v:>10}" for v in values) for label, values in body]
    if details := {k: x for k, x in result.means.items() if is_detail(k) and math.isfinite(x)}:
        lines.append(", ".join(f"{name} {value:.3g}" for name, value in details.items()))
    return "\n".join(lines)


def describe(facts: Mapping[str, Any]) -> str:
    """What was evaluated, in one line."""
    said = [f"{facts['images']} images"]
    if "alignment" in facts:
        cap = "no upper cap" if facts["max_depth"] is None else f"up to {facts['max_depth']:g} m"
        said += [f"{facts['alignment']} alignment", cap]
        said.append(f"evaluation crop {facts['evaluation_crop'] or 'none'}")
    said.append(f"processed at {facts['processing_resolution'] or 'native resolution'}")
    return f"{facts['dataset']} ({facts['split']}): " + ", ".join(said)


def rows_of(
    facts: Mapping[str, Any], means: Scores, baseline: Scores
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A table's titles, and its lines: (label, figures), "" where there is none.

    Args:
        facts: the `protocol` of a result.
        means, baseline: as in a result.
    """
    # Earlier reports have the kind alone.
    columns = MEASURES[facts.get("measure", facts["kind"])].columns
    parts = facts["parts"]
    used = {
        title: name
        for title, name in columns.items()
        if any(entry(part, name) in means for part in parts)
    }
    lines = []
    for part in parts:
        suffix = f" ({part})" if part else ""
        for label, scores in (("prediction", means), (facts["baseline"], baseline)):
            figures = [_figure(scores.get(entry(part, name))) for name in used.values()]
            lines.append((label + suffix, figures))
    return list(used), lines


def _figure(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def drawn(result: EvalResult) -> UInt8[np.ndarray, "h w 3"]:
    """The panel of input, truth and prediction of a result with pictures."""
    return panel([picture.pictures() for picture in result.pictures])


def write_report(folder: Path, result: EvalResult, facts: Mapping[str, Any]) -> list[Path]:
    """Write `metrics.json`, `per_image.csv` and, if there are pictures, `predictions.png`.

    In `metrics.json`, "metrics" and "best_constant" (of the trivial prediction) hold the dataset's
    metrics, "details" those of single classes and joints, null for one that does not occur.

    Args:
        folder: created if missing.
        result: what to write.
        facts: what the evaluator cannot know: the checkpoint, the command, ...

    Returns:
        The paths written, `metrics.json` last to be written and first named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / METRICS, folder / ROWS]
    with atomic(paths[1]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    if result.pictures:
        paths.append(folder / PICTURE)
        save_png(paths[2], drawn(result))
    details = {k: _plain(x) for k, x in result.means.items() if is_detail(k)}
    content = {
        "metrics": {k: _plain(x) for k, x in result.means.items() if not is_detail(k)},
        "best_constant": {k: _plain(x) for k, x in result.baseline.items() if not is_detail(k)},
        **({"details": details} if details else {}),
        "protocol": result.protocol,
        **facts,
    }
    save_json(paths[0], content)
    return paths


def kept_report(path: Path, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The report of an earlier run of the same request; all processes go by the first one's."""
    report = read_report(path)
    same = report is not None and report.get("request") == json.loads(json.dumps(request))
    if jax.process_count() > 1:
        same = bool(multihost_utils.broadcast_one_to_all(np.int32(same)))
    return (report or {}) if same else None


def read_report(path: Path) -> Mapping[str, Any] | None:
    """What an earlier run wrote, None where there is nothing whole."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
