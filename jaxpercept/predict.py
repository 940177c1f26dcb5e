"""Predict for an image or a folder of images with a trained model.

    python -m jaxpercept.predict --checkpoint=runs/depth --input=photo.jpg --output=out
    python -m jaxpercept.predict --checkpoint=runs/depth --input=photos/ --output=out --batch_size=8

--checkpoint takes a training workdir, an Orbax export, or a diffusers folder or hub id written by
this package. For each image NAME: NAME.npy (float32), NAME.png (coloured; near is red),
NAME_16bit.png (value x 65535) and NAME.json, which says what the numbers mean. Sub-folders are
kept. Images that cannot be read are named and skipped; the exit status is then 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import ExifTags, Image
from tqdm import tqdm

import jaxpercept
from jaxpercept import cli
from jaxpercept.data.readers import RGB_SUFFIXES, UnreadableFileError, read_rgb
from jaxpercept.errors import UserError
from jaxpercept.inference.outputs import ENDINGS, save_prediction
from jaxpercept.inference.pipeline import DTYPES, PerceptionOutput, PerceptionPipeline
from jaxpercept.inference.predictor import pad_rows, plan_batches
from jaxpercept.training import sharding

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to predict with.", flag_values=FLAGS)
flags.DEFINE_string("input", None, "An image, or a folder searched through.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Folder to write to.", flag_values=FLAGS)
flags.DEFINE_integer(
    "processing_resolution",
    None,
    "Long side in pixels the network works at; 0: the image's own; default: that of the training.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size", None, "Images at a time; default: one a device.", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Recorded; one-step models draw nothing.", flag_values=FLAGS)
flags.DEFINE_string("prompt", "", "For tasks that read text.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint", "input", "output")


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to predict for: where it lies, and the name, without ending, of its outputs."""

    path: Path
    name: str


def predict(
    checkpoint: str,
    input: str | Path,
    output: str | Path,
    *,
    processing_resolution: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    prompt: str = "",
    dtype: str = "float32",
) -> list[str]:
    """Predict for `input` and write to `output`, as the module's text says.

    Returns:
        One sentence for each image that could not be read.

    Raises:
        UserError: nothing to read, nothing to predict with, or options that do not fit.
    """
    jobs = find_images(Path(input), Path(output))
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output {output} is no folder: give another one.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}: give at least 1.")
    pipeline = PerceptionPipeline.from_pretrained(checkpoint, dtype=dtype)
    # Every process writes the predictions of its own share.
    jobs = jobs[jax.process_index() :: jax.process_count()]
    failures: list[str] = []
    with (
        ThreadPoolExecutor() as threads,
        tqdm(total=len(jobs), desc="predicting", unit="image") as bar,
    ):
        sizes = list(threads.map(_size_on_disk, [job.path for job in jobs]))
        devices = sharding.batch_devices(pipeline.mesh)
        plan = plan_batches(sizes, batch_size or devices, devices)
        writing: list[Future] = []
        for batch, rows in _decoded(jobs, plan, threads, failures, bar):
            images = np.stack([image for _, image in batch])
            result = pipeline(
                pad_rows(images, rows),
                processing_resolution=processing_resolution,
                seed=seed,
                prompt=prompt,
                batch_size=rows,
            )
            # Files are written while the next batch is predicted; errors surface here.
            _wait(writing)
            writing = [
                threads.submit(_write, Path(output), job, result, prediction)
                for (job, _), prediction in zip(batch, result.prediction, strict=False)
            ]
            bar.update(len(batch))
        _wait(writing)
    return failures


def find_images(source: Path, output: Path) -> list[Job]:
    """The images to predict for, in order of their paths.

    Files whose ending is no image's are ignored, and so is what lies in `output`. Images that share
    a stem (a.jpg and a.png) keep their ending in the name (a_jpg, a_png).

    Raises:
        UserError: there is no image, or an output would replace an image.
    """
    if source.is_dir():
        if output.resolve() == source.resolve():
            raise UserError(f"--output is the folder of the images, {source}: give another one.")
        inside = output.resolve()
        found = sorted(
            path
            for path in source.rglob("*")
            if path.suffix.lower() in RGB_SUFFIXES
            and not path.name.startswith(".")
            and inside not in path.resolve().parents
        )
        if not found:
            raise UserError(
                f"{source} holds no image ({', '.join(sorted(RGB_SUFFIXES))}): give a folder that "
                "does."
            )
        names = output_names([path.relative_to(source) for path in found])
    elif source.exists():
        found, names = [source], [source.stem]
    else:
        raise UserError(f"--input {source} does not exist: give an image or a folder of images.")
    written = {(output / f"{name}{ending}").resolve() for name in names for ending in ENDINGS}
    for path in found:
        if path.resolve() in written:
            raise UserError(f"the output would replace {path}: give another --output.")
    return [Job(path, name) for path, name in zip(found, names, strict=True)]


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name without ending for each path, such that no two images' output files collide."""
    stems = Counter(str(path.with_suffix("")) for path in paths)
    taken: set[str] = set()
    names = []
    for path in paths:
        stem, long = str(path.with_suffix("")), f"{path.with_suffix('')}_{path.suffix[1:]}"
        numbered = (f"{long}_{number}" for number in itertools.count(2))
        candidates = itertools.chain([stem] if stems[stem] == 1 else [], [long], numbered)
        name = next(n for n in candidates if not taken & {n + ending for ending in ENDINGS})
        taken |= {name + ending for ending in ENDINGS}
        names.append(name)
    return names


def _size_on_disk(path: Path) -> tuple[int, int] | None:
    """(height, width) from the file's header, upright; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # Damaged files raise almost anything; decoding will name the file.
        return None
    return (width, height) if sideways else (height, width)


def _decoded(
    jobs: Sequence[Job],
    plan: Sequence[tuple[list[int], int]],
    threads: ThreadPoolExecutor,
    failures: list[str],
    bar: tqdm,
) -> Iterator[tuple[list[tuple[Job, np.ndarray]], int]]:
    """(images, rows) of each batch, one batch ahead; what cannot be read is named and left out."""

    def start(batch: tuple[list[int], int] | None) -> list[tuple[Job, Future]]:
        items = batch[0] if batch else []
        return [(jobs[i], threads.submit(read_rgb, jobs[i].path)) for i in items]

    ahead = start(plan[0] if plan else None)
    for number, (_, rows) in enumerate(plan):
        current, ahead = ahead, start(plan[number + 1] if number + 1 < len(plan) else None)
        batch = []
        for job, future in current:
            try:
                batch.append((job, future.result()))
            except UnreadableFileError as error:
                failures.append(str(error))
                bar.write(f"skipped: {error}", file=sys.stderr)
                bar.update()
        if batch:
            yield batch, rows


def _write(output: Path, job: Job, result: PerceptionOutput, prediction: np.ndarray) -> None:
    record = {
        "processing_resolution": result.processing_resolution,
        "checkpoint": result.checkpoint,
        "step": result.step,
        "seed": result.seed,
        "source": str(job.path),
        "version": jaxpercept.__version__,
    }
    save_prediction(output, job.name, result.kind, prediction, record)


def _wait(writing: Sequence[Future]) -> None:
    for future in writing:
        try:
            future.result()
        except OSError as error:
            raise UserError(f"cannot write to {error.filename}: {error.strerror}.") from error


def main() -> int:
    """Read the flags and predict; 1 if an image could not be read."""
    cli.initialize_distributed()
    failures = predict(**{name: FLAGS[name].value for name in OWN_FLAGS})
    if failures:
        print(f"{len(failures)} image(s) could not be read and were skipped.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
