"""Looking through what this package writes: training workdirs, Orbax and StableHLO exports."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import tensorstore
from tqdm import tqdm

from jaxpercept.checkpoints import fit, orbax
from jaxpercept.checkpoints.load import FROZEN, STEPS
from jaxpercept.checkpoints.weights import open_weights
from jaxpercept.diagnosis.stored import Inspection, Part, attempt
from jaxpercept.inference import stablehlo

_INDEX = "manifest.ocdbt"  # of Orbax's database


def look_at_workdir(found: Inspection, bar: tqdm) -> None:
    """A training run: its frozen weights and its newest finished save."""
    for path in sorted((found.folder / STEPS).glob("*")):
        if path.name.isdigit() and (path / "params").is_dir():
            found.steps.append(int(path.name))
        elif path.is_dir():
            found.warnings.append(f"{path} is a save that was not finished: it is ignored.")
    found.steps.sort()
    frozen = found.folder / FROZEN
    stores = [frozen] if frozen.is_dir() else []
    if found.steps:
        stores.append(found.folder / STEPS / str(found.steps[-1]) / "params")
    else:
        found.problems.append(
            f"{found.folder} holds no finished checkpoint yet: let the training reach its first "
            "save."
        )
    look_at_weights(found, stores, bar)


def look_at_weights(found: Inspection, folders: Sequence[Path], bar: tqdm) -> None:
    """Weights in Orbax; those of later folders complete the earlier ones."""
    stored: dict[str, dict[str, Any]] = {}
    readable = True
    for folder in folders:
        shapes = attempt(found.problems, folder, functools.partial(orbax.load_shapes, folder))
        if shapes is None:
            readable = False
            continue
        for component, leaves in shapes.items():
            stored[component] = {**stored.get(component, {}), **leaves}
            part = found.parts.setdefault(component, Part(found.source))
            part.files.append(folder)
            _read_arrays(part, folder, component, leaves, bar)
    if found.description is None or not readable or not folders:
        return
    components = found.description.components
    for component, config in components.items():
        part = found.parts.setdefault(component, Part(found.source))
        part.config = config
        headless = component == "unet" and "head" in components
        part.compare(stored.get(component, {}), folders[-1], head=not headless)
    if "prompt" in stored:
        unet = components.get("unet")
        misshaped = fit.misshaped_prompt(stored["prompt"], unet)
        found.parts["prompt"].differences = fit.Differences(misshaped=misshaped)


def _read_arrays(
    part: Part, folder: Path, component: str, paths: Collection[str], bar: tqdm
) -> None:
    """Each array of an Orbax store by itself, whatever the state of the others."""
    bar.total = (bar.total or 0) + len(paths)
    for path in paths:
        bar.update()
        read = functools.partial(_read_array, folder, f"{component}.{path}/")
        values = attempt(part.errors, f"{folder}: {path}", read)
        if values is not None:
            part.count(path, values)


def _read_array(folder: Path, path: str) -> np.ndarray:
    store = {"driver": "auto", "kvstore": _kvstore(folder, path)}
    return tensorstore.open(store, open=True, read=True).result().read().result()


def _kvstore(folder: Path, path: str) -> dict[str, Any]:
    """Where Orbax keeps an array: all in one database, or each in a folder."""
    root = f"{folder.resolve()}/"
    if not (folder / _INDEX).is_file():
        return {"driver": "file", "path": root + path}
    return {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": path}


def look_at_program(found: Inspection, bar: tqdm) -> None:
    """A StableHLO program, and whether the weights beside it are those it takes."""
    program, file = found.folder / stablehlo.PROGRAM, found.folder / stablehlo.WEIGHTS
    wanted: dict[str, dict[str, Any]] = {}
    try:
        exported = jax.export.deserialize(bytearray(program.read_bytes()))
        wanted = stablehlo.nested(jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0])
    except ImportError as error:
        found.warnings.append(f"{program} is not looked at ({error}).")
    except Exception as error:  # a damaged file raises almost anything
        found.problems.append(
            f"{program} cannot be read ({type(error).__name__}); export it again."
        )
    tensors = attempt(found.problems, file, lambda: open_weights(file)) or {}
    stored = stablehlo.nested(tensors)
    for component in sorted({*stored, *wanted}):
        part = found.parts[component] = Part(found.source, files=[file])
        if found.description is not None:
            part.config = found.description.components.get(component)
        own = stored.get(component, {})
        if wanted and tensors:
            needed = fit.shapes_of(wanted.get(component, {}))
            part.differences = fit.differences(needed, fit.shapes_of(own))
        part.read(own, bar)
