"""One call from images to predictions."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Shaped

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step
from jaxpercept.checkpoints.tokenizer import Tokenize
from jaxpercept.diffusion.guidance import Guidance
from jaxpercept.errors import UserError
from jaxpercept.inference import modes
from jaxpercept.inference.answer import PerceptionOutput, check_finite, targets_apart
from jaxpercept.inference.batches import local_mesh, plan_batches, put_rows
from jaxpercept.inference.images import to_batch
from jaxpercept.inference.opening import (
    description_of_part,
    no_text,
    open_perception,
    open_tokenizer,
    perception_of,
)
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.outputs import KINDS, legend
from jaxpercept.inference.predictor import (
    Params,
    Prediction,
    Predictor,
    processing_size,
    resolve_resolution,
    shared_padding,
)
from jaxpercept.inference.texts import Texts, token_ids
from jaxpercept.inference.weights import place_weights
from jaxpercept.training import sharding


class PerceptionPipeline:
    """A trained model, ready for images.

        pipe = PerceptionPipeline.from_pretrained("runs/depth")
        depth = pipe(image).prediction[0, ..., 0]

    Args:
        description: what the model is.
        params: its weights.
        dtype: compute dtype: "float32", "bfloat16" or "float16".
        mesh: devices to split batches over; None takes all devices of this process.
        attention: attention implementation, "auto" by default.
        vae_tile: the autoencoder works in overlapping tiles of so many pixels; 0: in one piece.
        pad_multiple: borders are replicated up to multiples of so many pixels, such as 64, so that
            images of many sizes share few compiled programs; predictions then differ a little from
            those of the default, 0, which pads as diffusers does. None: by the training's size.
        checkpoint: the name reported in outputs.
        step: the training step reported in outputs.
        tokenize: reads texts, see `opening.open_tokenizer`.
    """

    def __init__(
        self,
        description: Description,
        params: Params,
        *,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "auto",
        vae_tile: int = 0,
        pad_multiple: int | None = 0,
        checkpoint: str = "",
        step: int | None = None,
        tokenize: Tokenize | None = None,
    ):
        self.description, self.checkpoint, self.step = description, checkpoint, step
        self.perception = perception_of(
            description, dtype=dtype, attention=attention, vae_tile=vae_tile, checkpoint=checkpoint
        )
        self.mesh = local_mesh() if mesh is None else mesh
        reads_text = self.perception.task.reads_text
        self.params = place_weights(params, dtype, self.mesh, text=reads_text)
        if pad_multiple is None:
            factor = self.perception.model.downscale
            pad_multiple = shared_padding(description.resolution, factor)
        self._predictor = Predictor(self.perception, self.mesh, pad_multiple=pad_multiple)
        self._encode: Callable[[str], dict[str, np.ndarray]] | None = None
        self._tokenize, self._prompt = tokenize, ""

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        task: str | None = None,
        family: str | None = None,
        base: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        decoder: str | os.PathLike[str] | None = None,
        lora: str | os.PathLike[str] | None = None,
        prompt: str = "",
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "auto",
        vae_tile: int = 0,
        pad_multiple: int | None = 0,
    ) -> PerceptionPipeline:
        """Open a checkpoint: a training workdir, an Orbax export, a diffusers folder or hub id.

        Marigold's checkpoints say what they are; `task`, `family` and `base` are for those of
        others that do not (see `methods.families`).

        Args:
            path_or_id: the checkpoint.
            task: what it predicts, a key of `tasks.TASKS`.
            family: how: "genpercept", "rgb_blending", "marigold", "e2e_ft", "lotus_d", "lotus_g".
            base: the text-to-image checkpoint that has what this one lacks; GenPercept publishes
                UNets alone.
            vae: an autoencoder in place of the checkpoint's own, AutoencoderKL or AutoencoderTiny.
            decoder: an autoencoder that only decodes in the place of the own one.
            lora: an adapter of the UNet, in peft's or diffusers' format, added to its weights.
            prompt: what the UNet reads, where there is a text encoder; "" is what the model was
                trained with, if it says so, or the empty prompt. For a model that looks for what a
                text names, what to look for unless a call says something else.
            dtype, mesh, attention, vae_tile, pad_multiple: see the class.

        Raises:
            UserError: nothing complete there; something must be named; a text-to-image model that
                was never fine-tuned; or a prompt and no text encoder.
        """
        source = os.fspath(path_or_id)
        named = {"task": task, "family": family, "base": base}
        description, params = open_perception(
            source, vae=vae, decoder=decoder, lora=lora, prompt=prompt, **named
        )
        pipeline = cls(
            description,
            params,
            dtype=dtype,
            mesh=mesh,
            attention=attention,
            vae_tile=vae_tile,
            pad_multiple=pad_multiple,
            checkpoint=source,
            step=latest_step(Path(source)),
            tokenize=open_tokenizer(source, description, base),
        )
        pipeline._prompt = prompt
        pipeline._encode = functools.cache(
            lambda text: open_perception(source, prompt=text, **named)[1]["prompt"]
        )
        return pipeline

    def part(self, task: str) -> PerceptionPipeline:
        """The same model asked for one of a generalist's tasks; it shares the weights.

        Raises:
            UserError: the model was not trained for it.
        """
        pipeline = copy.copy(self)
        pipeline.description = description_of_part(self.description, task, self.checkpoint)
        part = self.perception.task.parts[task]
        pipeline.perception = dataclasses.replace(self.perception, task=part)
        multiple = self._predictor.multiple
        pipeline._predictor = Predictor(pipeline.perception, self.mesh, pad_multiple=multiple)
        return pipeline

    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        ensemble_size: int = 1,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        latents: Any = None,
        seed: int = 0,
        prompt: Texts = "",
        *,
        unwanted: Texts = "",
        guidance: Guidance | None = None,
        batch_size: int | None = None,
        flip: bool = False,
        resample_method_input: str = "bilinear",
        resample_method_output: str = "bilinear",
        ensembling: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ) -> PerceptionOutput:
        """Predict for one image, or for several of one size.

        Args:
            image: PIL; uint8, uint16 or float [0, 1] array [h, w], [h, w, c] or [n, h, w, c]; or a
                list of these.
            num_inference_steps: None for the model's own number; one-step models take no other.
            ensemble_size: predictions for each image that are merged into one; 1 for a
                deterministic model.
            processing_resolution: long side in pixels at which the network works. None: the
                model's own (the long side of the training images); 0: the image's own size.
            match_input_resolution: whether the prediction has the image's size or the processing
                size.
            latents: the noise to start from instead of that of `seed`, a row for each of the
                ensemble's predictions of each image: [n e, i, j, k], or [n e, k, i, j] as diffusers
                gives it (where both fit, the first is meant).
            seed: of the noise. The noise of a prediction depends on the seed and on its number
                alone, not on batch size or devices.
            prompt: what the UNet reads instead of the prompt it was opened with. The first time
                that a text is given, the checkpoint is opened again to encode it. For a model that
                looks for what a text names, what to look for: one text, or one for each image.
            unwanted: for such a model, what it took for that and should not (a correctional
                prompt): likewise.
            guidance: how strongly text, image and correction pull, see `diffusion.guidance`.
            batch_size: predictions at a time; None: one a device.
            flip: also predict for the mirrored image, and merge.
            resample_method_input, resample_method_output: "bilinear", "bicubic", "nearest",
                "nearest-exact" or "area".
            ensembling: arguments of the ensembling function, see `inference.ensemble`.
            first_step: the step to go on from, with the latents that `advance` gave.

        Raises:
            UserError: an image or an option that does not fit the model.
        """
        options = Options(
            num_steps=num_inference_steps,
            ensemble_size=ensemble_size,
            flip=flip,
            seed=seed,
            resample_input=resample_method_input,
            resample_output=resample_method_output,
            merge=tuple(sorted((ensembling or {}).items())),
            guidance=guidance,
        )
        check_options(self.perception, options)
        if latents is not None and not (self.perception.recipe.draws_noise or first_step):
            raise UserError("this model starts from the image, not from noise: leave latents out.")
        resolution = self._resolution(processing_resolution)
        images = to_batch(image)
        params, texts = self._texts(prompt or self._prompt, unwanted, len(images))
        if latents is not None:
            size = processing_size(images.shape[1:3], resolution)
            latents = self._noise(latents, len(images) * ensemble_size, size)
        predictions = self._predict(
            params,
            images,
            batch_size,
            latents,
            texts,
            options=options,
            resolution=resolution,
            match_input=match_input_resolution,
            first_step=first_step,
        )
        prediction, uncertainty, latent, _ = (
            None if parts[0] is None else np.concatenate(parts).astype(np.float32)
            for parts in zip(*predictions, strict=True)
        )
        check_finite(prediction, self.checkpoint)
        kind = self.perception.task.kind
        return PerceptionOutput(
            prediction=targets_apart(prediction, self.perception.targets),
            uncertainty=None
            if uncertainty is None
            else targets_apart(uncertainty, self.perception.targets),
            latent=latent,
            kind=kind,
            range=KINDS[kind].range,
            convention=KINDS[kind].convention,
            processing_resolution=resolution,
            checkpoint=self.checkpoint,
            step=self.step,
            seed=seed,
            num_inference_steps=num_inference_steps or self.perception.recipe.num_steps,
            ensemble_size=options.members,
            target_properties=self.description.model_index.get("target_properties"),
            legend=legend(self.perception.task),
        )

    def advance(
        self,
        image: Any,
        prompt: str,
        until: int,
        *,
        num_inference_steps: int | None = None,
        processing_resolution: int | None = None,
        seed: int = 0,
        guidance: Guidance | None = None,
    ) -> Float[np.ndarray, "n i j k"]:
        """The latents before step `until`, from where a call with `first_step=until` goes on.

        A prediction that was corrected then costs a part of the steps. Arguments as for a call, for
        one image.
        """
        options = Options(num_steps=num_inference_steps, seed=seed, guidance=guidance)
        check_options(self.perception, options)
        images = to_batch(image)
        params, texts = self._texts(prompt, "", len(images))
        rows = sharding.batch_devices(self.mesh)
        x = self._predictor.advance(
            params,
            put_rows(images, rows, self.mesh),
            resolution=self._resolution(processing_resolution),
            until=until,
            options=options,
            **{name: put_rows(ids, rows, self.mesh) for name, ids in texts.items()},
        )
        return np.asarray(x)[: len(images)]

    def network_size(
        self, size: tuple[int, int], processing_resolution: int | None = None
    ) -> tuple[int, int]:
        """(height, width) in pixels at which the network sees images of that size.

        Each such size is compiled once.
        """
        return self._predictor.network_size(size, self._resolution(processing_resolution))

    tiled = modes.tiled
    sequence = modes.sequence
    watch = modes.watch

    def _resolution(self, requested: int | None) -> int:
        factor = self.perception.model.downscale
        return resolve_resolution(requested, self.description.resolution, factor)

    def _latent_shape(self, rows: int, size: tuple[int, int]) -> tuple[int, ...]:
        multiple, factor = self._predictor.multiple, self.perception.model.downscale
        cells = (math.ceil(edge / multiple) * multiple // factor for edge in size)
        channels = self.perception.model.vae.config.latent_channels * self.perception.targets
        return (rows, *cells, channels)

    def _predict(
        self,
        params: Params,
        images: Shaped[np.ndarray, "n h w 3"],
        batch_size: int | None,
        latents: np.ndarray | None,
        texts: Mapping[str, np.ndarray],
        *,
        options: Options,
        **given: Any,
    ) -> list[Prediction]:
        """Predictions of each batch, on the host."""
        devices = sharding.batch_devices(self.mesh)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1.")
        rows = math.ceil((batch_size or devices) / devices) * devices
        members = options.ensemble_size
        # One key: all images have one size here, and so all batches have the same number of rows.
        batches = plan_batches([0] * len(images), max(rows // members, 1), devices)
        predictions = []
        for items, padded in batches:
            own = slice(items[0] * members, (items[-1] + 1) * members)
            prediction = self._predictor(
                params,
                put_rows(images[items], padded, self.mesh),
                options=options,
                latents=None if latents is None else latents[own],
                first=items[0],
                count=len(items),
                rows=rows if members > 1 else padded,
                **{name: put_rows(ids[items], padded, self.mesh) for name, ids in texts.items()},
                **given,
            )
            answer = jax.tree.map(np.asarray, prediction._replace(raw=None))
            wanted = Prediction(
                answer.prediction[: len(items)],
                answer.uncertainty,
                answer.latent[: len(items) * members],
            )
            predictions.append(wanted)
        return predictions

    def _texts(
        self, prompt: Texts, unwanted: Texts, count: int
    ) -> tuple[Params, dict[str, np.ndarray]]:
        """The weights with the prompt, and the token ids of each image's texts."""
        if not self.perception.task.reads_text:
            if unwanted:
                raise UserError("this model looks for nothing that a text names: leave it out.")
            if not prompt:
                return self.params, {}
            if not isinstance(prompt, str):
                raise UserError("this model reads one prompt for all images: give one text.")
            if self._encode is None:
                raise no_text(self.checkpoint)
            return {**self.params, "prompt": self._encode(prompt)}, {}
        task = self.perception.task
        return self.params, token_ids(task, self._tokenize, prompt, unwanted, count)

    def _noise(
        self, latents: Any, rows: int, size: tuple[int, int]
    ) -> Float[np.ndarray, "m i j k"]:
        """Given noise, as float32 NHWC."""
        latents = np.asarray(latents, np.float32)
        shape = self._latent_shape(rows, size)
        channels_first = (shape[0], shape[3], *shape[1:3])
        if latents.shape == shape:
            return latents
        if latents.shape == channels_first:
            return latents.transpose(0, 2, 3, 1)
        raise UserError(
            f"latents has the shape {list(latents.shape)}: give {list(shape)} (or, as diffusers "
            f"has it, {list(channels_first)})."
        )
