"""A model ready to be evaluated, and one evaluation of it with its report."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import jaxpercept
from jaxpercept.checkpoints.card import weights_hash
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step
from jaxpercept.checkpoints.tokenizer import Tokenize
from jaxpercept.inference.evaluator import EvalResult, Evaluator
from jaxpercept.inference.measures import measured_parts
from jaxpercept.inference.opening import open_perception, open_tokenizer, perception_of
from jaxpercept.inference.options import Options, check_options
from jaxpercept.inference.predictor import Params, Predictor
from jaxpercept.inference.report import table, write_report
from jaxpercept.inference.weights import place_weights
from jaxpercept.methods import Perception
from jaxpercept.training import sharding


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to be evaluated.

    Attributes:
        checkpoint: its name.
        description, perception: what it is.
        weights: on `mesh`.
        predictor: its programs, shared by all evaluations.
        options: of predictions.
        facts: for reports.
        tokenize: reads texts, for a model that looks for what they name.
        identity: what tells its predictions from another model's, for reports; plain JSON.
    """

    checkpoint: str
    description: Description
    perception: Perception
    weights: Params
    mesh: Mesh
    predictor: Predictor
    options: Options
    facts: dict[str, Any]
    identity: dict[str, Any]
    tokenize: Tokenize | None = None

    def parts(self, dataset: str) -> dict[str, Model]:
        """The models by task that can be evaluated on a dataset, see `measures.measured_parts`."""
        parts = measured_parts(self.perception, dataset)
        if [*parts] == [""]:
            return {"": self}
        return {
            name: dataclasses.replace(
                self,
                perception=part,
                predictor=Predictor(part, self.mesh, pad_multiple=self.predictor.multiple),
                facts={**self.facts, "kind": part.task.kind},
                identity={**self.identity, "task": name},
            )
            for name, part in parts.items()
        }

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) it was trained at."""
        return self.description.resolution or (480, 640)


def open_model(
    checkpoint: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
    vae: str | None = None,
    decoder: str | None = None,
    lora: str | None = None,
    prompt: str = "",
    vae_tile: int = 0,
    pad_multiple: int = 0,
    num_inference_steps: int | None = None,
    ensemble_size: int = 1,
    flip: bool = False,
    seed: int = 0,
    text_guidance: float | None = None,
    image_guidance: float | None = None,
    correction_guidance: float | None = None,
    correction: str | None = None,
    dtype: str = "float32",
    identify: bool = False,
) -> Model:
    """Open a checkpoint for evaluations.

    Args:
        identify: look at the weights of a checkpoint without steps, for `identity`.
        checkpoint, task, ...: the flags of these names.

    Raises:
        UserError: the checkpoint or an option does not fit.
    """
    described = {"task": task, "family": family, "base": base}
    described |= {"vae": vae, "decoder": decoder, "lora": lora, "prompt": prompt}
    description, params = open_perception(checkpoint, **described)
    perception = perception_of(description, dtype=dtype, vae_tile=vae_tile, checkpoint=checkpoint)
    options = Options(
        num_steps=num_inference_steps,
        ensemble_size=ensemble_size,
        flip=flip,
        seed=seed,
        guidance=perception.guidance(
            text=text_guidance,
            image=image_guidance,
            correction=correction_guidance,
            combine=correction,
        ),
    )
    check_options(perception, options)
    mesh = sharding.make_mesh()
    step = latest_step(Path(checkpoint))
    facts = {
        "checkpoint": checkpoint,
        "step": step,
        "base_checkpoint": description.base_checkpoint,
        "kind": perception.task.kind,
        "dtype": dtype,
        "version": jaxpercept.__version__,
        "command": " ".join(sys.argv),
    }
    chosen = {**described, "vae_tile": vae_tile, "pad_multiple": pad_multiple, "dtype": dtype}
    chosen |= dataclasses.asdict(options)
    identity = {"checkpoint": checkpoint, "step": step, **chosen}
    if identify and step is None:
        hashes = "".join(weights_hash(weights) for _, weights in sorted(params.items()))
        identity["weights_sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
    return Model(
        checkpoint=checkpoint,
        description=description,
        perception=perception,
        weights=place_weights(params, dtype, mesh, text=perception.task.reads_text),
        mesh=mesh,
        predictor=Predictor(perception, mesh, pad_multiple=pad_multiple),
        options=options,
        facts=facts,
        identity=identity,
        tokenize=open_tokenizer(checkpoint, description, base),
    )


def run_evaluation(
    model: Model, folder: Path, *, facts: Mapping[str, Any] | None = None, **options: Any
) -> EvalResult:
    """Evaluate a model once, print the table and write the report.

    Args:
        folder: gets the report.
        facts: for the report, beside the model's.
        options: those of `Evaluator`, the dataset among them.

    Raises:
        UserError: the dataset or an option does not fit.
    """
    evaluator = Evaluator(
        model.perception,
        mesh=model.mesh,
        resolution=model.resolution,
        options=model.options,
        predictor=model.predictor,
        tokenize=model.tokenize,
        **options,
    )
    result = evaluator.run(model.weights)
    if jax.process_index() == 0:
        print(table(result))
        for path in write_report(folder, result, {**model.facts, **(facts or {})}):
            print(path)
    return result
