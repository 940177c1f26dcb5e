"""Reading checkpoints in diffusers' folder layout, without torch.

    model_index.json  unet/config.json  unet/diffusion_pytorch_model.safetensors  vae/...
    text_encoder/config.json  text_encoder/model.safetensors  tokenizer/  scheduler/

An autoencoder can also be a folder of its own, as madebyollin/taesd is:

    config.json  diffusion_pytorch_model.safetensors

Only safetensors are read: a pickle can run code. `diffusers_write` writes such folders.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from jaxpercept.checkpoints import hub
from jaxpercept.checkpoints.components import (
    COMPONENTS,
    DPT_HEADS,
    Config,
    find_head,
    find_weights,
    read_config,
    read_head,
    read_params,
    weight_name,
)
from jaxpercept.checkpoints.fit import check_layers, lacks_output
from jaxpercept.checkpoints.tokenizer import TOKENIZER_FILES, missing_tokenizer_files
from jaxpercept.checkpoints.values import check_model_index, check_scheduler
from jaxpercept.checkpoints.weights import open_weights, read_json, shard_names
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderConfig

Params = dict[str, dict[str, Any]]


_TOP_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
)

# Folder of each component to read within the checkpoint: its name, or "" for the checkpoint's own.
_Places = dict[str, str]


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
    for name, config in checkpoint.configs.items():
        file = find_weights(folder / name, name, variant)
        checkpoint.params[name] = read_params(file, config, dtype)
    return checkpoint


def load_autoencoder(
    path_or_hub_id: str | Path, *, variant: str | None = None, dtype: str | None = "float32"
) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Config and parameters of an AutoencoderKL or AutoencoderTiny alone.

    Args:
      path_or_hub_id: an autoencoder's own folder or hub repository ("madebyollin/taesd"), or a
        whole checkpoint, of which only `vae/` is read.
      variant, dtype: as `load`.

    Raises:
      UserError: as `load`.
    """

    def places(folder: Path) -> _Places:
        return {"vae": "vae" if (folder / "vae").is_dir() else ""}

    patterns = [name for place in ("", "vae") for name in _small_files(place)]
    folder = _folder(str(path_or_hub_id), patterns, places, variant)
    _check_complete(folder, places(folder), variant)
    folder /= places(folder)["vae"]
    config = read_config(folder, "vae")
    return config, read_params(find_weights(folder, "vae", variant), config, dtype)


def load_parts(
    path_or_hub_id: str | Path,
    *,
    components: Sequence[str] = ("unet", "vae", "text_encoder"),
    variant: str | None = None,
    dtype: str | None = "float32",
) -> Checkpoint:
    """What a checkpoint has of the components; `configs` and `params` hold no others.

    A folder with config.json and weights of its own is taken for a UNet, as GenPercept publishes
    them ("guangkaixu/genpercept-models/unet_depth_v2" on the hub), beside `vae/`. A UNet without
    output convolution needs a DPT head, which is looked for in `dpt_head_identity/` and
    `dpt_head/`, inside or beside it, and becomes the component "head".

    Args:
      path_or_hub_id, variant, dtype: as `load`; a hub id may go on with a folder's name.
      components: the networks wanted.

    Raises:
      UserError: as `load`, for the components that are there.
    """
    source = str(path_or_hub_id)
    top, inside, places = fetch_parts(source, components, variant)
    _check_complete(top, places, variant)
    checkpoint = _describe(top / inside, {}, source)
    for name, place in places.items():
        folder = top / place
        config = read_config(folder, name)
        file = find_weights(folder, name, variant)
        headless = name == "unet" and lacks_output(open_weights(file))
        checkpoint.configs[name] = config
        checkpoint.params[name] = read_params(file, config, dtype, not headless)
        if headless:
            head, checkpoint.params["head"] = read_head(find_head(folder), config, dtype)
            checkpoint.configs["head"] = head
    return checkpoint


def fetch_parts(
    source: str, components: Sequence[str], variant: str | None = None, also: Sequence[str] = ()
) -> tuple[Path, str, _Places]:
    """Finds the parts of a checkpoint; from the hub, what they need is downloaded.

    Args:
      source, components, variant: as `load_parts`.
      also: patterns of further files to download from the checkpoint's folder.

    Returns:
      A folder on this machine and, by their names in it ("" for itself), the checkpoint's own
      folder and the folder of each component that has a config.json. Whether a component is
      complete is not looked at.

    Raises:
      UserError: there is no such folder; the repository cannot be downloaded, or has only pickles.
    """
    repo, inside = _split(source)
    whole = {name: f"{_inside(inside)}{name}" for name in components}

    def places(folder: Path) -> _Places:
        every = {"unet": inside, "vae": "vae"} if is_network(folder / inside) else whole
        there = [name for name in every if (folder / every[name] / "config.json").is_file()]
        return {name: every[name] for name in there}

    patterns = [f"{_inside(inside)}{name}" for name in (*_TOP_FILES, *also)]
    patterns += [f"{place}{head}/*" for head in DPT_HEADS for place in ("", "*/")]
    for place in (inside, "vae", *whole.values()):
        patterns += _small_files(place)
    top = _folder(repo, patterns, places, variant)
    return top, inside, places(top)


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
    folder, checkpoint = _open(str(path_or_hub_id), components, variant)
    for name, config in checkpoint.configs.items():
        file = find_weights(folder / name, name, variant)
        check_layers(config, len(open_weights(file)), file)
    return checkpoint


def _open(source: str, components: Sequence[str], variant: str | None) -> tuple[Path, Checkpoint]:
    """The local folder, all its files there, and the checkpoint with no weights read."""
    if unknown := set(components) - COMPONENTS.keys():
        raise ValueError(f"unknown components {sorted(unknown)}; there are {list(COMPONENTS)}")
    places = {name: name for name in components}
    patterns = [*_TOP_FILES, *(name for place in components for name in _small_files(place))]
    folder = _folder(source, patterns, lambda _: places, variant)
    _check_complete(folder, places, variant)
    configs = {name: read_config(folder / name, name) for name in components}
    return folder, _describe(folder, configs, source)


def _describe(folder: Path, configs: dict[str, Config], source: str) -> Checkpoint:
    """A checkpoint with no weights read."""
    tokenizer = folder / "tokenizer"
    return Checkpoint(
        configs=configs,
        params={},
        scheduler=_read_if_there(folder / "scheduler" / "scheduler_config.json", check_scheduler),
        tokenizer_dir=None if missing_tokenizer_files(tokenizer) else tokenizer,
        model_index=_read_if_there(folder / "model_index.json", check_model_index),
        source=source,
    )


def _folder(
    source: str,
    small_files: Collection[str],
    places: Callable[[Path], _Places],
    variant: str | None,
) -> Path:
    """The local folder behind a path or hub id; downloads what the components need.

    `places` tells from the folder of the small files where the components are.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{source} is a single file; give a diffusers folder (convert a .ckpt or .safetensors "
            "file with diffusers' StableDiffusionPipeline.from_single_file and save_pretrained)."
        )

    def weights(names: Collection[str], folder: Path) -> list[str]:
        needed = []
        for name, place in places(folder).items():
            inside = [n[len(_inside(place)) :] for n in names if n.startswith(_inside(place))]
            where = f"{source}/{place}".rstrip("/")
            file = weight_name(inside, name, variant, where)
            if file is None:
                continue
            if file.endswith(".json"):
                shards = shard_names(folder / place / file)
                needed += [_inside(place) + shard for shard in shards]
            else:
                needed.append(_inside(place) + file)
        return needed

    return hub.fetch(source, small_files, weights)


def _inside(place: str) -> str:
    """What the names of a component's files start with."""
    return f"{place}/" if place else ""


def _small_files(place: str) -> list[str]:
    """Patterns of a component's files without weights."""
    return [f"{_inside(place)}config.json", f"{_inside(place)}*.index*.json"]


def _check_complete(folder: Path, places: _Places, variant: str | None) -> None:
    """Raises one UserError that lists every file missing."""
    missing = []
    for name, place in places.items():
        if not (folder / place / "config.json").is_file():
            missing.append(f"{_inside(place)}config.json")
        if find_weights(folder / place, name, variant) is None:
            suffix = f".{variant}" if variant else ""
            missing.append(f"{_inside(place)}{COMPONENTS[name].stem}{suffix}.safetensors")
    if "text_encoder" in places:
        tokenizer = Path(places["text_encoder"]).with_name("tokenizer")
        missing += [f"{tokenizer}/{name}" for name in missing_tokenizer_files(folder / tokenizer)]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; complete the diffusers folder, for example from "
            "the base model it was trained from."
        )


def _split(source: str) -> tuple[str, str]:
    """("owner/name", "folder") of "owner/name/folder"; of a local network, parent and name."""
    path = Path(source).expanduser()
    if path.exists():
        path = path.resolve()
        return (str(path.parent), path.name) if is_network(path) else (source, "")
    parts = source.split("/")
    if len(parts) < 3 or not all(parts):
        return source, ""
    return "/".join(parts[:2]), "/".join(parts[2:])


def is_network(folder: Path) -> bool:
    """Whether a folder holds a network of its own, and no checkpoint of several."""
    return (folder / "config.json").is_file() and not (folder / "unet").is_dir()


def _read_if_there(path: Path, check: Callable[[dict[str, Any], Path], None]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    check(content, path)
    return content
