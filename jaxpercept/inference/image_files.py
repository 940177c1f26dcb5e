"""The images of a folder: what they are called, how large they are, and their pixels."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from jaxpercept.data.readers import RGB_SUFFIXES, UnreadableFileError, read_rgb
from jaxpercept.errors import UserError
from jaxpercept.inference.outputs import ENDINGS


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to predict for: where it lies, and the name, without ending, of its outputs."""

    path: Path
    name: str


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


def size_on_disk(path: Path) -> tuple[int, int] | None:
    """(height, width) from the file's header, upright; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # Damaged files raise almost anything; decoding will name the file.
        return None
    return (width, height) if sideways else (height, width)


def decoded(
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
