"""What predict would do with a checkpoint, told without reading its weights again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.diagnosis.inspection import NETWORKS
from jaxpercept.diagnosis.stored import Inspection, Part
from jaxpercept.diagnosis.text import first_line
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import check_runs, perception_of
from jaxpercept.inference.outputs import KINDS
from jaxpercept.inference.predictor import resolve_resolution
from jaxpercept.inference.weights import used_weights
from jaxpercept.methods import Perception
from jaxpercept.methods.families import recognise
from jaxpercept.tasks import reads_text

_NOT_OPENED = {
    "autoencoder folder": (
        "autoencoder",
        "An autoencoder alone predicts nothing: give it to predict with --vae or --decoder.",
    ),
    "StableHLO export": (
        "program",
        "It runs by jax.export alone, as its README.md shows; predict takes the model that it was "
        "exported from.",
    ),
}


def examine_pipeline(
    found: Inspection, named: Mapping[str, str | None], *, damaged: bool
) -> dict[str, Any]:
    """What predict would do with a checkpoint.

    Args:
        found: the checkpoint, with what its base gives.
        named: the values of "task", "family" and "base", None where not given.
        damaged: whether something is wrong with the checkpoint.

    Returns:
        "role": "perception model", "text-to-image model", "autoencoder", "program", or None where
        it cannot be told; "runs", and "reason" where it does not; where it is a perception model,
        also how it predicts by default.
    """
    if not found.kind:
        return {"role": None, "runs": False, "reason": "There is no checkpoint."}
    if found.kind in _NOT_OPENED:
        role, reason = _NOT_OPENED[found.kind]
        return {"role": role, "runs": False, "reason": reason}
    role = None
    try:
        description = _describe(found, named)
        role = "perception model" if description.task else "text-to-image model"
        if "unet" not in description.components:  # of a run that trains one
            role = "autoencoder"
        perception = perception_of(description, dtype="float32", checkpoint=found.source)
        plan = _plan(description, perception)
    except UserError as error:
        return {"role": role, "runs": False, "reason": str(error)}
    except Exception as error:  # values of a wrong type in the files
        reason = f"What it predicts cannot be told ({first_line(error)}): see its files."
        return {"role": role, "runs": False, "reason": reason}
    reason = "It is damaged; see the problems." if damaged else None
    return {"role": role, "runs": not damaged, "reason": reason, **plan}


def _describe(found: Inspection, named: Mapping[str, str | None]) -> Description:
    """What a checkpoint predicts, as `inference.opening` finds out, but without its weights."""
    if found.description is None:
        description = _recognise(found, named)
    elif given := [name for name, value in named.items() if value is not None]:
        raise UserError(
            f"{found.source} says itself what it is and has all it needs: leave --{given[0]} out."
        )
    else:
        description = found.description
        _check_architectures(description.components, found.parts)
    check_runs(description, found.source)
    if description.task:
        stored: dict[str, dict[str, Any]] = {name: {} for name in found.parts}
        if found.in_parts and "text_encoder" in stored:
            stored["prompt"] = {}  # encoded at loading
        text = reads_text(description.task)
        used_weights(stored, "float32", text=text)  # raises where a component is missing
    return description


def _recognise(found: Inspection, named: Mapping[str, str | None]) -> Description:
    source, parts = found.source, found.parts
    if not found.in_parts or (found.folder / FILE_NAME).is_file():
        raise UserError(f"{source} does not say what it predicts: restore its {FILE_NAME}.")
    missing = found.lacking(NETWORKS)
    if "unet" in missing:
        raise UserError(
            f"{source} holds no UNet: give a checkpoint's folder, or one that holds a UNet's "
            "config.json and weights."
        )
    if missing and named["base"] is None:
        raise UserError(
            f"{source} holds no {' and no '.join(missing)}: name the text-to-image checkpoint it "
            "was trained from with --base."
        )
    if missing:
        raise UserError(
            f"the base {named['base']} holds no {' and no '.join(missing)}: give a complete one."
        )
    _check_architectures(parts, parts)
    description = Description(
        components={name: part.config for name, part in parts.items()},
        scheduler=found.scheduler,
        model_index=found.model_index,
        base_checkpoint=source,
    )
    recognised = recognise(
        source,
        found.model_index,
        parts["unet"].config,
        found.scheduler,
        family=named["family"],
        task=named["task"],
        head="dpt" if "head" in parts else "vae",
    )
    if recognised is None:
        return description
    return dataclasses.replace(description, **dataclasses.asdict(recognised))


def _check_architectures(names: Iterable[str], parts: Mapping[str, Part]) -> None:
    """Raises a UserError where a network is not to be built, having more layers than tensors."""
    if damaged := [name for name in names if name not in parts or parts[name].config is None]:
        raise UserError(f"The architecture of {damaged[0]} cannot be told: see the problems.")


def _plan(description: Description, perception: Perception) -> dict[str, Any]:
    """How a model predicts, by default."""
    recipe, solver, model = perception.recipe, perception.solver, perception.model
    text = repr(description.config["prompt"]) if description.config.get("prompt") else "empty"
    given = {} if recipe.timesteps is None else {"timesteps": recipe.timesteps}
    table = solver.steps(recipe.num_steps, **given).table
    latent, channels = model.vae.config.latent_channels, model.unet.config.in_channels
    inputs = {"image": latent} if recipe.concatenate else {}
    if channels > sum(inputs.values()):
        inputs["x"] = channels - sum(inputs.values())
    kind = KINDS[perception.task.kind]
    decoded = {"x0": "the last x_0", "sample": "the last sample"}[recipe.output]
    decoder = "vae" if model.decoder is None else "decoder"
    if recipe.head == "dpt":
        decoded, decoder = "the UNet's features", "DPT head"
    return {
        "family": recipe.family,
        "task": perception.task.name,
        "kind": perception.task.kind,
        "range": list(kind.range),
        "convention": kind.convention,
        "predictions_per_image": perception.targets,
        "starts_from": recipe.start,
        "unet_inputs": inputs,
        "task_vector": recipe.task_vector is not None,
        "prompt": f"{text}, {'' if recipe.padded_prompt else 'not '}padded",
        "solver": solver.class_name,
        "prediction_type": solver.schedule.prediction_type,
        "steps": recipe.num_steps,
        "timesteps": [round(float(t), 3) for t in table.timestep],
        "decoded": decoded,
        "decoder": decoder,
        "processing_resolution": resolve_resolution(None, description.resolution, 1),
        "ensemble": recipe.draws_noise,
    }
