"""What a trained model is, in one JSON file beside its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxpercept.checkpoints.values import check_description, check_numbers, in_short
from jaxpercept.checkpoints.weights import read_json
from jaxpercept.errors import UserError
from jaxpercept.models.config import (
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNetConfig,
    VAEConfig,
    config_of,
)
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.lora import LoraConfig

FILE_NAME = "jaxpercept.json"
FORMAT = 1
_AUTOENCODERS = (VAEConfig, AutoencoderTinyConfig)
_CONFIG_CLASSES = {
    "unet": (UNetConfig,),
    "vae": _AUTOENCODERS,
    "text_encoder": (CLIPTextConfig,),
    "decoder": _AUTOENCODERS,
    "head": (DPTConfig,),
}


def architectures(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Architectures by component name, from the content of their config.json files.

    Raises:
        UserError: an unknown component, or a value that is not supported.
    """
    unknown = sorted(set(configs) - set(_CONFIG_CLASSES))
    if unknown:
        raise UserError(
            f"the component {in_short(repr(unknown[0]))} is unknown: use "
            f"{', '.join(_CONFIG_CLASSES)}."
        )
    return {name: config_of(config, _CONFIG_CLASSES[name]) for name, config in configs.items()}


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything but the weights that is needed to run or continue a model.

    Attributes:
        components: the architecture of each network, by component name.
        scheduler: the base checkpoint's scheduler_config.json.
        method: the config's `method` section, `{"name": ..., options}`; empty for a checkpoint
            that was not trained here.
        recipe: arguments of `methods.recipe.Recipe.of` for a perception model that was not trained
            here, `{"family": ..., changes}`; a file may change num_steps, timesteps and head.
        task: the task's name; empty for a bare text-to-image checkpoint.
        task_options: the task's attributes that the checkpoint decides.
        model_index: content of the checkpoint's model_index.json.
        resolution: (height, width) in pixels the model was trained at.
        base_checkpoint: what the training started from.
        config: the whole training config, for the record.
        lora: what a training run adds to a network, `models.lora.LoraConfig.to_dict()`; empty where
            nothing is added, or it has been merged.
    """

    components: dict[str, Any]
    scheduler: dict[str, Any]
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_index: dict[str, Any] = dataclasses.field(default_factory=dict)
    resolution: tuple[int, int] | None = None
    base_checkpoint: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)

    def lora_of(self, component: str) -> LoraConfig | None:
        """What is added to a network.

        Raises:
            UserError: a value of `lora` that cannot be.
        """
        config = LoraConfig.from_dict(self.lora) if self.lora else None
        return config if config is not None and config.component == component else None

    def save(self, folder: Path) -> None:
        """Write `jaxpercept.json` into an existing folder."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        content["components"] = {name: c.to_dict() for name, c in self.components.items()}
        temporary = folder / (FILE_NAME + ".partial")
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        temporary.replace(folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Read `jaxpercept.json`.

        Raises:
            UserError: the file is broken, holds a value that cannot be, or is newer than this
                version of jaxpercept.
        """
        path = folder / FILE_NAME
        content = read_json(path)
        version = content.pop("format", None)
        if version != FORMAT:
            raise UserError(
                f"{path} has format {in_short(repr(version))}, this jaxpercept reads {FORMAT}: "
                "update jaxpercept, or restore the file."
            )
        check_description(content, path)
        check_numbers(content["components"], path)
        try:
            content["components"] = architectures(content["components"])
            if content.get("lora"):
                LoraConfig.from_dict(content["lora"])
        except UserError as error:
            raise UserError(in_short(f"{path}: {error}", 1000)) from None
        if content["resolution"] is not None:
            content["resolution"] = tuple(content["resolution"])
        return cls(**content)
