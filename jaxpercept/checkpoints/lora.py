"""LoRA adapters as peft and diffusers store them, without torch.

    pytorch_lora_weights.safetensors                       diffusers
    adapter_model.safetensors  adapter_config.json         peft

Keys are `unet.<layer>.lora_A.weight` [rank, in] and `unet.<layer>.lora_B.weight` [out, rank];
diffusers' `save_lora_adapter` leaves the prefix away, peft writes `base_model.model.` in its place,
and until peft came diffusers wrote `<layer>.lora.down.weight` or, older still,
`<attention>.processor.to_q_lora.down.weight`. peft's settings are JSON: in adapter_config.json, or
in the file's metadata under "lora_adapter_metadata"; without any, alpha is the rank.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.numpy import save as serialise

from jaxpercept.checkpoints.merging import adapted_layers
from jaxpercept.checkpoints.rules import DTYPES, match, to_jax, to_torch
from jaxpercept.checkpoints.values import in_short
from jaxpercept.checkpoints.weights import (
    PICKLES,
    atomic_write,
    open_weights,
    read_json,
    write_json,
)
from jaxpercept.errors import UserError
from jaxpercept.models.functional import Config, functional
from jaxpercept.models.lora import LoraConfig, is_lora, targets_of

__all__ = ["load", "save"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYOUTS = ("diffusers", "peft")
_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_MAX_METADATA = 2**22

_NAME = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_OLD_NAME = re.compile(
    r"(?P<block>.+)\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<factor>down|up)\.weight"
)
_FACTORS = {"lora_A": "A", "lora.down": "A", "down": "A"}  # any other is B

# What peft's settings may say beside rank and alpha. The tensors themselves tell the targets.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_WITHOUT_EFFECT = """
auto_mapping base_model_name_or_path ensure_weight_tying fan_in_fan_out inference_mode lora_alpha
lora_dropout megatron_core peft_version qalora_group_size revision task_type
"""
# Other initialisations (pissa, olora, loftq, corda) change the weights that A B is added to.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def load(
    path: str | Path, config: Config, *, component: str = "unet"
) -> tuple[LoraConfig, dict[str, Shaped[np.ndarray, "..."]]]:
    """Reads an adapter.

    Args:
      path: a safetensors file, or a folder with one of the two above.
      config: of the network that the adapter is for.
      component: the network's part of the file.

    Returns:
      What `functional` needs to build the network with it, and its parameters `path -> array`,
      float32, to be put beside the network's own.

    Raises:
      UserError: nothing there, damaged, or a pickle; tensors are missing, not expected, or of
        another shape (all are counted and the first ten named); one holds NaN or infinity; the
        ranks of the layers differ, or peft's settings ask for more than this.
    """
    file = _find(Path(path).expanduser())
    tensors = open_weights(file)
    settings = _settings(file, component)
    stored = _current_names(tensors, component, file)
    lora = _config_of(stored, tensors, settings, config, component, file)

    shapes = functional(config, lora=lora).shapes
    wanted = {path: shape for path, shape in shapes.items() if is_lora(path)}
    named = {name: tensors[key] for name, key in stored.items()}
    _, found = match(wanted, named, str(file))
    if any(found):
        raise UserError(
            f"The adapter {file} does not fit the {config.CLASS_NAME}: {found.in_words()}; "
            "use the one trained for this model, in the format of peft or diffusers."
        )
    return lora, to_jax(wanted, named, where=str(file))


def save(
    folder: str | Path,
    lora: LoraConfig,
    params: Mapping[str, Any],
    *,
    layout: str = "diffusers",
    dtype: str = "float32",
) -> Path:
    """Writes an adapter that diffusers' `load_lora_weights` or peft's `from_pretrained` reads.

    Args:
      folder: made where it is not there.
      lora: the adapter's shape.
      params: `path -> array` of the adapted network; all but the LoRA factors are left out.
      layout: "diffusers" or "peft".
      dtype: "float32", "float16" or "bfloat16".

    Returns:
      The safetensors file.

    Raises:
      UserError: the folder is a file, or a factor is not finite in `dtype`.
      ValueError: another layout, or the factors are not those of `lora`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder to save to.")
    folder.mkdir(parents=True, exist_ok=True)
    factors = {path: value for path, value in params.items() if is_lora(path)}
    adapted_layers(factors, lora)
    settings = _peft_settings(lora)
    prefix, name, metadata = f"{lora.component}.", DIFFUSERS_FILE, {"format": "pt"}
    if layout == "diffusers":
        content = {prefix + key: value for key, value in settings.items()}
        metadata[_METADATA] = json.dumps(content, indent=2, sort_keys=True)
    else:
        prefix, name = _PEFT_PREFIX, PEFT_FILE
    tensors = {}
    for key, value in to_torch(factors).items():
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            tensors[prefix + key] = np.ascontiguousarray(value, DTYPES[dtype])
        if not np.isfinite(tensors[prefix + key]).all():
            raise UserError(
                f"Tensor {prefix + key} holds values that are not finite in {dtype}; save it as "
                "float32, or check the training if it was NaN before."
            )
    with atomic_write(folder / name) as file:
        file.write(serialise(tensors, metadata))
    if layout == "peft":
        write_json(folder / PEFT_CONFIG, settings)
    return folder / name


def _find(path: Path) -> Path:
    """The safetensors file at a path or in a folder."""
    if path.is_dir():
        for name in (DIFFUSERS_FILE, PEFT_FILE):
            if (path / name).is_file():
                return path / name
        names = sorted(entry.name for entry in path.iterdir())
        pickles = [path / name for name in names if name.endswith(PICKLES)]
        if not pickles:
            raise UserError(
                f"{path} holds no LoRA adapter: it needs {DIFFUSERS_FILE}, or {PEFT_FILE} with "
                f"{PEFT_CONFIG}; name the file if it has another name."
            )
        path = pickles[0]
    if path.name.endswith(PICKLES):
        raise UserError(
            f"{path} is a pickle, which can run any code when read; convert it to safetensors "
            "where you trust it (load it with diffusers and save it again)."
        )
    if not path.is_file():
        raise UserError(f"{in_short(path)} is not there; give an adapter's folder or its file.")
    return path


def _settings(file: Path, component: str) -> dict[str, Any]:
    """peft's settings of an adapter, {} where there are none."""
    if file.name == PEFT_FILE:
        return read_json(file.with_name(PEFT_CONFIG))
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        if len(text) > _MAX_METADATA:
            raise ValueError(f"it has more than {_MAX_METADATA} characters")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The {_METADATA} of {file} cannot be read as JSON ({in_short(error)}); "
            "download it again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"The {_METADATA} of {file} must be a JSON object; download it again.")
    prefix = f"{component}."  # a pipeline's file has the settings of each network side by side
    own = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    return own or content


def _current_names(tensors: Iterable[str], component: str, file: Path) -> dict[str, str]:
    """`today's key without prefix -> stored key`; what is no factor keeps its name."""
    stored: dict[str, str] = {}
    for key in tensors:
        name = key.removeprefix(_PEFT_PREFIX).removeprefix(f"{component}.")
        name = name.replace(".processor.", ".")
        if found := _OLD_NAME.fullmatch(name):
            layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
            name = _factor_name(f"{found['block']}.{layer}", found["factor"])
        elif found := _NAME.fullmatch(name):
            name = _factor_name(found["layer"], found["factor"])
        if name in stored:
            raise UserError(
                f"{file} holds {in_short(name)} twice, as {stored[name]} and as {key}; remove one "
                "of them."
            )
        stored[name] = key
    return stored


def _factor_name(layer: str, factor: str) -> str:
    return f"{layer}.lora_{_FACTORS.get(factor, 'B')}.weight"


def _config_of(
    stored: Mapping[str, str],
    tensors: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Config,
    component: str,
    file: Path,
) -> LoraConfig:
    """What the tensors' names and shapes say, and the settings where these say more."""
    factors = [name for name in stored if _NAME.fullmatch(name)]
    ranks = {tensors[stored[name]].shape[:1] for name in factors if name.endswith("A.weight")}
    if len(ranks) != 1 or ranks == {()}:
        shown = ", ".join(str(rank[0]) if rank else "none" for rank in sorted(ranks)[:5])
        raise UserError(
            f"{file} has LoRA factors of {f'the ranks {shown}' if ranks else 'no rank at all'}; "
            "give an adapter that has one rank in all its layers."
        )
    rank = ranks.pop()[0]
    layers = {
        path.removesuffix(".kernel")
        for path in functional(config).shapes
        if path.endswith(".kernel")
    }
    adapted = {_NAME.fullmatch(name)["layer"] for name in factors} & layers
    if not adapted:
        raise UserError(
            f"The adapter {file} is for none of the layers of the {config.CLASS_NAME}, but for "
            f"{in_short(min(factors))}; use one trained for this model."
        )
    if settings:
        _check_settings(settings, rank, file)
        adapted |= _named_layers(settings, layers)
    try:
        return LoraConfig(
            rank, _alpha(settings, rank, file), targets_of(adapted, layers - adapted), component
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _check_settings(settings: Mapping[str, Any], rank: int, file: Path) -> None:
    """Refuses what changes the result and is not done here: DoRA, biases, ranks by layer."""
    known = {
        "r": (rank,),
        "peft_type": ("LORA",),
        "init_lora_weights": _INITIALISATIONS,
        "bias": ("none",),
        "use_rslora": (True, False),
        "rank_pattern": ({},),
        "alpha_pattern": ({},),
    }
    for key, value in settings.items():
        if key in (*_TARGETS, *_WITHOUT_EFFECT.split()):
            continue
        if key in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            usual = settings.get("r" if key == "rank_pattern" else "lora_alpha")
            ok = all(own == usual for own in value.values())
        else:
            # Whatever else there is must be off: a setting passed over is a wrong network.
            ok = value in known.get(key, (None, False, {}, []))
        if not ok:
            shown = type(value).__name__ if isinstance(value, dict | list) else repr(value)
            raise UserError(
                f"The adapter {file} has {in_short(key)}={in_short(shown)}, which is not "
                "supported; supported are peft's plain LoRA layers of one rank and alpha."
            )


def _alpha(settings: Mapping[str, Any], rank: int, file: Path) -> int | float:
    alpha = settings.get("lora_alpha", rank)
    if type(alpha) not in (int, float):
        raise UserError(
            f"The adapter {file} has lora_alpha={in_short(repr(alpha))}, which is no number; "
            "correct it, or download the file again."
        )
    if settings.get("use_rslora"):  # alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732)
        return alpha * math.sqrt(rank)
    return alpha


def _named_layers(settings: Mapping[str, Any], layers: set[str]) -> set[str]:
    """The layers that the settings name outright, all of which must have their factors.

    Expressions and selections are not followed: then the tensors alone tell.
    """
    names = settings.get("target_modules")
    if not isinstance(names, list) or any(settings.get(key) for key in _TARGETS[1:]):
        return set()
    ends = tuple(f".{name}" for name in names if isinstance(name, str) and name)
    return {layer for layer in layers if f".{layer}".endswith(ends)}


def _peft_settings(lora: LoraConfig) -> dict[str, Any]:
    """What peft's LoraConfig needs to be told; all else is at its default."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "target_modules": list(lora.targets),
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.0,
        "bias": "none",
    }
