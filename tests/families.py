"""Small random checkpoints of every published family of perception models, with torch's answers.

Each folder is laid out as the published one: by diffusers' and transformers' `save_pretrained`,
with the index and the scheduler file of the repository, "768" and its like made small. What the
networks compute from an image is in tests/families_torch.py.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_checkpoints
from diffusers import (
    AutoencoderKL,
    MarigoldDepthPipeline,
    MarigoldIntrinsicsPipeline,
    MarigoldNormalsPipeline,
)
from families_torch import (
    E2E_FT,
    GENPERCEPT,
    LOTUS,
    DPTHead,
    Marigold,
    OnePass,
    OnePassDPT,
    Output,
    blending_latent,
    e2e_latent,
    genpercept_latent,
    lotus_latent,
    quiet,
)
from safetensors.torch import save_file
from torch_checkpoints import (
    FULL_TEXT_ENCODER,
    FULL_UNET,
    FULL_VAE,
    cast,
    randomise,
    text_encoder,
    unet,
    write_tokenizer,
)
from transformers import CLIPTokenizer

RESOLUTION = 64
"""default_processing_resolution, where the folder has one."""

COMPONENTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
UNCHECKED = {
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}
"""Stable Diffusion's index without a safety checker."""
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.25.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
"""Marigold v1-0's, which is Stable Diffusion 2's."""
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
NOT_PNDM = ("clip_sample_range", "dynamic_thresholding_ratio", "rescale_betas_zero_snr")
NOT_PNDM += ("sample_max_value", "thresholding")
PNDM = {
    **{key: value for key, value in SCHEDULER.items() if key not in NOT_PNDM},
    "_class_name": "PNDMScheduler",
    "prediction_type": "epsilon",
}
ALPHA_999 = float(np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
"""Cumulative alpha of `SCHEDULER` at its last timestep: 0.0046601."""

APPEARANCE = {
    "target_names": ["albedo", "material"],
    "albedo": {"prediction_space": "srgb"},
    "material": {
        "prediction_space": "stack",
        "sub_target_names": ["roughness", "metallicity", None],
    },
    "roughness": {"prediction_space": "linear"},
    "metallicity": {"prediction_space": "linear"},
}
# Which of these are up to scale was not seen in the published index.
LIGHTING = {
    "target_names": ["albedo", "shading", "residual"],
    "albedo": {"prediction_space": "linear", "up_to_scale": False},
    "shading": {"prediction_space": "linear", "up_to_scale": True},
    "residual": {"prediction_space": "linear", "up_to_scale": False},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A published kind of checkpoint, small.

    folder: what a user names. base_folder: a whole Stable Diffusion folder, where the family's own
    lacks components. modules: the networks with the weights that count, in float32. predict: what
    torch answers; None where nothing is predicted. needs_task: whether the folder leaves open what
    its images mean. settings: for `predict`, what the folder does not say. method: how the
    prediction is computed.
    """

    name: str
    folder: Path
    modules: dict[str, torch.nn.Module]
    predict: Callable[..., Output] | None
    method: str
    task: str
    needs_task: bool = False
    base_folder: Path | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Builder = Callable[..., Family]
"""`(folder, seed=0) -> Family`: writes into `folder`, which need not exist."""


def vae(seed: int, levels: int = 2) -> AutoencoderKL:
    """Downscales by 2 ** (levels - 1). Its decoder puts out about (0, 0, 0.7) +- 0.2: little is
    clipped, and hardly a normal is so short that its direction hangs on rounding."""
    widths = {2: (16, 32), 3: (16, 16, 32), 4: (8, 8, 16, 16)}[levels]
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=16,
    )
    randomise(model, seed)
    last = model.decoder.conv_out
    noise = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    with quiet():
        colours = model.decode(4 * noise).sample
        scale = 0.2 / colours.std((0, 2, 3))
        last.weight *= scale[:, None, None, None]
        last.bias -= colours.mean((0, 2, 3))
        last.bias *= scale
        last.bias += torch.tensor([0.0, 0.0, 0.7])
    return model


def unet_of_four_levels(seed: int, **overrides):
    return unet(
        "sd2",
        seed,
        block_out_channels=(16, 24, 32, 32),
        attention_head_dim=(2, 3, 4, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **overrides,
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_folder(
    folder: Path,
    network: torch.nn.Module,
    seed: int,
    pipeline: str,
    fields: dict[str, Any],
    scheduler: dict[str, Any],
    levels: int = 2,
) -> dict[str, torch.nn.Module]:
    """A whole diffusers folder around a UNet; its networks. fields: of the index, beside its
    components."""
    size = write_tokenizer(folder / "tokenizer", "!")
    modules = {
        "unet": network,
        "vae": vae(seed + 1, levels),
        "text_encoder": text_encoder("sd2", size, seed + 2),
    }
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.25.0",
        **COMPONENTS,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_json(folder / "model_index.json", index | fields)
    return modules


# --- Marigold --------------------------------------------------------------------------------


def marigold(
    folder: Path,
    seed: int = 0,
    *,
    name: str,
    task: str,
    scheduler: dict[str, Any],
    steps: int = 4,
    pipeline: type = MarigoldDepthPipeline,
    old_index: bool = False,
    levels: int = 2,
    targets: int = 1,
    **fields: Any,
) -> Family:
    """old_index: the class name of before diffusers had the pipeline, and no fields."""
    network = unet("marigold", seed, in_channels=4 * (targets + 1), out_channels=4 * targets)
    sizes = {"default_denoising_steps": steps, "default_processing_resolution": RESOLUTION}
    explicit = {"num_inference_steps": steps, "processing_resolution": RESOLUTION}
    class_name = "MarigoldPipeline" if old_index else pipeline.__name__
    fields = {} if old_index else {**sizes, **fields}
    modules = write_folder(folder, network, seed, class_name, fields, SCHEDULER | scheduler, levels)
    predict = Marigold(folder, pipeline)
    settings = explicit if old_index else {}
    return Family(name, folder, modules, predict, "marigold", task, settings=settings)


def depth_fields(prediction_type: str = "depth") -> dict[str, Any]:
    return {"prediction_type": prediction_type, "scale_invariant": True, "shift_invariant": True}


NORMALS = {"pipeline": MarigoldNormalsPipeline, "task": "normals", "prediction_type": "normals"}
INTRINSICS = {
    "pipeline": MarigoldIntrinsicsPipeline,
    "task": "intrinsics",
    "prediction_type": "intrinsics",
    "scheduler": ZERO_SNR,
}


def one_pass(
    name: str,
    folder: Path,
    modules: dict[str, torch.nn.Module],
    task: str,
    method: str,
    oracle: Callable[..., OnePass],
    base_folder: Path | None = None,
) -> Family:
    """A family without a pipeline of diffusers'; none of these folders names its task."""
    tokenizer = CLIPTokenizer.from_pretrained((base_folder or folder) / "tokenizer")
    predict = oracle(modules, tokenizer, task)
    settings = {"processing_resolution": RESOLUTION}
    return Family(name, folder, modules, predict, method, task, True, base_folder, settings)


# --- GenPercept --------------------------------------------------------------------------------


def genpercept(
    folder: Path, seed: int = 0, *, name: str, task: str, layout: str = "repository"
) -> Family:
    """layout: "repository": `unet/` and `vae/` with an index, as genpercept-depth; "bare":
    `unet_depth_v2/`, a network's folder, beside `vae/`; "dpt": the same with a UNet that has no
    last norm and convolution, beside `dpt_head_identity/`. The rest is Stable Diffusion 2.1's."""
    dpt = layout == "dpt"
    make_unet = unet_of_four_levels if dpt else partial(unet, "sd2")
    levels = 4 if dpt else 2
    base = folder / "stable-diffusion-2-1"
    modules = write_base(base, make_unet(seed + 10), seed + 10, levels)
    root = folder / "genpercept-models"
    names = {"repository": "unet", "bare": f"unet_{task}_v2", "dpt": f"unet_{task}_dpt_head_v2"}
    own = root / names[layout]
    network, autoencoder = make_unet(seed), vae(seed + 1, levels)
    if dpt:
        # As published: the head reads the up-blocks, so the file lacks what comes after them.
        network.conv_norm_out, network.conv_out = None, torch.nn.Identity()
        head = randomise(DPTHead((16, 24, 32, 32), width=16), seed + 3)
        (root / "dpt_head_identity").mkdir(parents=True)
        save_file(head.state_dict(), root / "dpt_head_identity" / "model.safetensors")
        modules["dpt_head"] = head
    network.save_pretrained(own)
    cast(autoencoder, torch.float16)
    autoencoder.save_pretrained(root / "vae")
    cast(autoencoder, torch.float32)
    index = {key: COMPONENTS[key] for key in ("unet", "vae")}
    index = {"_class_name": "GenPerceptPipeline", "_diffusers_version": "0.24.0"} | index
    write_json(root / "model_index.json", index)
    modules |= {"unet": network, "vae": autoencoder}
    oracle = OnePassDPT if dpt else OnePass
    folder = root if layout == "repository" else own
    method = "dpt" if dpt else "genpercept"
    oracle = partial(oracle, own=GENPERCEPT, latent=genpercept_latent, stretched=dpt)
    return one_pass(name, folder, modules, task, method, oracle, base)


def write_base(folder: Path, network: torch.nn.Module, seed: int, levels: int = 2):
    """A text-to-image folder: Stable Diffusion 2.1's index, with the safety checker left out."""
    return write_folder(
        folder, network, seed, "StableDiffusionPipeline", UNCHECKED, SCHEDULER, levels
    )


def rgb_blending(
    folder: Path, seed: int = 0, *, name: str, betas: tuple[float, float], steps: int
) -> Family:
    """GenPercept's ablation: image and target blended by a schedule of these betas. Published are a
    UNet and a scheduler file; the index is what the pipeline's own fields would make."""
    scheduler = SCHEDULER | {"beta_start": betas[0], "beta_end": betas[1]}
    fields = {
        "default_denoising_steps": steps,
        "default_processing_resolution": RESOLUTION,
        "rgb_blending": True,
        "genpercept_pipeline": False,
    }
    modules = write_folder(folder, unet("sd2", seed), seed, "GenPerceptPipeline", fields, scheduler)
    latent = partial(blending_latent, scheduler=scheduler, num_inference_steps=steps)
    oracle = partial(OnePass, own=GENPERCEPT, latent=latent)
    return one_pass(name, folder, modules, "depth", "rgb_blending", oracle)


# --- E2E-FT and Lotus --------------------------------------------------------------------------


def e2e_ft(folder: Path, seed: int = 0, *, name: str, task: str, channels: int = 8) -> Family:
    """channels: 8, or 4 for the variant without a noise input."""
    fields = {"_diffusers_version": "0.31.0.dev0", "image_encoder": [None, None], **UNCHECKED}
    network = unet("marigold", seed, in_channels=channels)
    scheduler = SCHEDULER | {"timestep_spacing": "trailing"}
    modules = write_folder(folder, network, seed, "StableDiffusionPipeline", fields, scheduler)
    latent = partial(e2e_latent, alpha=ALPHA_999)
    oracle = partial(OnePass, own=E2E_FT, latent=latent, stretched=task == "depth")
    return one_pass(name, folder, modules, task, "e2e_ft", oracle)


def lotus(folder: Path, seed: int = 0, *, name: str, task: str, pipeline: str) -> Family:
    generative = pipeline == "LotusGPipeline"
    extractor = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    fields = {"_diffusers_version": "0.28.0.dev0", **UNCHECKED, **extractor}
    network = unet(
        "marigold" if generative else "sd2",
        seed,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=4,
    )
    scheduler = SCHEDULER | {"prediction_type": "sample"} if generative else PNDM
    modules = write_folder(folder, network, seed, pipeline, fields, scheduler)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
    write_json(folder / "feature_extractor" / "preprocessor_config.json", processor)
    oracle = partial(OnePass, own=LOTUS, latent=lotus_latent)
    return one_pass(name, folder, modules, task, "lotus_g" if generative else "lotus_d", oracle)


def text_to_image(folder: Path, seed: int = 0, *, name: str) -> Family:
    """Stable Diffusion itself, which predicts nothing about an image."""
    modules = write_base(folder, unet("sd2", seed), seed)
    return Family(name, folder, modules, None, "text_to_image", "", needs_task=True)


# --- The table -----------------------------------------------------------------------------------

_BUILDERS: dict[str, Builder] = {
    "marigold_depth_v1_0_old": partial(marigold, task="depth", scheduler={}, old_index=True),
    "marigold_depth_v1_0": partial(marigold, task="depth", scheduler={}, **depth_fields()),
    "marigold_depth_v1_1": partial(marigold, task="depth", scheduler=ZERO_SNR, **depth_fields()),
    "marigold_depth_lcm": partial(marigold, task="depth", scheduler=LCM, steps=1, **depth_fields()),
    "marigold_disparity": partial(
        marigold, task="disparity", scheduler=ZERO_SNR, **depth_fields("disparity")
    ),
    "marigold_normals_v0_1": partial(
        marigold, **NORMALS, scheduler={}, steps=10, use_full_z_range=True
    ),
    "marigold_normals_half_z": partial(
        marigold, **NORMALS, scheduler=LCM, steps=1, use_full_z_range=False
    ),
    "marigold_normals_v1_1": partial(
        marigold, **NORMALS, scheduler=ZERO_SNR, use_full_z_range=True, levels=3
    ),
    "marigold_iid_appearance": partial(
        marigold, **INTRINSICS, targets=2, target_properties=APPEARANCE
    ),
    "marigold_iid_lighting": partial(marigold, **INTRINSICS, targets=3, target_properties=LIGHTING),
    "genpercept_depth": partial(genpercept, task="depth"),
    "genpercept_disparity": partial(genpercept, task="disparity"),
    "genpercept_normals": partial(genpercept, task="normals"),
    "genpercept_matting": partial(genpercept, task="matting"),
    "genpercept_dis": partial(genpercept, task="dis"),
    "genpercept_seg": partial(genpercept, task="seg"),
    "genpercept_bare_depth": partial(genpercept, task="depth", layout="bare"),
    "genpercept_dpt_disparity": partial(genpercept, task="disparity", layout="dpt"),
    "rgb_blending": partial(rgb_blending, betas=(0.00085, 0.012), steps=10),
    "rgb_blending_strong": partial(rgb_blending, betas=(0.136, 0.192), steps=10),
    "e2e_ft_depth": partial(e2e_ft, task="depth"),
    "e2e_ft_depth_rgb": partial(e2e_ft, task="depth", channels=4),
    "e2e_ft_normals": partial(e2e_ft, task="normals"),
    "lotus_g_depth": partial(lotus, task="depth", pipeline="LotusGPipeline"),
    "lotus_g_normals": partial(lotus, task="normals", pipeline="LotusGPipeline"),
    "lotus_d_depth": partial(lotus, task="depth", pipeline="LotusDPipeline"),
    "lotus_d_normals": partial(lotus, task="normals", pipeline="LotusDPipeline"),
    "lotus_d_disparity": partial(lotus, task="disparity", pipeline="DirectRegressionPipeline"),
    "stable_diffusion": text_to_image,
}


def instruct_pix2pix(
    folder: Path,
    seed: int = 0,
    scheduler: dict[str, Any] | None = None,
    *,
    full_size: bool = False,
) -> dict[str, torch.nn.Module]:
    """An InstructPix2Pix folder: Stable Diffusion 1 with eight input channels. Its networks.

    Not among `FAMILIES`: it reads a text with each image.
    """
    name = "StableDiffusionInstructPix2PixPipeline"
    scheduler = scheduler or {**SCHEDULER, "prediction_type": "epsilon"}
    network = unet("sd1", seed, in_channels=8, **(FULL_UNET["sd1"] if full_size else {}))
    modules = write_folder(folder, network, seed, name, UNCHECKED, scheduler)
    if full_size:
        words = modules["text_encoder"].config.vocab_size
        large = {
            "vae": torch_checkpoints.vae(seed + 1, **FULL_VAE),
            "text_encoder": text_encoder("sd1", words, seed + 2, **FULL_TEXT_ENCODER["sd1"]),
        }
        for part, module in large.items():
            module.save_pretrained(folder / part)
        modules |= large
    return modules


FAMILIES: dict[str, Builder] = {
    name: partial(builder, name=name) for name, builder in _BUILDERS.items()
}
