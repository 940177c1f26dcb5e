"""Whether stored weights can be those of an architecture, told before any of them is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpercept.checkpoints.values import in_short, listed
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderTinyConfig, CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.functional import Config, Functional, functional

_PROMPT = "prompt"


def network_of(config: Config, tensors: int, where: str | Path, *, head: bool = True) -> Functional:
    """`functional(config)` for weights of so many tensors.

    Building a network takes time and memory for each of its layers, though none for their sizes.

    Raises:
      UserError: the config has more layers than there are tensors.
    """
    if (layers := _layers(config)) > tensors:
        raise UserError(
            f"The {config.CLASS_NAME} of {where} has at least {in_short(layers, 30)} layers by its "
            f"config and only {tensors} tensors; use the weights and the config of the same model."
        )
    return functional(config, head=head)


def check_fit(
    components: Mapping[str, Config],
    shapes: Mapping[str, Mapping[str, Any]],
    where: str | Path,
    *,
    dpt: bool = False,
) -> None:
    """Compares weights in this package's layout with the architectures they are for.

    Args:
      components: architecture of each component.
      shapes: `{component: {path: anything with .shape}}`; "prompt" is the encoded empty prompt.
      where: names the weights in error messages.
      dpt: whether the UNet ends in a DPT head.

    Raises:
      UserError: tensors are missing, not expected or of another shape (all are counted and the
        first ten named).
    """
    missing = [f"{component}/" for component in components.keys() - shapes.keys()]
    extra = [f"{component}/" for component in shapes.keys() - {*components, _PROMPT}]
    misshaped = []
    for component in components.keys() & shapes.keys():
        config, stored = components[component], shapes[component]
        headless = dpt and component == "unet"
        wanted = network_of(config, len(stored), where, head=not headless).shapes
        missing += [f"{component}/{path}" for path in wanted.keys() - stored.keys()]
        extra += [f"{component}/{path}" for path in stored.keys() - wanted.keys()]
        for path in wanted.keys() & stored.keys():
            have, want = tuple(stored[path].shape), tuple(wanted[path].shape)
            if have != want:
                misshaped.append(f"{component}/{path} {list(have)} instead of {list(want)}")
    if _PROMPT in shapes:
        misshaped += _misshaped_prompt(shapes[_PROMPT], components.get("unet"))
    groups = {"missing": missing, "not expected": extra, "of another shape": misshaped}
    if problems := [f"{what} {listed(names)}" for what, names in groups.items() if names]:
        raise UserError(
            f"The weights in {where} do not fit the model's description: {'; '.join(problems)}; "
            "restore both from the same export."
        )


def prompt_widths(unet: UNetConfig) -> set[int]:
    """The widths of the prompt that a UNet's attention layers take; one, unless it is mistaken."""
    widths = unet.per_level("cross_attention_dim")
    down = zip(unet.down_block_types, widths, strict=True)
    up = zip(unet.up_block_types, reversed(widths), strict=True)
    used = {width for kind, width in (*down, *up) if kind.startswith("Cross")}
    return used | {widths[-1]}  # of the middle block


def _layers(config: Config) -> int:
    """Layers that hold a tensor each, at least so many; counted without building them."""
    match config:
        case UNetConfig():
            layers = config.per_level("layers_per_block")
            depths = config.per_level("transformer_layers_per_block")
            down = zip(config.down_block_types, layers, depths, strict=True)
            up = zip(config.up_block_types, reversed(layers), reversed(depths), strict=True)
            attended = [n * (t if "Cross" in kind else 1) for kind, n, t in (*down, *up)]
            return sum(attended) + depths[-1]  # the middle block's
        case VAEConfig():
            return len(config.block_out_channels) * config.layers_per_block
        case AutoencoderTinyConfig():
            blocks = (*config.num_encoder_blocks, *config.num_decoder_blocks)
            return len(blocks) + sum(blocks)
        case CLIPTextConfig():
            return config.num_hidden_layers
        case DPTConfig():
            return len(config.neck_hidden_sizes)


def _misshaped_prompt(stored: Mapping[str, Any], unet: UNetConfig | None) -> list[str]:
    shape = tuple(stored["embedding"].shape) if stored.keys() == {"embedding"} else ()
    widths = set() if unet is None else prompt_widths(unet)
    if len(shape) == 3 and shape[0] == 1 and widths <= {shape[2]}:
        return []
    width = min(widths, default="width")
    return [f"prompt/embedding {list(shape)} instead of [1, tokens, {width}]"]
