"""One call from images to predictions."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step, load_model
from jaxpercept.errors import UserError
from jaxpercept.inference.images import to_batch
from jaxpercept.inference.outputs import KINDS
from jaxpercept.inference.predictor import (
    Params,
    Predictor,
    local_mesh,
    plan_batches,
    put_rows,
    resolve_resolution,
)
from jaxpercept.methods import OneStep, build_method
from jaxpercept.training import sharding

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class PerceptionOutput:
    """Predictions of N images, and what they are.

    Attributes:
        prediction: float32 [N, h, w, c], diffusers' Marigold conventions.
        uncertainty: float32 [N, h, w, 1], only where several predictions were merged.
        latent: float32 [N, i, j, c], what the prediction was decoded from, padding included.
        kind: the kind of prediction, a key of `outputs.KINDS`.
        range: least and largest value.
        convention: what the values mean.
        processing_resolution: long side in pixels the network worked at; 0: the images' own.
        checkpoint: what was opened.
        step: the training step, where the checkpoint is a training workdir.
        seed: the seed given; deterministic models do not use it.
    """

    prediction: Float[np.ndarray, "n h w c"]
    uncertainty: Float[np.ndarray, "n h w 1"] | None
    latent: Float[np.ndarray, "n i j k"]
    kind: str
    range: tuple[float, float]
    convention: str
    processing_resolution: int
    checkpoint: str
    step: int | None
    seed: int


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
        checkpoint: the name reported in outputs.
        step: the training step reported in outputs.
    """

    def __init__(
        self,
        description: Description,
        params: Params,
        *,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "auto",
        checkpoint: str = "",
        step: int | None = None,
    ):
        self.description, self.checkpoint, self.step = description, checkpoint, step
        self.method = perception_method(
            description, dtype=dtype, attention=attention, checkpoint=checkpoint
        )
        self.mesh = local_mesh() if mesh is None else mesh
        self.params = place_weights(params, dtype, self.mesh)
        self._predictor = Predictor(self.method, self.mesh)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "auto",
    ) -> PerceptionPipeline:
        """Open a training workdir, an Orbax export, or a diffusers folder or hub id.

        Raises:
            UserError: nothing complete there, or a text-to-image model that was never fine-tuned.
        """
        source = os.fspath(path_or_id)
        description, params = load_model(source)
        return cls(
            description,
            params,
            dtype=dtype,
            mesh=mesh,
            attention=attention,
            checkpoint=source,
            step=latest_step(Path(source)),
        )

    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        ensemble_size: int = 1,
        processing_resolution: int | None = None,
        match_input_resolution: bool = True,
        latents: Any = None,
        seed: int = 0,
        prompt: str = "",
        *,
        batch_size: int | None = None,
    ) -> PerceptionOutput:
        """Predict for one image, or for several of one size.

        Args:
            image: PIL; uint8, uint16 or float [0, 1] array [h, w], [h, w, c] or [n, h, w, c]; or a
                list of these.
            num_inference_steps: None or 1 for a one-step model.
            ensemble_size: 1 for a deterministic model.
            processing_resolution: long side in pixels at which the network works. None: the long
                side of the training images; 0: the image's own size.
            match_input_resolution: whether the prediction has the image's size or the processing
                size.
            latents: None for a one-step model, which starts from the image alone.
            seed: kept in the output.
            prompt: empty for a task that reads no text.
            batch_size: images at a time; None: one a device.

        Raises:
            UserError: an image or an option that does not fit the model.
        """
        self._check_options(num_inference_steps, ensemble_size, latents, prompt)
        resolution = resolve_resolution(
            processing_resolution, self.description.resolution, self._predictor.factor
        )
        images = to_batch(image)
        devices = sharding.batch_devices(self.mesh)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1.")
        # One key: all images have one size here, and so all batches have the same number of rows.
        batches = plan_batches([0] * len(images), batch_size or devices, devices)
        results = []
        for items, rows in batches:
            prediction, latent = self._predictor(
                self.params,
                put_rows(images[items], rows, self.mesh),
                resolution=resolution,
                match_input=match_input_resolution,
            )
            results.append((np.asarray(prediction)[: len(items)], np.asarray(latent)[: len(items)]))
        prediction, latent = (np.concatenate(parts) for parts in zip(*results, strict=True))
        if not np.isfinite(prediction).all():
            raise UserError(
                f"{self.checkpoint or 'the model'} predicts values that are not finite: its "
                "weights are damaged, or need dtype float32 or bfloat16."
            )
        kind = self.method.task.kind
        return PerceptionOutput(
            prediction=prediction,
            uncertainty=None,
            latent=latent.astype(np.float32),
            kind=kind,
            range=KINDS[kind].range,
            convention=KINDS[kind].convention,
            processing_resolution=resolution,
            checkpoint=self.checkpoint,
            step=self.step,
            seed=seed,
        )

    def _check_options(
        self, num_inference_steps: int | None, ensemble_size: int, latents: Any, prompt: str
    ) -> None:
        if num_inference_steps not in (None, 1):
            raise UserError(
                f"this model predicts in one step, not {num_inference_steps}: leave "
                "num_inference_steps out."
            )
        if ensemble_size != 1:
            raise UserError(
                f"ensemble_size {ensemble_size} is pointless for a deterministic model, whose "
                "predictions are all equal: leave it out."
            )
        if latents is not None:
            raise UserError("a one-step model takes no noise: leave latents out.")
        if prompt and not self.method.needs_text:
            raise UserError(
                f"the task {self.method.task.name!r} reads no text: leave the prompt out."
            )


def perception_method(
    description: Description, *, dtype: str, attention: str = "auto", checkpoint: str = ""
) -> OneStep:
    """The method of a model that predicts something.

    Raises:
        UserError: the model was never fine-tuned for perception, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}.")
    if not description.task:
        raise _not_fine_tuned(checkpoint)
    return build_method(description, dtype=jnp.dtype(dtype), attention=attention)


def _not_fine_tuned(checkpoint: str) -> UserError:
    name = checkpoint or "the checkpoint"
    return UserError(
        f"{name} predicts no depth or other map yet: fine-tune it with "
        f"python -m jaxpercept.train --config=configs/depth.py --config.checkpoint={name}."
    )


def place_weights(params: Params, dtype: str, mesh: Mesh) -> Params:
    """The weights that predicting needs, on the devices.

    Kernels are kept in the compute dtype: the layers would convert them at every call. Norms,
    biases and the prompt's embedding are small, and statistics want them in float32.

    Raises:
        UserError: a component is missing.
    """
    needed = ("unet", "vae", "prompt")
    missing = [component for component in needed if component not in params]
    if missing:
        raise UserError(
            f"the checkpoint lacks {' and '.join(missing)}: convert or train it again from a "
            "complete one, text encoder included."
        )

    def cast(path: tuple[Any, ...], weight: Any) -> Any:
        is_kernel = path[-1].key.endswith("kernel")
        return np.asarray(weight, jnp.dtype(dtype)) if is_kernel else np.asarray(weight)

    used = {component: params[component] for component in needed}
    used = jax.tree_util.tree_map_with_path(cast, used)
    return sharding.put_tree(used, sharding.tree_shardings(used, mesh))
