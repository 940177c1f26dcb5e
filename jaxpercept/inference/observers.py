"""What a training run shows of itself: evaluations and pictures, called by the loop."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.transforms import Augment, prepare
from jaxpercept.methods import Autoencoder, TextToImage
from jaxpercept.training.loop import Observer
from jaxpercept.training.metric_writer import MetricWriter
from jaxpercept.training.optim import Params
from jaxpercept.training.setup import Setup

_COLUMNS = 8


def picture_observer(setup: Setup, mesh: Mesh) -> Observer:
    """Pictures of a generative method: reconstructions of an autoencoder, samples of a diffuser.

    Both use held-out examples of the datasets trained on, and their captions.
    """
    method, config = setup.method, setup.description.config
    records = [
        record
        for name in config["data"]["mixture"]
        for record in _held_out(name, config, count=_COLUMNS)
    ]
    rgb = np.stack([record["rgb"] for record in records])

    if isinstance(method, Autoencoder):
        reconstruct = jax.jit(method.reconstruct)

        def draw(weights: Params) -> UInt8[np.ndarray, "h w 3"]:
            return _grid(np.concatenate([rgb, _to_uint8(reconstruct(weights, jnp.asarray(rgb)))]))

    elif isinstance(method, TextToImage):
        ids = jnp.asarray(setup.tokenize([record["caption"] for record in records]))
        size = tuple(side // method.model.downscale for side in rgb.shape[1:3])
        sample = jax.jit(functools.partial(method.sample, latent_size=size))

        def draw(weights: Params) -> UInt8[np.ndarray, "h w 3"]:
            return _grid(_to_uint8(sample(weights, ids, jax.random.key(0))))

    else:
        raise TypeError(f"{type(method).__name__} predicts: its pictures come from evaluation")

    def observe(step: int, weights: Params, writer: MetricWriter) -> dict[str, float]:
        # Weights lie on the mesh; the pictures are few, one device draws them.
        local = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), weights)
        writer.picture(step, "samples", draw(local))
        return {}

    del mesh
    return observe


def _held_out(name: str, config: dict[str, Any], *, count: int) -> list[dict[str, Any]]:
    options = {"data_dir": config["data_dir"], **config["data"]["options"].get(name, {})}
    resolution = tuple(config["resolution"])
    split = DATASETS[name].splits[-1]
    records = open_dataset(name, split=split, resolution=resolution, **options)
    stride = max(min(len(records), 1000) // count, 1)
    center = Augment(flip=0.0, fit="center", photometric=0.0)
    rng = np.random.default_rng(0)
    return [
        {**records[i * stride], **prepare(records[i * stride], rng, center, resolution)}
        for i in range(count)
    ]


def _to_uint8(images: Float[jax.Array, "b h w 3"]) -> UInt8[np.ndarray, "b h w 3"]:
    scaled = np.asarray(images, np.float32) * 127.5 + 127.5
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def _grid(images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    rows = images.reshape(-1, _COLUMNS, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
