"""What a model estimates on its way from noise to a prediction, and from the truth with noise.

`inference.analysis` makes curves of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpercept import losses
from jaxpercept.diffusion.guidance import Text
from jaxpercept.diffusion.steps import ideal_path, sample_from, trajectory
from jaxpercept.inference.options import Options
from jaxpercept.inference.predictor import (
    Params,
    Prediction,
    Predictor,
    Size,
    processing_size,
)
from jaxpercept.methods import Perception
from jaxpercept.training import sharding


class Truth(NamedTuple):
    """What a perfect model would predict.

    Attributes:
        latent: of the target's image, z_0.
        mask: its cells that the truth covers whole.
    """

    latent: Float[Array, "b i j k"]
    mask: Bool[Array, "b i j 1"]


class Opened(NamedTuple):
    """A batch at the start.

    Attributes:
        image: the images' latents.
        text: what to look for, where the model reads a text.
        truth: the true latents.
        numbers: of the images, for the noise.
        size, output: (height, width) at which the network works, without padding, and of the
            predictions.
    """

    image: Float[Array, "b i j c"]
    text: Text | None
    truth: Truth
    numbers: np.ndarray
    size: Size
    output: Size


class Trace(NamedTuple):
    """What a trajectory of n steps passes through.

    Attributes:
        latents: what each step predicted of the target's latent, and last that latent itself.
        drift: the sum of squares of what a step's sample differs by from a training sample with the
            same noise, over the cells that the truth covers.
        error: likewise of what each prediction differs by from the true latent.
        count: how many values these are sums of.
        all: how many there are, those that the truth does not cover included.
    """

    latents: Float[Array, "m b i j k"]
    drift: Float[Array, " n"]
    error: Float[Array, " n"]
    count: Int[Array, ""]
    all: Int[Array, ""]


class Tracer(Predictor):
    """Predictions of single steps, for images with a truth.

    Each program is compiled once for each size of images, whichever step it is about. Arguments as
    of `Predictor`.
    """

    def __init__(self, perception: Perception, mesh: Mesh, *, pad_multiple: int = 0):
        super().__init__(perception, mesh, pad_multiple=pad_multiple)
        whole = sharding.replicated(mesh)
        spread = NamedSharding(mesh, P(None, *sharding.BATCH))
        self._true = jax.jit(self._encode_truth)
        self._trace = jax.jit(
            self._trace_rows,
            static_argnames=("num_steps",),
            out_shardings=Trace(spread, whole, whole, whole, whole),
        )
        self._resume = jax.jit(self._resume_rows, static_argnames=("num_steps",))
        self._decode = jax.jit(self._decode_one)

    def open(
        self,
        params: Params,
        image: Shaped[Array, "b h w 3"],
        truth: Mapping[str, Array],
        *,
        resolution: int,
        options: Options,
        input_ids: Int[Array, "b l"] | None = None,
        first: int = 0,
    ) -> Opened:
        """Encode a batch and its truth; arguments as for a call, where they have the same names.

        Args:
            truth: the task's fields and "rgb", at the size where the network works.
        """
        size = processing_size(image.shape[1:3], resolution)
        return Opened(
            image=self._encoded(params, image, size, options.resample_input),
            text=self._text(params, input_ids, None),
            truth=self._true(params, dict(truth)),
            numbers=np.arange(first, first + image.shape[0], dtype=np.int32),
            size=size,
            output=image.shape[1:3],
        )

    def trace(self, params: Params, batch: Opened, options: Options, count: int) -> Trace:
        """Run a trajectory; sums are those of the first `count` images."""
        given = {"truth": batch.truth, "count": self._scalar(count)}
        return self._run(self._trace, *self._row_arguments(params, batch, options), **given)

    def estimate(
        self,
        params: Params,
        batch: Opened,
        latents: Float[Array, "m b i j k"],
        number: int,
        options: Options,
    ) -> Prediction:
        """The prediction that one of a trace's latents decodes to."""
        return self._shown(*self._decode(params, latents, self._scalar(number)), batch, options)

    def finish(self, params: Params, batch: Opened, first: int, options: Options) -> Prediction:
        """The prediction from step `first` on, from the true latent with the noise of its level."""
        given = {"truth": batch.truth.latent, "first": self._scalar(first)}
        arguments = self._row_arguments(params, batch, options)
        return self._shown(*self._run(self._resume, *arguments, **given), batch, options)

    def _row_arguments(self, params: Params, batch: Opened, options: Options) -> tuple[Any, ...]:
        return params, batch.image, batch.numbers, None, batch.text, options

    def _scalar(self, value: int) -> Array:
        return sharding.put_tree(np.int32(value), sharding.replicated(self.mesh))

    def _shown(self, decoded: Array, latent: Array, batch: Opened, options: Options) -> Prediction:
        maps = self._maps(decoded, size=batch.size)
        method = options.resample_output
        shown = self._finish(maps, output=batch.output, method=method, kind="prediction")
        return Prediction(shown, None, latent, maps)

    def _encode_truth(self, params: Params, fields: Mapping[str, Array]) -> Truth:
        target = self.perception.task.encode_target(fields)
        pad = [(0, 0), *((0, -edge % self.multiple) for edge in target.image.shape[1:3]), (0, 0)]
        latent = self.perception.encode(params, jnp.pad(target.image, pad, mode="edge"))
        return Truth(latent, losses.pool_mask(jnp.pad(target.mask, pad), self._cell))

    @property
    def _cell(self) -> int:
        return self.perception.model.downscale

    def _trace_rows(
        self,
        params: Params,
        image: Array,
        rows: Mapping[str, Array] | None = None,
        seed: Array | None = None,
        *,
        truth: Truth,
        count: Array,
        num_steps: int | None,
        **conditions: Any,
    ) -> Trace:
        perception, steps = self.perception, self.perception.steps(num_steps)
        drawn = self._noise(image, rows, seed)
        network = perception.network(params, image, **conditions)
        start = perception.start(image, drawn.pop("noise", None))
        passed = trajectory(steps, network, start, **drawn)
        unlimited = dataclasses.replace(steps, clip=None)
        seen = ideal_path(unlimited, truth.latent, start, **drawn)
        scale = steps.table.scale.astype(np.float32)[:, None, None, None, None]
        own = (jnp.arange(image.shape[0]) < count)[:, None, None, None]
        mask = truth.mask & own

        def squares(difference: Array) -> Array:
            return jnp.where(mask[None], difference**2, 0).sum(axis=(1, 2, 3, 4))

        return Trace(
            latents=jnp.concatenate([passed.x0, truth.latent[None].astype(passed.x0.dtype)]),
            drift=squares(scale * passed.x - seen),
            error=squares(passed.x0 - truth.latent[None]),
            count=mask.sum() * truth.latent.shape[-1],
            all=jnp.broadcast_to(own, truth.latent.shape).sum(),
        )

    def _resume_rows(
        self,
        params: Params,
        image: Array,
        rows: Mapping[str, Array] | None = None,
        seed: Array | None = None,
        *,
        truth: Array,
        first: Array,
        num_steps: int | None,
        **conditions: Any,
    ) -> tuple[Array, Array]:
        perception, steps = self.perception, self.perception.steps(num_steps)
        drawn = self._noise(image, rows, seed)
        network = perception.network(params, image, **conditions)
        start = perception.start(image, drawn.pop("noise", None))
        alpha, scale = (
            jnp.asarray(column, jnp.float32)[first]
            for column in (steps.table.alpha, steps.table.scale)
        )
        x = (jnp.sqrt(alpha) * truth + jnp.sqrt(1 - alpha) * start) / scale
        last, x0 = sample_from(steps, network, x, first, **drawn)
        latent = x0 if perception.recipe.output == "x0" else last
        return perception.decode(params, latent), latent

    def _decode_one(self, params: Params, latents: Array, number: Array) -> tuple[Array, Array]:
        latent = latents[number]
        return self.perception.decode(params, latent), latent
