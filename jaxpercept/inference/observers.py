"""What a training run shows of itself: evaluations and pictures, called by the loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxpercept.config import dataset_options
from jaxpercept.data.datasets import DATASETS, open_dataset
from jaxpercept.data.transforms import FOG, Augment, prepare
from jaxpercept.inference.evaluator import Evaluator
from jaxpercept.inference.measures import is_detail, measured_parts
from jaxpercept.inference.predictor import Predictor
from jaxpercept.inference.report import drawn, table, write_report
from jaxpercept.methods import Autoencoder, TextToImage
from jaxpercept.training.loop import Observer
from jaxpercept.training.metric_writer import MetricWriter
from jaxpercept.training.optim import Params
from jaxpercept.training.setup import Setup

_COLUMNS = 8
# Options of a training dataset that say how its files are to be read; others choose examples.
_READING = (
    *("depth_scale", "normals_axes", "first_class", "columns", "held_out"),
    *("persons", "margin", "min_keypoints", "filled", "orientation"),
)


def evaluation_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.evaluation` says, as arguments of `Evaluator`; plain JSON.

    Of these `pad_multiple` is its predictor's. The files are read as the training reads those of
    the same dataset.
    """
    given = {name: value for name, value in config["evaluation"].items() if value is not None}
    own = dataset_options(config, given["dataset"])
    reading = {name: own[name] for name in _READING if name in own}
    return {
        **given,
        "data_dir": own["data_dir"] or None,
        "overrides": {**reading, **given.get("overrides", {})},
    }


def evaluation_observer(setup: Setup, mesh: Mesh, *, workdir: Path) -> Observer:
    """Evaluate as `config.evaluation` says; the last report lies in `workdir/evaluation/DATASET`.

    It holds arguments of `Evaluator`. Metrics of single classes and joints are in the report only.
    The panel of input, truth and prediction also goes to the run's pictures. A generalist is
    evaluated task by task, each with a report in a folder of its name.
    """
    wanted = evaluation_options(setup.description.config)
    dataset = wanted["dataset"]
    options = {**wanted}
    padding = options.pop("pad_multiple")
    evaluators = {
        "/".join(filter(None, (dataset, name))): Evaluator(
            part,
            mesh=mesh,
            resolution=setup.description.resolution,
            tokenize=setup.tokenize,
            predictor=Predictor(part, mesh, pad_multiple=padding),
            **options,
        )
        for name, part in measured_parts(setup.method.perception, dataset).items()
    }

    def observe(step: int, weights: Params, writer: MetricWriter) -> dict[str, float]:
        found = {}
        for title, evaluator in evaluators.items():
            result = evaluator.run(weights)
            logging.info("%s after step %d, %s", title, step, table(result))
            if jax.process_index() == 0:
                facts = {"checkpoint": str(workdir), "step": step, "evaluation": wanted}
                write_report(workdir / "evaluation" / title, result, facts)
            if result.pictures:
                writer.picture(step, title.replace("/", "_"), drawn(result))
            scores = result.means | {f"constant_{name}": x for name, x in result.baseline.items()}
            found |= {f"{title}/{name}": x for name, x in scores.items() if not is_detail(name)}
        return found

    return observe


def picture_observer(setup: Setup, mesh: Mesh) -> Observer:
    """Pictures of a generative method: reconstructions of an autoencoder, samples of a diffuser.

    Both use held-out examples of the datasets trained on, and their captions; a diffuser that edits
    also draws the examples in fog.
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
        captions = [record["caption"] for record in records]
        ids, fog = (
            jnp.asarray(setup.tokenize([prefix + caption for caption in captions]))
            for prefix in ("", FOG)
        )
        size = tuple(side // method.model.downscale for side in rgb.shape[1:3])
        sample = jax.jit(functools.partial(method.sample, latent_size=size))
        edit = jax.jit(method.edit)

        def draw(weights: Params) -> UInt8[np.ndarray, "h w 3"]:
            rows = [_to_uint8(sample(weights, ids, jax.random.key(0)))]
            if method.edit_share:
                rows.append(_to_uint8(edit(weights, jnp.asarray(rgb), fog)))
            return _grid(np.concatenate(rows))

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
    options = dataset_options(config, name)
    resolution = tuple(config["resolution"])
    split = DATASETS[name].splits[-1]
    records = open_dataset(name, split=split, resolution=resolution, evaluation=True, **options)
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
