"""GenPercept's DPT head: a map in full resolution from the outputs of a UNet's up blocks, NHWC.

It stands in the place of the autoencoder's decoder. Sources: recipes.md 1.3; transformers,
models/dpt/modeling_dpt.py (the neck without its reassemble stage, and DPTDepthEstimationHead);
Ranftl et al., arXiv 2103.13413.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpercept.models.blocks import Upsample2D
from jaxpercept.models.config import _TRANSFORMERS_KEYS, UNetConfig, _JsonConfig
from jaxpercept.models.layers import Conv2d, DType, Identity
from jaxpercept.resize import resize

Feature = Float[Array, "b h w c"]
Tensor = TypeVar("Tensor")

# What the image encoder in front of the neck, the reassemble stage and the segmentation heads are
# made of. There is none of them here.
_OTHER_PARTS = """
attention_probs_dropout_prob auxiliary_loss_weight backbone backbone_config backbone_featmap_shape
backbone_kwargs backbone_out_indices hidden_act hidden_dropout_prob hidden_size image_size
intermediate_size layer_norm_eps neck_ignore_stages num_attention_heads num_channels
num_hidden_layers patch_size pooler_act pooler_output_size qkv_bias readout_type reassemble_factors
semantic_classifier_dropout semantic_loss_ignore_index use_auxiliary_head use_pretrained_backbone
use_timm_backbone
"""

_TRANSFORMERS_NAME = re.compile(r"(neck\.(convs|fusion_stage)|head\.(projection|head))\..*")
_UNUSED = re.compile(r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*")


@dataclasses.dataclass(frozen=True)
class DPTConfig(_JsonConfig):
    """The keys of transformers' DPTConfig that a neck and a depth head need.

    `DPTConfig()` is the published head of GenPercept. A file that leaves a key out means
    transformers' default, as for the other configs.
    """

    # Channels of the UNet's levels, highest resolution first: its block_out_channels.
    neck_hidden_sizes: tuple[int, ...] = (320, 640, 1280, 1280)
    fusion_hidden_size: int = 256
    add_projection: bool = True
    use_bias_in_fusion_residual: bool | None = False
    # Ours: GenPercept's "dpt_head" (relu) and "dpt_head_identity" have the same config.json.
    final_activation: str = "identity"
    out_channels: int = 1  # ours, too: transformers' head gives depth

    CLASS_NAME: ClassVar[str] = "DPTForDepthEstimation"
    FIXED: ClassVar[dict[str, tuple]] = {
        "model_type": ("dpt",),
        "head_in_index": (-1,),
        "is_hybrid": (False,),
        "use_batch_norm_in_fusion_residual": (False, None),
    }
    INERT: ClassVar[frozenset[str]] = frozenset((_TRANSFORMERS_KEYS + _OTHER_PARTS).split())

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DPTConfig":
        """Reads a config.json's content; see _JsonConfig."""
        defaults = {
            "neck_hidden_sizes": [96, 192, 384, 768],
            "add_projection": False,
            "use_bias_in_fusion_residual": None,
        }
        return super().from_dict({**defaults, **config})

    @classmethod
    def beside(cls, unet: UNetConfig, out_channels: int) -> "DPTConfig":
        """The head of a UNet: GenPercept's beside SD's, and as much narrower beside another."""
        widths = unet.block_out_channels
        # 256 of 320 channels.
        fusion = max(2 * round(0.4 * widths[0]), 2)
        return cls(neck_hidden_sizes=widths, fusion_hidden_size=fusion, out_channels=out_channels)

    def __post_init__(self):
        if self.use_bias_in_fusion_residual is None:  # transformers: where there is no batch norm
            object.__setattr__(self, "use_bias_in_fusion_residual", True)
        sizes = self.neck_hidden_sizes
        self._require(
            "neck_hidden_sizes",
            "one positive number of channels a level",
            len(sizes) > 0 and all(size > 0 for size in sizes),
        )
        self._require(
            "fusion_hidden_size",
            "a positive even number",
            self.fusion_hidden_size > 0 and self.fusion_hidden_size % 2 == 0,
        )
        activations = ("identity", "relu")
        self._require(
            "final_activation", " or ".join(activations), self.final_activation in activations
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a valid transformers config.json."""
        config = super().to_dict()
        del config["_class_name"]
        return {"architectures": [self.CLASS_NAME], "model_type": "dpt", **config}


class DPTPreActResidualLayer(nnx.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, *, bias: bool, dtype: DType):
        self.convolution1 = Conv2d(channels, channels, bias=bias, dtype=dtype)
        self.convolution2 = Conv2d(channels, channels, bias=bias, dtype=dtype)

    def __call__(self, x: Feature) -> Feature:
        return x + self.convolution2(jax.nn.relu(self.convolution1(jax.nn.relu(x))))


class DPTFeatureFusionLayer(nnx.Module):
    """Adds a lateral feature to what comes from below, and doubles the resolution."""

    def __init__(self, config: DPTConfig, *, has_lateral: bool, dtype: DType):
        channels, bias = config.fusion_hidden_size, config.use_bias_in_fusion_residual
        self.projection = Conv2d(channels, channels, 1, padding=0, dtype=dtype)
        if has_lateral:
            self.residual_layer1 = DPTPreActResidualLayer(channels, bias=bias, dtype=dtype)
        self.residual_layer2 = DPTPreActResidualLayer(channels, bias=bias, dtype=dtype)

    def __call__(
        self, x: Feature, lateral: Float[Array, "b hl wl c"] | None
    ) -> Float[Array, "b ho wo c"]:
        """`lateral` is brought to the size of x where they differ; None at the lowest level."""
        if lateral is not None:
            x = x + self.residual_layer1(resize(lateral, x.shape[1:3], "bilinear"))
        # transformers projects after doubling. That is the same, since interpolation's weights sum
        # to one, on four times as many pixels.
        return _double(self.projection(self.residual_layer2(x)))


class DPTFeatureFusionStage(nnx.Module):
    """One fusion layer a level, from the lowest resolution up."""

    def __init__(self, config: DPTConfig, *, dtype: DType, remat: str):
        self.remat = remat
        self.layers = nnx.List(
            [
                DPTFeatureFusionLayer(config, has_lateral=i > 0, dtype=dtype)
                for i in range(len(config.neck_hidden_sizes))
            ]
        )

    def __call__(self, features: Sequence[Array]) -> Float[Array, "b h w c"]:
        """Features of one width, highest resolution first -> the last layer's output."""
        *laterals, x = features
        for layer, lateral in zip(self.layers, [None, *reversed(laterals)], strict=True):
            x = (jax.checkpoint(layer) if self.remat == "block" else layer)(x, lateral)
        return x


class DPTNeck(nnx.Module):
    """A convolution to a common width for each level, then fusion."""

    def __init__(self, config: DPTConfig, *, dtype: DType, remat: str):
        self.convs = nnx.List(
            [
                Conv2d(channels, config.fusion_hidden_size, bias=False, dtype=dtype)
                for channels in config.neck_hidden_sizes
            ]
        )
        self.fusion_stage = DPTFeatureFusionStage(config, dtype=dtype, remat=remat)

    def __call__(self, features: Sequence[Array]) -> Float[Array, "b h w c"]:
        pairs = zip(self.convs, features, strict=True)
        return self.fusion_stage([conv(feature) for conv, feature in pairs])


class DPTDepthEstimationHead(nnx.Module):
    """Convolutions down to `out_channels`, the resolution doubled on the way."""

    def __init__(self, config: DPTConfig, *, dtype: DType):
        channels = config.fusion_hidden_size
        self.final_activation = config.final_activation
        self.add_projection = config.add_projection
        if self.add_projection:
            self.projection = Conv2d(channels, channels, dtype=dtype)
        self.head = nnx.List(
            [
                Conv2d(channels, channels // 2, dtype=dtype),
                Identity(),  # in torch, the doubling
                Conv2d(channels // 2, 32, dtype=dtype),
                Identity(),  # in torch, a ReLU
                Conv2d(32, config.out_channels, 1, padding=0, dtype=dtype),
            ]
        )

    def __call__(self, x: Feature) -> Float[Array, "b ho wo k"]:
        if self.add_projection:
            x = jax.nn.relu(self.projection(x))
        x = jax.nn.relu(self.head[2](_double(self.head[0](x))))
        x = self.head[4](x)
        return jax.nn.relu(x) if self.final_activation == "relu" else x


class DPTHead(nnx.Module):
    """The outputs of all up blocks (`UNet2DConditionModel.features`) -> unbounded channels.

    Names: those under `neck` and `head` are confirmed by transformers' classes. That of the
    upsampler in front of the neck is not; `published_tensors` takes any.

    remat: "none", or "block" to recompute each fusion layer and the output convolutions in the
    backward pass. attention: accepted as by all networks; there is none here.
    """

    def __init__(
        self,
        config: DPTConfig,
        *,
        dtype: DType = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.feature_upsample_0 = Upsample2D(config.neck_hidden_sizes[0], dtype=dtype)
        self.neck = DPTNeck(config, dtype=dtype, remat=remat)
        self.head = DPTDepthEstimationHead(config, dtype=dtype)

    def __call__(self, features: Sequence[Array]) -> Float[Array, "b H W k"]:
        """In the compute dtype.

        features: one [b, h, w, c] a level, lowest resolution first; the last two of one size, as
          the last up block does not double.

        H and W are those of features[0] times 2^(levels + 1): the image's where its latent's sides
        divide by 2^(levels - 2), such as 480 x 640 with four levels; else larger (504 gives 512).

        Raises ValueError where the number of features or their channels do not fit the config.
        """
        have = tuple(feature.shape[-1] for feature in features)
        want = self.config.neck_hidden_sizes[::-1]
        if have != want:
            raise ValueError(f"the DPT head reads features of {want} channels, not {have}")
        *lower, highest = features
        x = self.neck([self.feature_upsample_0(highest), *reversed(lower)])
        return (jax.checkpoint(self.head) if self.remat == "block" else self.head)(x)


def published_tensors(tensors: Mapping[str, Tensor], config: DPTConfig) -> dict[str, Tensor]:
    """A DPT head's tensors under this module's names, ready for the strict `rules.to_jax`.

    Two things are taken as they come, all else is left for `to_jax` to judge: the upsampler's
    convolution may have any name, if it is the only one left and has its shapes; and weights that
    transformers gives the lowest fusion layer for a lateral it never has are dropped.
    """
    tensors = {name: value for name, value in tensors.items() if not _UNUSED.fullmatch(name)}
    upsampler = [name for name in tensors if not _TRANSFORMERS_NAME.fullmatch(name)]
    modules = {name.rpartition(".")[0] for name in upsampler}
    shapes = {name.rpartition(".")[2]: tuple(tensors[name].shape) for name in upsampler}
    channels = config.neck_hidden_sizes[0]
    if len(modules) != 1 or shapes != {"weight": (channels, channels, 3, 3), "bias": (channels,)}:
        return tensors
    prefix = modules.pop() + "."
    return {
        f"feature_upsample_0.conv.{name.removeprefix(prefix)}" if name in upsampler else name: value
        for name, value in tensors.items()
    }


def _double(x: Feature) -> Float[Array, "b ho wo c"]:
    size = (2 * x.shape[1], 2 * x.shape[2])
    return resize(x, size, "bilinear", align_corners=True)
