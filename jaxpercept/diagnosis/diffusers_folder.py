"""Looking through folders in diffusers' layout: whole checkpoints, UNets, autoencoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxpercept.checkpoints import diffusers, fit
from jaxpercept.checkpoints.description import FILE_NAME
from jaxpercept.checkpoints.tokenizer import (
    TOKENIZER_FILES,
    load_tokenizer,
    missing_tokenizer_files,
    tokenize,
)
from jaxpercept.checkpoints.values import check_model_index, check_scheduler
from jaxpercept.checkpoints.weights import open_weights, read_json, shard_names
from jaxpercept.diagnosis.stored import Inspection, Part, attempt
from jaxpercept.models.config import AutoencoderTinyConfig, VAEConfig
from jaxpercept.models.dpt import published_tensors

_AUTOENCODERS = (VAEConfig.CLASS_NAME, AutoencoderTinyConfig.CLASS_NAME)


def look_at_network(found: Inspection, places: Mapping[str, Path], bar: tqdm) -> None:
    """A folder that is itself a network; `places` are those of a UNet, see `look_at_folder`."""
    config = attempt([], "", lambda: read_json(found.folder / "config.json")) or {}
    found.kind = "UNet folder"
    if config.get("_class_name") in _AUTOENCODERS:
        found.kind, places = "autoencoder folder", {"vae": found.folder}
    look_at_folder(found, places, bar)


def look_at_folder(found: Inspection, places: Mapping[str, Path], bar: tqdm) -> None:
    """All parts of a checkpoint.

    Args:
        found: what to fill; its kind, folder and description are known.
        places: the folders, there or not, of the components wanted.
        bar: counts the tensors read.
    """
    for name, place in places.items():
        if place.is_dir():
            _look_at_component(found, name, place, bar)
    index = found.folder / "model_index.json"
    scheduler = found.folder / "scheduler" / "scheduler_config.json"
    found.model_index = _read_small(found, index, check_model_index)
    found.scheduler = _read_small(found, scheduler, check_scheduler)
    _look_at_tokenizer(found)
    for name, config in () if found.description is None else found.description.components.items():
        if name in found.parts and found.parts[name].config not in (None, config):
            found.problems.append(
                f"{places[name] / 'config.json'} and {found.folder / FILE_NAME} describe different "
                "networks: restore both from the same export."
            )
    used = {file for part in found.parts.values() for file in part.files}
    used |= {index, scheduler}
    used |= {found.folder / "tokenizer" / name for name in TOKENIZER_FILES}
    found.list_unused(used)


def _read_small(found: Inspection, file: Path, check: Callable[..., None]) -> dict[str, Any]:
    """A JSON file's content, also where a check complains of it; {} where there is none."""
    if not file.is_file():
        return {}
    content = attempt(found.problems, file, lambda: read_json(file)) or {}
    attempt(found.problems, file, lambda: check(content, file))
    return content


def _look_at_component(found: Inspection, name: str, folder: Path, bar: tqdm) -> None:
    """A network's config.json and weights."""
    part = found.parts[name] = Part(found.source)
    config = folder / "config.json"
    part.has_config = config.is_file()
    if part.has_config:
        part.files.append(config)
        part.config = attempt(part.errors, config, lambda: diffusers.read_config(folder, name))
    else:
        part.errors.append(f"{config} is missing; restore it.")
    before = len(part.errors)
    file = attempt(part.errors, folder, lambda: diffusers.find_weights(folder, name))
    if file is None:
        if len(part.errors) == before:
            stem = diffusers.COMPONENTS[name].stem
            part.errors.append(f"{folder / stem}.safetensors is missing; download it.")
        return
    tensors = _open(part, file)
    if part.config is not None and len(part.errors) == before:
        headless = name == "unet" and fit.lacks_output(tensors)
        part.compare_torch(tensors, file, head=not headless)
        if headless:
            _look_at_head(found, folder, bar)
    part.read(tensors, bar)


def _look_at_head(found: Inspection, unet: Path, bar: tqdm) -> None:
    """The DPT head of a UNet without output convolution."""
    part = found.parts["head"] = Part(found.source)
    file = attempt(part.errors, unet, lambda: diffusers.find_head(unet))
    config = found.parts["unet"].config
    if file is None or config is None:
        return
    tensors = _open(part, file)
    part.config = attempt(part.errors, file, lambda: fit.head_config(tensors, config, file))
    if part.config is not None and tensors:
        part.compare_torch(published_tensors(tensors, part.config), file)
    part.read(tensors, bar)


def _open(part: Part, file: Path) -> dict[str, Any]:
    """The tensors of one file, or of all shards that can be read."""
    part.files.append(file)
    files, listed = [file], set()
    if file.suffix == ".json":
        names = attempt(part.errors, file, lambda: shard_names(file)) or []
        files = [file.parent / name for name in names]
        part.files += files
        listed = set(read_json(file)["weight_map"]) if files else set()
    before, tensors = len(part.errors), {}
    for path in files:
        opened = attempt(part.errors, path, functools.partial(open_weights, path)) or {}
        for twice in sorted(tensors.keys() & opened.keys()):
            part.errors.append(f"{path} repeats tensor {twice} of another shard.")
        tensors |= opened
    if len(part.errors) == before and (absent := sorted(listed - tensors.keys())):
        part.errors.append(
            f"{file} lists {len(absent)} tensors that its shards do not hold, the first being "
            f"{absent[0]}; download the checkpoint again."
        )
    return tensors


def _look_at_tokenizer(found: Inspection) -> None:
    folder, encoder = found.folder / "tokenizer", found.parts.get("text_encoder")
    if missing := missing_tokenizer_files(folder):
        if encoder is not None and encoder.has_config:
            found.problems.append(
                f"{folder} lacks {', '.join(missing)}; copy the tokenizer of the base model there."
            )
        return
    loaded = attempt(found.problems, folder, lambda: load_tokenizer(folder))
    if loaded is None:
        return
    ids = attempt(found.problems, folder, lambda: tokenize(loaded, [""], None)[0].tolist())
    found.tokenizer = {
        "class": type(loaded).__name__,
        "tokens": len(loaded),
        "model_max_length": int(loaded.model_max_length),
        "empty_prompt": ids,
    }
    config = encoder.config if encoder is not None else None
    if config is not None and ids is not None and max(ids, default=0) >= config.vocab_size:
        found.problems.append(
            f"{folder} gives tokens that the text encoder does not know (it has "
            f"{config.vocab_size}): use the tokenizer of the same model."
        )
