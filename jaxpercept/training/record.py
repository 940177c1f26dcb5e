"""A run's folder that explains itself: what was run, with what, on which data."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpercept import environment
from jaxpercept.checkpoints.card import write_card
from jaxpercept.checkpoints.description import Description

FILE_NAME = "run.json"

_FILES = (
    ("jaxpercept.json", "the whole config, the architectures, the task and the method"),
    ("checkpoints/", "weights, optimizer and position in the data, by step"),
    ("frozen/", "the weights that are not trained"),
    ("metrics.jsonl", "one JSON object a logged step; the same in tensorboard/"),
    (FILE_NAME, "what a step costs, and every start: command, versions, revision, data"),
    ("pictures/", "panels of input, truth and prediction"),
    ("evaluation/", "metrics and scores of every image, by dataset"),
    ("profile/", "traces of steps, where config.profile asked for them"),
)


class Record:
    """The record of one run; the first process alone writes.

    Args:
        workdir: the run's folder.
        description: the model.
        step: the step this start goes on from.
        data: of each dataset, `Records.provenance()`.
    """

    def __init__(
        self,
        workdir: Path,
        description: Description,
        step: int,
        data: Sequence[Mapping[str, Any]],
    ):
        self._path, self._description = workdir / FILE_NAME, description
        now = datetime.datetime.now(datetime.UTC)
        start = {
            "step": step,
            "time": now.isoformat(timespec="seconds"),
            "command": _command(),
            "revision": environment.revision(),
            "versions": environment.versions(),
            "host": environment.host(),
            "processes": jax.process_count(),
            "data": list(data),
        }
        self._starts = [*_starts(self._path), start]

    def facts(self, values: Mapping[str, Any]) -> None:
        """Write what holds for the program that now runs, and all starts so far, in `run.json`."""
        if jax.process_index() == 0:
            content = json.dumps({**values, "starts": self._starts}, indent=2)
            partial = self._path.with_suffix(".partial")
            partial.write_text(content + "\n")
            partial.replace(self._path)

    def card(self) -> None:
        """Write `README.md`: what the model is, how to go on with it, what it scored so far."""
        if jax.process_index() != 0:
            return
        workdir = self._path.parent
        usage = (
            "from jaxpercept import PerceptionPipeline\n\n"
            f"out = PerceptionPipeline.from_pretrained({str(workdir)!r})(image)"
        )
        write_card(
            workdir, self._description, usage=usage, workdir=workdir, more=self._sections(workdir)
        )

    def _sections(self, workdir: Path) -> list[str]:
        there = [(name, what) for name, what in _FILES if (workdir / name).exists()]
        lines = ["", "## Starts", "", "The last command goes on with the run.", ""]
        lines += ["| step | time | revision | command |", "|---|---|---|---|"]
        for start in self._starts:
            revision = (start["revision"] or "unknown")[:12]
            command = start["command"].replace("|", "\\|")
            lines.append(f"| {start['step']} | {start['time']} | {revision} | `{command}` |")
        lines += ["", "## Files", "", "| | |", "|---|---|"]
        return lines + [f"| `{name}` | {what} |" for name, what in there]


def _command() -> str:
    """What was typed; of a module run with -m Python itself keeps the file alone."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _starts(path: Path) -> list[dict[str, Any]]:
    """Those of an earlier `run.json`; none where it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return content.get("starts", [])
    except (OSError, ValueError):
        return []
