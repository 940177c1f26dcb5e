"""One network within a checkpoint in diffusers' layout: its config.json and its weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from jaxpercept.checkpoints.fit import check_layers, head_config
from jaxpercept.checkpoints.merging import merged_tensors
from jaxpercept.checkpoints.rules import to_jax
from jaxpercept.checkpoints.values import check_numbers, in_short
from jaxpercept.checkpoints.weights import PICKLES, open_weights, read_json, weight_file
from jaxpercept.errors import UserError
from jaxpercept.models.config import (
    AutoencoderConfig,
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNetConfig,
    VAEConfig,
    config_of,
)
from jaxpercept.models.dpt import DPTConfig, published_tensors
from jaxpercept.models.functional import functional

Config = UNetConfig | AutoencoderConfig | CLIPTextConfig | DPTConfig


class _Component(NamedTuple):
    configs: tuple[type, ...]  # the first where config.json has no _class_name
    stem: str  # of the weight files
    library: str


COMPONENTS = {
    "unet": _Component((UNetConfig,), "diffusion_pytorch_model", "diffusers"),
    "vae": _Component((VAEConfig, AutoencoderTinyConfig), "diffusion_pytorch_model", "diffusers"),
    "text_encoder": _Component((CLIPTextConfig,), "model", "transformers"),
}

# GenPercept's, in the order it looks for them.
DPT_HEADS = ("dpt_head_identity", "dpt_head")


def find_weights(folder: Path, component: str, variant: str | None = None) -> Path | None:
    """The file of a component's weights, or the index of its shards; None where there is none.

    Raises:
      UserError: all there are is pickles, or unknown variants to choose between.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    name = weight_name(names, component, variant, str(folder))
    return None if name is None else folder / name


def weight_name(
    names: Collection[str], component: str, variant: str | None, where: str
) -> str | None:
    """The same among the names of a folder's files; `where` names the folder in messages."""
    name = weight_file(names, COMPONENTS[component].stem, variant, where)
    pickles = sorted(other for other in names if other.endswith(PICKLES))
    if name is None and pickles and not any(other.endswith(".safetensors") for other in names):
        raise UserError(
            f"{where} holds its weights as a pickle ({pickles[0]}), which can run any code when "
            "read; convert it to safetensors where you trust it (load it with diffusers and call "
            "save_pretrained(folder, safe_serialization=True))."
        )
    return name


def read_config(folder: Path, component: str) -> Config:
    """The architecture that the config.json in a component's folder describes.

    Raises:
      UserError: the file is damaged, or the architecture not supported.
    """
    path = folder / "config.json"
    content = read_json(path)
    check_numbers(content, path)
    try:
        return config_of(content, COMPONENTS[component].configs)
    except UserError as error:
        raise UserError(in_short(f"{path}: {error}", 1000)) from None


def read_params(file: Path, config: Config, dtype: str | None, head: bool = True) -> dict[str, Any]:
    """The parameters in one file of weights, or in the shards that an index lists.

    Args:
      head: whether a UNet has its output convolution.

    Raises:
      UserError: damaged, or not those of the architecture.
    """
    tensors = merged_tensors(open_weights(file))  # of GenPercept's LoRA runs
    check_layers(config, len(tensors), file)
    shapes = functional(config, head=head).shapes
    return to_jax(shapes, tensors, where=str(file), dtype=dtype)


def find_head(unet: Path) -> Path:
    """The safetensors file of the DPT head that belongs to a UNet without output convolution.

    Raises:
      UserError: it is neither in the UNet's folder nor beside it.
    """
    for folder in (unet, unet.parent, unet.parent.parent):
        for head in DPT_HEADS:
            for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
                if (folder / head / name).is_file():
                    return folder / head / name
    raise UserError(
        f"{unet} has no output convolution: it needs GenPercept's DPT head in "
        f"{unet.parent / DPT_HEADS[0]}/model.safetensors, which is not there; download it."
    )


def read_head(file: Path, unet: UNetConfig, dtype: str | None) -> tuple[DPTConfig, dict[str, Any]]:
    """A DPT head's architecture and parameters.

    Raises:
      UserError: damaged, or not the head of such a UNet.
    """
    tensors = open_weights(file)
    config = head_config(tensors, unet, file)
    tensors = published_tensors(tensors, config)
    check_layers(config, len(tensors), file)
    shapes = functional(config).shapes
    return config, to_jax(shapes, tensors, where=str(file), dtype=dtype)
