"""The oracles of the published families, checked against each other and against diffusers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    MarigoldDepthPipeline,
    MarigoldIntrinsicsPipeline,
    MarigoldNormalsPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families import FAMILIES, RESOLUTION, SCHEDULER
from families_torch import DPTHead, blending_latent, embed, quiet, unit, up_features
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

PIPELINES = {
    "depth": MarigoldDepthPipeline,
    "disparity": MarigoldDepthPipeline,
    "normals": MarigoldNormalsPipeline,
    "seg": MarigoldIntrinsicsPipeline,
}


@pytest.fixture(autouse=True)
def calm():
    with quiet():
        yield


@pytest.fixture
def family(tmp_path, rng):
    """name -> a fresh family with fresh weights."""
    return lambda name: FAMILIES[name](tmp_path / name, int(rng.integers(2**20)))


def photo(rng, height: int, width: int) -> np.ndarray:
    """Coarse colours under fine noise, [height, width, 3] uint8."""
    coarse = rng.integers(0, 200, (-(-height // 8), -(-width // 8), 3))
    fine = np.kron(coarse, np.ones((8, 8, 1), int))[:height, :width]
    return (fine + rng.integers(0, 56, fine.shape)).astype(np.uint8)


def noise(rng, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def latents_of(family, image, rng, members: int = 1) -> dict[str, torch.Tensor]:
    """The latents that a family starts from, for an image processed at `RESOLUTION`."""
    if family.method not in ("marigold", "lotus_g"):
        return {}
    long = max(image.shape[:2])
    factor = 2 ** (len(family.modules["vae"].config.block_out_channels) - 1)
    sides = [-(-(side * RESOLUTION // long) // factor) for side in image.shape[:2]]
    return {"latents": noise(rng, members, family.modules["unet"].config.out_channels, *sides)}


def assert_close(a, b, atol: float = 5e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def assert_same(task: str, ours, theirs) -> None:
    """Predictions; the direction of a short normal magnifies rounding."""
    assert_close(ours, theirs, atol=1e-3 if task == "normals" else 1e-4)


def assert_holds(module, saved) -> None:
    saved = {key: value.float() for key, value in saved.items()}
    torch.testing.assert_close(saved, dict(module.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_and_prediction(name, family, rng):
    family = family(name)
    index_folder = family.folder
    if not (family.folder / "model_index.json").exists():
        index_folder = family.folder.parent
        assert (family.folder / "config.json").exists()
    index = json.loads((index_folder / "model_index.json").read_text())
    where = {"unet": family.folder if index_folder != family.folder else family.folder / "unet"}
    where["vae"] = index_folder / "vae"
    where["text_encoder"] = (family.base_folder or family.folder) / "text_encoder"
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for component, kind in classes.items():
        if family.method == "dpt" and component == "unet":
            saved = load_file(where["unet"] / "diffusion_pytorch_model.safetensors")
            assert not [key for key in saved if "conv_out" in key or "conv_norm_out" in key]
            assert "conv_in.weight" in saved
        else:
            saved = kind.from_pretrained(where[component]).state_dict()
        assert_holds(family.modules[component], saved)
    if family.base_folder:
        assert set(index) == {"_class_name", "_diffusers_version", "unet", "vae"}
        assert not (index_folder / "text_encoder").exists()
    elif family.method != "marigold":
        StableDiffusionPipeline.from_pretrained(family.folder)
    if family.base_folder or family.predict is None:
        StableDiffusionPipeline.from_pretrained(family.base_folder or family.folder)
    if family.predict is None:
        return

    image = photo(rng, 45, 70)  # 41 x 64 when processed: not divisible
    settings = {**family.settings, **latents_of(family, image, rng)}
    out = family.predict(image, **settings)
    colours = family.task in ("normals", "intrinsics", "seg")
    targets = family.modules["unet"].config.out_channels // 4
    assert out.prediction.shape == (targets, 45, 70, 3 if colours else 1)
    assert out.prediction.dtype == np.float32
    low = -1 if family.task == "normals" else 0
    assert low <= out.prediction.min() < out.prediction.max() <= 1 + 1e-6
    assert out.prediction.std() > 0.01
    if family.task == "normals":
        assert_close(np.linalg.norm(out.prediction, axis=-1), np.ones((1, 45, 70)))
    if family.method != "dpt":
        factor = 2 ** (len(family.modules["vae"].config.block_out_channels) - 1)
        assert out.latent.shape == (1, 4 * targets, -(-41 // factor), 64 // factor)
    out = family.predict(photo(rng, 82, 128), match_input_resolution=False, **settings)
    assert out.prediction.shape[1:3] == (41, 64)


class Answer(torch.nn.Module):
    """A pipeline's UNet with the output `answer(x, t, text)`."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, unet, answer):
        super().__init__()
        self.config, self.answer = unet.config, answer

    def forward(self, x, t, encoder_hidden_states, return_dict):
        return (self.answer(x, t, encoder_hidden_states),)


def pipeline_around(family, unet, kind, scheduler):
    return kind(
        unet=unet,
        scheduler=DDIMScheduler.from_config(SCHEDULER | scheduler | {"set_alpha_to_one": True}),
        vae=family.modules["vae"],
        text_encoder=family.modules["text_encoder"],
        tokenizer=family.predict.tokenizer,
    )


@pytest.mark.parametrize("size", [(45, 70), (90, 60)])
@pytest.mark.parametrize(
    "name",
    [
        "genpercept_depth",
        "genpercept_normals",
        "genpercept_seg",
        "rgb_blending_strong",
        "lotus_g_normals",
        "lotus_d_disparity",
    ],
)
def test_everything_around_the_networks_is_marigolds(name, size, family, rng):
    family = family(name)
    image = photo(rng, *size)
    settings = latents_of(family, image, rng)
    ours = family.predict(image, processing_resolution=RESOLUTION, **settings)

    def answer(x, t, text):  # One step of v-prediction from no signal gives the negated output.
        assert t == 999
        return -family.predict.latent(family.modules, x[:, :4], text, **settings)

    pipe = pipeline_around(
        family,
        Answer(family.modules["unet"], answer),
        PIPELINES[family.task],
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    )
    theirs = pipe(
        Image.fromarray(image),
        num_inference_steps=1,
        processing_resolution=RESOLUTION,
        output_latent=True,
    )
    assert_close(ours.latent, theirs.latent)
    assert_same(family.task, ours.prediction, theirs.prediction)


@pytest.mark.parametrize("name", ["e2e_ft_depth", "e2e_ft_normals"])
def test_e2e_ft_is_marigold_with_zeros_and_no_noise_left(name, family, rng):
    family = family(name)
    image = photo(rng, 45, 70)
    trailing = {"timestep_spacing": "trailing"}
    pipe = pipeline_around(family, family.modules["unet"], PIPELINES[family.task], trailing)
    shape = {"num_inference_steps": 1, "processing_resolution": RESOLUTION}
    zeros = torch.zeros(1, 4, 21, 32)
    theirs = pipe(Image.fromarray(image), latents=zeros, output_latent=True, **shape)
    ours = family.predict(image, processing_resolution=RESOLUTION)
    assert_close(ours.latent, theirs.latent)
    raw = ours.prediction if ours.raw is None else ours.raw
    assert_same(family.task, raw, theirs.prediction)
    other = family.predict(image, processing_resolution=RESOLUTION, latents=zeros + 1)
    assert np.abs(other.latent - ours.latent).max() > 0.1


def test_depth_of_e2e_ft_is_stretched_before_it_is_resized(family, rng):
    family = family("e2e_ft_depth_rgb")
    out = family.predict(photo(rng, 64, 48), processing_resolution=RESOLUTION)
    low, high = out.raw.min(), out.raw.max()
    assert (out.prediction.min(), out.prediction.max()) == (0, 1)
    assert_close(out.prediction, (out.raw - low) / (high - low))
    out = family.predict(photo(rng, 90, 60), processing_resolution=RESOLUTION)
    assert out.prediction.max() - out.prediction.min() < 1


def test_genpercept_is_blending_by_betas_of_one(family, rng):
    family = family("genpercept_depth")
    z, text = noise(rng, 1, 4, 12, 16), noise(rng, 1, 2, 32)
    ones = SCHEDULER | {"beta_start": 1.0, "beta_end": 1.0}
    blended = blending_latent(family.modules, z, text, scheduler=ones, num_inference_steps=1)
    assert torch.equal(blended, family.predict.latent(family.modules, z, text))
    later = family.predict.latent(family.modules, z, text, timestep=500)
    assert (later - blended).abs().max() > 0.01


def test_blending_is_ddim_with_the_noise_left_out(family, rng):
    family = family("rgb_blending")
    z, text = noise(rng, 1, 4, 12, 16), noise(rng, 1, 2, 32)
    ddim = DDIMScheduler.from_config(SCHEDULER)
    ddim.set_timesteps(10)
    assert ddim.timesteps.tolist() == list(range(901, 0, -100))
    x = z
    for t in ddim.timesteps:
        v = family.modules["unet"](x, t, encoder_hidden_states=text).sample
        step = ddim.step(v, t, x)
        x = step.prev_sample
    x0 = family.predict.latent(family.modules, z, text)
    assert_close(x0, step.pred_original_sample)
    # The last step's sample still holds a little noise.
    assert 0.001 < (x - x0).abs().max() < 0.5


def test_lotus_g_is_marigold_with_a_label(family, rng):
    family = family("lotus_g_depth")
    image = photo(rng, 45, 70)
    settings = latents_of(family, image, rng)
    label = torch.tensor([[0.84147098, 0, 0.54030231, 1]])

    def answer(x, t, text):
        return family.modules["unet"](x, t, text, class_labels=label).sample

    sample = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    network = Answer(family.modules["unet"], answer)
    pipe = pipeline_around(family, network, MarigoldDepthPipeline, sample)
    shape = {"num_inference_steps": 1, "processing_resolution": RESOLUTION}
    theirs = pipe(Image.fromarray(image), output_latent=True, **shape, **settings)
    ours = family.predict(image, processing_resolution=RESOLUTION, **settings)
    assert_close(ours.latent, theirs.latent)
    assert_same(family.task, ours.prediction, theirs.prediction)


@pytest.mark.parametrize("name", ["lotus_g_depth", "lotus_d_depth"])
def test_lotus(name, family, rng):
    family = family(name)
    image = photo(rng, 45, 70)
    settings = {**family.settings, **latents_of(family, image, rng)}
    ours = family.predict(image, **settings)
    if name == "lotus_g_depth":  # Its pipeline's sampler adds nothing to the output.
        sampler = DDPMScheduler.from_config(SCHEDULER | {"prediction_type": "sample"})
        sampler.set_timesteps(timesteps=[999])
        x = noise(rng, 1, 4, 21, 32)
        last = sampler.step(torch.from_numpy(ours.latent), 999, x).prev_sample
        assert_close(last, ours.latent)

    pipe = StableDiffusionPipeline.from_pretrained(family.folder)
    theirs, _ = pipe.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)
    padded = embed(family.modules, family.predict.tokenizer, "", padded=True)
    assert theirs.shape == (1, 24, 32)
    assert_close(padded, theirs)
    changed = {
        "padded": family.predict(image, padded=True, **settings),
        "sampled": family.predict(image, posterior_noise=noise(rng, 1, 4, 21, 32), **settings),
        "switched": family.predict(image, switch=(0, 1), **settings),
    }
    for what, other in changed.items():
        assert np.abs(other.latent - ours.latent).max() > 0.01, what
    still = family.predict(image, posterior_noise=torch.zeros(1, 4, 21, 32), **settings)
    assert_close(still.latent, ours.latent)


def test_original_processing_differs_only_in_resizing(family, rng):
    family = family("genpercept_normals")
    image = photo(rng, 64, 48)
    original = family.predict(image, processing="original").prediction
    ours = family.predict(image).prediction
    assert original.min() >= 0
    length_one = unit(torch.from_numpy(original * 2 - 1).movedim(-1, 1)).movedim(1, -1)
    assert_same("normals", length_one, ours)

    resized = [
        family.predict(photo(rng, 45, 70), processing=way, processing_resolution=RESOLUTION)
        for way in ("diffusers", "original")
    ]
    assert [out.latent.shape[-2:] for out in resized] == [(21, 32), (20, 32)]
    assert resized[1].prediction.shape == (1, 45, 70, 3)


@pytest.mark.parametrize(
    ("name", "how", "rounds"),
    [
        ("genpercept_matting", {"mode": "bilinear", "antialias": True}, True),
        ("lotus_d_normals", {"mode": "nearest"}, False),
    ],
)
def test_original_resizing(name, how, rounds, family, rng):
    family = family(name)
    image = photo(rng, 24, 36)
    settings = {"processing": "original", "processing_resolution": 48}
    large = family.predict(image, match_input_resolution=False, **settings)
    assert large.prediction.shape[1:3] == (32, 48)
    back = F.interpolate(torch.from_numpy(large.prediction).movedim(-1, 1), (24, 36), **how)
    out = family.predict(image, **settings)
    assert_close(out.prediction, back.movedim(1, -1))
    floats = family.predict(np.float32(image / 255), **settings)
    assert (np.abs(floats.latent - out.latent).max() > 1e-3) == rounds


def test_dpt_head(family, rng):
    with torch.device("meta"):
        published = DPTHead((320, 640, 1280, 1280), 256)
    assert sum(p.numel() for p in published.parameters()) == 18_474_753  # of the published file

    family = family("genpercept_dpt_disparity")
    head, unet = family.modules["dpt_head"], family.modules["unet"]
    file = family.folder.parent / "dpt_head_identity" / "model.safetensors"
    assert_holds(head, load_file(file))
    z, text = noise(rng, 1, 4, 8, 16), noise(rng, 1, 2, 32)
    features = up_features(unet, z, 1, encoder_hidden_states=text)
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 8, 16),
        (24, 8, 16),
        (32, 4, 8),
        (32, 2, 4),
    ]
    # This UNet ends with its last up-block.
    assert torch.equal(features[0], unet(z, 1, encoder_hidden_states=text).sample)
    assert head(features).shape == (1, 1, 64, 128)
    out = family.predict(photo(rng, 48, 64), match_input_resolution=False)
    assert (out.prediction.min(), out.prediction.max()) == (0, 1)
    assert out.raw.shape == out.prediction.shape
    assert np.corrcoef(out.raw.ravel(), out.prediction.ravel())[0, 1] > 0.9999


def test_marigold_takes_every_image_ensembles_and_step_noise(family, rng):
    family = family("marigold_depth_lcm")
    image = photo(rng, 45, 70)
    start = latents_of(family, image, rng)
    ours = family.predict(image, **start).prediction
    for same in (Image.fromarray(image), image[None], [image], np.float32(image / 255)):
        assert_close(family.predict(same, **start).prediction, ours)
    assert family.predict([image, image], processing_resolution=0).prediction.shape[0] == 2

    start = latents_of(family, image, rng, members=3)
    members = family.predict(image, ensemble_size=3, **start)
    assert members.uncertainty.shape == members.prediction.shape == (1, 45, 70, 1)
    assert members.latent.shape == (3, 4, 21, 32)

    start = latents_of(family, image, rng)
    draws = [noise(rng, 1, 4, 21, 32) for _ in range(2)]
    steps = [
        family.predict(image, num_inference_steps=2, step_noise=[draw], **start).latent
        for draw in (*draws, draws[0])
    ]
    assert np.array_equal(steps[0], steps[2])
    assert np.abs(steps[0] - steps[1]).max() > 0.01
    with pytest.raises(AssertionError, match="more step noise"):
        family.predict(image, num_inference_steps=2, step_noise=draws, **start)
