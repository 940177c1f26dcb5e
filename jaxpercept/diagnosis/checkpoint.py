"""What a checkpoint holds, what is wrong with it, and what predict would do with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxpercept.diagnosis.inspection import add_base, inspect
from jaxpercept.diagnosis.prediction import examine_pipeline
from jaxpercept.diagnosis.stored import Inspection, Part
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError

# What is told of a network's config.json; the channels of its levels first.
_CHANNELS = ("block_out_channels", "encoder_block_out_channels", "neck_hidden_sizes")
_SETTINGS = ("in_channels", "out_channels", "latent_channels", "scaling_factor")
_SETTINGS += ("cross_attention_dim", "attention_head_dim", "class_embed_type", "hidden_size")
_SETTINGS += ("num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


def examine_checkpoint(
    checkpoint: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, what is wrong with it, and what predict would do with it."""
    with tqdm(unit="tensor", desc="reading", leave=False) as bar:
        found = inspect(checkpoint, bar=bar)
        if base is not None and found.in_parts:
            add_base(found, base, bar)
    problems = list(found.problems)
    for name, part in found.parts.items():
        problems += [f"{name}: {problem}" for problem in part.problems()]
    named = {"task": task, "family": family, "base": base}
    pipeline = examine_pipeline(found, named, damaged=bool(problems))
    sound = pipeline["role"] in ("text-to-image model", "autoencoder", "program")
    if not (pipeline["runs"] or sound or problems):
        problems.append(pipeline["reason"])
    config = found.description.scheduler if found.description is not None else found.scheduler
    if found.in_parts and not config and pipeline.get("family") != "genpercept":
        found.warnings.append(
            "There is no scheduler/scheduler_config.json: DDIM with its default betas is taken."
        )
    return {
        "source": checkpoint,
        "kind": found.kind or None,
        "folder": None if found.folder is None else str(found.folder),
        "newest_step": max(found.steps, default=None),
        "steps": found.steps,
        "components": {name: _component(part, found) for name, part in found.parts.items()},
        "scheduler": _scheduler(config),
        "tokenizer": found.tokenizer,
        "pipeline": pipeline,
        "unused_files": found.unused,
        "warnings": found.warnings,
        "problems": problems,
    }


def _component(part: Part, found: Inspection) -> dict[str, Any]:
    def name(path: Path) -> str:
        inside = found.folder in path.parents
        return str(path.relative_to(found.folder) if inside else path)

    return {
        "source": part.source,
        "architecture": _architecture(part.config),
        "tensors": part.tensors,
        "parameters": part.parameters,
        "bytes": part.bytes,
        "dtypes": dict(part.dtypes),
        "files": [name(path) for path in part.files],
        "non_finite": part.non_finite,
        **{name: list(names) for name, names in part.differences._asdict().items()},
        "problems": part.problems(),
    }


def _architecture(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    content = config.to_dict()
    channels = [content[key] for key in _CHANNELS if key in content]
    settings = {key: content[key] for key in _SETTINGS if content.get(key) is not None}
    levels = {"channels": channels[0], "levels": len(channels[0])} if channels else {}
    return {"class": config.CLASS_NAME, **levels, **settings}


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The noise schedule of a scheduler_config.json, None where there is none."""
    if not config:
        return None
    found = {"class": config.get("_class_name", "DDIMScheduler")}
    try:
        schedule = NoiseSchedule.from_config(config)
        last = float(schedule.alphas_cumprod[-1])
    except (UserError, TypeError, ValueError) as error:
        return {**found, "error": str(error)}
    found |= dataclasses.asdict(schedule) | {"zero_snr": last == 0, "last_alpha_cumprod": last}
    return {key: value for key, value in found.items() if value is not None}
