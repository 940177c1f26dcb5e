"""Whether stored tensors can be those of an architecture, told before any of them is read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpercept.checkpoints.values import in_short, listed
from jaxpercept.checkpoints.weights import read_json
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderTinyConfig, CLIPTextConfig, UNetConfig, VAEConfig
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.functional import Config, functional
from jaxpercept.models.lora import LoraConfig

_PROMPT = "prompt"
Shape = tuple[int, ...]


class Differences(NamedTuple):
    """How stored tensors differ from those of an architecture.

    Attributes:
      missing, unexpected: names of tensors.
      misshaped: names with the shape stored and the one wanted.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    misshaped: Sequence[str] = ()

    def in_words(self) -> str:
        """All of them counted and the first ten named; "" where there are none."""
        words = ("missing", "not expected", "of another shape")
        named = zip(words, self, strict=True)
        return "; ".join(f"{what} {listed(names)}" for what, names in named if names)


def differences(wanted: Mapping[str, Shape], stored: Mapping[str, Shape]) -> Differences:
    """Compares shapes by the tensors' names."""
    both = sorted(wanted.keys() & stored.keys())
    return Differences(
        missing=sorted(wanted.keys() - stored.keys()),
        unexpected=sorted(stored.keys() - wanted.keys()),
        misshaped=[
            f"{name} {list(stored[name])} instead of {list(wanted[name])}"
            for name in both
            if stored[name] != wanted[name]
        ],
    )


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of anything with .shape, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_layers(config: Config, tensors: int, where: str | Path) -> None:
    """Whether a network of that config can have so few tensors; it is not built.

    Building one takes time and memory for each of its layers, though none for their sizes.

    Raises:
      UserError: the config has more layers than there are tensors.
    """
    if (layers := _layers(config)) > tensors:
        raise UserError(
            f"The {config.CLASS_NAME} of {where} has at least {in_short(layers, 30)} layers by its "
            f"config and only {tensors} tensors; use the weights and the config of the same model."
        )


def check_fit(
    components: Mapping[str, Config],
    shapes: Mapping[str, Mapping[str, Any]],
    where: str | Path,
    lora: LoraConfig | None = None,
) -> None:
    """Compares weights in this package's layout with the architectures they are for.

    Args:
      components: architecture of each component.
      shapes: `{component: {path: anything with .shape}}`; "prompt" is the encoded empty prompt.
      where: names the weights in error messages.
      lora: what is added to one of the networks.

    Raises:
      UserError: tensors are missing, not expected or of another shape (all are counted and the
        first ten named).
    """
    wanted = {f"{component}/": () for component in components.keys() - shapes.keys()}
    stored = {f"{component}/": () for component in shapes.keys() - {*components, _PROMPT}}
    for component in components.keys() & shapes.keys():
        config, tensors = components[component], shapes[component]
        check_layers(config, len(tensors), where)
        network = functional(
            config,
            head=not (component == "unet" and "head" in components),
            lora=lora if lora is not None and lora.component == component else None,
        )
        wanted |= shapes_of({f"{component}/{path}": leaf for path, leaf in network.shapes.items()})
        stored |= shapes_of({f"{component}/{path}": leaf for path, leaf in tensors.items()})
    found = differences(wanted, stored)
    if _PROMPT in shapes:
        more = misshaped_prompt(shapes[_PROMPT], components.get("unet"))
        found = found._replace(misshaped=[*found.misshaped, *more])
    if any(found):
        raise UserError(
            f"The weights in {where} do not fit the model's description: {found.in_words()}; "
            "restore both from the same export."
        )


def prompt_widths(unet: UNetConfig) -> set[int]:
    """The widths of the prompt that a UNet's attention layers take; one, unless it is mistaken."""
    widths = unet.per_level("cross_attention_dim")
    down = zip(unet.down_block_types, widths, strict=True)
    up = zip(unet.up_block_types, reversed(widths), strict=True)
    used = {width for kind, width in (*down, *up) if kind.startswith("Cross")}
    return used | {widths[-1]}  # of the middle block


def lacks_output(tensors: Iterable[str]) -> bool:
    """Whether a UNet with tensors of these names has no output convolution: a DPT head follows."""
    return not any(name.startswith(("conv_out.", "conv_norm_out.")) for name in tensors)


def head_config(tensors: Mapping[str, Any], unet: UNetConfig, file: Path) -> DPTConfig:
    """The architecture of a UNet's DPT head, told from the tensors in its file.

    How it ends they do not tell. GenPercept's `dpt_head/` ends with a ReLU, `dpt_head_identity/`
    does not, unless a config.json beside the file has another `final_activation`.

    Raises:
      UserError: there is no such head, or the config.json is damaged.
    """
    name = "neck.convs.0.weight"
    shape = tensors[name].shape if name in tensors else ()
    width = shape[0] if shape else DPTConfig.fusion_hidden_size
    end = "relu" if file.parent.name == "dpt_head" else "identity"
    config = file.with_name("config.json")
    if config.is_file():
        end = read_json(config).get("final_activation", end)
    try:
        told = DPTConfig(neck_hidden_sizes=unet.block_out_channels, fusion_hidden_size=width)
        return DPTConfig.from_dict({**told.to_dict(), "final_activation": end})
    except UserError as error:
        raise UserError(in_short(f"{file}: {error}", 1000)) from None


def misshaped_prompt(stored: Mapping[str, Any], unet: UNetConfig | None) -> list[str]:
    """Names an encoded prompt with its shape, [1, tokens, width], where a UNet cannot take it.

    Args:
      stored: `{"embedding": anything with .shape}`.
      unet: None where the model has none; any width will do then.
    """
    shape = tuple(stored["embedding"].shape) if stored.keys() == {"embedding"} else ()
    widths = set() if unet is None else prompt_widths(unet)
    if len(shape) == 3 and shape[0] == 1 and widths <= {shape[2]}:
        return []
    width = min(widths, default="width")
    return [f"prompt/embedding {list(shape)} instead of [1, tokens, {width}]"]


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
