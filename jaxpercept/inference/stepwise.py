"""A prediction step by step, so that it can be watched, and stopped or corrected on the way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Shaped

from jaxpercept.diffusion.steps import Row, draws_noise, rows
from jaxpercept.inference.answer import targets_apart
from jaxpercept.inference.batches import pad_rows
from jaxpercept.inference.options import Options
from jaxpercept.training import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Glimpse:
    """A prediction on the way.

    Attributes:
        step: steps taken.
        steps: all there are; `step == steps` is the prediction itself.
        latents: gives what x is then, from where a call with `first_step=step` goes on; float32
            [n, i, j, k].
        prediction: gives the task's map of what this step predicts, at the image's size; float32
            [n, h, w, c]. It is decoded when it is asked for.
    """

    step: int
    steps: int
    latents: Callable[[], Float[np.ndarray, "n i j k"]]
    prediction: Callable[[], Float[np.ndarray, "n h w c"]]


class Stepwise:
    """What a `Predictor` does in one program, a step at a time; a part of it in its own file.

    One program serves each step of any number of them, where the whole loop is compiled for each
    number and for each step to go on from.

    Args:
        predictor: whose model and programs these are. The model takes steps: it has no DPT head.
    """

    def __init__(self, predictor: Any):
        self._predictor, self._perception = predictor, predictor.perception
        # One sharding of x, from wherever it comes: another one would be compiled for again.
        spread = NamedSharding(predictor.mesh, sharding.BATCH)
        self._start = jax.jit(
            self._start_rows, static_argnames=("on", "scale"), out_shardings=spread
        )
        self._take = jax.jit(self._take_rows, static_argnames="clip", out_shardings=spread)
        self._decode = jax.jit(self._perception.decode)

    def __call__(
        self,
        params: Any,
        image: Shaped[Array, "b h w 3"],
        *,
        size: tuple[int, int],
        count: int,
        options: Options,
        latents: Float[np.ndarray, "n i j k"] | None = None,
        input_ids: Int[Array, "b l"] | None = None,
        unwanted_ids: Int[Array, "b l"] | None = None,
        first_step: int = 0,
    ) -> Iterator[Glimpse]:
        """A glimpse after each step.

        Args:
            size: (height, width) that the image is resized to.
            params, image, count, options, latents, input_ids, unwanted_ids, first_step: as for a
                call of the predictor.
        """
        own, predictor = image.shape[1:3], self._predictor
        encoded = predictor._encoded(params, image, size, options.resample_input)
        text = predictor._text(params, input_ids, unwanted_ids)
        numbers = np.arange(image.shape[0], dtype=np.int32)
        given = None if latents is None else pad_rows(latents, image.shape[0])
        args, told = predictor._arguments(numbers, given, text, options)
        whole = self._perception.steps(options.num_steps)
        table, told = rows(whole), {"clip": whole.clip, **told}
        x = self._start(encoded, *args, on=first_step > 0, scale=whole.initial_scale)

        def map_of(latent: Array) -> np.ndarray:
            maps = predictor._maps(self._decode(params, latent), size=size)
            method = options.resample_output
            maps = predictor._finish(maps, output=own, method=method, kind="prediction")
            return targets_apart(np.asarray(maps)[:count], self._perception.targets)

        total, drawn = len(whole), ()
        if draws_noise(whole):
            drawn = args[0]["numbers"], args[1]
        for number in range(first_step, total):
            row = jax.tree.map(lambda column, i=number: column[i], table)
            x, x0 = self._take(params, encoded, x, row, *drawn, **told)
            last = number + 1 == total and self._perception.recipe.output == "sample"
            yield Glimpse(
                number + 1,
                total,
                latents=lambda x=x: np.asarray(x)[:count],
                prediction=functools.cache(functools.partial(map_of, x if last else x0)),
            )

    def _start_rows(
        self,
        image: Array,
        given: Mapping[str, Array] | None = None,
        seed: Array | None = None,
        *,
        on: bool,
        scale: float,
    ) -> Array:
        """What x is before the first step; `on`: before the one to go on with, as it was given."""
        noise = self._predictor._noise(image, given, seed).get("noise")
        return noise if on else self._perception.start(image, noise).astype(jnp.float32) * scale

    def _take_rows(
        self,
        params: Any,
        image: Array,
        x: Array,
        row: Row,
        numbers: Array | None = None,
        seed: Array | None = None,
        **told: Any,
    ) -> tuple[Array, Array]:
        """The next x, and what this step predicts; numbers and seed for a step that draws noise."""
        if numbers is not None:
            noise = self._predictor._noise(image, {"numbers": numbers, "noise": x}, seed)
            told |= {"key": noise["key"], "index": noise["index"]}
        return self._perception.step(params, image, x, row, **told)
