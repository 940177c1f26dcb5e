"""Reports and errors as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render(report: Mapping[str, Any]) -> str:
    """A report as text: what JSON holds, in aligned columns."""
    part = report.get("machine") or report["checkpoint"]
    single = {key: value for key, value in part.items() if not isinstance(value, list | dict)}
    sections: dict[str, Any] = {"checkpoint": single}
    for key, value in part.items():
        if key == "components":
            for name, component in value.items():
                architecture = component["architecture"] or {}
                sections[name] = {**architecture, **component, "architecture": None}
        elif key not in single and key not in ("problems", "warnings"):
            sections[key] = value
    lines = []
    for title, value in sections.items():
        if value:
            lines += ["", _label(title), *_section(value)]
    lines += ["", *(f"warning: {sentence}" for sentence in part["warnings"])]
    lines += [f"problem: {sentence}" for sentence in report["problems"]]
    return "\n".join([*lines, "No problems." if report["ok"] else "There are problems."]).lstrip()


def _section(value: Any) -> list[str]:
    """Lines of a dict, of a list of dicts (a table; errors below it) or of a list of names."""
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item not in (None, [], {})}
        return _columns([row for key, item in given.items() for row in _rows(key, item)])
    if not isinstance(value[0], dict):
        return [f"  {row[-1]}" for row in _rows("", value)]
    keys = list(dict.fromkeys(key for item in value for key in item if key != "error"))
    table = [[_text(key, item.get(key)) for key in keys] for item in value]
    errors = [f"  {item['probe']}: {item['error']}" for item in value if item.get("error")]
    return _columns([[_label(key) for key in keys], *table]) + errors


def _rows(key: str, value: Any, limit: int = 40) -> list[list[str]]:
    """Key and value; names, one a line, after the key."""
    if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
        value = [f"{name} ({_text('', counts)})" for name, counts in value.items()]
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        return [[_label(key), _text(key, value)]]
    rest = len(value) - limit
    names = value[:limit] + ([f"and {rest} more: --json names them all"] if rest > 0 else [])
    return [["" if i else _label(key), name] for i, name in enumerate(names)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [f"  {line}".rstrip() for line in lines]


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(key, item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        if key.endswith("bytes"):
            return f"{value / 1e6:,.1f} MB"
        return f"{value:,}" if value >= 1e5 else str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def first_line(error: Exception | str) -> str:
    """The first line, without its full stop; of an error that says nothing, its class."""
    name = "" if isinstance(error, str) else type(error).__name__
    return (str(error).strip().splitlines() or [name])[0].rstrip(".")[:300]
