"""What lies in a checkpoint's folder, part by part: damage is noted, not raised.

Opening a checkpoint stops at the first thing that is wrong. Here every file is looked at, tensors
are read one at a time, and no network is built.
"""

from __future__ import annotations

from collections.abc import Collection

from tqdm import tqdm

from jaxpercept.checkpoints import diffusers, orbax
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.load import FROZEN, STEPS, resolve
from jaxpercept.diagnosis import diffusers_folder, exports
from jaxpercept.diagnosis.stored import Inspection, attempt
from jaxpercept.errors import UserError
from jaxpercept.inference import stablehlo

NETWORKS = tuple(diffusers.COMPONENTS)
# Beside the weights, by kind; what else there is, is listed as not used.
_KNOWN = {
    "training workdir": (STEPS, FROZEN, "metrics.jsonl", "tensorboard", "pictures", "evaluation"),
    "Orbax export": (orbax.WEIGHTS, "tokenizer", "evaluation"),
    "StableHLO export": (stablehlo.PROGRAM, stablehlo.WEIGHTS, stablehlo.SIGNATURE),
}


def inspect(
    source: str, *, components: Collection[str] = NETWORKS, bar: tqdm | None = None
) -> Inspection:
    """Look at all of a checkpoint.

    Args:
        source: as for `load.load_model`. From the hub, what loading needs is downloaded.
        components: the networks wanted of a diffusers checkpoint.
        bar: counts the tensors read.
    """
    found = Inspection(source)
    bar = tqdm(disable=True) if bar is None else bar
    attempt(found.problems, source, lambda: _look(found, components, bar))
    return found


def add_base(found: Inspection, base: str, bar: tqdm | None = None) -> None:
    """Take what a diffusers checkpoint lacks from the text-to-image checkpoint `base`."""
    missing = found.lacking(NETWORKS)
    if not missing or "unet" in missing:  # a base has everything but the UNet to give
        return
    other = inspect(base, components=missing, bar=bar)
    found.parts |= {name: other.parts[name] for name in missing if name in other.parts}
    found.scheduler = found.scheduler or other.scheduler
    found.tokenizer = found.tokenizer or other.tokenizer
    found.warnings += other.warnings
    found.problems += other.problems


def _look(found: Inspection, components: Collection[str], bar: tqdm) -> None:
    source = resolve(found.source)
    top, inside, places = diffusers.fetch_parts(source, tuple(components), also=("*.json",))
    folder = found.folder = top / inside
    own = folder / FILE_NAME
    if own.is_file():
        found.description = attempt(found.problems, own, lambda: Description.load(folder))
    if (folder / stablehlo.PROGRAM).is_file():
        found.kind = "StableHLO export"
        exports.look_at_program(found, bar)
    elif (folder / orbax.WEIGHTS).is_dir():
        found.kind = "Orbax export"
        exports.look_at_weights(found, [folder / orbax.WEIGHTS], bar)
    elif diffusers.is_network(folder):
        # GenPercept's UNets have their autoencoder beside them.
        networks = {name: top / place for name, place in places.items() if name in components}
        diffusers_folder.look_at_network(found, networks, bar)
    elif any((folder / name).exists() for name in ("model_index.json", *NETWORKS)):
        found.kind = "diffusers folder"
        diffusers_folder.look_at_folder(found, {name: folder / name for name in components}, bar)
    elif own.is_file() or (folder / STEPS).is_dir():
        found.kind = "training workdir"
        exports.look_at_workdir(found, bar)
    else:
        raise UserError(f"{folder} holds no checkpoint: give the folder of one.")
    if found.kind in _KNOWN:
        found.list_unused(known=_KNOWN[found.kind])
        if not own.is_file():
            found.problems.append(f"{own} is missing, which says what the model is: restore it.")
