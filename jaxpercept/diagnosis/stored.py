"""What is stored in a checkpoint. Damage is noted, not raised: a file more can be looked at."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxpercept.checkpoints import fit, rules
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.weights import PICKLES
from jaxpercept.diagnosis.text import first_line
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional


@dataclasses.dataclass
class Part:
    """One network as it is stored.

    Attributes:
        source: the checkpoint it is in.
        config: the architecture, None where it cannot be told.
        has_config: whether there is a config.json, damaged or not.
        files: those read.
        tensors, parameters, bytes: their number, and that of their values and bytes.
        dtypes: tensors by type.
        non_finite: by tensor, how many values are NaN and how many infinite.
        differences: tensors that do not fit the architecture.
        errors: a sentence for each file that cannot be used.
    """

    source: str
    config: Any = None
    has_config: bool = True
    files: list[Path] = dataclasses.field(default_factory=list)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: Counter[str] = dataclasses.field(default_factory=Counter)
    non_finite: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    differences: fit.Differences = dataclasses.field(default_factory=fit.Differences)
    errors: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """All that keeps the part from being used, in sentences."""
        found = list(self.errors)
        if any(self.differences):
            missing, unexpected, misshaped = map(len, self.differences)
            found.append(
                f"The tensors do not fit the architecture: {missing} missing, {unexpected} not "
                f"expected, {misshaped} of another shape; use the weights and the config.json of "
                "the same model."
            )
        if self.non_finite:
            found.append(
                f"{len(self.non_finite)} of {self.tensors} tensors hold NaN or infinite values; "
                "download or export them again."
            )
        return found

    def count(self, name: str, values: np.ndarray) -> None:
        """Take note of a tensor."""
        self.tensors += 1
        self.parameters += values.size
        self.bytes += values.nbytes
        self.dtypes[values.dtype.name] += 1
        if values.dtype.kind not in "iub" and not (finite := np.isfinite(values)).all():
            nan = int(np.isnan(values).sum())
            self.non_finite[name] = {"nan": nan, "infinite": int((~finite).sum()) - nan}

    def read(self, tensors: Mapping[str, Any], bar: tqdm) -> None:
        """Take note of tensors by name, reading one at a time."""
        bar.total = (bar.total or 0) + len(tensors)
        for name, tensor in tensors.items():
            bar.update()
            values = attempt(self.errors, name, lambda tensor=tensor: np.asarray(tensor))
            if values is not None:
                self.count(name, values)

    def compare(self, stored: Mapping[str, Any], where: Path, *, head: bool = True) -> None:
        """Take note of what does not fit the architecture.

        Args:
            stored: {path: anything with .shape} in this package's layout.
            where: names them in sentences.
            head: whether a UNet should have its output convolution.
        """
        if (wanted := self._wanted(len(stored), where, head)) is not None:
            self.differences = fit.differences(fit.shapes_of(wanted), fit.shapes_of(stored))

    def compare_torch(self, tensors: Mapping[str, Any], where: Path, *, head: bool = True) -> None:
        """The same for a diffusers folder's tensors, by the rules they are converted with."""
        if (wanted := self._wanted(len(tensors), where, head)) is None:
            return
        try:
            _, self.differences = rules.match(wanted, tensors, str(where))
        except UserError as error:  # a tensor under its old and its new name
            self.errors.append(str(error))

    def _wanted(self, tensors: int, where: Path, head: bool) -> Mapping[str, Any] | None:
        try:
            fit.check_layers(self.config, tensors, where)
        except UserError as error:  # far more layers than tensors
            self.errors.append(str(error))
            self.config = None  # nothing is to be built of it
            return None
        return functional(self.config, head=head).shapes


@dataclasses.dataclass
class Inspection:
    """What a checkpoint is and holds.

    Attributes:
        source: as it was named.
        kind: "training workdir", "Orbax export", "StableHLO export", "diffusers folder",
            "UNet folder", "autoencoder folder", or "" where it is none of these.
        folder: where it lies on this machine.
        parts: the networks by component name; "prompt" is the encoded empty prompt.
        description: content of jaxpercept.json.
        model_index, scheduler: content of diffusers' files, {} where they are not there.
        tokenizer: what it is, None where there is none.
        steps: of a training workdir, the steps saved.
        unused: files that are there and not read.
        warnings, problems: sentences; problems keep the checkpoint from being opened.
    """

    source: str
    kind: str = ""
    folder: Path | None = None
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    description: Description | None = None
    model_index: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    steps: list[int] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def in_parts(self) -> bool:
        """Whether its networks lie in diffusers' layout, and a base may have to complete them."""
        return self.kind in ("diffusers folder", "UNet folder")

    def lacking(self, components: Iterable[str]) -> list[str]:
        """Those of the components of which there is no config.json."""
        return [n for n in components if n not in self.parts or not self.parts[n].has_config]

    def list_unused(self, used: Collection[Path] = (), known: Collection[str] = ()) -> None:
        """Take note of files that are neither `used` nor `known`; pickles get a warning.

        Args:
            used: paths of files.
            known: names in the checkpoint's folder; of a folder, all that is inside is known.
        """
        known = {FILE_NAME, "README.md", *known}
        tops = [path for path in self.folder.iterdir() if path.name not in known]
        for path in sorted(path for top in tops for path in (top, *top.rglob("*"))):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path in used or hidden or not path.is_file():
                continue
            self.unused.append(str(name))
            if path.name.endswith(PICKLES):
                self.warnings.append(
                    f"{path} is a pickle, which can run any code when read: it is never opened."
                )


def attempt(errors: list[str], what: str | Path, function: Callable[[], Any]) -> Any:
    """The function's result; None where it fails, with a sentence more among the errors."""
    try:
        return function()
    except UserError as error:
        errors.append(str(error))
    except Exception as error:  # damaged files raise almost anything
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        errors.append(f"{what} cannot be read ({reason}); restore it.")
    return None
