"""What lies in a checkpoint's folder, part by part: damage is reported, not raised.

Opening a checkpoint stops at the first thing that is wrong. Here every file is looked at, tensors
are read one at a time, and no network is built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import tensorstore
from tqdm import tqdm

from jaxpercept.checkpoints import diffusers, fit, orbax, rules
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.load import FROZEN, STEPS, latest_step, resolve
from jaxpercept.checkpoints.tokenizer import (
    TOKENIZER_FILES,
    load_tokenizer,
    missing_tokenizer_files,
    tokenize,
)
from jaxpercept.checkpoints.values import check_model_index, check_scheduler
from jaxpercept.checkpoints.weights import (
    PICKLES,
    open_weights,
    read_json,
    shard_names,
    weight_file,
)
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderTinyConfig, VAEConfig
from jaxpercept.models.dpt import DPTConfig, published_tensors

NETWORKS = ("unet", "vae", "text_encoder")
STABLEHLO = ("model.stablehlo", "weights.safetensors", "signature.json")
_INDEX = "manifest.ocdbt"  # of Orbax's database
_AUTOENCODERS = (VAEConfig.CLASS_NAME, AutoencoderTinyConfig.CLASS_NAME)
# Beside the weights, by kind; what else there is, is listed as not used.
_KNOWN = {
    "training workdir": (STEPS, FROZEN, "metrics.jsonl", "tensorboard", "pictures", "evaluation"),
    "Orbax export": (orbax.WEIGHTS, "tokenizer", "evaluation"),
    "StableHLO export": STABLEHLO,
}


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
        missing, unexpected, misshaped: names of tensors that do not fit the architecture.
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
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """All that keeps the part from being used, in sentences."""
        found = list(self.errors)
        if self.missing or self.unexpected or self.misshaped:
            found.append(
                f"The tensors do not fit the architecture: {len(self.missing)} missing, "
                f"{len(self.unexpected)} not expected, {len(self.misshaped)} of another shape; use "
                "the weights and the config.json of the same model."
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

    def compare(self, stored: Mapping[str, Any], where: Path, *, head: bool = True) -> None:
        """Take note of what does not fit the architecture: {path: with .shape}."""
        if (wanted := self._wanted(len(stored), where, head)) is not None:
            self.compare_shapes(wanted, stored)

    def compare_shapes(self, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        """The same, by the shapes wanted."""
        self._compare(
            {path: tuple(leaf.shape) for path, leaf in wanted.items()},
            {path: (path, tuple(leaf.shape)) for path, leaf in stored.items()},
        )

    def compare_torch(self, tensors: Mapping[str, Any], where: Path, *, head: bool = True) -> None:
        """The same for a diffusers folder's tensors, by the rules they are converted with."""
        if (shapes := self._wanted(len(tensors), where, head)) is None:
            return
        paths = {rules.torch_name(path, len(s.shape)): path for path, s in shapes.items()}
        wanted = {
            name: rules._torch_shape(tuple(shapes[path].shape), path)
            for name, path in paths.items()
        }
        try:
            names = rules._current_names(tensors, paths, str(where))
        except UserError as error:  # a tensor under its old and its new name
            self.errors.append(str(error))
            return
        stored = {}
        for name, key in names.items():
            have = tuple(tensors[key].shape)
            stored[name] = key, rules._flat_projection(name, have, wanted.get(name, have))
        self._compare(wanted, stored)

    def _wanted(self, tensors: int, where: Path, head: bool) -> Mapping[str, Any] | None:
        try:
            return fit.network_of(self.config, tensors, where, head=head).shapes
        except UserError as error:  # far more layers than tensors
            self.errors.append(str(error))
            self.config = None  # nothing is to be built of it
            return None

    def _compare(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        self.missing = sorted(wanted.keys() - stored.keys())
        self.unexpected = sorted(stored[name][0] for name in stored.keys() - wanted.keys())
        for name in sorted(wanted.keys() & stored.keys()):
            key, have = stored[name]
            if have != wanted[name]:
                self.misshaped.append(f"{key} {list(have)} instead of {list(wanted[name])}")


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
    _attempt(found.problems, source, lambda: _look(found, components, bar))
    return found


def _look(found: Inspection, components: Collection[str], bar: tqdm) -> None:
    top, inside = _fetch(found.source, components)
    folder = found.folder = top / inside
    own = folder / FILE_NAME
    if own.is_file():
        found.description = _attempt(found.problems, str(own), lambda: Description.load(folder))
    if (folder / STABLEHLO[0]).is_file():
        found.kind = "StableHLO export"
        _program(found, folder, bar)
    elif (folder / orbax.WEIGHTS).is_dir():
        found.kind = "Orbax export"
        _stores(found, [folder / orbax.WEIGHTS], bar)
    elif diffusers._is_network(folder):
        _network(found, top, folder, components, bar)
    elif any((folder / name).exists() for name in ("model_index.json", *NETWORKS)):
        found.kind = "diffusers folder"
        _diffusers(found, {name: folder / name for name in components}, bar)
    elif own.is_file() or (folder / STEPS).is_dir():
        found.kind = "training workdir"
        _workdir(found, folder, bar)
    else:
        raise UserError(f"{folder} holds no checkpoint: give the folder of one.")
    if found.kind in _KNOWN:
        _list_unused(found, set(), _KNOWN[found.kind])
        if not own.is_file():
            found.problems.append(f"{own} is missing, which says what the model is: restore it.")


def add_base(found: Inspection, base: str, bar: tqdm | None = None) -> None:
    """Take what a diffusers checkpoint lacks from the text-to-image checkpoint `base`."""
    missing = [n for n in NETWORKS if n not in found.parts or not found.parts[n].has_config]
    if not missing or "unet" in missing:  # a base has everything but the UNet to give
        return
    other = inspect(base, components=missing, bar=bar)
    found.parts |= {name: other.parts[name] for name in missing if name in other.parts}
    found.scheduler = found.scheduler or other.scheduler
    found.tokenizer = found.tokenizer or other.tokenizer
    found.warnings += other.warnings
    found.problems += other.problems


def _fetch(source: str, components: Collection[str]) -> tuple[Path, str]:
    """The folder on this machine, and the name in it of a network's own folder, mostly ""."""
    repo, inside = diffusers._split(resolve(source))
    prefix = diffusers._inside(inside)
    patterns = [f"{prefix}*.json", f"{prefix}tokenizer/*.txt", f"*{diffusers._DPT_HEAD}/*"]
    patterns += ["vae/config.json", "vae/*.index*.json"]

    def places(folder: Path) -> dict[str, str]:
        every = {name: f"{prefix}{name}" for name in components}
        if diffusers._is_network(folder / inside):
            every = {"unet": inside, "vae": "vae"}
        return {k: v for k, v in every.items() if (folder / v / "config.json").is_file()}

    return diffusers._folder(repo, patterns, places, None), inside


def _attempt(errors: list[str], what: str, function: Callable[[], Any]) -> Any:
    """The function's result; None where it fails, with a sentence more among the errors."""
    try:
        return function()
    except UserError as error:
        errors.append(str(error))
    except Exception as error:  # damaged files raise almost anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        errors.append(f"{what} cannot be read ({type(error).__name__}: {reason}); restore it.")
    return None


# ---- diffusers -----------------------------------------------------------------------------------


def _network(
    found: Inspection, top: Path, folder: Path, components: Collection[str], bar: tqdm
) -> None:
    """A folder that is itself a network; GenPercept's UNets have their autoencoder beside them."""
    config = _attempt([], "", lambda: read_json(folder / "config.json")) or {}
    if config.get("_class_name") in _AUTOENCODERS:
        found.kind = "autoencoder folder"
        _diffusers(found, {"vae": folder}, bar)
        return
    found.kind = "UNet folder"
    places = {"unet": folder}
    if "vae" in components and (top / "vae" / "config.json").is_file():
        places["vae"] = top / "vae"
    _diffusers(found, places, bar)


def _diffusers(found: Inspection, places: Mapping[str, Path], bar: tqdm) -> None:
    folder = found.folder
    for name, place in places.items():
        if place.is_dir():
            _component(found, name, place, bar)
    small = {
        "model_index": folder / "model_index.json",
        "scheduler": folder / "scheduler" / "scheduler_config.json",
    }
    for attribute, file in small.items():
        if file.is_file():
            content = _attempt(found.problems, str(file), lambda file=file: read_json(file)) or {}
            check = check_model_index if attribute == "model_index" else check_scheduler
            _attempt(found.problems, str(file), functools.partial(check, content, file))
            setattr(found, attribute, content)
    _tokenizer(found, folder / "tokenizer")
    for name, config in () if found.description is None else found.description.components.items():
        if name in found.parts and found.parts[name].config not in (None, config):
            found.problems.append(
                f"{places[name] / 'config.json'} and {folder / FILE_NAME} describe different "
                "networks: restore both from the same export."
            )
    used = {file for part in found.parts.values() for file in part.files}
    used |= {*small.values(), *(folder / "tokenizer" / name for name in TOKENIZER_FILES)}
    _list_unused(found, used, ())


def _component(found: Inspection, name: str, folder: Path, bar: tqdm) -> None:
    """A network's config.json and weights."""
    kinds, stem, _ = diffusers.COMPONENTS[name]
    part = found.parts[name] = Part(found.source)
    config = folder / "config.json"
    part.has_config = config.is_file()
    if part.has_config:
        part.files.append(config)
        part.config = _attempt(
            part.errors, str(config), lambda: diffusers._read_config(config, kinds)
        )
    else:
        part.errors.append(f"{config} is missing; restore it.")
    names = [path.name for path in folder.iterdir()]
    before = len(part.errors)
    file = _attempt(part.errors, "", lambda: weight_file(names, stem, None, str(folder)))
    if file is None:
        if len(part.errors) == before:
            _attempt(part.errors, "", lambda: diffusers._check_no_pickle(str(folder), names))
        if len(part.errors) == before:
            part.errors.append(f"{folder / stem}.safetensors is missing; download it.")
        return
    tensors = _open(part, folder / file)
    if part.config is not None and len(part.errors) == before:
        # As `diffusers.load_parts` tells a UNet that ends in a DPT head.
        whole = any(key.startswith(("conv_out.", "conv_norm_out.")) for key in tensors)
        headless = name == "unet" and not whole
        part.compare_torch(tensors, folder / file, head=not headless)
        if headless:
            _head(found, folder, bar)
    _count(part, tensors, bar)


def _open(part: Part, file: Path) -> dict[str, Any]:
    """The tensors of one file, or of all shards that can be read."""
    part.files.append(file)
    files, listed = [file], set()
    if file.suffix == ".json":
        names = _attempt(part.errors, str(file), lambda: shard_names(file)) or []
        files = [file.parent / name for name in names]
        part.files += files
        listed = set(read_json(file)["weight_map"]) if files else set()
    before, tensors = len(part.errors), {}
    for path in files:
        opened = _attempt(part.errors, str(path), lambda path=path: open_weights(path))
        for twice in sorted(tensors.keys() & (opened or {}).keys()):
            part.errors.append(f"{path} repeats tensor {twice} of another shard.")
        tensors |= opened or {}
    if len(part.errors) == before and (absent := sorted(listed - tensors.keys())):
        part.errors.append(
            f"{file} lists {len(absent)} tensors that its shards do not hold, the first being "
            f"{absent[0]}; download the checkpoint again."
        )
    return tensors


def _count(part: Part, tensors: Mapping[str, Any], bar: tqdm) -> None:
    bar.total = (bar.total or 0) + len(tensors)
    for name, tensor in tensors.items():
        bar.update()
        values = _attempt(part.errors, name, lambda tensor=tensor: np.asarray(tensor))
        if values is not None:
            part.count(name, values)


def _head(found: Inspection, unet: Path, bar: tqdm) -> None:
    """The DPT head of a UNet without output convolution."""
    part = found.parts["head"] = Part(found.source)
    file = _attempt(part.errors, "", lambda: diffusers._find_head(unet))
    config = found.parts["unet"].config
    if file is None or config is None:
        return
    tensors, neck = _open(part, file), "neck.convs.0.weight"
    sizes = tuple(tensors[neck].shape) if neck in tensors else ()

    def build() -> DPTConfig:
        width = (*sizes, DPTConfig.fusion_hidden_size)[0]
        return DPTConfig(neck_hidden_sizes=config.block_out_channels, fusion_hidden_size=width)

    part.config = _attempt(part.errors, str(file), build)
    if part.config is not None and tensors:
        named = published_tensors(tensors, part.config)
        part.compare_torch(named, file)
    _count(part, tensors, bar)


def _tokenizer(found: Inspection, folder: Path) -> None:
    missing = missing_tokenizer_files(folder)
    encoder = found.parts.get("text_encoder")
    if missing:
        if encoder is not None and encoder.has_config:
            found.problems.append(
                f"{folder} lacks {', '.join(missing)}; copy the tokenizer of the base model there."
            )
        return
    loaded = _attempt(found.problems, str(folder), lambda: load_tokenizer(folder))
    if loaded is None:
        return
    ids = _attempt(found.problems, str(folder), lambda: tokenize(loaded, [""], None)[0].tolist())
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


def _list_unused(found: Inspection, used: Collection[Path], known: Sequence[str]) -> None:
    """What of the folder is neither used nor inside the folders `known`, pickles with a warning."""
    tops = [p for p in found.folder.iterdir() if p.name not in (FILE_NAME, "README.md", *known)]
    for path in sorted(path for top in tops for path in (top, *top.rglob("*"))):
        name = path.relative_to(found.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path in used or hidden or not path.is_file():
            continue
        found.unused.append(str(name))
        if path.name.endswith(PICKLES):
            found.warnings.append(
                f"{path} is a pickle, which can run any code when read: it is never opened."
            )


# ---- Orbax and StableHLO -------------------------------------------------------------------------


def _workdir(found: Inspection, folder: Path, bar: tqdm) -> None:
    for path in sorted((folder / STEPS).glob("*")):
        if path.name.isdigit() and (path / "params").is_dir():
            found.steps.append(int(path.name))
        elif path.is_dir():
            found.warnings.append(f"{path} is a save that was not finished: it is ignored.")
    found.steps.sort()
    newest = latest_step(folder)
    stores = [folder / FROZEN] if (folder / FROZEN).is_dir() else []
    if newest is None:
        found.problems.append(
            f"{folder} holds no finished checkpoint yet: let the training reach its first save."
        )
    else:
        stores.append(folder / STEPS / str(newest) / "params")
    _stores(found, stores, bar)


def _stores(found: Inspection, folders: Sequence[Path], bar: tqdm) -> None:
    """Weights in Orbax; those of later folders complete the earlier ones."""
    stored: dict[str, dict[str, Any]] = {}
    readable = True
    for folder in folders:
        leaves = _attempt(found.problems, str(folder), lambda folder=folder: _leaves(folder))
        if leaves is None:
            readable = False
            continue
        bar.total = (bar.total or 0) + len(leaves)
        for (component, path), leaf in leaves.items():
            bar.update()
            stored.setdefault(component, {})[path] = leaf
            part = found.parts.setdefault(component, Part(found.source))
            if folder not in part.files:
                part.files.append(folder)
            read = functools.partial(_read_array, folder, component, path)
            values = _attempt(part.errors, f"{folder}: {path}", read)
            if values is not None:
                part.count(path, values)
    if found.description is None or not readable or not folders:
        return
    dpt = found.description.recipe.get("head") == "dpt"
    for component, config in found.description.components.items():
        part = found.parts.setdefault(component, Part(found.source))
        part.config = config
        headless = dpt and component == "unet"
        part.compare(stored.get(component, {}), folders[-1], head=not headless)
    if "prompt" in stored:
        found.parts["prompt"].misshaped += fit._misshaped_prompt(
            stored["prompt"], found.description.components.get("unet")
        )


def _leaves(folder: Path) -> dict[tuple[str, str], Any]:
    """Shapes and types of an Orbax store's arrays by (component, path)."""
    shapes = orbax.load_shapes(folder)
    return {(c, path): leaf for c, weights in shapes.items() for path, leaf in weights.items()}


def _read_array(folder: Path, component: str, path: str) -> np.ndarray:
    """One array of an Orbax store, whatever the state of the others."""
    store = {"driver": "auto", "kvstore": _kvstore(folder, f"{component}.{path}/")}
    return tensorstore.open(store, open=True, read=True).result().read().result()


def _kvstore(folder: Path, path: str) -> dict[str, Any]:
    """Where Orbax keeps an array: all in one database, or each in a folder."""
    root = f"{folder.resolve()}/"
    if not (folder / _INDEX).is_file():
        return {"driver": "file", "path": root + path}
    return {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": path}


def _program(found: Inspection, folder: Path, bar: tqdm) -> None:
    """A StableHLO program, and whether the weights beside it are those it takes."""
    program, weights, _ = (folder / name for name in STABLEHLO)
    exported = None
    try:
        exported = jax.export.deserialize(bytearray(program.read_bytes()))
    except ImportError as error:
        found.warnings.append(f"{program} is not looked at ({error}).")
    except Exception as error:  # a damaged file raises almost anything
        found.problems.append(
            f"{program} cannot be read ({type(error).__name__}); export it again."
        )
    tensors = _attempt(found.problems, str(weights), lambda: open_weights(weights)) or {}
    wanted: dict[str, Any] = {}
    if exported is not None:
        wanted = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
    for component in sorted({name.partition("/")[0] for name in (*tensors, *wanted)}):
        part = found.parts[component] = Part(found.source, files=[weights])
        if found.description is not None:
            part.config = found.description.components.get(component)

        def own(every: Mapping[str, Any], prefix: str = component + "/") -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in every.items() if k.startswith(prefix)}

        if wanted and tensors:
            part.compare_shapes(own(wanted), own(tensors))
        _count(part, own(tensors), bar)
