"""Other ways to predict with a pipeline than image by image: in tiles, frame by frame, and step by
step.

The functions are methods of `pipeline.PerceptionPipeline`, their first argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpercept.diffusion.guidance import Guidance
from jaxpercept.errors import UserError
from jaxpercept.inference.answer import PerceptionOutput, check_finite
from jaxpercept.inference.batches import put_rows
from jaxpercept.inference.images import to_batch
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.outputs import KINDS
from jaxpercept.inference.predictor import processing_size
from jaxpercept.inference.sequence import SharedScale, next_latents
from jaxpercept.inference.stepwise import Glimpse
from jaxpercept.inference.texts import Texts
from jaxpercept.inference.tiles import cut_tiles, merge_tiles, plan_tiles
from jaxpercept.training import sharding

# Merging tiles by a task's `merge`.
_TILES = {"affine": "affine", "normals": "unit", "average": "none"}


def tiled(
    pipe: Any,
    image: Any,
    tile: int,
    overlap: int | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> PerceptionOutput:
    """Predict for one image in overlapping tiles, for images beyond memory or training size.

    Tiles and, once more, the whole image are predicted at the processing resolution and merged
    without seams (`inference.tiles`): depth and disparity, whose scale and shift differ from
    tile to tile, are fitted to each other and to the coarse prediction of the whole. A pixel's
    class is that of the tile it lies deepest in.

    Args:
        image: as for a call, one.
        tile: side in pixels of the image. A network sees what it was trained for where tiles
            have about its processing resolution, or a small multiple of it.
        overlap: least overlap of neighbours in pixels; None: a quarter of a tile.
        seed, options: as for a call, but for `latents`.

    Raises:
        UserError: several images, or tiles or options that do not fit.
    """
    images = to_batch(image)
    if len(images) != 1 or options.get("latents") is not None:
        raise UserError("tiles are cut of one image at a time, and take no latents.")
    size = images.shape[1:3]
    places = plan_tiles(size, (tile, tile), tile // 4 if overlap is None else overlap)
    whole = pipe(images, seed=seed, **options)
    if len(places) == 1:
        return whole
    parts = pipe(cut_tiles(images[0], places, (tile, tile)), seed=seed, **options)
    task, targets = pipe.perception.task, pipe.perception.targets
    alignment = "nearest" if KINDS[task.kind].categories else _TILES[task.merge]
    merged = [
        merge_tiles(
            parts.prediction[target::targets],
            places,
            size,
            alignment=alignment,
            anchor=whole.prediction[target] if task.merge == "affine" else None,
        )
        for target in range(targets)
    ]
    return dataclasses.replace(parts, prediction=np.stack(merged), uncertainty=None)


def watch(
    pipe: Any,
    image: Any,
    prompt: Texts = "",
    *,
    unwanted: Texts = "",
    latents: Any = None,
    first_step: int = 0,
    num_inference_steps: int | None = None,
    processing_resolution: int | None = None,
    seed: int = 0,
    guidance: Guidance | None = None,
) -> Iterator[Glimpse]:
    """Predict for images of one size, with a glimpse of the prediction after each step.

    The last one shows what a call returns. Arguments as for a call; models of one step and those
    with a DPT head give one glimpse.

    Raises:
        UserError: as a call.
    """
    given = {"num_inference_steps": num_inference_steps, "seed": seed, "guidance": guidance}
    options = Options(num_steps=num_inference_steps, seed=seed, guidance=guidance)
    check_options(pipe.perception, options)
    if pipe.perception.recipe.timesteps is not None:
        out = pipe(
            image,
            prompt=prompt,
            unwanted=unwanted,
            processing_resolution=processing_resolution,
            **given,
        )
        yield Glimpse(1, 1, latents=lambda: out.latent, prediction=lambda: out.prediction)
        return
    images = to_batch(image)
    params, texts = pipe._texts(prompt or pipe._prompt, unwanted, len(images))
    size = processing_size(images.shape[1:3], pipe._resolution(processing_resolution))
    if latents is not None:
        latents = pipe._noise(latents, len(images), size)
    devices = sharding.batch_devices(pipe.mesh)
    rows = math.ceil(len(images) / devices) * devices
    ids = {name: put_rows(array, rows, pipe.mesh) for name, array in texts.items()}
    glimpses = pipe._predictor.stepwise(
        params,
        put_rows(images, rows, pipe.mesh),
        size=size,
        count=len(images),
        options=options,
        latents=latents,
        first_step=first_step,
        **ids,
    )
    for glimpse in glimpses:
        if glimpse.step == glimpse.steps:
            check_finite(glimpse.prediction(), pipe.checkpoint)
        yield glimpse


def sequence(
    pipe: Any,
    frames: Iterable[Any],
    *,
    strength: float = 0.1,
    processing_resolution: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[PerceptionOutput]:
    """Predict for the frames of a video, with less flicker.

    All frames start from the same noise, warmed by the last frame's latent; depth and disparity
    are brought to one scale (`inference.sequence`), on which values may leave [0, 1]: divide by
    the range of the whole sequence (`sequence.normalise`) where that matters.

    Args:
        frames: images of one size, in order.
        strength: share of the last frame's latent in the next frame's noise, 0 for none.
        processing_resolution, seed, options: as for a call, but for `latents`.

    Raises:
        UserError: a frame or an option does not fit.
    """
    scale = SharedScale() if pipe.perception.task.merge == "affine" else None
    noise, previous = None, None
    for frame in frames:
        latents = None
        if pipe.perception.recipe.draws_noise:
            if noise is None:
                noise = _fixed_noise(pipe, frame, processing_resolution, seed, options)
            latents = next_latents(noise, previous, strength)
        out = pipe(
            frame,
            processing_resolution=processing_resolution,
            latents=latents,
            seed=seed,
            **options,
        )
        previous = out.latent
        if scale is not None:
            out = dataclasses.replace(out, prediction=scale(out.prediction[0])[None])
        yield out


def _fixed_noise(
    pipe: Any, frame: Any, resolution: int | None, seed: int, options: Mapping[str, Any]
) -> Float[np.ndarray, "m i j k"]:
    size = processing_size(to_batch(frame).shape[1:3], pipe._resolution(resolution))
    shape = pipe._latent_shape(options.get("ensemble_size", 1), size)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
