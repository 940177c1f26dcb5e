"""The preparation of a dataset: what is to be written, Beam, and the header at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from jaxpercept.data.datasets import DATASETS, TARGETS, Records, open_dataset
from jaxpercept.data.prepared import (
    HEADER,
    PROGRESS,
    names_file,
    read_header,
    tfds_name,
)
from jaxpercept.data.readers import EmptyMaskError, UnreadableFileError
from jaxpercept.data.row import Dataset
from jaxpercept.data.sources import names_hash
from jaxpercept.data.storage import STORAGES, choose
from jaxpercept.errors import UserError
from jaxpercept.preparation.beam import run
from jaxpercept.preparation.header import MEANING, header_of, row_facts, write_metadata
from jaxpercept.preparation.report import write_report
from jaxpercept.preparation.shards import REJECTED, Plan, files_of, write_shard

# From so many examples, spread over the split, it is seen how fields can be stored.
_PROBES = 16
_POLL_SECONDS = 0.5


def prepare(
    dataset: str,
    source: str | Path | None,
    target: str | Path,
    *,
    splits: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    resolution: tuple[int, int] = (480, 640),
    store: Mapping[str, str] | None = None,
    name: str | None = None,
    version: str = "1.0.0",
    shard_size: int = 256,
    limit: int = 0,
    workers: int = 1,
    beam: str = "",
    progress: bool = False,
) -> Path:
    """Writes a dataset of the table as sharded ArrayRecord that this package and TFDS read.

    What a preparation that was stopped has finished is kept: the same call goes on with the rest.
    Splits can be added later.

    Args:
      dataset: key of `DATASETS`.
      source: folder of the files as they are published (None for rendered scenes).
      target: folder that gets `NAME/VERSION/`.
      splits: which ones; none means all that the folder has.
      targets: which ones; None means all that the folder has for the first split.
      options: of the dataset's row, as of `open_dataset`.
      resolution: (height, width) of datasets that have none of their own.
      store: field -> storage (`storage.STORAGES`) instead of the smallest exact one.
      name: of the dataset in TFDS; None for that of the row.
      version: of what is written.
      shard_size: examples of a shard.
      limit: at most so many examples of a split, the first ones; 0 for all.
      workers: processes of this machine.
      beam: options of Beam, such as "--runner=FlinkRunner --parallelism=64"; workers then is of no
        importance. All workers must see both folders.
      progress: whether a bar shows the shards that are finished.

    Returns:
      The folder of the version.

    Raises:
      UserError: there is nothing to prepare, an option is wrong, the folder holds something else,
        or a shard could not be written.
    """
    for what, number, least in (("shard_size", shard_size, 1), ("workers", workers, 1)):
        if number < least:
            raise UserError(f"{what} must be at least {least}, got {number}.")
    if limit < 0:
        raise UserError(f"limit must not be negative, got {limit}.")
    if dataset not in DATASETS:
        raise UserError(f"Unknown dataset {dataset!r}; known are {', '.join(sorted(DATASETS))}.")
    row, options = DATASETS[dataset], dict(options or {})
    if not (row.needs_data_dir or limit):
        raise UserError(f"The scenes of {dataset} have no end; say with --limit how many you want.")
    name = tfds_name(name or dataset)
    opened = _open_all(row, source, splits, targets, options, resolution)
    _check_one_layout(opened)
    folder = Path(target) / name / version
    if source is not None and folder.resolve() == Path(source).resolve():
        raise UserError(f"{folder} holds the files to be read; choose another folder for --to.")
    old = read_header(folder) if (folder / HEADER).exists() else None
    storages = _storages(opened, store or {})
    plans = [
        _plan(records, storages, folder, name, shard_size, limit) for records in opened.values()
    ]
    _check_same(folder, old, row, plans)
    for part in (PROGRESS, REJECTED, "names"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for plan in plans:
        _run(plan, workers=workers, beam=beam, progress=progress)
    _finish(folder, plans, old, row)
    return folder


# ---- what is to be written -----------------------------------------------------------------------


def _open_all(
    row: Dataset,
    source: str | Path | None,
    splits: Sequence[str],
    targets: Sequence[str] | None,
    options: Mapping[str, Any],
    resolution: tuple[int, int],
) -> dict[str, Records]:
    """The raw splits: of phrases, the training split as it is trained on, all of an object's at
    once, the others as they are evaluated, one by one."""

    def opened(split: str, targets: Sequence[str]) -> Records:
        return open_dataset(
            row.name,
            split=split,
            data_dir=source,
            resolution=resolution,
            targets=targets,
            evaluation="referred" in row.provides and split != row.splits[0],
            **options,
        )

    found: dict[str, Records] = {}
    complaint: UserError | None = None
    for split in splits or row.splits:
        wanted = targets
        if wanted is None and found:
            wanted = next(iter(found.values())).targets
        try:
            if wanted is None:
                wanted = _all_targets(lambda t, split=split: opened(split, t), row)
            found[split] = opened(split, wanted)
        except UserError as error:
            if splits:
                raise
            complaint = complaint or error
    if not found:
        raise complaint or UserError(f"Dataset {row.name} has no split.")
    return found


def _all_targets(opened: Any, row: Dataset) -> tuple[str, ...]:
    """All targets that can be opened together, in the order of `TARGETS`."""
    together: tuple[str, ...] = ()
    complaint: UserError | None = None
    for target in (t for t in TARGETS if t in row.targets):
        try:
            opened((*together, target))
            together = (*together, target)
        except UserError as error:
            complaint = complaint or error
    if complaint is not None and not together:
        raise complaint
    return together


def _check_one_layout(opened: Mapping[str, Records]) -> None:
    """Whether one header can say of all splits what their numbers mean.

    Raises:
      UserError: their files lie in layouts with other units or ranges.
    """
    (first, records), *others = opened.items()
    facts = row_facts(records.dataset)
    for split, other in others:
        for key, value in row_facts(other.dataset).items():
            if value != facts[key]:
                raise UserError(
                    f"The splits {first} and {split} of {records.dataset.name} lie in layouts with "
                    f"{key} {facts[key]} and {value}; prepare them one by one, with --splits and "
                    "--name."
                )


def _storages(opened: Mapping[str, Records], store: Mapping[str, str]) -> dict[str, str]:
    """How the fields are stored, chosen by looking at some examples of all splits."""
    examples = [example for records in opened.values() for example in _probes(records)]
    if not examples:
        first = next(iter(opened.values()))
        raise UserError(f"No example of dataset {first.dataset.name} can be read; check the files.")
    fields = [f for f in examples[0] if f in MEANING and all(f in other for other in examples)]
    for field, name in store.items():
        if field not in fields:
            raise UserError(f"There is no field {field} to store; there are {', '.join(fields)}.")
        if name not in STORAGES or not all(STORAGES[name].fits(e[field]) for e in examples):
            raise UserError(f"{field} cannot be stored as {name!r}; leave --store away.")
    return {
        field: store.get(field) or choose(field, [example[field] for example in examples])
        for field in fields
    }


def _probes(records: Records) -> list[dict[str, Any]]:
    """Some readable examples, spread over the split."""
    found = []
    for index in np.unique(np.linspace(0, len(records) - 1, _PROBES, dtype=np.int64)):
        try:
            found.append(records.source[int(index)])
        except (UnreadableFileError, EmptyMaskError):
            continue
    return found


def _plan(
    records: Records,
    storages: Mapping[str, str],
    folder: Path,
    name: str,
    shard_size: int,
    limit: int,
) -> Plan:
    length = min(len(records), limit or len(records))
    names = getattr(records.source, "names", None)
    decides = {
        "dataset": records.dataset.name,
        "row": row_facts(records.dataset),
        "split": records.split,
        "targets": records.targets,
        "storages": dict(storages),
        "length": length,
        "shard_size": shard_size,
        "source": repr(records.source),
        "names": names[:length] if names else None,
    }
    fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Plan(records, dict(storages), str(folder), name, length, shard_size, fingerprint)


# ---- the run -------------------------------------------------------------------------------------


def _run(plan: Plan, *, workers: int, beam: str, progress: bool) -> None:
    """Writes the shards of a plan that are not finished.

    Raises:
      UserError: one could not be written; the others are.
    """
    missing = [shard for shard in range(plan.shards) if plan.summary(shard) is None]
    done = plan.shards - len(missing)
    split = plan.records.split
    if done:
        logging.info("%d of %d shards of %s are there.", done, plan.shards, split)
    if not missing:
        return
    for shard in missing:
        plan.summary_file(shard).unlink(missing_ok=True)
    log = Path(plan.folder, PROGRESS, "workers.log")
    quiet = None if progress else True
    bar = tqdm(total=plan.shards, initial=done, desc=split, unit="shard", disable=quiet)
    with bar, _Watch(plan, missing, bar):
        run(_Write(plan), missing, workers=workers, options=beam, log=log)
    for shard in missing:
        if plan.error_file(shard).exists():
            raise UserError(plan.error_file(shard).read_text())
        if plan.summary(shard) is None:
            raise UserError(
                f"Shard {shard} of {split} is missing after the run; see the log of the workers."
            )


@dataclasses.dataclass(frozen=True)
class _Write:
    """`write_shard` of a plan, as Beam sends it to its workers."""

    plan: Plan

    def __call__(self, shard: int) -> None:
        write_shard(self.plan, shard)


class _Watch:
    """Moves a bar while workers, wherever they are, leave summaries in the folder."""

    def __init__(self, plan: Plan, shards: Sequence[int], bar: tqdm):
        self._plan, self._open, self._bar = plan, set(shards), bar
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        done = {shard for shard in self._open if self._plan.summary_file(shard).exists()}
        self._open -= done
        self._bar.update(len(done))


# ---- the end -------------------------------------------------------------------------------------


def _finish(folder: Path, plans: Sequence[Plan], old: Mapping | None, row: Dataset) -> None:
    """Names, TFDS's metadata with the header, and the report.

    Raises:
      UserError: nothing was accepted.
    """
    summaries = {
        plan.records.split: [plan.summary(shard) for shard in range(plan.shards)] for plan in plans
    }
    splits = dict(old["splits"]) if old else {}
    for plan in plans:
        split = plan.records.split
        accepted = [record for summary in summaries[split] for record in summary["accepted"]]
        rejected = [record for summary in summaries[split] for record in summary["rejected"]]
        if not accepted:
            raise UserError(
                f"All {len(rejected)} examples of split {split} of {row.name} were rejected, the "
                f"first because: {rejected[0]['reason']}"
            )
        names = [record["name"] for record in accepted]
        (folder / names_file(split)).write_text(json.dumps(names))
        origins = "".join(record["source_sha256"] for record in accepted)
        splits[split] = {
            "examples": len(accepted),
            "rejected": len(rejected),
            "evaluation": plan.records.evaluation,
            "expected": _published(plan),
            "shards": [plan.shard_file(shard) for shard in range(plan.shards)],
            "shard_lengths": [len(summary["accepted"]) for summary in summaries[split]],
            "shard_sha256": [summary["sha256"] for summary in summaries[split]],
            "bytes": sum(summary["bytes"] for summary in summaries[split]),
            "names_sha256": names_hash(names),
            "source_sha256": hashlib.sha256(origins.encode()).hexdigest(),
            "source_sha256_of": "files" if files_of(plan.records.source, 0) else "records",
            "origin": repr(plan.records.source),
        }
    first = plans[0]
    header = header_of(first.records.dataset, first.records.targets, first.storages, splits)
    write_metadata(folder, first.name, header)
    write_report(folder, header, summaries)


def _published(plan: Plan) -> int | None:
    """How many examples the split has as published, if all of it was prepared."""
    if plan.length < len(plan.records):
        return None
    return getattr(plan.records.source, "expected", None)


def _check_same(folder: Path, old: Mapping | None, row: Dataset, plans: Sequence[Plan]) -> None:
    """Whether a preparation can go on in a folder, or splits be added to what is there."""
    remedy = "choose another --to, --name or --version, or remove it"
    if old is not None and (old["dataset"], old["fields"]) != (row.name, plans[0].storages):
        raise UserError(
            f"{folder} holds {old['dataset']} with the fields {old['fields']}, not {row.name} with "
            f"{plans[0].storages}; {remedy}."
        )
    facts = row_facts(plans[0].records.dataset)
    for key in facts.keys() & (old or {"row": {}})["row"].keys():
        if old["row"][key] != facts[key]:
            raise UserError(
                f"{folder} holds splits whose {key} is {old['row'][key]}, not {facts[key]}; "
                f"{remedy}."
            )
    for plan in plans:
        for path in sorted(Path(folder, PROGRESS).glob(f"{plan.records.split}-*.json"))[:1]:
            if json.loads(path.read_text())["fingerprint"] != plan.fingerprint:
                raise UserError(
                    f"{folder} holds shards of split {plan.records.split} of other files or flags; "
                    f"{remedy}."
                )
