"""The papers' tables: a model on every dataset of a suite that is there."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.layouts import NoLayoutError
from jaxpercept.data.row import Dataset
from jaxpercept.errors import UserError
from jaxpercept.inference.evaluator import EvalResult
from jaxpercept.inference.measures import check_dataset, measure_of
from jaxpercept.inference.outputs import atomic, save_png
from jaxpercept.inference.published import PUBLISHED, REPORTED
from jaxpercept.inference.report import METRICS, PICTURE, kept_report, read_report, rows_of
from jaxpercept.tasks import Task

TABLE, LINES, GRID = "suite.md", "suite.csv", "suite.png"
_WIDTH = 960


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset of a suite.

    Attributes:
        dataset: a key of `data.datasets.DATASETS`.
        split: what is evaluated of it.
        folders: below the root of all datasets; the first that is there is taken.
        resolution: long side in pixels the network works at, 0 for the images' own, None for the
            model's.
        name: of the folder of results.
    """

    dataset: str
    split: str
    folders: tuple[str, ...]
    resolution: int | None
    name: str

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.dataset} ({self.split})"

    @property
    def row(self) -> Dataset:
        """Of the table of datasets."""
        return DATASETS[self.dataset]


def _entry(
    dataset: str, *splits: str, folders: Sequence[str] = (), resolution: int | None = None
) -> list[Entry]:
    return [
        Entry(
            dataset,
            split,
            tuple(folders) or (dataset,),
            resolution,
            dataset if len(splits) == 1 else f"{dataset}_{split}",
        )
        for split in splits
    ]


def _native(dataset: str, split: str, *, depth: bool = False) -> list[Entry]:
    resolution = (DATASETS[dataset].eval_resolution or 0) if depth else 0
    return _entry(dataset, split, resolution=resolution)


SUITES: dict[str, list[Entry]] = {
    # Marigold, GenPercept, E2E-FT and Lotus, in GenPercept's order.
    "depth": [
        *_native("kitti_eigen", "test", depth=True),
        *_native("nyuv2", "test", depth=True),
        *_native("scannet", "test", depth=True),
        *_native("diode", "test", depth=True),
        *_native("eth3d", "test", depth=True),
    ],
    # DSINE, E2E-FT and Lotus; DIODE is Marigold's.
    "normals": [
        *_native("nyuv2", "test"),
        *_native("scannet", "test"),
        *_native("ibims1", "test"),
        *_native("sintel", "all"),
        *_native("diode", "test"),
    ],
    "dis": [
        *_entry("dis5k", "val", "te1", "te2", "te3", "te4"),
        *_entry("masks", "all", folders=("masks", "sod")),
    ],
    "matting": [
        *_entry("p3m10k", "p", "np"),
        *_entry("aim500", "test"),
        *_entry("alphamatting", "all"),
    ],
    "seg": [
        *_entry("nyuv2", "test"),
        *_entry("nyuv2_13", "test", folders=("nyuv2_13", "nyuv2")),
        *_entry("camvid", "test"),
        *_entry("cityscapes", "val"),
        *_entry("ade20k", "val"),
        *_entry("vkitti", "val"),
    ],
}
"""What each suite has, in the order of its table."""

_REMARKS = {
    "seg": " GenPercept's is of a model of Hypersim's classes, mapped to those of ADE20K in a way "
    "that was not published: no row here can reproduce it.",
}
"""What else is to be said of the published figures."""

_KINDS = {
    "depth": ("affine_depth", "affine_disparity"),
    "normals": ("normals",),
    "dis": ("mask",),
    "matting": ("alpha",),
    "seg": ("classes",),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """What became of an entry.

    Attributes:
        entry: the entry.
        status: "evaluated", "kept" (from an earlier run), "absent", "unfit" (the model predicts
            something else) or "failed".
        note: why there is no result.
        report: what its metrics.json says.
    """

    entry: Entry
    status: str
    note: str = ""
    report: Mapping[str, Any] | None = None


Evaluate = Callable[[Entry, Path, float, Mapping[str, Any]], EvalResult]


def run_suite(
    suite: str,
    task: Task,
    *,
    data_root: Path,
    folder: Path,
    request: Mapping[str, Any],
    evaluate: Evaluate,
    trained: Mapping[str, Any] | None = None,
) -> list[Line]:
    """Evaluate what is there and not yet evaluated; the table is written after each dataset.

    Args:
        suite: a key of `SUITES`.
        task: the model's.
        data_root: has a folder for each dataset, of its name.
        folder: gets ENTRY/metrics.json and the like, suite.md, suite.csv and suite.png.
        request: what results depend on beside the dataset; plain JSON.
        evaluate: `(entry, folder of the dataset, held_out, facts)` evaluates the images that were
            held out, and writes the report, with these facts, to `folder / entry.name`.
        trained: the config of the model's training, if it is known.

    Raises:
        UserError: the suite is unknown or of other models, or there is no such root.
    """
    if suite not in SUITES:
        raise UserError(f"the suite {suite!r} is unknown: use {', '.join(SUITES)}.")
    if task.kind not in _KINDS[suite]:
        raise UserError(
            f"the suite {suite!r} is for models of {' or '.join(_KINDS[suite])}, and this one "
            f"predicts {task.kind}."
        )
    if not data_root.is_dir():
        raise UserError(f"--data_root {data_root} is no folder: give that of the datasets.")
    lines: list[Line] = []
    for entry in SUITES[suite]:
        lines.append(_run_entry(entry, task, data_root, folder, request, evaluate, trained or {}))
        if jax.process_index() == 0:
            write_suite(folder, suite, lines, SUITES[suite][len(lines) :])
    return lines


def _run_entry(
    entry: Entry,
    task: Task,
    data_root: Path,
    folder: Path,
    request: Mapping[str, Any],
    evaluate: Evaluate,
    trained: Mapping[str, Any],
) -> Line:
    places = [data_root / name for name in entry.folders]
    found = [place for place in places if place.is_dir()]
    if not found:
        looked = " or ".join(map(str, places))
        return Line(entry, "absent", f"no {looked}; expected there: {entry.row.layout}.")
    measure = measure_of(task)
    try:
        check_dataset(measure, task, entry.dataset, entry.row)
    except UserError as error:
        return Line(entry, "unfit", str(error))
    held_out = _held_out(trained, entry, measure.target)
    try:
        records = open_dataset(
            entry.dataset,
            split=entry.split,
            data_dir=found[0],
            targets=(measure.target,),
            evaluation=held_out > 0,  # else only the evaluator may complain about the number
            held_out=held_out,
        )
        wanted = {**request, "data_dir": str(found[0].resolve()), "examples": len(records)}
        wanted |= {"held_out": held_out} if held_out else {}
        report = kept_report(folder / entry.name / METRICS, wanted)
        if report is not None:
            return Line(entry, "kept", report=report)
        evaluate(entry, found[0], held_out, {"request": wanted})
    except NoLayoutError as error:
        return Line(entry, "absent", str(error))
    except UserError as error:
        return Line(entry, "failed", str(error))
    return Line(entry, "evaluated", report=read_report(folder / entry.name / METRICS))


def _held_out(trained: Mapping[str, Any], entry: Entry, target: str) -> float:
    """The share of an entry's images that the training kept apart; 0 if it knew none of them."""
    data = trained.get("data", {})
    options = data.get("options", {}).get(entry.dataset, {})
    if not data.get("mixture", {}).get(entry.dataset):
        return 0.0
    split = options.get("split") or entry.row.splits_with((target,))[0]
    return (options.get("held_out") or 0.0) if split == entry.split else 0.0


# ---- files ---------------------------------------------------------------------------------------


def write_suite(folder: Path, suite: str, lines: Sequence[Line], rest: Sequence[Entry]) -> None:
    """Write suite.md, suite.csv and suite.png of what is known so far.

    Args:
        rest: entries whose turn has not come.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / TABLE) as path:
        path.write_text(markdown(suite, lines, rest))
    _write_csv(folder / LINES, lines)
    panels = {line.entry.title: folder / line.entry.name / PICTURE for line in lines if line.report}
    panels = {title: path for title, path in panels.items() if path.is_file()}
    if panels:
        save_png(folder / GRID, _grid(panels))
    else:
        (folder / GRID).unlink(missing_ok=True)


def markdown(suite: str, lines: Sequence[Line], rest: Sequence[Entry] = ()) -> str:
    """The table, and under it what is not in it and why."""
    done = [line for line in lines if line.report]
    text = [f"# {suite}", ""]
    if done:
        request = done[0].report.get("request", {})
        named = ", ".join(f"{k} {request[k]}" for k in ("checkpoint", "step") if request.get(k))
        text += [f"{named}. {done[0].report['protocol']['average'].capitalize()}.", ""]
        every = [_figures(line) for line in done]
        titles = list(dict.fromkeys(title for figures in every for title in figures[0]))
        text.append("| " + " | ".join(["dataset", "images", "processed at", "", *titles]) + " |")
        text.append("|---" * (4 + len(titles)) + "|")
        for line, (own, body) in zip(done, every, strict=True):
            facts = line.report["protocol"]
            resolution = facts["processing_resolution"] or "native"
            held_out = ", held out" if line.report.get("request", {}).get("held_out") else ""
            lead = [line.entry.title + held_out, str(facts["images"]), str(resolution)]
            for label, values in body:
                shown = dict(zip(own, values, strict=True))
                cells = [*lead, label, *(shown.get(title, "") for title in titles)]
                text.append("| " + " | ".join(cells) + " |")
                lead = ["", "", ""]
        text.append("")
    for status, heading in (
        ("absent", "Absent"),
        ("unfit", "Not for this model"),
        ("failed", "Failed"),
    ):
        if found := [line for line in lines if line.status == status]:
            text += [f"{heading}:", ""]
            text += [f"- {line.entry.title}: {' '.join(line.note.split())}" for line in found]
            text.append("")
    if done:
        text += _published(suite)
    if rest:
        text += ["Still to come: " + ", ".join(entry.title for entry in rest) + ".", ""]
    return "\n".join(text)


def _published(suite: str) -> list[str]:
    """A table of the papers' figures, one column a dataset."""
    models, names = PUBLISHED[suite], REPORTED[suite]
    entries = [e for e in SUITES[suite] if any(e.name in model.figures for model in models)]
    said = f"Published, {' / '.join(names)}, for orientation: protocols differ in details."
    text = [said + _REMARKS.get(suite, ""), ""]
    text.append("| " + " | ".join(["", *(entry.title for entry in entries), "source"]) + " |")
    text.append("|---" * (2 + len(entries)) + "|")
    for model in models:
        cells = []
        for entry in entries:
            known = [x for x in model.figures.get(entry.name, ()) if x is not None]
            cells.append(" / ".join(f"{value:.4g}" for value in known))
        text.append("| " + " | ".join([model.model, *cells, model.source]) + " |")
    return [*text, ""]


def _figures(line: Line) -> tuple[list[str], list[tuple[str, list[str]]]]:
    report = line.report
    return rows_of(report["protocol"], report["metrics"], report["best_constant"])


def _write_csv(path: Path, lines: Sequence[Line]) -> None:
    rows = []
    for line in lines:
        row = {"dataset": line.entry.dataset, "split": line.entry.split, "status": line.status}
        row["note"] = " ".join(line.note.split())
        if line.report:
            row["images"] = line.report["protocol"]["images"]
            row |= line.report["metrics"]
            row |= {f"constant_{k}": x for k, x in line.report["best_constant"].items()}
        rows.append(row)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=titles)
        writer.writeheader()
        writer.writerows(rows)


def _grid(panels: Mapping[str, Path]) -> UInt8[np.ndarray, "h w 3"]:
    """The datasets' panels, at one width, each under its name."""
    parts = []
    for title, path in panels.items():
        bar = Image.new("RGB", (_WIDTH, 28), "white")
        draw = ImageDraw.Draw(bar)
        font = ImageFont.load_default(size=18)
        draw.text((4, 14), title, fill=(0, 0, 0), font=font, anchor="lm")
        with Image.open(path) as image:
            height = max(round(image.height * _WIDTH / image.width), 1)
            shown = image.convert("RGB").resize((_WIDTH, height), Image.Resampling.BICUBIC)
        parts += [np.asarray(bar), np.asarray(shown)]
    return np.concatenate(parts)
