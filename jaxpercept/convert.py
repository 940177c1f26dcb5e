"""Convert a model between formats.

    python -m jaxpercept.convert --from=prs-eth/marigold-depth-v1-1 --to=marigold
    python -m jaxpercept.convert --from=runs/depth --to=depth --format=diffusers
    python -m jaxpercept.convert --from=runs/depth --to=depth --format=diffusers --layout=marigold
    python -m jaxpercept.convert --from=runs/depth --to=depth --format=stablehlo --size=480x640

--from takes a training workdir, an Orbax export, a diffusers folder or a hub id. Formats:

    orbax      weights/ (Orbax, restored to any mesh), jaxpercept.json, tokenizer/
    diffusers  a folder that diffusers opens. A one-step model keeps its four-channel UNet, with
               GenPercept's scheduler; --layout=marigold writes it such that diffusers'
               MarigoldDepthPipeline or MarigoldNormalsPipeline runs it unchanged
    stablehlo  one portable program for any batch size, its weights beside it
    lora       the low-rank additions of a run that trained them, as peft and diffusers'
               load_lora_weights read them; the other formats merge them into the weights

Weights keep their type, unless --dtype says otherwise; with a low-rank addition merged they are
float32. Every export has a model card. A training run keeps no text encoder: --format=diffusers
takes it from the base checkpoint. --check opens the export with torch and compares the networks.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
from absl import flags

from jaxpercept import cli
from jaxpercept.checkpoints import diffusers, diffusers_write, load, orbax
from jaxpercept.checkpoints.card import write_card
from jaxpercept.checkpoints.check import check_against_torch
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.load import readable, resolve
from jaxpercept.checkpoints.lora import save as save_adapter
from jaxpercept.checkpoints.rules import DTYPES
from jaxpercept.checkpoints.tokenizer import missing_tokenizer_files
from jaxpercept.checkpoints.values import in_short
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import assemble, describe, open_own, padded_prompt
from jaxpercept.inference.predictor import Params
from jaxpercept.methods.layouts import as_marigold, as_stable_diffusion
from jaxpercept.models.lora import LoraConfig, is_lora

FORMATS = ("orbax", "diffusers", "stablehlo", "lora")
LAYOUTS = ("own", "marigold")
FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "What to convert.", flag_values=FLAGS)
flags.DEFINE_string("to", None, "Folder to write; it must not exist.", flag_values=FLAGS)
flags.DEFINE_enum("format", "orbax", FORMATS, "What to write.", flag_values=FLAGS)
flags.DEFINE_enum(
    "layout", "own", LAYOUTS, "How a one-step model is written for diffusers.", flag_values=FLAGS
)
flags.DEFINE_enum(
    "dtype", None, tuple(DTYPES), "Of the weights; default: as they are.", flag_values=FLAGS
)
flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH of a StableHLO program's images; default: that of the training.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("task", None, "As for predict.", flag_values=FLAGS)
flags.DEFINE_string("family", None, "As for predict.", flag_values=FLAGS)
flags.DEFINE_string("base", None, "The checkpoint that has what this one lacks.", flag_values=FLAGS)
flags.DEFINE_string(
    "license", None, "For the model card; default: the base checkpoint's.", flag_values=FLAGS
)
flags.DEFINE_boolean("check", False, "Compare with torch afterwards.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("from", "to")

_USAGE = {
    "orbax": """
from jaxpercept import PerceptionPipeline

out = PerceptionPipeline.from_pretrained("{folder}")(image)
""",
    "diffusers": """
from jaxpercept import PerceptionPipeline

out = PerceptionPipeline.from_pretrained("{folder}")(image)
""",
    "marigold": """
from diffusers import {pipeline}

out = {pipeline}.from_pretrained("{folder}")(image)
""",
    "stablehlo": """
import jax
from safetensors.numpy import load_file

program = jax.export.deserialize(open("{folder}/model.stablehlo", "rb").read())
weights = load_file("{folder}/weights.safetensors")
prediction = jax.jit(program.call)(weights, images)  # uint8 [batch, height, width, 3]
""",
    "lora": """
from diffusers import UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{base}", subfolder="unet")
unet.load_lora_adapter("{folder}", use_safetensors=True)
""",
    "text_orbax": """
from jaxpercept.checkpoints.load import load_model

description, params = load_model("{folder}")
""",
    "text_diffusers": """
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{folder}")
""",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at rest: what it is, all its weights, the files of its tokenizer."""

    description: Description
    params: Params
    tokenizer_dir: Path | None


def convert(
    source: str,
    target: str | Path,
    *,
    format: str = "orbax",
    layout: str = "own",
    dtype: str | None = None,
    size: tuple[int, int] | None = None,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
    license: str | None = None,
) -> Path:
    """Convert `source` and write it to `target`, as the module's text says.

    Returns:
        The folder written. It appears when it is complete.

    Raises:
        UserError: the source cannot be opened, the target exists, lies inside the source or cannot
            be written, or the format cannot hold the model.
    """
    if format not in FORMATS or layout not in LAYOUTS:
        raise UserError(f"use a format of {', '.join(FORMATS)} and a layout of {LAYOUTS}.")
    target = Path(os.path.expanduser(target))
    if target.name in ("", ".."):
        target = target.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        _check_target(target, source)
        _remove(partial)  # of an interrupted run
    except OSError as error:
        raise _not_written(target, error) from error
    model = open_model(source, task=task, family=family, base=base, merge_lora=format != "lora")
    usage = format if model.description.task else f"text_{format}"
    try:
        if format == "orbax":
            written = _cast(model, dtype)
            orbax.save_export(partial, written.description, written.params)
            _copy_tokenizer(written.tokenizer_dir, partial)
        elif format == "diffusers":
            written, usage = _save_diffusers(partial, model, layout, dtype, base, usage)
        elif format == "lora":
            written, usage = _save_lora(partial, model, source, dtype), format
        else:
            written = model
            _save_stablehlo(partial, model, size, dtype)
        pipeline = written.description.model_index.get("_class_name", "")
        write_card(
            partial,
            written.description,
            written.params,
            usage=_USAGE[usage].format(
                folder=target.name, pipeline=pipeline, base=written.description.base_checkpoint
            ),
            license=license,
            workdir=Path(resolve(source)),
            name=target.name,
        )
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        _remove(partial)
    return target


def _check_target(target: Path, source: str) -> None:
    """Raises where an export cannot be written, or would change something that is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: give a new folder.")
    own, place = Path(resolve(source)).resolve(), target.resolve()
    if own.is_dir() and own in place.parents:
        raise UserError(f"{target} lies inside {source}: give a folder outside of it.")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), above)
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), above)


def _remove(partial: Path) -> None:
    if partial.is_symlink():  # what it points to is not ours
        partial.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _not_written(target: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {in_short(target)}: {error.strerror or in_short(error)}.")


def open_model(
    source: str,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
    merge_lora: bool = True,
) -> Model:
    """Open what is to be converted, weights in the type they are stored in."""
    with readable(source):
        folder = Path(resolve(source))
        if not (folder / FILE_NAME).is_file():
            checkpoint = assemble(source, base, dtype=None)
            description, params = describe(checkpoint, family=family, task=task)
            return Model(description, params, checkpoint.tokenizer_dir)
        description, params = open_own(source, dtype=None, merge_lora=merge_lora)
        tokenizer = folder / "tokenizer"
        return Model(description, params, None if missing_tokenizer_files(tokenizer) else tokenizer)


def _save_diffusers(
    folder: Path, model: Model, layout: str, dtype: str | None, base: str | None, usage: str
) -> tuple[Model, str]:
    if extra := {"decoder", "head"} & set(model.description.components):
        raise UserError(
            f"a diffusers folder has no place for the model's {min(extra)}: use --format=orbax."
        )
    model = _with_text_encoder(model, base)
    if model.description.task:
        _check_prompt(model)
    one_step = model.description.method.get("name") == "one_step"
    if layout == "marigold":
        if not one_step:
            raise UserError("--layout=marigold is for one-step models trained here: leave it out.")
        description, unet = as_marigold(model.description, model.params["unet"])
        model = dataclasses.replace(
            model, description=description, params={**model.params, "unet": unet}
        )
        usage = "marigold"
    elif one_step:
        description = as_stable_diffusion(model.description)
        model = dataclasses.replace(model, description=description)
    model = _cast(model, dtype)
    description = model.description
    networks = [name for name in diffusers.COMPONENTS if name in description.components]
    checkpoint = diffusers.Checkpoint(
        configs={name: description.components[name] for name in networks},
        params={name: model.params[name] for name in networks},
        scheduler=description.scheduler,
        tokenizer_dir=model.tokenizer_dir,
        model_index=description.model_index,
    )
    diffusers_write.save(folder, checkpoint, dtype=None)
    if layout != "marigold" and description.task:
        description.save(folder)
    return model, usage


def _save_lora(folder: Path, model: Model, source: str, dtype: str | None) -> Model:
    if not model.description.lora:
        raise UserError(f"{source} has no low-rank additions: leave --format=lora out.")
    _check_trained(model, source)
    lora = LoraConfig.from_dict(model.description.lora)
    weights = model.params[lora.component]
    save_adapter(folder, lora, weights, dtype=dtype or "float32")
    factors = {path: value for path, value in weights.items() if is_lora(path)}
    return dataclasses.replace(model, params={lora.component: factors})


def _check_trained(model: Model, source: str) -> None:
    """Raises a UserError where a run has trained more than its low-rank additions."""
    trainable = model.description.config.get("trainable", ())
    for component, paths in model.params.items():
        for name in (f"{component}/{path}" for path in paths if not is_lora(path)):
            if any(re.match(expression, name) for expression in trainable):
                raise UserError(
                    f"{source} has trained {name}, too, which an adapter does not hold: convert it "
                    "to orbax or diffusers, which merge, or train with "
                    "config.trainable=('unet/.*lora_',)."
                )


def _with_text_encoder(model: Model, base: str | None) -> Model:
    """The model with the parts that a training run does not keep."""
    description = model.description
    if "text_encoder" in description.components and model.tokenizer_dir is not None:
        return model
    base = base or description.base_checkpoint
    try:
        other = diffusers.load_parts(resolve(base), components=("text_encoder",), dtype=None)
        config = other.configs["text_encoder"]
    except (UserError, KeyError) as error:
        raise UserError(
            "the model has no text encoder, which a diffusers folder needs, and "
            f"{in_short(base) or 'no base'} does not give it: name the text-to-image checkpoint it "
            "was trained from with --base."
        ) from error
    components = {**description.components, "text_encoder": config}
    return Model(
        dataclasses.replace(description, components=components),
        {**model.params, "text_encoder": other.params["text_encoder"]},
        other.tokenizer_dir,
    )


def _check_prompt(model: Model) -> None:
    """Raises a UserError where the text encoder does not give what the model reads.

    A diffusers folder holds the text encoder and the text, not what the one makes of the other.
    """
    description, tokenizer = model.description, model.tokenizer_dir
    checkpoint = diffusers.Checkpoint(description.components, model.params, tokenizer_dir=tokenizer)
    text = description.config.get("prompt", "")
    given = load.encode_prompt(checkpoint, text, padded=padded_prompt(description))
    own = np.asarray(model.params["prompt"]["embedding"], np.float32)
    # Devices round differently, and a run may keep what it does not train in half precision.
    if given.shape != own.shape or np.linalg.norm(given - own) > 0.1 * np.linalg.norm(own):
        raise UserError(
            f"the model reads something else than the text encoder makes of {in_short(repr(text))}:"
            " name the checkpoint that it was trained from with --base, or use --format=orbax."
        )


def _save_stablehlo(
    folder: Path, model: Model, size: tuple[int, int] | None, dtype: str | None
) -> None:
    from jaxpercept.inference.stablehlo import save_stablehlo

    size = size or model.description.resolution
    if size is None:
        raise UserError("the model names no image size: give one with --size=HEIGHTxWIDTH.")
    save_stablehlo(folder, model.description, model.params, size=size, dtype=dtype or "float32")
    model.description.save(folder)


def _cast(model: Model, dtype: str | None) -> Model:
    if dtype is None:
        return model
    params = {}
    for component, weights in model.params.items():
        kind = None if component == "prompt" else DTYPES[dtype]
        with np.errstate(over="ignore"):
            params[component] = {path: np.asarray(array, kind) for path, array in weights.items()}
        for path, array in params[component].items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"{component}/{path} has values beyond {dtype}'s: use --dtype=bfloat16."
                )
    return dataclasses.replace(model, params=params)


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    if source is not None:
        diffusers_write.copy_tokenizer(source, folder / "tokenizer")


def main() -> None:
    """Read the flags and convert."""
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    source, check = values.pop("from"), values.pop("check")
    values["size"] = values["size"] and cli.height_and_width("size", values["size"])
    folder = convert(source, values.pop("to"), **values)
    print(folder)
    if check:
        for name, deviation in check_against_torch(folder).items():
            print(f"{name}: as in torch, largest deviation {deviation:.1e} of the largest value")


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
