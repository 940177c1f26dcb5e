"""Evaluation of depth: every image of a dataset, the protocol of the papers, on all devices."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from jaxpercept.data.datasets import Record, open_dataset
from jaxpercept.errors import UserError
from jaxpercept.inference.options import Options
from jaxpercept.inference.panel import PanelRow
from jaxpercept.inference.predictor import (
    Params,
    PerceptionModel,
    Predictor,
    plan_batches,
    resolve_resolution,
)
from jaxpercept.metrics.depth import (
    METRICS,
    align_disparity,
    align_least_squares,
    constant_depth_metrics,
    evaluate_depth,
)
from jaxpercept.training import sharding

# Decoded images are kept between runs up to this many bytes.
_CACHE_BYTES = 512 * 2**20
# Median depths in metres outside of which the unit must be wrong.
_PLAUSIBLE = (0.01, 1000.0)
_FIELDS = ("rgb", "depth", "valid")
_ALIGN = {"least_square": align_least_squares, "least_square_disparity": align_disparity}
ALIGNMENTS = tuple(_ALIGN)
_KIND_ALIGN = {"affine_depth": None, "affine_disparity": "least_square_disparity"}
_SCORES = ("valid_pixels", *METRICS, *(f"constant_{name}" for name in METRICS))


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        means: each metric, averaged over images with equal weight.
        baseline: the same for the best constant depth of each image.
        rows: for each image `name`, `height`, `width`, `valid_pixels`, the metrics, and the best
            constant's as `constant_...`.
        pictures: a few images with their truth and aligned prediction.
        protocol: what was evaluated, and how.
    """

    means: dict[str, float]
    baseline: dict[str, float]
    rows: list[dict[str, Any]]
    pictures: list[PanelRow]
    protocol: dict[str, Any]


class Evaluator:
    """Evaluates models of depth or disparity on one dataset, again and again.

    Construction reads every image once, so that a damaged one, an empty mask or a wrong unit is
    reported before anything is compiled; small datasets then stay in memory. A second `run` with
    other weights compiles nothing.

    Args:
        perception: what predicts.
        dataset: a row of `data.datasets`.
        mesh: where weights and batches live; every process of it must construct and run alike.
        resolution: (height, width) of the training images: the default processing resolution, and
            the size of the procedural scenes.
        data_dir: folder of the dataset.
        depth_scale: units of depth files per metre; None takes the dataset's.
        split: None takes the dataset's test split.
        batch_size: images at a time, rounded up to the number of devices.
        processing_resolution: long side in pixels the network works at; None: that of
            `resolution`; 0: each image's own.
        limit: evaluate this many images, spread evenly; 0: all.
        alignment: how predictions are fitted to the truth; None takes the dataset's, and for a
            model of disparity a fit in disparity.
        options: steps, ensemble and noise of the prediction.
        pictures: how many rows of `EvalResult.pictures` to make.
        overrides: values that replace the dataset row's: `min_depth`, `max_depth`, `eval_crop`.
        progress: show progress bars.

    Raises:
        UserError: the dataset, an image of it, or an option does not fit; it names which.
    """

    def __init__(
        self,
        perception: PerceptionModel,
        dataset: str,
        *,
        mesh: Mesh,
        resolution: tuple[int, int],
        data_dir: str | Path | None = None,
        depth_scale: float | None = None,
        split: str | None = None,
        batch_size: int = 8,
        processing_resolution: int | None = None,
        limit: int = 0,
        alignment: str | None = None,
        options: Options | None = None,
        pictures: int = 4,
        overrides: Mapping[str, Any] | None = None,
        progress: bool = True,
    ):
        if batch_size < 1 or limit < 0:
            raise UserError(f"give batch_size >= 1 and limit >= 0, not {batch_size} and {limit}.")
        kind = perception.task.kind
        if kind not in _KIND_ALIGN:
            raise UserError(
                f"a model of {kind} cannot be evaluated yet, only one of depth or disparity."
            )
        row_options = dict(overrides or {})
        if depth_scale is not None:
            row_options["depth_scale"] = depth_scale
        self._records = open_dataset(
            dataset,
            split=split,
            data_dir=data_dir,
            resolution=resolution,
            evaluation=True,
            **row_options,
        )
        row = self._records.dataset
        if "depth" not in row.provides:
            raise UserError(f"the dataset {dataset!r} has no depth to evaluate against.")
        self._alignment = alignment or _KIND_ALIGN[kind] or row.alignment
        if self._alignment not in ALIGNMENTS:
            raise UserError(
                f"the alignment {self._alignment!r} is unknown: use {' or '.join(ALIGNMENTS)}."
            )
        self._mesh = mesh
        self._resolution = resolve_resolution(
            processing_resolution, resolution, perception.model.downscale
        )
        self._predictor = Predictor(perception, mesh)
        self._options = options or Options()
        # Scores are replicated: with several processes, each then holds all of them. The aligned
        # maps, large and wanted for a few pictures only, stay where they are.
        self._batch_sharding = NamedSharding(mesh, sharding.BATCH)
        self._score = jax.jit(
            self._compare, out_shardings=(sharding.replicated(mesh), self._batch_sharding)
        )
        self._progress = progress and jax.process_index() == 0
        self._indices = _spread(len(self._records), limit)
        self._cache: dict[int, Record] = {}
        self._names, self._sizes = self._survey()
        self._batches = plan_batches(self._sizes, batch_size, sharding.batch_devices(mesh))
        own = sorted(
            items[row]
            for items, rows in self._batches
            for row in self._own_rows(rows)
            if row < len(items)
        )
        self._pictured = {own[i] for i in _spread(len(own), pictures)} if pictures else set()
        low, high = row.clip_range
        self.protocol = {
            "dataset": dataset,
            "split": split or row.splits[-1],
            "images": len(self._indices),
            "names_sha256": hashlib.sha256("\n".join(self._names).encode()).hexdigest(),
            "alignment": self._alignment,
            "alignment_max_resolution": row.alignment_max_resolution,
            "min_depth": low,
            "max_depth": high if np.isfinite(high) else None,
            "crop": row.crop,
            "evaluation_crop": row.eval_crop,
            "depth_scale": row.depth_scale,
            "processing_resolution": self._resolution,
            "num_inference_steps": self._options.num_steps or perception.recipe.num_steps,
            "ensemble_size": self._options.ensemble_size,
            "flip": self._options.flip,
            "seed": self._options.seed,
            "average": "mean over images of per-image metrics",
        }

    def run(self, params: Params, *, progress: bool = True) -> EvalResult:
        """Evaluate weights that live on the mesh.

        Raises:
            UserError: a prediction is not finite.
        """
        rows: list[dict[str, Any]] = [{} for _ in self._indices]
        pictures: dict[int, PanelRow] = {}
        pending = None
        with (
            ThreadPoolExecutor() as threads,
            tqdm(
                total=len(rows),
                desc="evaluating",
                unit="image",
                disable=None if progress and self._progress else True,
            ) as bar,
        ):
            for items, arrays in self._loaded(threads):
                prediction = self._predictor(
                    params,
                    arrays["rgb"],
                    resolution=self._resolution,
                    options=self._options,
                    first=items[0],
                ).prediction
                if self._options.members > 1:  # merged on this process's first device
                    prediction = np.asarray(prediction)
                scores, aligned = self._score(prediction, arrays["depth"], arrays["valid"])
                # The devices work on this batch while the host collects the one before.
                if pending is not None:
                    self._collect(*pending, rows, pictures)
                    bar.update(len(pending[0]))
                pending = (items, scores, aligned)
            self._collect(*pending, rows, pictures)
            bar.update(len(pending[0]))
        return EvalResult(
            means={name: _mean(row[name] for row in rows) for name in METRICS},
            baseline={name: _mean(row[f"constant_{name}"] for row in rows) for name in METRICS},
            rows=rows,
            pictures=[pictures[item] for item in sorted(pictures)],
            protocol=self.protocol,
        )

    def _compare(
        self,
        prediction: Float[Array, "b h w 1"],
        depth: Float[Array, "b h w 1"],
        valid: Bool[Array, "b h w 1"],
    ) -> tuple[dict[str, Array], Float[Array, "b h w 1"]]:
        """Scores per image, those of the best constant included, and the aligned prediction."""
        row = self._records.dataset
        low, high = row.clip_range
        fit = _ALIGN[self._alignment]
        aligned = fit(prediction, depth, valid & (depth > 0), row.alignment_max_resolution)
        scores = evaluate_depth(
            aligned, depth, valid, alignment="none", min_depth=low, max_depth=high
        )
        constant = constant_depth_metrics(depth, valid, min_depth=low, max_depth=high)
        return scores | {f"constant_{name}": constant[name] for name in METRICS}, aligned

    def _survey(self) -> tuple[list[str], list[tuple[int, int]]]:
        """Names and sizes of all images; checks each, and keeps what fits into memory."""
        names, sizes, medians, size = [], [], [], 0
        with ThreadPoolExecutor() as threads:
            records = threads.map(self._records.__getitem__, self._indices)
            for item, record in enumerate(
                tqdm(
                    records,
                    total=len(self._indices),
                    desc="checking images",
                    unit="image",
                    leave=False,
                    disable=None if self._progress else True,
                )
            ):
                names.append(record.get("name", str(self._indices[item])))
                sizes.append(record["rgb"].shape[:2])
                medians.append(np.median(record["depth"][record["valid"]][::16]))
                size += sum(record[field].nbytes for field in _FIELDS)
                if size <= _CACHE_BYTES:
                    self._cache[item] = {field: record[field] for field in _FIELDS}
        median = float(np.median(medians))
        if not _PLAUSIBLE[0] < median < _PLAUSIBLE[1]:
            raise UserError(
                f"the median depth is {median:g} m with depth_scale "
                f"{self._records.dataset.depth_scale:g}: set depth_scale to the units of the depth "
                "files per metre (1000 for millimetres)."
            )
        return names, sizes

    def _own_rows(self, rows: int) -> list[int]:
        """The rows of a batch that this process's devices hold."""
        places = self._batch_sharding.addressable_devices_indices_map((rows,)).values()
        return sorted({row for (place,) in places for row in range(*place.indices(rows))})

    def _loaded(self, threads: ThreadPoolExecutor) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """The items of each batch and its arrays on the mesh, read one batch ahead."""

        def start(number: int) -> dict[int, Future]:
            if number == len(self._batches):
                return {}
            items, rows = self._batches[number]
            # Rows beyond the last item repeat it; nobody reads their scores.
            return {
                row: threads.submit(self._load, items[min(row, len(items) - 1)])
                for row in self._own_rows(rows)
            }

        ahead = start(0)
        for number, (items, rows) in enumerate(self._batches):
            records = {row: future.result() for row, future in ahead.items()}
            ahead = start(number + 1)
            yield items, {field: self._put(records, field, rows) for field in _FIELDS}

    def _load(self, item: int) -> Record:
        return self._cache.get(item) or self._records[self._indices[item]]

    def _put(self, records: Mapping[int, Record], field: str, rows: int) -> Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([records[row][field] for row in range(*index[0].indices(rows))])

        shape = (rows, *next(iter(records.values()))[field].shape)
        return jax.make_array_from_callback(shape, self._batch_sharding, shard)

    def _collect(
        self,
        items: list[int],
        scores: Mapping[str, Array],
        aligned: Array,
        rows: list[dict[str, Any]],
        pictures: dict[int, PanelRow],
    ) -> None:
        """Wait for a batch; file its scores and the pictures wanted of it."""
        values = {name: np.asarray(score) for name, score in scores.items()}
        for row, item in enumerate(items):
            height, width = self._sizes[item]
            rows[item] = {"name": self._names[item], "height": height, "width": width}
            rows[item] |= {name: values[name][row].item() for name in _SCORES}
            if not np.isfinite(rows[item]["abs_rel"]):
                raise UserError(
                    f"the prediction for {self._names[item]} is not finite: the weights are "
                    "damaged, or need dtype float32 or bfloat16."
                )
        wanted = {row: item for row, item in enumerate(items) if item in self._pictured}
        for shard in aligned.addressable_shards if wanted else ():
            first = shard.index[0].indices(aligned.shape[0])[0]
            for offset in range(shard.data.shape[0]):
                if (item := wanted.get(first + offset)) is not None:
                    record = self._load(item)
                    prediction = np.asarray(shard.data)[offset]
                    pictures[item] = PanelRow(
                        record["rgb"], record["depth"], record["valid"], prediction
                    )


def _spread(count: int, limit: int) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spread; all of them if `limit` is 0."""
    if not 0 < limit < count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
