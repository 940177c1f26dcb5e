"""The tiny autoencoder against torch diffusers, in memory and on disk."""

import fnmatch
import json
import shutil
import types

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_checkpoints
from safetensors.torch import load_file, save_file
from torch_checkpoints import assert_bit_equal
from torch_parity import max_abs, normal, params_of, quick_jit, randomise, to_torch

from jaxpercept.checkpoints import diffusers as checkpoints
from jaxpercept.checkpoints import diffusers_write
from jaxpercept.checkpoints.rules import to_torch as torch_tensors
from jaxpercept.errors import UserError
from jaxpercept.models.config import AutoencoderTinyConfig, VAEConfig, config_of
from jaxpercept.models.functional import functional
from jaxpercept.models.vae import decode_latents, encode_mean

# config.json of madebyollin/taesd.
PUBLISHED = json.loads("""{
  "_class_name": "AutoencoderTiny", "_diffusers_version": "0.30.0", "act_fn": "relu",
  "block_out_channels": [64, 64, 64, 64], "decoder_block_out_channels": [64, 64, 64, 64],
  "encoder_block_out_channels": [64, 64, 64, 64], "force_upcast": false, "in_channels": 3,
  "latent_channels": 4, "latent_magnitude": 3, "latent_shift": 0.5,
  "num_decoder_blocks": [3, 3, 3, 1], "num_encoder_blocks": [1, 3, 3, 3], "out_channels": 3,
  "scaling_factor": 1.0, "shift_factor": 0.0, "upsample_fn": "nearest",
  "upsampling_scaling_factor": 2
}""")
# Widths and numbers of blocks differ between the two halves; one level has no block.
SMALL = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [12, 12],
    "num_encoder_blocks": [1, 2],
    "num_decoder_blocks": [1, 0],
    "latent_channels": 5,
    "latent_magnitude": 2,
}
MARIGOLD = diffusers.MarigoldDepthPipeline


def reference(rng, config=SMALL, **changes):
    public = {key: value for key, value in config.items() if key != "block_out_channels"}
    return randomise(diffusers.AutoencoderTiny.from_config(public | changes), rng)


def ported(module, **options):
    kinds = (VAEConfig, AutoencoderTinyConfig)
    content = {"_class_name": type(module).__name__, **module.config}
    vae = functional(config_of(content, kinds), **options)
    return vae, params_of(module, vae.shapes)


@pytest.mark.parametrize("config", [PUBLISHED, SMALL], ids=["published", "small"])
def test_encode_and_decode_match_torch(rng, config):
    module = reference(rng, config)
    vae, params = ported(module)
    x = normal(rng, 2, 13, 10, 3)  # an odd side: the encoder rounds up
    z = 4 * normal(rng, 2, 9, 15, vae.config.latent_channels)  # many beyond the soft clamp

    latent = quick_jit(lambda p, x: vae.bind(p).encode(x))(params, x)
    assert max_abs(latent, module.encode(to_torch(x)).latents) <= 1e-5
    image = quick_jit(lambda p, z: vae.bind(p).decode(z))(params, z)
    want = module.decode(to_torch(z)).sample
    assert max_abs(image, want) <= 1e-5 * max(1, float(want.abs().max()))
    assert image.shape[1] == 9 * vae.config.downsampling


def test_published_config_and_size():
    config = AutoencoderTinyConfig.from_dict(PUBLISHED)
    assert config == AutoencoderTinyConfig()
    assert (
        config.downsampling
        == VAEConfig(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).downsampling
    )
    assert config.downsampling == 8
    assert sum(s.size for s in functional(config).shapes.values()) == 2_445_063


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_latents_and_images_are_those_of_diffusers_pipeline(rng, kind):
    """What Marigold's pipeline does before and after its UNet, with either autoencoder."""
    if kind == "tiny":
        module = reference(rng, scaling_factor=0.4)
    else:
        module = diffusers.AutoencoderKL(
            block_out_channels=[8], norm_num_groups=4, scaling_factor=0.4, latent_channels=5
        )
        module = randomise(module, rng)
    vae, params = ported(module)
    x = normal(rng, 1, 8, 12, 3)
    pipeline = types.SimpleNamespace(vae=module)
    theirs, z = MARIGOLD.prepare_latents(pipeline, to_torch(x), None, None, 1, 1)
    latent = quick_jit(lambda p, x: encode_mean(vae, p, x))(params, x)
    assert latent.dtype == jnp.float32
    assert max_abs(latent, theirs) <= 1e-5

    depth = MARIGOLD.decode_prediction(pipeline, z)
    z = jnp.asarray(z.numpy().transpose(0, 2, 3, 1))
    image = quick_jit(lambda p, z: decode_latents(vae, p, z))(params, z)
    ours = (jnp.clip(jnp.mean(image, axis=-1, keepdims=True), -1, 1) + 1) / 2
    assert max_abs(ours, depth) <= 1e-5


def test_bfloat16_is_close_and_remat_changes_nothing(rng):
    vae, params = ported(reference(rng))
    z, weight = jnp.asarray(normal(rng, 1, 4, 3, 5)), normal(rng, 1, 8, 6, 3)

    def value_and_grad(vae):
        def loss(params, z):
            image = decode_latents(vae, params, z)
            return jnp.sum(weight * image), image

        return quick_jit(jax.value_and_grad(loss, argnums=1, has_aux=True))

    (_, image), grad = value_and_grad(vae)(params, z)
    remat = value_and_grad(functional(vae.config, remat="block"))
    (_, remat_image), remat_grad = remat(params, z)
    assert max_abs(image, remat_image) <= 1e-5
    assert max_abs(grad, remat_grad) <= 1e-5 * float(jnp.abs(grad).max())
    assert "remat" in str(remat.trace(params, z).jaxpr)

    half = functional(vae.config, dtype=jnp.bfloat16)
    low = quick_jit(lambda p, z: decode_latents(half, p, z))(params, z)
    assert low.dtype == jnp.float32
    error = np.asarray(low) - np.asarray(image)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * np.std(image)


def test_diffusers_reads_what_we_write_and_we_its_defaults():
    ours = AutoencoderTinyConfig.from_dict(SMALL)
    theirs = diffusers.AutoencoderTiny.from_config(ours.to_dict())
    assert AutoencoderTinyConfig.from_dict(dict(theirs.config)) == ours
    assert AutoencoderTinyConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    defaults = diffusers.AutoencoderTiny(**SMALL).config
    assert all(defaults[key] in values for key, values in AutoencoderTinyConfig.FIXED.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("upsample_fn", "bilinear"),
        ("upsampling_scaling_factor", 3),
        ("shift_factor", 0.1),
        ("scaling_factor", 0),
        ("latent_channels", -1),
        ("encoder_block_out_channels", [8, 16]),
        ("encoder_block_out_channels", []),
        ("decoder_block_out_channels", [8]),
        ("decoder_block_out_channels", [0, 0]),
        ("num_encoder_blocks", [1, 2, 3]),
        ("num_decoder_blocks", [1, -1]),
        ("latent_magnitude", "3"),
        ("norm_num_groups", 4),
    ],
)
def test_unsupported_keys_and_values_are_named(key, value):
    with pytest.raises(UserError, match=rf"^AutoencoderTiny config: .*{key}.*\.$"):
        AutoencoderTinyConfig.from_dict(SMALL | {key: value})


# On disk.


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(a whole checkpoint, the autoencoder's own folder, torch module), not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    torch_checkpoints.write_checkpoint(folder / "whole", "sd2")
    module = reference(np.random.default_rng(), scaling_factor=0.7)
    shutil.rmtree(folder / "whole" / "vae")
    for place in ("whole/vae", "own"):
        module.save_pretrained(folder / place)
    return folder / "whole", folder / "own", module


def assert_holds(params, module):
    tensors = {key: value.numpy() for key, value in module.state_dict().items()}
    assert_bit_equal(torch_tensors(params), tensors)


def test_load_and_save_a_checkpoint_with_it(stored, tmp_path, capfd):
    folder, _, module = stored
    checkpoint = checkpoints.load(folder)
    config = checkpoint.configs["vae"]
    assert isinstance(config, AutoencoderTinyConfig)
    assert (config.scaling_factor, config.latent_magnitude) == (0.7, 2)
    assert_holds(checkpoint.params["vae"], module)
    assert checkpoints.read_configs(folder).configs["vae"] == config

    checkpoint.model_index = {}
    diffusers_write.save(tmp_path / "out", checkpoint)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    capfd.readouterr()
    loaded, info = diffusers.AutoencoderTiny.from_pretrained(
        tmp_path / "out" / "vae", output_loading_info=True
    )
    assert "ignored" not in capfd.readouterr().err
    assert not any(info.values()), info
    assert AutoencoderTinyConfig.from_dict(dict(loaded.config)) == config
    assert_holds(checkpoint.params["vae"], loaded)


@pytest.mark.parametrize("place", ["whole", "own"])
def test_load_and_save_the_autoencoder_alone(stored, tmp_path, place):
    whole, own, module = stored
    config, params = checkpoints.load_autoencoder(whole if place == "whole" else own)
    assert isinstance(config, AutoencoderTinyConfig)
    assert_holds(params, module)
    diffusers_write.save_autoencoder(tmp_path / "out", config, params, dtype="bfloat16")
    file = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    diffusers_write.save_autoencoder(tmp_path / "out", config, params)  # over the first
    assert_holds(checkpoints.load_autoencoder(tmp_path / "out")[1], module)
    loaded = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "out")
    assert_holds(params, loaded)


def test_the_other_autoencoder_alone(tmp_path):
    module = torch_checkpoints.vae()
    module.save_pretrained(tmp_path, max_shard_size="40KB", variant="fp16")
    config, params = checkpoints.load_autoencoder(tmp_path, variant="fp16")
    assert isinstance(config, VAEConfig)
    assert_holds(params, module)
    half = checkpoints.load_autoencoder(tmp_path, dtype="float16")[1]
    assert {value.dtype.name for value in half.values()} == {"float16"}


def test_damaged_and_foreign_folders(stored, tmp_path):
    def refused(folder=tmp_path / "vae") -> str:
        with pytest.raises(UserError) as error:
            checkpoints.load_autoencoder(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    whole, own, _ = stored
    folder = shutil.copytree(own, tmp_path / "vae")
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    content, tensors = json.loads(config.read_text()), load_file(weights)

    config.write_text(json.dumps(content | {"decoder_norm": 1}))
    assert f"{config}: AutoencoderTiny config: key 'decoder_norm'" in refused()
    config.write_text(json.dumps(content | {"_class_name": "AutoencoderDC"}))
    message = refused()
    assert f"{config}: the config describes a AutoencoderDC; supported: Auto" in message
    config.write_text(json.dumps(content))

    changed = {**tensors, "decoder.layers.1.weight": torch.ones(2)}
    changed["encoder.layers.0.weight"] = torch.ones(8, 4, 3, 3)
    del changed["decoder.layers.2.conv.0.bias"]
    save_file(changed, weights)
    message = refused()
    assert str(weights) in message
    for part in (
        "missing (1): decoder.layers.2.conv.0.bias",
        "not expected (1): decoder.layers.1.weight",
        "encoder.layers.0.weight [8, 4, 3, 3] instead of [8, 3, 3, 3]",
    ):
        assert part in message
    tensors["encoder.layers.0.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, weights)
    assert "Tensor encoder.layers.0.weight of" in refused()

    weights.rename(folder / "diffusion_pytorch_model.bin")
    assert f"{folder} holds its weights as a pickle" in refused()
    (folder / "diffusion_pytorch_model.bin").unlink()
    config.unlink()
    assert f"{folder} lacks config.json, diffusion_pytorch_model.safetensors;" in refused()
    (tmp_path / "empty" / "vae").mkdir(parents=True)
    assert "lacks vae/config.json, vae/diffusion" in refused(tmp_path / "empty")
    assert f"{own / 'config.json'} is a single file" in refused(own / "config.json")

    config, params = checkpoints.load_autoencoder(own)
    for target, words in ((whole, "holds no autoencoder"), (own / "config.json", "is a file")):
        with pytest.raises(UserError, match=words):
            diffusers_write.save_autoencoder(target, config, params)


@pytest.mark.parametrize("place", ["whole", "own"])
def test_from_the_hub(stored, tmp_path, monkeypatch, place):
    """Only the autoencoder's files are fetched."""
    whole, own, module = stored
    remote = shutil.copytree(whole if place == "whole" else own, tmp_path / "remote")
    (remote / "taesd_decoder.safetensors").touch()
    cache = tmp_path / "snapshots" / "abc123"

    def names(repo=None, revision=None):
        return [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]

    def download(repo, allow_patterns, revision=None):
        for name in names():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: types.SimpleNamespace(list_repo_files=names)
    )
    assert_holds(checkpoints.load_autoencoder("owner/taesd")[1], module)
    inside = "vae/" if place == "whole" else ""
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*.*")}
    assert fetched == {
        f"{inside}config.json",
        f"{inside}diffusion_pytorch_model.safetensors",
    }
