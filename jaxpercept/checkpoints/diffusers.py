"""Checkpoints in diffusers' folder layout, read and written without torch.

    model_index.json  unet/config.json  unet/diffusion_pytorch_model.safetensors  vae/...
    text_encoder/config.json  text_encoder/model.safetensors  tokenizer/  scheduler/

Only safetensors are read: a pickle can run code.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpercept.checkpoints import hub
from jaxpercept.checkpoints.rules import DTYPES, to_jax, to_torch
from jaxpercept.checkpoints.tokenizer import (
    TOKENIZER_FILES,
    load_tokenizer,
    missing_tokenizer_files,
    tokenize,
)
from jaxpercept.checkpoints.weights import (
    PICKLES,
    atomic_write,
    open_weights,
    read_json,
    shard_names,
    weight_file,
    write_json,
    write_weights,
)
from jaxpercept.errors import UserError
from jaxpercept.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.functional import functional

__all__ = [
    "Checkpoint",
    "load",
    "load_tokenizer",
    "read_configs",
    "save",
    "tokenize",
    "widen",
    "widen_conv_in",
]

Config = UNetConfig | VAEConfig | CLIPTextConfig
Params = dict[str, dict[str, Any]]

# The diffusers version whose file format `save` writes.
_DIFFUSERS_VERSION = "0.42.1"


class _Component(NamedTuple):
    config: type
    stem: str  # of the weight files
    library: str


COMPONENTS = {
    "unet": _Component(UNetConfig, "diffusion_pytorch_model", "diffusers"),
    "vae": _Component(VAEConfig, "diffusion_pytorch_model", "diffusers"),
    "text_encoder": _Component(CLIPTextConfig, "model", "transformers"),
}

# What `save` may find in a folder that an interrupted `save` left without its model_index.json.
_OWN_NAMES = {*COMPONENTS, "tokenizer", "scheduler", "model_index.json", "jaxpercept.json"}


@dataclasses.dataclass
class Checkpoint:
    """A latent diffusion model at rest.

    Attributes:
      configs: architecture of each component.
      params: `{component: {path: array}}` in this package's layout, on the host.
      scheduler: content of scheduler_config.json, {} where the checkpoint has none.
      tokenizer_dir: folder of the tokenizer's files, None where the checkpoint has none.
      model_index: content of model_index.json, {} where the checkpoint has none.
      source: the folder or hub id it came from.
    """

    configs: dict[str, Config]
    params: Params
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer_dir: Path | None = None
    model_index: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""


def load(
    path_or_hub_id: str | Path,
    *,
    components: Sequence[str] = ("unet", "vae", "text_encoder"),
    variant: str | None = None,
    dtype: str | None = "float32",
) -> Checkpoint:
    """Reads a diffusers folder or hub repository.

    Args:
      path_or_hub_id: a folder, or "owner/name" on the Hugging Face hub (only the files needed are
        downloaded).
      components: networks to read; with "text_encoder" the tokenizer must be there too.
      variant: "fp16", "bf16", ... as in the file names; None takes the most precise one present.
      dtype: "float32", "float16" or "bfloat16" of the returned arrays; None keeps the stored one.

    Raises:
      UserError: files are missing (all are listed), damaged or pickles; a config or the tensors do
        not fit the supported architectures; a tensor holds NaN or infinity.
    """
    folder, checkpoint = _open(str(path_or_hub_id), components, variant)
    for name in components:
        shapes = functional(checkpoint.configs[name]).shapes
        weights = folder / name / _weight_file(folder / name, name, variant)
        tensors = open_weights(weights)
        checkpoint.params[name] = to_jax(shapes, tensors, where=str(weights), dtype=dtype)
    return checkpoint


def read_configs(
    path_or_hub_id: str | Path,
    *,
    components: Sequence[str] = ("unet", "vae", "text_encoder"),
    variant: str | None = None,
) -> Checkpoint:
    """What `load` gives, checked for completeness, but with empty `params`: no weights are read.

    Raises:
      UserError: as `load`, as far as it can be told without reading weights.
    """
    return _open(str(path_or_hub_id), components, variant)[1]


def _open(source: str, components: Sequence[str], variant: str | None) -> tuple[Path, Checkpoint]:
    """The local folder, all its files there, and the checkpoint with no weights read."""
    if unknown := set(components) - COMPONENTS.keys():
        raise ValueError(f"unknown components {sorted(unknown)}; there are {list(COMPONENTS)}")
    folder = _folder(source, components, variant)
    _check_complete(folder, components, variant)
    tokenizer = folder / "tokenizer"
    return folder, Checkpoint(
        configs={
            name: _read_config(folder / name / "config.json", COMPONENTS[name].config)
            for name in components
        },
        params={},
        scheduler=_read_if_there(folder / "scheduler" / "scheduler_config.json"),
        tokenizer_dir=None if missing_tokenizer_files(tokenizer) else tokenizer,
        model_index=_read_if_there(folder / "model_index.json"),
        source=source,
    )


def save(folder: str | Path, checkpoint: Checkpoint, *, dtype: str = "float32") -> None:
    """Writes a diffusers folder that diffusers' `from_pretrained` loads.

    Each file appears complete or not at all, model_index.json last. The components are those of
    `checkpoint.configs`; a model_index given in the checkpoint is kept, less what is not written.

    Raises:
      UserError: the folder holds something else than a diffusers checkpoint, or a weight is not
        finite in `dtype` ("float32", "float16", "bfloat16").
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder to save to.")
    names = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if "model_index.json" not in names and not names <= _OWN_NAMES:
        raise UserError(
            f"{folder} is not empty and holds no diffusers checkpoint; choose another folder."
        )
    for name, config in checkpoint.configs.items():
        _save_component(folder / name, name, config, checkpoint.params[name], dtype)
    if checkpoint.scheduler:
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    if checkpoint.tokenizer_dir is not None:
        _copy_tokenizer(checkpoint.tokenizer_dir, folder / "tokenizer")
    write_json(folder / "model_index.json", _model_index(checkpoint))


def widen_conv_in(
    params_unet: Mapping[str, Any], factor: int = 2, halve_bias: bool = False
) -> dict[str, Any]:
    """The UNet's parameters with `factor` times the input channels.

    The first kernel is repeated over the new channel groups and divided by `factor`, so that an
    input repeated `factor` times gives the same activations [Marigold `_replace_unet_conv_in`;
    GenPercept the same]. E2E-FT also divides the bias [E2E training/util/unet_prep.py]:
    `halve_bias`, which gives different activations and is there to repeat its runs.
    """
    params = dict(params_unet)
    kernel: Float[np.ndarray, "kh kw c_in c_out"] = np.asarray(params["conv_in.kernel"])
    params["conv_in.kernel"] = np.tile(kernel, (1, 1, factor, 1)) / kernel.dtype.type(factor)
    if halve_bias:
        bias = np.asarray(params["conv_in.bias"])
        params["conv_in.bias"] = bias / bias.dtype.type(factor)
    return params


def widen(checkpoint: Checkpoint, factor: int = 2, halve_bias: bool = False) -> Checkpoint:
    """The checkpoint with `widen_conv_in` done on its UNet and written into its config."""
    config = checkpoint.configs["unet"]
    widened = dataclasses.replace(config, in_channels=config.in_channels * factor)
    unet = widen_conv_in(checkpoint.params["unet"], factor, halve_bias)
    return dataclasses.replace(
        checkpoint,
        configs={**checkpoint.configs, "unet": widened},
        params={**checkpoint.params, "unet": unet},
    )


def _folder(source: str, components: Sequence[str], variant: str | None) -> Path:
    """The local folder behind a path or hub id; downloads what the components need."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{source} is a single file; give a diffusers folder (convert a .ckpt or .safetensors "
            "file with diffusers' StableDiffusionPipeline.from_single_file and save_pretrained)."
        )
    small = ["model_index.json", "scheduler/scheduler_config.json"]
    small += [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    for name in components:
        small += [f"{name}/config.json", f"{name}/*.index*.json"]

    def weights(names: Collection[str], folder: Path) -> list[str]:
        needed = []
        for name in components:
            inside = [n.removeprefix(f"{name}/") for n in names if n.startswith(f"{name}/")]
            file = weight_file(inside, COMPONENTS[name].stem, variant, f"{source}/{name}")
            if file is None:
                _check_no_pickle(f"{source}/{name}", inside)
            elif file.endswith(".json"):
                needed += [f"{name}/{shard}" for shard in shard_names(folder / name / file)]
            else:
                needed.append(f"{name}/{file}")
        return needed

    return hub.fetch(source, small, weights)


def _weight_file(folder: Path, component: str, variant: str | None) -> str | None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return weight_file(names, COMPONENTS[component].stem, variant, str(folder))


def _check_complete(folder: Path, components: Sequence[str], variant: str | None) -> None:
    """Raises one UserError that lists every file missing."""
    missing = []
    for name in components:
        if not (folder / name / "config.json").is_file():
            missing.append(f"{name}/config.json")
        if _weight_file(folder / name, name, variant) is None:
            if (folder / name).is_dir():
                _check_no_pickle(str(folder / name), [p.name for p in (folder / name).iterdir()])
            suffix = f".{variant}" if variant else ""
            missing.append(f"{name}/{COMPONENTS[name].stem}{suffix}.safetensors")
    if "text_encoder" in components:
        missing += [f"tokenizer/{name}" for name in missing_tokenizer_files(folder / "tokenizer")]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; complete the diffusers folder, for example from "
            "the base model it was trained from."
        )


def _check_no_pickle(folder: str, names: Collection[str]) -> None:
    """Raises a UserError where pickles are all the weights there are."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when "
            "read; convert it to safetensors where you trust it (load it with diffusers and call "
            "save_pretrained(folder, safe_serialization=True))."
        )


def _read_config(path: Path, kind: type) -> Config:
    content = read_json(path)
    class_name = content.get("_class_name", kind.CLASS_NAME)
    if class_name != kind.CLASS_NAME:
        raise UserError(f"{path} describes a {class_name}; only {kind.CLASS_NAME} is supported.")
    try:
        return kind.from_dict(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _save_component(
    folder: Path, name: str, config: Config, params: Mapping[str, Any], dtype: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = COMPONENTS[name].stem
    write_weights(folder / f"{stem}.safetensors", to_torch(params), DTYPES[dtype])
    content = config.to_dict()
    if "_class_name" in content:
        content["_diffusers_version"] = _DIFFUSERS_VERSION
    write_json(folder / "config.json", content)
    # Shards and variants of an earlier checkpoint would be read instead of, or beside, this one.
    for old in folder.glob(f"{stem}*.safetensors*"):
        if old.name != f"{stem}.safetensors":
            old.unlink()


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            content = (source / name).read_bytes()
            with atomic_write(target / name) as file:
                file.write(content)
        else:  # of an earlier tokenizer
            (target / name).unlink(missing_ok=True)


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The given model_index.json, or a StableDiffusionPipeline's, naming only what was written."""
    classes: dict[str, list[str | None]] = {
        name: [COMPONENTS[name].library, config.CLASS_NAME]
        for name, config in checkpoint.configs.items()
    }
    if checkpoint.scheduler:
        scheduler = checkpoint.scheduler.get("_class_name", "DDIMScheduler")
        classes["scheduler"] = ["diffusers", scheduler]
    if checkpoint.tokenizer_dir is not None:
        classes["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    index = dict(checkpoint.model_index or index)
    for name, value in index.items():
        if isinstance(value, list) and name not in classes:
            index[name] = [None, None]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    return index | classes
