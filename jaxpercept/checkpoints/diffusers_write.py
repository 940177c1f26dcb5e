"""Writing checkpoints in diffusers' folder layout without torch; `diffusers` reads them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxpercept.checkpoints.diffusers import COMPONENTS, Checkpoint, Config
from jaxpercept.checkpoints.rules import DTYPES, to_torch
from jaxpercept.checkpoints.tokenizer import TOKENIZER_FILES
from jaxpercept.checkpoints.weights import atomic_write, write_json, write_weights
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderConfig

__all__ = ["copy_tokenizer", "save", "save_autoencoder"]

# The diffusers version whose file format `save` writes.
_DIFFUSERS_VERSION = "0.42.1"

# What `save` may find in a folder that an interrupted `save` left without its model_index.json.
_OWN_NAMES = {*COMPONENTS, "tokenizer", "scheduler", "model_index.json", "jaxpercept.json"}


def save(folder: str | Path, checkpoint: Checkpoint, *, dtype: str | None = "float32") -> None:
    """Writes a diffusers folder that diffusers' `from_pretrained` loads.

    Each file appears complete or not at all, model_index.json last. The components are those of
    `checkpoint.configs`; a model_index given in the checkpoint is kept, less what is not written.

    Raises:
      UserError: the folder holds something else than a diffusers checkpoint, or a weight is not
        finite in `dtype` ("float32", "float16", "bfloat16").
    """
    folder = Path(folder)
    _check_own(folder, "model_index.json", _OWN_NAMES, "diffusers checkpoint")
    for name, config in checkpoint.configs.items():
        _save_component(folder / name, name, config, checkpoint.params[name], dtype)
    if checkpoint.scheduler:
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    if checkpoint.tokenizer_dir is not None:
        copy_tokenizer(checkpoint.tokenizer_dir, folder / "tokenizer")
    write_json(folder / "model_index.json", _model_index(checkpoint))


def save_autoencoder(
    folder: str | Path,
    config: AutoencoderConfig,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
) -> None:
    """Writes an autoencoder's own folder, which `load_autoencoder` and diffusers read.

    Raises:
      UserError: the folder holds something else, or a weight is not finite in `dtype`.
    """
    folder = Path(folder)
    _check_own(folder, "config.json", {f"{COMPONENTS['vae'].stem}.safetensors"}, "autoencoder")
    _save_component(folder, "vae", config, params, dtype)


def copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            content = (source / name).read_bytes()
            with atomic_write(target / name) as file:
                file.write(content)
        else:  # of an earlier tokenizer
            (target / name).unlink(missing_ok=True)


def _save_component(
    folder: Path, name: str, config: Config, params: Mapping[str, Any], dtype: str | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = COMPONENTS[name].stem
    kind = None if dtype is None else DTYPES[dtype]
    write_weights(folder / f"{stem}.safetensors", to_torch(params), kind)
    content = config.to_dict()
    if "_class_name" in content:
        content["_diffusers_version"] = _DIFFUSERS_VERSION
    write_json(folder / "config.json", content)
    # Shards and variants of an earlier checkpoint would be read instead of, or beside, this one.
    for old in folder.glob(f"{stem}*.safetensors*"):
        if old.name != f"{stem}.safetensors":
            old.unlink()


def _check_own(folder: Path, last: str, others: Collection[str], what: str) -> None:
    """Raises a UserError where saving to a folder would mix with what is no `what`.

    `last` is the file that is written last; an interrupted call leaves some of the `others`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder to save to.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if last not in names and not names <= {*others}:
        raise UserError(f"{folder} is not empty and holds no {what}; choose another folder.")


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
