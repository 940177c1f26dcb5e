"""What published perception checkpoints compute, in torch: the oracles behind tests/families.py.

Marigold's families run diffusers' own pipelines. The others have no pipeline in diffusers; for
them `OnePass` puts the real networks together by the papers' formulas. It treats an image in one of
two ways, named by the argument `processing`:

- "diffusers" (default): before and after the networks as diffusers' Marigold pipelines do it.
  Normalised, long side resized with antialiasing (integer floor), padded by replication to the
  autoencoder's factor; afterwards unpadded and resized back without antialiasing. Depth-like maps
  are the channel mean, clipped, in [0, 1]; normals are clipped and of unit length in [-1, 1], again
  after resizing; segmentation colours are clipped, in [0, 1].
- "original": as the family's own scripts do it (`Own`), without padding: the autoencoder floors
  sizes that its factor does not divide. Normals stay as the scripts leave them.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from diffusers.schedulers import scheduling_lcm
from torch import Tensor, nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

Modules = dict[str, nn.Module]
LAST = 999
"""The timestep of models trained at the end of the schedule."""


@dataclasses.dataclass(frozen=True)
class Output:
    """prediction, uncertainty: [N, H, W, C] float32, as diffusers' pipelines give them.

    latent: what was decoded, [N * E, 4n, h, w]; None for the DPT head, which decodes none. raw: the
    map before its minimum and maximum were stretched to [0, 1], where that is part of the family.
    """

    prediction: np.ndarray
    latent: np.ndarray | None
    uncertainty: np.ndarray | None = None
    raw: np.ndarray | None = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without gradients, without diffusers' remarks on old scheduler files and small ensembles, and
    on one thread: for networks this small torch's threads cost far more than they bring."""
    level, threads = diffusers.utils.logging.get_verbosity(), torch.get_num_threads()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
        torch.set_num_threads(threads)


def as_tensor(image) -> Tensor:
    """[N, 3, H, W] of a PIL image, an array [H, W], [H, W, C] or [N, H, W, C], or a list of them:
    uint8, or floats in [0, 1]. Diffusers' pipelines get it too: they read an array's height and
    width in the wrong place when they check latents."""
    if isinstance(image, list):
        return torch.cat([as_tensor(one) for one in image])
    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / np.float32(65535)
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def nhwc(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


# --- Marigold --------------------------------------------------------------------------------


class Marigold:
    """A folder opened by one of diffusers' Marigold pipelines."""

    def __init__(self, folder: Path, pipeline: type):
        self.folder, self.pipeline = folder, pipeline

    @functools.cached_property
    def pipe(self):
        with quiet():
            pipe = self.pipeline.from_pretrained(self.folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def __call__(self, image, *, step_noise: list[Tensor] | None = None, **settings) -> Output:
        """settings: those of the pipeline's call. latents: torch, [N * E, 4n, h, w].

        step_noise: what LCM's sampler adds after each step but the last, in the order in which it
        asks; drawn by torch without it. Uncertainty is computed for more than two members.
        """
        settings["output_uncertainty"] = settings.get("ensemble_size", 1) > 2
        draws = iter(step_noise or ())
        patch = contextlib.nullcontext()
        if step_noise is not None:
            patch = mock.patch.object(scheduling_lcm, "randn_tensor", side_effect=draws)
        with quiet(), patch:
            out = self.pipe(as_tensor(image), output_latent=True, **settings)
        assert next(draws, None) is None, "more step noise than steps"
        return Output(out.prediction, out.latent.numpy(), out.uncertainty)


# --- Before and after the networks -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own:
    """What a family's own scripts do around the networks.

    rounds: whether uint8 images are resized as uint8, hence rounded. back: the resampling back to
    the image's size. clip_first: whether channels are clipped before their mean is taken.
    normal_range: "01" leaves normals in [0, 1], neither of unit length; "unit" divides by the
    length + 1e-5 before clipping and does not again after resizing.
    """

    rounds: bool
    back: str
    clip_first: bool
    normal_range: str


GENPERCEPT = Own(rounds=True, back="antialias", clip_first=False, normal_range="01")
E2E_FT = Own(rounds=True, back="antialias", clip_first=False, normal_range="unit")
LOTUS = Own(rounds=False, back="nearest", clip_first=True, normal_range="01")


def resize_long_side(pixels: Tensor, resolution: int) -> Tensor:
    """Both sides times resolution / long side, floored. Scripts that compute this in floats floor a
    whole number to one less for some sizes: such a size is refused, so that no test rests on it."""
    height, width = pixels.shape[-2:]
    size = tuple(side * resolution // max(height, width) for side in (height, width))
    floats = tuple(int(side * (resolution / max(height, width))) for side in (height, width))
    assert size == floats, f"rounding decides the size of {height} x {width} at {resolution}"
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def original_input(image: Tensor, resolution: int, own: Own) -> Tensor:
    """[N, 3, h, w] in [-1, 1]."""
    integer = not image.is_floating_point()
    pixels = image.float() * (1 if integer else 255)
    if resolution:
        pixels = resize_long_side(pixels, resolution)
        pixels = pixels.round() if integer and own.rounds else pixels
    return pixels / 255 * 2 - 1


def resize_back(x: Tensor, size: tuple[int, int], how: str) -> Tensor:
    if how == "nearest":
        return F.interpolate(x, size, mode="nearest")
    return F.interpolate(x, size, mode="bilinear", antialias=how == "antialias")


def unit(normals: Tensor) -> Tensor:
    return normals / normals.norm(dim=1, keepdim=True).clamp(min=1e-6)


def to_map(x: Tensor, task: str, own: Own | None) -> Tensor:
    """The decoder's image [N, 3, h, w] as the task's map; `own` None for diffusers' way."""
    if task in ("depth", "disparity", "matting", "dis"):
        x = x.clip(-1, 1) if own and own.clip_first else x
        return (x.mean(1, keepdim=True).clip(-1, 1) + 1) / 2
    if task == "normals" and own is None:
        return unit(x.clip(-1, 1))
    if task == "normals" and own.normal_range == "unit":
        return (x / (x.norm(dim=1, keepdim=True) + 1e-5)).clip(-1, 1)
    return (x.clip(-1, 1) + 1) / 2


def stretch(x: Tensor, whole_batch: bool = False) -> Tensor:
    """Minimum to 0, maximum to 1: of each image, or of the whole batch."""
    dims = (0, 1, 2, 3) if whole_batch else (1, 2, 3)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low)


# --- One-pass families ------------------------------------------------------------------------


def encode(vae: AutoencoderKL, pixels: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
    """The posterior's mean, or the sample that the noise makes of it, times the scaling factor."""
    posterior = vae.encode(pixels).latent_dist
    noise = 0 if posterior_noise is None else posterior_noise
    return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor


def embed(modules: Modules, tokenizer, prompt: str, padded: bool) -> Tensor:
    """[1, length, width]; "" is two tokens, or the tokenizer's maximum if padded."""
    ids = tokenizer(
        prompt,
        padding="max_length" if padded else "do_not_pad",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return modules["text_encoder"](ids)[0]


def call_unet(modules: Modules, x: Tensor, timestep: int, text: Tensor, **kwargs) -> Tensor:
    text = text.expand(len(x), -1, -1)
    return modules["unet"](x, timestep, encoder_hidden_states=text, **kwargs).sample


def genpercept_latent(modules: Modules, z: Tensor, text: Tensor, *, timestep: int = 1) -> Tensor:
    """v-prediction with a cumulative alpha of zero everywhere: the negated output is the latent."""
    return -call_unet(modules, z, timestep, text)


def e2e_latent(
    modules: Modules, z: Tensor, text: Tensor, *, alpha: float, latents: Tensor | None = None
) -> Tensor:
    """x0 of the v-prediction at t = 999; alpha: cumulative there. latents: zeros in the scripts.

    A four-channel UNet sees the image alone; the formula then has zeros for the noise.
    """
    x = torch.zeros_like(z) if latents is None else latents
    doubled = modules["unet"].config.in_channels == 8
    v = call_unet(modules, torch.cat([z, x], 1) if doubled else z, LAST, text)
    x = x if doubled else torch.zeros_like(z)
    return math.sqrt(alpha) * x - math.sqrt(1 - alpha) * v


def lotus_latent(
    modules: Modules,
    z: Tensor,
    text: Tensor,
    *,
    latents: Tensor | None = None,
    switch: tuple[float, float] = (1, 0),
) -> Tensor:
    """The output at t = 999 itself. Lotus-G (eight channels) needs its noise `latents`.

    switch: (1, 0) asks for the annotation, (0, 1) for the image again.
    """
    u = torch.tensor([switch], dtype=torch.float32)
    task = torch.cat([u.sin(), u.cos()], -1).expand(len(z), -1)
    generative = modules["unet"].config.in_channels == 8
    x = torch.cat([z, latents], 1) if generative else z
    return call_unet(modules, x, LAST, text, class_labels=task)


class Deterministic(DDIMScheduler):
    """DDIM for eta = 0 alone, whose variance 0 / 0 where cumulative alphas are zero is not used."""

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        return torch.zeros(())


def blending_latent(
    modules: Modules, z: Tensor, text: Tensor, *, scheduler: dict, num_inference_steps: int
) -> Tensor:
    """DDIM from the image's latent; x0 of the last step. scheduler: the file's content."""
    scheduler = Deterministic.from_config(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    x = z
    for t in scheduler.timesteps:
        step = scheduler.step(call_unet(modules, x, t, text), t, x)
        x = step.prev_sample
    return step.pred_original_sample


@dataclasses.dataclass(frozen=True)
class OnePass:
    """Image to prediction through `latent(modules, z_x, text, **settings) -> latent`."""

    modules: Modules
    tokenizer: object
    task: str
    own: Own
    latent: Callable[..., Tensor]
    stretched: bool = False
    """Whether a depth map's minimum and maximum become 0 and 1 before it is resized back."""

    @quiet()
    def __call__(
        self,
        image,
        *,
        processing_resolution: int = 0,
        match_input_resolution: bool = True,
        processing: str = "diffusers",
        prompt: str = "",
        padded: bool = False,
        posterior_noise: Tensor | None = None,
        **settings,
    ) -> Output:
        """processing_resolution: 0 for the image's own size. settings: those of the family's
        latent function. posterior_noise [N, 4, h, w]: for scripts that sample the posterior."""
        own = {"diffusers": None, "original": self.own}[processing]
        image = as_tensor(image)
        vae = self.modules["vae"]
        processor = MarigoldImageProcessor(2 ** (len(vae.config.block_out_channels) - 1))
        if own is None:
            pixels, padding, _ = processor.preprocess(image, processing_resolution)
        else:
            pixels, padding = original_input(image, processing_resolution, own), (0, 0)
        z = encode(vae, pixels, posterior_noise)
        text = embed(self.modules, self.tokenizer, prompt, padded)
        x, latent = self.decoded(z, text, own, **settings)
        x = raw = processor.unpad_image(x, padding)
        if self.stretched:
            x = stretch(x, whole_batch=own is not None and "dpt_head" in self.modules)
        if match_input_resolution:
            how = own.back if own else "plain"
            x, raw = (resize_back(y, image.shape[-2:], how) for y in (x, raw))
            if self.task == "normals" and own is None:
                x = unit(x)
        return Output(
            nhwc(x),
            None if latent is None else latent.numpy(),
            raw=nhwc(raw) if self.stretched else None,
        )

    def decoded(
        self, z: Tensor, text: Tensor, own: Own | None, **settings
    ) -> tuple[Tensor, Tensor | None]:
        """The task's map [N, C, h, w] and the latent it came from."""
        vae = self.modules["vae"]
        latent = self.latent(self.modules, z, text, **settings)
        return to_map(vae.decode(latent / vae.config.scaling_factor).sample, self.task, own), latent


# --- GenPercept's DPT head ---------------------------------------------------------------------


class DPTHead(nn.Module):
    """GenPercept's head on a UNet's up-blocks, made of transformers' DPT modules.

    channels: of the levels, the last up-block first. Published: (320, 640, 1280, 1280) and 256.
    Its state dict has the keys of the published `dpt_head_identity/model.safetensors`.
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        config = DPTConfig(
            hidden_size=8,
            neck_hidden_sizes=list(channels),
            fusion_hidden_size=width,
            use_bias_in_fusion_residual=False,
            add_projection=True,
            head_in_index=-1,
        )
        self.feature_upsample_0 = Upsample2D(channels[0], use_conv=True, out_channels=channels[0])
        self.neck = DPTNeck(config)
        self.neck.reassemble_stage = None
        self.head = DPTDepthEstimationHead(config)
        # Transformers fixes this layer's width at 256, and ends with a ReLU.
        self.head.projection = nn.Conv2d(width, width, 3, padding=1)
        self.head.head[-1] = nn.Identity()
        # The first fusion layer has no lateral input, hence no use for its first residual unit.
        self.neck.fusion_stage.layers[0].residual_layer1 = None

    def forward(self, features: list[Tensor]) -> Tensor:
        """features: of each up-block, the last first. [N, 1, H, W], unbounded; H is eight times
        the last up-block's height."""
        features = [self.feature_upsample_0(features[0]), *features[1:]]
        return self.head(self.neck(features))[:, None]


def up_features(unet: UNet2DConditionModel, *args, **kwargs) -> list[Tensor]:
    """What each up-block puts out, its upsampler included; the last block first."""
    features = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: features.append(output))
        for block in unet.up_blocks
    ]
    try:
        unet(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return features[::-1]


class OnePassDPT(OnePass):
    """The DPT head instead of the autoencoder's decoder. The head puts out the map itself: its
    minimum and maximum are stretched to [0, 1], in the scripts over the whole batch.

    Where a side of the latent is no multiple of 4, the map comes out larger than the padded image.
    The scripts resize it to the image's size at once; "diffusers" has no such case, and here it is
    first resized bilinearly to the padded image, so that the padding can be cut off.
    """

    def decoded(self, z, text, own, *, timestep: int = 1) -> tuple[Tensor, None]:
        text = text.expand(len(z), -1, -1)
        features = up_features(self.modules["unet"], z, timestep, encoder_hidden_states=text)
        x = self.modules["dpt_head"](features)
        size = tuple(8 * side for side in z.shape[-2:])
        return (resize_back(x, size, "plain") if own is None and x.shape[-2:] != size else x), None
