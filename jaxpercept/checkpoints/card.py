"""The model card every export carries: what the model is, what it came from, what it scored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxpercept
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.values import in_short
from jaxpercept.checkpoints.weights import atomic_write, read_json
from jaxpercept.errors import UserError

FILE_NAME = "README.md"
_LICENSE = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*(\S[^\n]*)\n(?:.*\n)*?---")
_TAGS = {"depth": "depth-estimation", "disparity": "depth-estimation", "": "text-to-image"}
_TASK_NAMES = {
    "depth": "affine-invariant depth",
    "disparity": "affine-invariant disparity",
    "normals": "surface normals",
    "dis": "a mask of the salient object",
    "matting": "the foreground's opacity",
    "semantic": "semantic classes",
    "pose": "a person's joints",
    "seg": "semantic classes in a palette's colours",
    "intrinsics": "intrinsic images",
}


def write_card(
    folder: Path,
    description: Description,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    usage: str,
    license: str | None = None,
    workdir: Path | None = None,
    name: str | None = None,
    more: Sequence[str] = (),
) -> Path:
    """Write `README.md` into an export or a training run.

    Args:
        folder: the export.
        description: the model.
        params: the weights exported, which the card has hashes of; None: says nothing of them.
        usage: the lines of code that open this export.
        license: None takes that of the base checkpoint's card, where it lies on this machine.
        workdir: the training run whose evaluations the card quotes.
        name: the model's; None: the folder's.
        more: lines to end with.

    Raises:
        UserError: an evaluation's report is damaged.
    """
    base = in_short(description.base_checkpoint)
    license = license or base_license(description.base_checkpoint)
    task = _TASK_NAMES.get(description.task, description.task)
    header = ["---", f"license: {license or 'unknown'}"]
    if base:
        header.append(f"base_model: {base}")
    header += [f"pipeline_tag: {_TAGS.get(description.task, 'image-to-image')}", "---", ""]
    method = description.recipe.get("family") or description.method.get("name") or "text to image"
    says = f"Predicts {task} from an image" if task else "Paints images from text"
    lines = [
        *header,
        f"# {name or folder.name}",
        "",
        f"{says} (method: {method}).",
        "",
        *_code(usage),
        "",
    ]
    lines += ["## Origin", "", f"- Base checkpoint: {base or 'none, trained from random weights'}"]
    lines.append(f"- Licence: {license or 'not stated by the base checkpoint; look it up there'}")
    lines.append(f"- Written by jaxpercept {jaxpercept.__version__}")
    lines += _training(description) + _scores(workdir)
    lines += _weights(params) if params is not None else []
    lines += more
    path = folder / FILE_NAME
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path


def weights_hash(weights: Mapping[str, Any]) -> str:
    """SHA-256 of one component's weights, the same for every format they are stored in."""
    digest = hashlib.sha256()
    for path, array in sorted(weights.items()):
        array = np.ascontiguousarray(array)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def base_license(base: str) -> str | None:
    """The licence in the head of a checkpoint's own card; None where there is none to read."""
    from jaxpercept.checkpoints.load import resolve

    card = Path(resolve(base)) / FILE_NAME if base else None
    try:
        if card is None or not card.is_file():
            return None
        found = _LICENSE.match(card.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # such as a base that is no path at all
        return None
    return in_short(found[1]) if found else None


def _code(text: str) -> list[str]:
    return ["```python", *text.strip().splitlines(), "```"]


def _training(description: Description) -> list[str]:
    config = description.config
    if not config:
        return []
    data = config.get("data")
    mixture = data.get("mixture") if isinstance(data, dict) else None
    resolution = " x ".join(map(str, description.resolution or ()))
    lines = ["", "## Training", ""]
    steps, batch_size = in_short(config.get("steps")), in_short(config.get("batch_size"))
    lines.append(f"- {steps} steps of {batch_size} at {resolution}")
    lines.append(f"- Data: {in_short(', '.join(map(str, mixture or ()))) or 'not recorded'}")
    lines += ["", "<details><summary>The whole config</summary>", "", "```json"]
    lines += json.dumps(config, indent=2, sort_keys=True).splitlines()
    return [*lines, "```", "", "</details>"]


def _weights(params: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["", "## Weights", ""]
    lines.append("SHA-256 of each component: of the sorted weights' names, types,")
    lines += ["shapes and bytes in jaxpercept's layout, whatever the file format.", ""]
    lines += ["| component | weights | SHA-256 |", "|---|---|---|"]
    for component, weights in sorted(params.items()):
        count = sum(np.size(array) for array in weights.values())
        lines.append(f"| {component} | {count:,} | `{weights_hash(weights)}` |")
    return lines


def _scores(workdir: Path | None) -> list[str]:
    reports = sorted(workdir.glob("evaluation/*/metrics.json")) if workdir else []
    lines = ["", "## Results", ""] if reports else []
    for path in reports:
        report = read_json(path)
        try:
            protocol = report.get("protocol", {})
            scores = ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items())
            facts = [str(protocol.get("split")), f"{protocol.get('images')} images"]
            if "alignment" in protocol:
                facts.append(f"alignment {protocol['alignment']}")
            line = f"{path.parent.name} ({', '.join(facts)}): {scores}"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no evaluation's report: evaluate again.") from error
        lines.append(f"- {in_short(line, 2000)}")
    return lines
