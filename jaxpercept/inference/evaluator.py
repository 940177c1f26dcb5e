"""Evaluation: every image of a dataset, by the protocols of the papers, on all devices."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from jaxpercept.checkpoints.tokenizer import Tokenize
from jaxpercept.data.datasets import DATASETS, Record, open_dataset
from jaxpercept.errors import UserError
from jaxpercept.inference.comparison import Comparison
from jaxpercept.inference.eval_images import EvalImages, spread
from jaxpercept.inference.measures import (
    check_dataset,
    entry,
    is_detail,
    make_protocols,
    measure_name,
    measure_of,
)
from jaxpercept.inference.options import Options
from jaxpercept.inference.predictor import (
    Params,
    PerceptionModel,
    Prediction,
    Predictor,
    resolve_resolution,
)
from jaxpercept.inference.scoring import Scorer, Started, Tally, own_rows, settled

Predict = Callable[[list[int], Mapping[str, Array]], Iterable[Prediction]]
"""`(items, arrays) -> predictions` of a batch, at the images' own sizes; lazily, one by one."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        means: each metric of the dataset; metrics of single classes or joints have a slash in their
            names, and are NaN where these do not occur.
        baseline: the same for a trivial prediction that knows each image's truth as a whole.
        rows: for each image `name`, `height`, `width`, its metrics as far as they are one image's,
            and those of the trivial prediction as `constant_...`.
        pictures: a few images with their truth and prediction.
        protocol: what was evaluated, and how.
    """

    means: dict[str, float]
    baseline: dict[str, float]
    rows: list[dict[str, Any]]
    pictures: list[Comparison]
    protocol: dict[str, Any]


class Evaluator:
    """Evaluates models of one kind on one dataset, again and again.

    The protocols are those of the task's kind (`inference.measures`). Construction reads every
    image once, so that a damaged one, an empty mask or a wrong unit is reported before anything is
    compiled; small datasets then stay in memory. A second `run` with other weights compiles
    nothing.

    Args:
        perception: what predicts.
        dataset: a row of `data.datasets`.
        mesh: where weights and batches live; every process of it must construct and run alike.
        resolution: (height, width) of the training images: the default processing resolution, and
            the size of the procedural scenes.
        data_dir: folder of the dataset.
        split: None takes the last one that has the truth.
        batch_size: images at a time, rounded up to the number of devices.
        processing_resolution: long side in pixels the network works at, a multiple of the
            autoencoder's factor or the dataset's `eval_resolution`; None: that of `resolution`; 0:
            each image's own.
        limit: evaluate this many images, spread evenly; 0: all.
        options: steps, ensemble and noise of the prediction.
        pictures: how many rows of `EvalResult.pictures` to make.
        overrides: values that replace the dataset row's, such as `depth_scale`, `max_depth`,
            `eval_crop`, and options of its source.
        progress: show progress bars.
        predictor: a `Predictor` of the same model and mesh, whose programs are used again.
        tokenize: reads the captions, for a model that looks for what they name.
        corrections: so many of the things of each image that might be taken for what its caption
            names (`distractors`) are called unwanted, as `inference.correction.Script` does.
        resume: the share of the steps before, which are without correction.
        more: `(record, resolution) -> further arrays` for the predictions of `measure`, where
            resolution is as of `resolution`.
        protocol_options: of the kind's protocols: `alignment` of depth and disparity, `hce` of
            masks.

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
        split: str | None = None,
        batch_size: int = 8,
        processing_resolution: int | None = None,
        limit: int = 0,
        options: Options | None = None,
        pictures: int = 4,
        overrides: Mapping[str, Any] | None = None,
        progress: bool = True,
        predictor: Predictor | None = None,
        tokenize: Tokenize | None = None,
        corrections: int = 0,
        resume: float = 0.5,
        more: Callable[[Record, int], Mapping[str, np.ndarray]] | None = None,
        **protocol_options: Any,
    ):
        if batch_size < 1 or limit < 0:
            raise UserError(f"give batch_size >= 1 and limit >= 0, not {batch_size} and {limit}.")
        self._task = perception.task
        self._measure = measure_of(self._task)
        check_dataset(self._measure, self._task, dataset, DATASETS.get(dataset))
        records = open_dataset(
            dataset,
            split=split,
            data_dir=data_dir,
            resolution=resolution,
            evaluation=True,
            targets=(self._measure.target,),
            **dict(overrides or {}),
        )
        row = records.dataset
        # What the papers work at need not be a multiple of anything: the border is padded.
        published = processing_resolution if processing_resolution == row.eval_resolution else None
        self._resolution = published or resolve_resolution(
            processing_resolution, resolution, perception.model.downscale
        )
        self._options = options or Options()
        self._predictor = predictor or Predictor(perception, mesh)
        self._progress = progress and jax.process_index() == 0
        if not len(records):
            raise UserError(f"the split {records.split!r} of dataset {dataset!r} is empty.")
        indices = spread(len(records), limit)
        self._texts = _texts_of(self._task, tokenize, corrections)
        self._first_step = _steps_before(perception, self._options, corrections, resume)

        def further(record: Record) -> Mapping[str, np.ndarray]:
            return {} if more is None else more(record, self._resolution)

        def prepare(record: Record) -> Record:
            prepared = self._measure.prepare(record)
            texts = {name: read(prepared) for name, read in self._texts.items()}
            return {**prepared, **texts, **further(record)}

        first = records[indices[0]]
        sample = self._measure.prepare(first)
        self._protocols = make_protocols(self._measure, self._task, row, sample, protocol_options)
        self._scorer = Scorer(self._measure, self._protocols, mesh)
        medians: list[float] = []

        def look(record: Record) -> None:
            for protocol in self._protocols.values():
                protocol.check(record)
            if self._measure.median_of is not None:
                medians.append(self._measure.median_of(record))

        self._images = EvalImages(
            records,
            indices,
            prepare=prepare,
            look=look,
            fields=("rgb", *self._texts, *self._scorer.fields, *further(first)),
            kept=("valid", *(field for p in self._protocols.values() for field in p.fields)),
            mesh=mesh,
            batch_size=batch_size,
            progress=self._progress,
        )
        if self._measure.judge is not None:
            self._measure.judge(float(np.median(medians)), row)
        own = self._images.own
        self._pictured = {own[i] for i in spread(len(own), pictures)} if pictures else set()
        # Does not depend on the weights: found in the first run.
        self._baseline: tuple[list[dict[str, Any]], dict[str, float]] | None = None
        self.protocol = {
            "dataset": dataset,
            "split": records.split,
            "kind": self._task.kind,
            "measure": measure_name(self._task),
            "images": len(indices),
            "names_sha256": hashlib.sha256("\n".join(self._images.names).encode()).hexdigest(),
            **self._measure.facts(next(iter(self._protocols.values())), row),
            "crop": row.crop,
            "processing_resolution": self._resolution,
            "pad_multiple": self._predictor.multiple,
            "num_inference_steps": self._options.num_steps or perception.recipe.num_steps,
            "ensemble_size": self._options.ensemble_size,
            "flip": self._options.flip,
            "seed": self._options.seed,
            **({"corrections": corrections, "resume": resume} if corrections else {}),
            "parts": list(self._protocols),
            "baseline": self._measure.baseline,
            "average": self._measure.average,
        }

    @property
    def metrics(self) -> list[str]:
        """The names of a dataset's metrics, those of single classes and joints left out."""
        named = ((title, name) for title, p in self._protocols.items() for name in p.names)
        return [entry(title, name) for title, name in named if not is_detail(name)]

    @property
    def resolution(self) -> int:
        """Long side in pixels at which the network works; 0: the images' own."""
        return self._resolution

    def run(self, params: Params, *, progress: bool = True) -> EvalResult:
        """Evaluate weights that live on the mesh.

        Raises:
            UserError: a prediction is not finite.
        """

        def predict(items: list[int], arrays: Mapping[str, Array]) -> Iterable[Prediction]:
            predicted = self._predict(params, arrays, items[0])
            # Members are merged on this process's first device.
            several = self._options.members > 1
            yield jax.tree.map(np.asarray, predicted) if several else predicted

        images, pictures = self._images, {}
        tally = Tally(self._scorer, len(images))
        self._score(predict, [tally], pictures, "evaluating", progress)
        rows, means = tally.result(lambda: images.load(0))
        constants, baseline = self._baseline
        return EvalResult(
            means=means,
            baseline=baseline,
            rows=[
                {"name": name, "height": height, "width": width, **row}
                | {f"constant_{k}": x for k, x in constant.items() if k != "valid_pixels"}
                for name, (height, width), row, constant in zip(
                    images.names, images.sizes, rows, constants, strict=True
                )
            ],
            pictures=[pictures[item] for item in sorted(pictures)],
            protocol=self.protocol,
        )

    def measure(
        self, predict: Predict, count: int, *, title: str
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Measure `count` predictions for each image.

        Args:
            predict: `(items, arrays)` gives them for a batch, in the same order for each. Arrays
                are "rgb", those of `texts`, and those of `more`.
            title: of the progress bar.

        Returns:
            The metrics of each, and those of the trivial prediction.

        Raises:
            UserError: a prediction is not finite.
        """
        tallies = [Tally(self._scorer, len(self._images)) for _ in range(count)]
        self._score(predict, tallies, None, title, True)
        found = [tally.result(lambda: self._images.load(0))[1] for tally in tallies]
        return found, self._baseline[1]

    def texts(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What a batch says to look for, as arguments of the predictor."""
        return {field: arrays[field] for field in self._texts}

    def _score(
        self,
        predict: Predict,
        tallies: list[Tally],
        pictures: dict[int, Comparison] | None,
        title: str,
        progress: bool,
    ) -> None:
        """Take down what a batch's predictions score, each in its tally; pictures of the first."""
        images = self._images
        trivial = Tally(self._scorer, len(images)) if self._baseline is None else None
        pending: tuple[Any, ...] | None = None
        with (
            ThreadPoolExecutor() as threads,
            tqdm(
                total=len(images) * len(tallies),
                desc=title,
                unit="image",
                disable=None if progress and self._progress else True,
            ) as bar,
        ):
            for items, records, arrays in images.loaded(threads):
                extras = trivial, pictures
                for tally, predicted in zip(tallies, predict(items, arrays), strict=True):
                    started = self._scorer.start(predicted, arrays)
                    # The devices work on this batch while the host measures the one before.
                    if pending is not None:
                        self._collect(*pending, threads)
                        bar.update(len(pending[0]))
                    pending = (items, records, started, tally, *extras)
                    extras = None, None
            self._collect(*pending, threads)
            bar.update(len(pending[0]))
        if trivial is not None:
            self._baseline = trivial.result(lambda: images.load(0))

    def _predict(self, params: Params, arrays: Mapping[str, Array], first: int) -> Prediction:
        options = {"resolution": self._resolution, "options": self._options, "first": first}
        options |= self.texts(arrays)
        if self._first_step:
            before = {name: value for name, value in options.items() if name != "unwanted_ids"}
            x = self._predictor.advance(params, arrays["rgb"], until=self._first_step, **before)
            options |= {"latents": np.asarray(x), "first_step": self._first_step}
        return self._predictor(params, arrays["rgb"], **options)

    def _collect(
        self,
        items: list[int],
        records: Mapping[int, Record],
        started: Started,
        tally: Tally,
        trivial: Tally | None,
        pictures: dict[int, Comparison] | None,
        threads: ThreadPoolExecutor,
    ) -> None:
        """Wait for a batch; take down its rows and the pictures wanted of it."""
        finite = np.asarray(started.finite)[: len(items)]
        if not finite.all():
            raise UserError(
                f"the prediction for {self._images.names[items[int(finite.argmin())]]} is not "
                "finite: the weights are damaged, or need dtype float32 or bfloat16."
            )
        found = self._scorer.finish(started, records, threads)
        constants = {}
        if trivial is not None:
            constants = {
                row: threads.submit(self._scorer.trivial, record) for row, record in records.items()
            }
        pictured = self._pictured if pictures is not None else ()
        wanted = [row for row in records if items[row] in pictured]
        predictions = own_rows(started.prediction) if wanted else {}
        for row in wanted:
            pictures[items[row]] = self._measure.compare(
                self._task, self._protocols, predictions[row], records[row]
            )
        for row, rows in settled(found).items():
            tally.add(items[row], rows)
        for row, rows in settled(constants).items():
            trivial.add(items[row], rows)


def _texts_of(
    task: Any, tokenize: Tokenize | None, corrections: int
) -> dict[str, Callable[[Record], np.ndarray]]:
    """Batch field -> what reads its token ids off a record.

    Raises:
        UserError: the task reads no text to be corrected, or there is no tokenizer.
    """
    if corrections and not task.needs_prompt:
        raise UserError(
            f"the task {task.name!r} looks for nothing that a text names: leave --corrections out."
        )
    if not task.reads_text:
        return {}
    if tokenize is None:
        raise UserError("this model looks for what a text names: give its tokenizer.")

    def read(texts: list[str]) -> np.ndarray:
        return tokenize([task.instruction.format(" and ".join(texts))])[0]

    def unwanted(record: Record) -> np.ndarray:
        # Away from the thing itself is nowhere: what has no distractor is not corrected.
        return read(record["distractors"][:corrections] or [record["caption"]])

    readers = {"input_ids": lambda record: read([record["caption"]] if task.needs_prompt else [])}
    return readers | ({"unwanted_ids": unwanted} if corrections else {})


def _steps_before(
    perception: PerceptionModel, options: Options, corrections: int, resume: float
) -> int:
    """The steps that are taken before a correction."""
    if corrections < 0 or not 0 <= resume < 1:
        raise UserError(
            f"give --corrections of 0 or more and --resume in [0, 1), not {corrections} and "
            f"{resume}."
        )
    if corrections and options.members > 1:
        raise UserError("corrections are of single predictions: leave the ensemble out.")
    return int(resume * (options.num_steps or perception.recipe.num_steps)) if corrections else 0
