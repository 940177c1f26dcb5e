"""An evaluation as a table on the screen and as files."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpercept.inference.evaluator import EvalResult
from jaxpercept.inference.outputs import atomic, save_json, save_png
from jaxpercept.inference.panel import panel

_COLUMNS = {
    "AbsRel": "abs_rel",
    "SqRel": "sq_rel",
    "RMSE": "rmse",
    "RMSElog": "rmse_log",
    "log10": "log10",
    "delta1": "delta1",
    "delta2": "delta2",
    "delta3": "delta3",
    "SILog": "silog",
    "iRMSE": "i_rmse",
}


def table(result: EvalResult) -> str:
    """The means, and under them those of the best constant depth of each image."""
    facts = result.protocol
    cap = "no upper cap" if facts["max_depth"] is None else f"up to {facts['max_depth']:g} m"
    lines = [
        f"{facts['dataset']} ({facts['split']}): {facts['images']} images, {facts['alignment']} "
        f"alignment, {cap}, evaluation crop {facts['evaluation_crop'] or 'none'}, processed at "
        f"{facts['processing_resolution'] or 'native resolution'}",
        f"{'':<14}" + "".join(f"{title:>9}" for title in _COLUMNS),
    ]
    for title, means in (("prediction", result.means), ("best constant", result.baseline)):
        lines.append(f"{title:<14}" + "".join(f"{means[key]:9.4f}" for key in _COLUMNS.values()))
    return "\n".join(lines)


def write_report(folder: Path, result: EvalResult, facts: Mapping[str, Any]) -> list[Path]:
    """Write `metrics.json`, `per_image.csv` and, if there are pictures, `predictions.png`.

    Args:
        folder: created if missing.
        result: what to write.
        facts: what the evaluator cannot know: the checkpoint, the command, ...

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "metrics.json", folder / "per_image.csv"]
    save_json(
        paths[0],
        {
            "metrics": result.means,
            "best_constant": result.baseline,
            "protocol": result.protocol,
            **facts,
        },
    )
    with atomic(paths[1]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    if result.pictures:
        paths.append(folder / "predictions.png")
        save_png(paths[2], panel(result.pictures))
    return paths
