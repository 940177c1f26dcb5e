"""From images of any size to predictions of that size: resize, pad, predict, resize back.

The steps follow diffusers' Marigold pipelines [`pipelines/marigold/marigold_image_processing.py`]:
the long side goes to the processing resolution with integer arithmetic, antialiased; the border is
replicated right and bottom up to the autoencoder's factor and cut off again after decoding; the
prediction goes back to the image's size without antialiasing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Shaped

from jaxpercept.diffusion.guidance import Guidance, Text
from jaxpercept.diffusion.noise import per_example
from jaxpercept.errors import UserError
from jaxpercept.inference.batches import pad_rows
from jaxpercept.inference.ensemble import ensemble
from jaxpercept.inference.options import Options
from jaxpercept.inference.stepwise import Stepwise
from jaxpercept.resize import resize
from jaxpercept.training import sharding

Params = dict[str, dict[str, Any]]
Size = tuple[int, int]


@runtime_checkable
class PerceptionModel(Protocol):
    """What predicting needs of a model; `methods.Perception` is one."""

    model: Any
    """Has `downscale`, pixels per latent cell."""
    task: Any
    """A `tasks.base.Task`."""
    recipe: Any
    """Has `draws_noise`."""
    targets: int
    """Images in one latent."""

    def encode(self, params: Params, rgb: Array) -> Array:
        """Latents of float images in [-1, 1]."""

    def predict(self, params: Params, image: Array, noise: Array | None, **options: Any) -> Any:
        """Decoded images, not clamped, and their latents."""


class Prediction(NamedTuple):
    """Of n images: the task's maps, their uncertainty (None without an ensemble) and the latents.

    The latents are those of each member, image by image, padding included; mirrored ones are left
    out. `raw` is what the maps are made of, at the size the network worked at, before they are
    resized and finished.
    """

    prediction: Float[Array, "n h w c"]
    uncertainty: Float[Array, "n h w d"] | None
    latent: Float[Array | np.ndarray, "m i j k"]
    raw: Float[Array, "n y x e"] | None = None


def processing_size(size: Size, resolution: int) -> Size:
    """(height, width) whose long side is `resolution`; 0 keeps the size."""
    if resolution == 0:
        return size
    long = max(size)
    return max(size[0] * resolution // long, 1), max(size[1] * resolution // long, 1)


def resolve_resolution(requested: int | None, trained: Size | None, factor: int) -> int:
    """The processing resolution to use: the requested one, or the long side of the training.

    Args:
        requested: None for the default, 0 for each image's own size.
        trained: (height, width) of the training images, if known.
        factor: pixels per latent cell.

    Raises:
        UserError: negative, or not a multiple of `factor`.
    """
    if requested is None:
        return max(trained) if trained is not None else 0
    if requested < 0 or requested % factor:
        nearest = max(round(requested / factor), 1) * factor
        raise UserError(
            f"processing_resolution {requested} is not a multiple of {factor}: use {nearest}, or 0 "
            "for each image's own size."
        )
    return requested


def shared_padding(trained: Size | None, factor: int) -> int:
    """A multiple to pad to such that images of many sizes share few programs.

    Images of the training's shape, lying or upright, are not padded by it.

    Args:
        trained: (height, width) of the training images, if known.
        factor: pixels per latent cell.
    """
    if trained is None or trained[0] == trained[1]:
        return 8 * factor  # 64 pixels for Stable Diffusion
    return math.gcd(*trained)


def to_signed_float(image: Shaped[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """uint8, uint16 or float [0, 1] to float32 [-1, 1]."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        image = image.astype(jnp.float32) / float(jnp.iinfo(image.dtype).max)
    return image.astype(jnp.float32) * 2.0 - 1.0


class Predictor:
    """A model's predictions for images of any size.

    Weights are arguments. The networks are compiled once for each processing size, whatever the
    images' own sizes are; only the two resizes depend on those, and compile in a moment.

    No program moves data between devices: each predicts for its own rows. The members of an
    ensemble, which lie on several devices, come together on the host.

    Args:
        perception: the model.
        mesh: where batches are split.
        pad_multiple: borders are replicated up to multiples of so many pixels; 0: of the
            autoencoder's factor, as diffusers does.

    Raises:
        UserError: `pad_multiple` is no multiple of the autoencoder's factor.
    """

    def __init__(self, perception: PerceptionModel, mesh: Mesh, *, pad_multiple: int = 0):
        self.perception, self.mesh = perception, mesh
        factor = perception.model.downscale
        if pad_multiple < 0 or pad_multiple % factor:
            raise UserError(
                f"pad_multiple {pad_multiple} does not fit: give a multiple of {factor}."
            )
        self.multiple = pad_multiple or factor
        self._prepare = jax.jit(self._resize_and_pad, static_argnames=("size", "method", "flip"))
        self._encode = jax.jit(perception.encode)
        self._embed = jax.jit(perception.embed) if perception.task.reads_text else None
        self._network = jax.jit(self._predict_rows, static_argnames=("num_steps", "first"))
        self._advance = jax.jit(self._advance_rows, static_argnames=("num_steps", "until"))
        self._maps = jax.jit(self._crop, static_argnames=("size", "flip"))
        self._finish = jax.jit(self._resize_back, static_argnames=("output", "method", "kind"))

    def __call__(
        self,
        params: Params,
        image: Shaped[Array, "b h w 3"],
        *,
        resolution: int,
        match_input: bool = True,
        options: Options | None = None,
        latents: Float[np.ndarray, "m i j k"] | None = None,
        input_ids: Int[Array, "b l"] | None = None,
        unwanted_ids: Int[Array, "b l"] | None = None,
        first: int = 0,
        count: int | None = None,
        rows: int | None = None,
        first_step: int = 0,
    ) -> Prediction:
        """Predict a batch.

        Args:
            params: all components, on the mesh.
            image: on the mesh; uint8, uint16 or float [0, 1].
            resolution: long side at which the network works, 0 for the image's own.
            match_input: bring the prediction back to the image's size.
            options: what else there is to choose; None: the model's own.
            latents: standard normal noise to start from instead of that of `options.seed`: a row
                for each member of each of the first `count` images.
            input_ids: what to look for in each image, where the model reads a text; on the mesh.
            unwanted_ids: what not to; see `diffusion.guidance`.
            first: number of the batch's first image, for the noise.
            count: how many of the batch's images matter; the others fill up the devices. The
                answer has at least so many rows.
            rows: predictions made at a time in an ensemble; None: as many as there are images.
            first_step: the first step to take; `latents` are then those that `advance` led to.
        """
        options = options or Options()
        own, count = image.shape[1:3], image.shape[0] if count is None else count
        size = processing_size(own, resolution)
        encoded = self._encoded(params, image, size, options.resample_input)
        text = self._text(params, input_ids, unwanted_ids)
        if options.members == 1:
            numbers = np.arange(first, first + image.shape[0], dtype=np.int32)
            noise = None if latents is None else pad_rows(latents, image.shape[0])
            given = (params, encoded, numbers, noise, text, options)
            decoded, latent = self._run(self._network, *given, first=first_step)
            maps, uncertainty = self._maps(decoded, size=size), None
        else:
            split = (count, first, rows or image.shape[0])
            members, latent = self._ensemble(params, encoded, size, options, latents, text, *split)
            if options.flip:
                mirrored = self._encoded(params, image, size, options.resample_input, flip=True)
                turned, _ = self._ensemble(
                    params, mirrored, size, options, latents, text, *split, flip=True
                )
                members = np.concatenate([members, turned], axis=1)
            maps, uncertainty = self._merge(members, options)
        output = own if match_input else size
        finish = functools.partial(self._finish, output=output, method=options.resample_output)
        if uncertainty is not None:
            uncertainty = finish(uncertainty, kind="uncertainty")
        return Prediction(finish(maps, kind="prediction"), uncertainty, latent, maps)

    def advance(
        self,
        params: Params,
        image: Shaped[Array, "b h w 3"],
        *,
        resolution: int,
        until: int,
        options: Options | None = None,
        input_ids: Int[Array, "b l"] | None = None,
        first: int = 0,
    ) -> Float[Array, "b i j k"]:
        """What x is before step `until`, from where a call goes on with `first_step=until`.

        So a prediction that is corrected does not start anew. Arguments as for a call.
        """
        options, size = options or Options(), processing_size(image.shape[1:3], resolution)
        encoded = self._encoded(params, image, size, options.resample_input)
        text = self._text(params, input_ids, None)
        numbers = np.arange(first, first + image.shape[0], dtype=np.int32)
        given = (params, encoded, numbers, None, text, options)
        return self._run(self._advance, *given, until=until)

    @functools.cached_property
    def stepwise(self) -> Stepwise:
        """The same predictions, step by step."""
        return Stepwise(self)

    def network_size(self, size: Size, resolution: int) -> Size:
        """(height, width) at which the network sees images of that size; each is compiled once."""
        return tuple(edge + -edge % self.multiple for edge in processing_size(size, resolution))

    def _encoded(
        self, params: Params, image: Array, size: Size, method: str, flip: bool = False
    ) -> Array:
        return self._encode(params, self._prepare(image, size=size, method=method, flip=flip))

    def _split(self, tree: Any, rows: Any = slice(None)) -> Any:
        """These rows of the host's arrays, split over the mesh."""
        spread = NamedSharding(self.mesh, sharding.BATCH)
        return jax.tree.map(lambda array: sharding.put_tree(array[rows], spread), tree)

    def _text(self, params: Params, wanted: Array | None, unwanted: Array | None) -> Text | None:
        if wanted is None:
            return None
        ids = [wanted] if unwanted is None else [wanted, unwanted]
        return Text(*(self._embed(params, x) for x in ids))

    def _run(
        self,
        program: Callable[..., Any],
        params: Params,
        encoded: Array,
        numbers: np.ndarray,
        noise: np.ndarray | None,
        text: Text | None,
        options: Options,
        **given: Any,
    ) -> Any:
        """What a program gives for rows that lie on the mesh."""
        args, told = self._arguments(numbers, noise, text, options)
        return program(params, encoded, *args, num_steps=options.num_steps, **told, **given)

    def _arguments(
        self, numbers: np.ndarray, noise: np.ndarray | None, text: Text | None, options: Options
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """On the mesh: the rows' numbers with their noise, and the seed, where there is noise or
        something to go on from; text and mixture by name."""
        told: dict[str, Any] = {"text": text}
        if text is not None:
            guidance = options.guidance or Guidance(*self.perception.recipe.guidance)
            mixture = guidance.mixture(corrected=text.unwanted is not None)
            weights = sharding.put_tree(mixture.weights, sharding.replicated(self.mesh))
            told["mixture"] = dataclasses.replace(mixture, weights=weights)
        if not self.perception.recipe.draws_noise and noise is None:
            return (), told
        rows = {"numbers": numbers} | ({} if noise is None else {"noise": noise})
        seed = sharding.put_tree(np.uint32(options.seed), sharding.replicated(self.mesh))
        return (self._split(rows), seed), told

    def _ensemble(
        self,
        params: Params,
        encoded: Array,
        size: Size,
        options: Options,
        latents: np.ndarray | None,
        text: Text | None,
        count: int,
        first: int,
        rows: int,
        *,
        flip: bool = False,
    ) -> tuple[Float[np.ndarray, "n e h w c"], Float[np.ndarray, "m i j k"]]:
        """The members' maps at the processing size, and their latents; so many rows at a time."""
        members, images = options.ensemble_size, _to_host(encoded)
        texts = jax.tree.map(_to_host, text)
        maps, latent = [], []
        for start in range(0, count * members, rows):
            row = np.minimum(np.arange(start, start + rows), count * members - 1)
            noise = None if latents is None else latents[row]
            chunk, told = self._split((images, texts), row // members)
            numbers = (first * members + row).astype(np.int32)
            given = (params, chunk, numbers, noise, told, options)
            decoded, predicted = self._run(self._network, *given)
            maps.append(_to_host(self._maps(decoded, size=size, flip=flip)))
            latent.append(_to_host(predicted))
        total = count * members
        stacked = np.concatenate(maps)[:total]
        stacked = stacked.reshape(count, members, *stacked.shape[1:])
        return stacked, np.concatenate(latent)[:total]

    def _predict_rows(
        self,
        params: Params,
        image: Array,
        rows: Mapping[str, Array] | None = None,
        seed: Array | None = None,
        **options: Any,
    ) -> tuple[Array, Array]:
        """Decoded images and their latents."""
        return self.perception.predict(params, image, **options, **self._noise(image, rows, seed))

    def _advance_rows(
        self,
        params: Params,
        image: Array,
        rows: Mapping[str, Array] | None = None,
        seed: Array | None = None,
        **options: Any,
    ) -> Array:
        """What x is before a step."""
        return self.perception.advance(params, image, **options, **self._noise(image, rows, seed))

    def _noise(
        self, image: Array, rows: Mapping[str, Array] | None, seed: Array | None
    ) -> dict[str, Array]:
        """What rows start from, given or drawn, and what the noise between steps hangs on."""
        if rows is None:
            return {}
        start, between = jax.random.split(jax.random.key(seed))
        noise, numbers = rows.get("noise"), rows["numbers"]
        if noise is None:
            shape = (*image.shape[1:3], image.shape[3] * self.perception.targets)
            noise = per_example(start, numbers, lambda k: jax.random.normal(k, shape))
        return {"noise": noise, "key": between, "index": numbers}

    def _resize_and_pad(self, image: Array, *, size: Size, method: str, flip: bool) -> Array:
        image = to_signed_float(image[:, :, ::-1] if flip else image)
        image = resize(image, size, method, antialias=method in ("bilinear", "bicubic"))
        pad = [(0, -edge % self.multiple) for edge in size]
        return jnp.pad(image, ((0, 0), *pad, (0, 0)), mode="edge")

    def _crop(self, decoded: Array, *, size: Size, flip: bool = False) -> Array:
        maps = self.perception.to_prediction(decoded[:, : size[0], : size[1]])
        return self.perception.task.mirror(maps) if flip else maps

    def _merge(self, members: np.ndarray, options: Options) -> tuple[Array, Array]:
        task = self.perception.task
        chosen = dict(options.merge)
        if options.flip and options.ensemble_size == 1:
            # The median of two is the lesser one, and both normals are as close to their mean.
            chosen.setdefault("reduction", "mean")
        return ensemble(task.merge, members, **task.merge_options, **chosen)

    def _resize_back(self, maps: Array, *, output: Size, method: str, kind: str) -> Array:
        resized, task = resize(maps, output, method), self.perception.task
        if kind == "uncertainty":
            return resized
        return task.finish(task.after_resize(resized) if output != maps.shape[1:3] else resized)


def _to_host(array: Array) -> np.ndarray:
    """The whole array, of all processes' devices."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
