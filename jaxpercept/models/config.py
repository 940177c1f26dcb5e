"""Typed configs of the networks, read from a checkpoint's config.json.

Each class lists the keys it understands as fields, the keys whose only supported value is fixed in
`FIXED`, and the keys without effect here in `INERT`. Anything else in the file is an error that
names the key: a silently ignored key is a silently wrong network. Defaults are those of
diffusers 0.42 and transformers 5, which old files rely on when they lack a key.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from jaxpercept.errors import UserError

# Initialisation, dropout (only ever 0 in published towers) and transformers' generic keys, which
# old files list in full; none changes what a text tower computes.
_TRANSFORMERS_KEYS = """
architectures attention_dropout dropout dtype torch_dtype transformers_version
initializer_factor initializer_range add_cross_attention bad_words_ids begin_suppress_tokens
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16 use_cache
gradient_checkpointing
"""

_MAX_LEVELS = 16  # each halves the height and the width


def _freeze(value: Any) -> Any:
    """JSON lists become tuples, so that configs are hashable."""
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a frozen JSON value has the type of a field: unions, tuples[X, ...] and scalars."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    return type(value) is hint  # not isinstance: True is no number of channels


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _thaw(value: Any) -> Any:
    return [_thaw(v) for v in value] if isinstance(value, tuple) else value


ConfigT = TypeVar("ConfigT", bound="_JsonConfig")


class _JsonConfig:
    """from_dict and to_dict of the frozen config dataclasses below."""

    CLASS_NAME: ClassVar[str]
    FIXED: ClassVar[dict[str, tuple]]  # key -> the values supported
    INERT: ClassVar[frozenset[str]]

    @classmethod
    def from_dict(cls: type[ConfigT], config: Mapping[str, Any]) -> ConfigT:
        """Reads a config.json's content.

        Keys starting with "_" and keys without effect on this implementation are accepted.

        Raises UserError naming the first key that is unknown or has an unsupported value.
        """
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        known = {}
        for key, value in config.items():
            value = _freeze(value)
            if key in fields:
                if not _fits(value, fields[key]):
                    raise cls._error(key, value, f"a value of type {_type_name(fields[key])}")
                known[key] = value
            elif key in cls.FIXED:
                # A per-level list is as good as its one value.
                values = value if isinstance(value, tuple) and value else (value,)
                for v in values:
                    if v not in cls.FIXED[key]:
                        raise cls._error(key, value, " or ".join(map(repr, cls.FIXED[key])))
            elif not key.startswith("_") and key not in cls.INERT:
                raise UserError(
                    f"{cls.CLASS_NAME} config: key {key!r} is not supported; remove it if it has "
                    "no effect on the network, or use a checkpoint of a supported architecture."
                )
        return cls(**known)

    @classmethod
    def _error(cls, key: str, value: Any, supported: str) -> UserError:
        return UserError(
            f"{cls.CLASS_NAME} config: {key}={_thaw(value)!r} is not supported; "
            f"supported: {supported}."
        )

    def _require(self, key: str, supported: str, ok: bool) -> None:
        if not ok:
            raise self._error(key, getattr(self, key), supported)

    def _require_positive(self, *keys: str) -> None:
        for key in keys:
            self._require(key, "a positive number", (getattr(self, key) or 0) > 0)

    def _require_widths(self, key: str = "block_out_channels") -> None:
        """Widths: one positive integer a level, each divisible by the norm groups."""
        widths, groups = getattr(self, key), self.norm_num_groups
        ok = 0 < len(widths) <= _MAX_LEVELS and all(w > 0 and w % groups == 0 for w in widths)
        levels = f"1 to {_MAX_LEVELS} levels"
        self._require(
            key, f"one positive multiple of norm_num_groups={groups} for each of {levels}", ok
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a valid config.json, `_class_name` first."""
        fields = {f.name: _thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"_class_name": self.CLASS_NAME, **fields}


def config_of(content: Mapping[str, Any], kinds: Sequence[type[ConfigT]]) -> ConfigT:
    """Reads a config.json's content as that of `kinds` which its `_class_name` names.

    Without a `_class_name` it is the first. Raises UserError for another class, and as from_dict.
    """
    class_name = content.get("_class_name", kinds[0].CLASS_NAME)
    for kind in kinds:
        if class_name == kind.CLASS_NAME:
            return kind.from_dict(content)
    supported = " and ".join(kind.CLASS_NAME for kind in kinds)
    raise UserError(f"the config describes a {class_name}; supported: {supported}.")


@dataclasses.dataclass(frozen=True)
class UNetConfig(_JsonConfig):
    """UNet2DConditionModel of SD 1.x, 2.x and their children (recipes.md 1.1, 1.8).

    `attention_head_dim` is, by diffusers' historic naming, the NUMBER of heads, one for all levels
    or one a level; `num_attention_heads`, where given, is the same thing, wins and is moved there.
    """

    sample_size: int | tuple[int, ...] | None = None  # latent pixels of the training images; inert
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: int | float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False  # softmax runs in float32 either way

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    FIXED: ClassVar[dict[str, tuple]] = {
        "center_input_sample": (False,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0,),
        "act_fn": ("silu", "swish"),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "dual_cross_attention": (False,),
        "addition_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }
    # Sizes of embeddings that FIXED keeps absent.
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"addition_time_embed_dim", "addition_embed_type_num_heads"}
    )

    def __post_init__(self):
        self._require_positive("in_channels", "out_channels", "norm_num_groups", "norm_eps")
        self._require_widths()
        levels = len(self.block_out_channels)
        for key, kinds in (
            ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
            ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
        ):
            types = getattr(self, key)
            ok = len(types) == levels and set(types) <= set(kinds)
            self._require(key, f"{levels} of {' and '.join(kinds)} (one a level)", ok)
        for key in (
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "attention_head_dim",
            "num_attention_heads",
        ):
            value = getattr(self, key)
            values = value if isinstance(value, tuple) else (value,) * levels
            ok = len(values) == levels and all(v is None or v > 0 for v in values)
            self._require(key, f"a positive integer or {levels} of them", ok)
        if self.num_attention_heads is not None:
            # One name for one thing; diffusers refuses files that set num_attention_heads.
            object.__setattr__(self, "attention_head_dim", self.num_attention_heads)
            object.__setattr__(self, "num_attention_heads", None)
        heads = self.per_level("attention_head_dim")
        divides = all(w % n == 0 for w, n in zip(self.block_out_channels, heads, strict=True))
        self._require(
            "attention_head_dim", f"numbers of heads dividing {self.block_out_channels}", divides
        )
        self._require(
            "class_embed_type",
            "None or 'projection'",
            self.class_embed_type in (None, "projection"),
        )
        if self.class_embed_type == "projection":
            self._require_positive("projection_class_embeddings_input_dim")

    def per_level(self, key: str) -> tuple[int, ...]:
        """A setting that may be one number or one a level, spread over the levels."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclasses.dataclass(frozen=True)
class VAEConfig(_JsonConfig):
    """AutoencoderKL (recipes.md 1.1)."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # inert
    scaling_factor: int | float = 0.18215
    shift_factor: int | float | None = None
    force_upcast: bool = True  # inert: the compute dtype is the caller's choice
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    FIXED: ClassVar[dict[str, tuple]] = {
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    INERT: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        self._require_positive(
            "in_channels",
            "out_channels",
            "layers_per_block",
            "latent_channels",
            "norm_num_groups",
            "scaling_factor",
        )
        self._require_widths()
        levels = len(self.block_out_channels)
        for key, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            self._require(key, f"{levels} times {kind!r}", getattr(self, key) == (kind,) * levels)
        self._require("shift_factor", "None or 0", self.shift_factor in (None, 0))

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along an axis: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig(_JsonConfig):
    """AutoencoderTiny, the distilled autoencoder known as TAESD."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: int | float = 1.0
    # The range in which diffusers stores latents as bytes; neither encode nor decode reads them.
    latent_magnitude: int | float = 3
    latent_shift: int | float = 0.5

    CLASS_NAME: ClassVar[str] = "AutoencoderTiny"
    FIXED: ClassVar[dict[str, tuple]] = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (None, 0),
    }
    # diffusers sets both itself: block_out_channels to the decoder's, force_upcast to false.
    INERT: ClassVar[frozenset[str]] = frozenset({"block_out_channels", "force_upcast"})

    @classmethod
    def beside(cls, vae: VAEConfig) -> "AutoencoderTinyConfig":
        """A decoder for the latents of another autoencoder: TAESD's beside SD's.

        It is as much narrower beside another; its encoder is not to be used, and next to nothing.
        """
        levels = len(vae.block_out_channels)
        width = max(vae.block_out_channels[0] // 2, 1)
        return cls(
            encoder_block_out_channels=(width,) * levels,
            decoder_block_out_channels=(width,) * levels,
            latent_channels=vae.latent_channels,
            num_encoder_blocks=(0,) * levels,
            num_decoder_blocks=(*(3,) * (levels - 1), 1),
        )

    def __post_init__(self):
        self._require_positive("in_channels", "out_channels", "latent_channels", "scaling_factor")
        levels = len(self.encoder_block_out_channels)
        for key in ("encoder_block_out_channels", "decoder_block_out_channels"):
            widths = getattr(self, key)
            ok = len(widths) == levels > 0 and widths[0] > 0 and len(set(widths)) == 1
            # The convolution between two levels keeps the width.
            self._require(key, f"one positive width, repeated for {max(levels, 1)} levels", ok)
        for key in ("num_encoder_blocks", "num_decoder_blocks"):
            blocks = getattr(self, key)
            ok = len(blocks) == levels and min(blocks) >= 0
            self._require(key, f"{levels} numbers of blocks (one a level)", ok)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along an axis: 8 for four levels."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


AutoencoderConfig = VAEConfig | AutoencoderTinyConfig


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_JsonConfig):
    """CLIPTextModel: OpenAI's (quick_gelu, SD 1.x) and OpenCLIP's (gelu, SD 2.x) text towers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: int | float = 1e-5
    # Kept only to write the file back as it was.
    projection_dim: int | None = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | tuple[int, ...] | None = 49407

    CLASS_NAME: ClassVar[str] = "CLIPTextModel"
    FIXED: ClassVar[dict[str, tuple]] = {"model_type": ("clip_text_model",)}
    INERT: ClassVar[frozenset[str]] = frozenset(_TRANSFORMERS_KEYS.split())

    def __post_init__(self):
        self._require_positive(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
        )
        self._require(
            "num_attention_heads",
            f"a divisor of hidden_size={self.hidden_size}",
            self.hidden_size % self.num_attention_heads == 0,
        )
        activations = ("quick_gelu", "gelu")
        self._require("hidden_act", " or ".join(activations), self.hidden_act in activations)

    def to_dict(self) -> dict[str, Any]:
        """The content of a valid transformers config.json."""
        config = super().to_dict()
        del config["_class_name"]
        # Without dtype, transformers would run half-precision files in half precision, beside a
        # UNet that diffusers runs in float32.
        own = {"architectures": [self.CLASS_NAME], "model_type": "clip_text_model"}
        return {**own, "dtype": "float32", **config}
