r"""The built-in checkpoint `sd-tiny`: a small text-to-image latent diffusion model, from scratch.

    python -m jaxpercept.pretrain --config=configs/pretrain.py --data_dir=tiny_imagenet \
        --output=jaxpercept/assets/sd-tiny

Three stages and an export; docs/pretraining.md has the hardware, the time and the figures. `vae`
trains the autoencoder, `unet` the UNet and the text encoder in its latent space. Both learn from
the procedural scenes with their captions and from natural images (Tiny ImageNet, class names as
captions). `fog` learns to edit as well: given a clear picture and the word "fog", paint it in fog;
docs/pretraining.md says why. 5.9 M weights in all, 12 MB in float16.
"""

from ml_collections import ConfigDict

from jaxpercept import presets
from jaxpercept.config import base_config

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 128,
    "scaling_factor": 1.0,
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [56, 96, 112],
    "layers_per_block": 1,
    "attention_head_dim": [4, 6, 7],
    "cross_attention_dim": 96,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "sample_size": 16,
}
TEXT_ENCODER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 24,
    "vocab_size": 1024,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def get_config(stage: str = "fog") -> ConfigDict:
    """The config of a stage, one of `STAGES`."""
    config = base_config()
    config.checkpoint = ""
    config.task = ""
    config.seed = 1
    config.data.mixture = {"scenes": 0.3, "furnished": 0.4, "tiny_imagenet": 0.3}
    config.data.augment.update({"brightness": 0.1, "contrast": 0.1})
    config.scheduler = SCHEDULER
    config.ema_decay = 0.998
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = config.get_ref("steps")
    config.optimizer.clip_norm = 1.0
    config.save_every = 200
    choices = {"vae": _vae, "unet": _unet, "fog": _fog}
    return presets.choose("configs/pretrain.py", stage, choices, config)


STAGES = ("vae", "unet", "fog")


def _vae(config: ConfigDict) -> ConfigDict:
    # Convolutions do not care about the size of the picture: parts of it, at about their own scale.
    config.resolution = (48, 64)
    config.data.augment.scale = (0.45, 0.7)
    config.data.mixture = {"furnished": 0.5, "tiny_imagenet": 0.5}
    config.steps = 1900
    config.batch_size = 16
    config.method = {"name": "autoencoder", "gradient_weight": 1.0, "cell_weight": 1.0}
    config.method.kl_weight = 1e-4
    config.architecture = {"vae": VAE}
    config.random_init = ("vae",)
    config.trainable = ("vae/",)
    config.optimizer.learning_rate = 2e-3
    return config


def _unet(config: ConfigDict) -> ConfigDict:
    config.resolution = (96, 128)
    config.data.augment.scale = (0.7, 1.0)
    config.steps = 2600
    config.batch_size = 32
    config.method = {"name": "text_to_image", "caption_dropout": 0.1}
    config.architecture = {"vae": VAE, "unet": UNET, "text_encoder": TEXT_ENCODER}
    config.random_init = ("unet", "text_encoder")
    config.trainable = ("unet/", "text_encoder/")
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.01
    return config


def _fog(config: ConfigDict) -> ConfigDict:
    config = _unet(config)
    config.data.mixture = {"scenes": 0.5, "furnished": 0.4, "tiny_imagenet": 0.1}
    config.data.augment.haze = 0.75
    config.method.edit_share = 0.9
    config.method.edit_weight = 10.0
    config.method.caption_dropout = 0.3
    config.steps = 1500
    config.optimizer.learning_rate = 2e-3
    config.random_init = ()
    return config
