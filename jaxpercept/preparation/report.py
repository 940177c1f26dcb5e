"""The report of a preparation: what was taken, what was not and why, with pictures."""

from __future__ import annotations

import collections
import csv
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxpercept.data.prepared import PreparedSource
from jaxpercept.data.readers import VOID
from jaxpercept.data.sources import Example
from jaxpercept.inference.panel import colour_limits, grey, panel, spectral

FOLDER = "report"
_EXAMPLES = 4
_SHOWN = 60  # pictures of what was rejected, on the page
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;"
    "padding:.3rem .7rem;text-align:left}figure{display:inline-block;width:15rem;margin:.5rem;"
    "vertical-align:top}figcaption{font-size:.8rem;overflow-wrap:anywhere}img{max-width:100%}"
)

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(folder: Path, header: Mapping[str, Any], summaries: Summaries) -> None:
    """Writes `report/`: index.html, records-SPLIT.csv, rejected-SPLIT.csv, examples-SPLIT.png.

    Args:
      folder: of the version.
      header: see `pipeline`.
      summaries: of the shards of each split that was prepared now.
    """
    report = folder / FOLDER
    for split, shards in summaries.items():
        accepted = [record for shard in shards for record in shard["accepted"]]
        rejected = [record for shard in shards for record in shard["rejected"]]
        _write_table(report / f"records-{split}.csv", accepted)
        _write_table(report / f"rejected-{split}.csv", rejected)
        source = PreparedSource(folder, split, list(header["fields"]))
        chosen = np.unique(np.linspace(0, len(source) - 1, _EXAMPLES, dtype=np.int64))
        rows = [drawn(source[int(index)], header["palette"]) for index in chosen]
        Image.fromarray(panel(rows)).save(report / f"examples-{split}.png")
    (report / "index.html").write_text(_page(folder, header))


def drawn(
    example: Example, palette: Sequence[Sequence[int]] = ()
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Pictures of an example's maps, by their names; classes in the colours of `palette`."""
    pictures = {"rgb": example["rgb"]}
    if "depth" in example:
        depth = example["depth"][..., 0]
        known = np.isfinite(depth) & (depth > 0)
        if "mask" in example:
            known &= example["mask"][..., 0]
        shown = np.where(known, depth, np.nan)
        pictures["depth"] = spectral(shown, colour_limits(depth, known))
    if "normals" in example:
        pictures["normals"] = np.rint((example["normals"] + 1) * 127.5).astype(np.uint8)
    if "alpha" in example:
        pictures["alpha"] = grey(example["alpha"][..., 0])
    if "classes" in example:
        table = _any_colours()
        table[: len(palette)] = np.array(palette, np.uint8).reshape(-1, 3)
        table[VOID] = 0
        pictures["classes"] = table[example["classes"][..., 0]]
    if "instance" in example:
        table = _any_colours()
        table[0] = 0
        pictures["instance"] = table[example["instance"][..., 0]]
    return pictures


def _any_colours() -> UInt8[np.ndarray, "65536 3"]:
    """A colour for every number, the same in every report; none is black."""
    return np.random.default_rng(0).integers(40, 256, (65536, 3)).astype(np.uint8)


def reasons(rejected: Iterable[Mapping[str, Any]]) -> collections.Counter[str]:
    """How often each reason is given, told apart by what is not a name or a number of its own."""
    return collections.Counter(
        record["reason"].replace(record["name"], "...") for record in rejected
    )


def _write_table(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns or ["name"])
        writer.writeheader()
        writer.writerows(records)


def _page(folder: Path, header: Mapping[str, Any]) -> str:
    parts = [
        f"<h1>{html.escape(header['dataset'])}</h1>",
        f"<p>{html.escape(header['licence'])}. {html.escape(header['written_by'])}.</p>",
        _table(
            ("field", "stored as", "what it is"),
            [
                (field, storage, header["meaning"][field])
                for field, storage in header["fields"].items()
            ],
        ),
        _table(("of the row", "value"), list(header["row"].items())),
    ]
    for split, facts in header["splits"].items():
        with open(folder / FOLDER / f"rejected-{split}.csv", newline="") as file:
            rejected = list(csv.DictReader(file))
        parts += [
            f"<h2>{html.escape(split)}</h2>",
            f"<p>{facts['examples']} examples in {len(facts['shards'])} shards, "
            f"{facts['bytes'] / 1e6:.1f} MB; {facts['rejected']} rejected. From "
            f"{html.escape(facts['origin'])}.</p>",
            f'<img src="examples-{html.escape(split)}.png" alt="examples of {html.escape(split)}">',
        ]
        if rejected:
            parts.append(_table(("rejected", "because"), _counted(rejected)))
            parts += [_figure(record) for record in rejected if record.get("picture")][:_SHOWN]
    title = f"{html.escape(header['dataset'])}, prepared"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _counted(rejected: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    return [(count, reason) for reason, count in reasons(rejected).most_common()]


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{html.escape(title)}</th>" for title in titles)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _figure(record: Mapping[str, Any]) -> str:
    picture = html.escape(Path(record["picture"]).relative_to(FOLDER).as_posix())
    text = html.escape(f"{record['name']}: {record['reason']}")
    return f'<figure><img src="{picture}" alt=""><figcaption>{text}</figcaption></figure>'
