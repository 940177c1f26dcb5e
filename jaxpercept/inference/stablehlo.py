"""A model as one portable program: StableHLO, with the weights beside it as safetensors.

    model.stablehlo       `predict(weights, images[, noise]) -> prediction`, any batch size
    weights.safetensors   the weights by "component/path"
    jaxpercept.json       the model's description
    signature.json        sizes, types, what the prediction means

The program needs jax and safetensors to run, nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.weights import atomic_write, write_json, write_weights
from jaxpercept.diffusion.guidance import Text
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import perception_of
from jaxpercept.inference.outputs import KINDS
from jaxpercept.inference.predictor import Params, to_signed_float
from jaxpercept.inference.weights import used_weights
from jaxpercept.models.layers import portable

PROGRAM, WEIGHTS, SIGNATURE = "model.stablehlo", "weights.safetensors", "signature.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def save_stablehlo(
    folder: Path,
    description: Description,
    params: Params,
    *,
    size: tuple[int, int],
    dtype: str = "float32",
    num_steps: int | None = None,
) -> None:
    """Write the program and its weights.

    Args:
        folder: where; created if missing.
        description, params: the model.
        size: (height, width) of the images; multiples of the autoencoder's factor.
        dtype: compute dtype, and that of the kernels.
        num_steps: denoising steps; None: the model's own.

    Raises:
        UserError: the model predicts nothing, or the size does not fit.
    """
    # The other attention kernels belong to one platform each.
    perception = perception_of(description, dtype=dtype, attention="xla")
    factor = perception.model.downscale
    if any(edge % factor or edge < factor for edge in size):
        raise UserError(
            f"The size {size[0]} x {size[1]} does not fit: give multiples of {factor} pixels."
        )
    reads_text = perception.task.reads_text
    weights = flat(used_weights(params, dtype, text=reads_text))
    batch, images = jax.export.symbolic_args_specs(
        (jax.ShapeDtypeStruct((), jnp.uint8), jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)),
        ("", f"b, {size[0]}, {size[1]}, 3"),
    )
    del batch
    arguments = [
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()},
        images,
    ]
    if perception.recipe.draws_noise:
        channels = perception.targets * perception.model.vae.config.latent_channels
        cells = tuple(edge // factor for edge in size)
        arguments.append(jax.ShapeDtypeStruct((images.shape[0], *cells, channels), jnp.float32))
    if reads_text:
        length = params["prompt"]["embedding"].shape[1]
        arguments.append(jax.ShapeDtypeStruct((images.shape[0], length), jnp.int32))

    def predict(weights: dict[str, Any], images: Any, *more: Any) -> Any:
        tree, more = nested(weights), list(more)
        image = perception.encode(tree, to_signed_float(images))
        noise = more.pop(0) if perception.recipe.draws_noise else None
        text = Text(perception.embed(tree, more.pop(0))) if reads_text else None
        decoded, _ = perception.predict(
            tree, image, noise, text=text, num_steps=num_steps, key=jax.random.key(0)
        )
        return perception.to_prediction(decoded)

    with portable():
        exported = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(*arguments)
    kind = perception.task.kind
    signature = {
        "images": ["batch", *size, 3],
        "images_type": "uint8",
        "noise": list(map(str, arguments[2].shape)) if perception.recipe.draws_noise else None,
        "input_ids": list(map(str, arguments[-1].shape)) if reads_text else None,
        "kind": kind,
        "range": list(KINDS[kind].range),
        "convention": KINDS[kind].convention,
        "platforms": list(PLATFORMS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PROGRAM) as file:
        file.write(exported.serialize())
    write_weights(folder / WEIGHTS, weights, None)
    write_json(folder / SIGNATURE, signature)


def flat(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """`{"component/path": array}`."""
    return {
        f"{component}/{path}": np.asarray(array)
        for component, weights in params.items()
        for path, array in weights.items()
    }


def nested(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `flat`."""
    params: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        component, _, path = name.partition("/")
        params.setdefault(component, {})[path] = array
    return params
