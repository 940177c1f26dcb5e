"""Beyond one image in one piece: mirrored, tiled, in sequence, with another autoencoder."""

import json

import families
import numpy as np
import pytest
import tiny_model
from diffusers import AutoencoderTiny
from PIL import Image
from tiny_model import one_device
from torch_checkpoints import randomise

import jaxpercept.predict as door
from jaxpercept import PerceptionPipeline
from jaxpercept.checkpoints.load import load_model
from jaxpercept.checkpoints.orbax import save_export
from jaxpercept.errors import UserError
from jaxpercept.inference.ensemble import ensemble


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model") / "export", np.random.default_rng())


@pytest.fixture(scope="module")
def pipe(folder):
    """A one-step model of depth."""
    return PerceptionPipeline.from_pretrained(folder, mesh=one_device())


@pytest.fixture(scope="module")
def marigold(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marigold") / "checkpoint"
    return families.FAMILIES["marigold_depth_v1_1"](folder, 4).folder


@pytest.fixture(scope="module")
def noisy(marigold):
    return PerceptionPipeline.from_pretrained(marigold, mesh=one_device())


def photo(rng, height=32, width=48):
    """Smooth colours, as photographs have."""
    coarse = rng.random((5, 7, 3), np.float32)
    image = Image.fromarray((coarse * 255).astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


# ---- mirrored ------------------------------------------------------------------------------------


def test_flip_merges_the_mirrored_image(pipe, rng):
    image = photo(rng, 30, 45)
    straight = pipe(image, match_input_resolution=False).prediction
    turned = pipe(image[:, ::-1], match_input_resolution=False).prediction[:, :, ::-1]
    both = np.stack([straight, turned], axis=1)
    expected, uncertainty = ensemble("affine", both, reduction="mean", alignment="closed_form")
    out = pipe(
        image, flip=True, match_input_resolution=False, ensembling={"alignment": "closed_form"}
    )
    np.testing.assert_allclose(out.prediction, expected, atol=1e-4)
    np.testing.assert_allclose(out.uncertainty, uncertainty, atol=1e-4)
    assert out.ensemble_size == 2


def test_flip_turns_normals_round(tmp_path, rng):
    family = families.FAMILIES["genpercept_normals"](tmp_path / "normals", 5)
    pipe = PerceptionPipeline.from_pretrained(
        family.folder, task="normals", base=family.base_folder, mesh=one_device()
    )
    image, options = photo(rng), {"processing_resolution": 0, "flip": True}
    merged = pipe(image, ensembling={"reduction": "mean"}, **options).prediction
    again = pipe(image[:, ::-1], ensembling={"reduction": "mean"}, **options).prediction
    # What is merged for the mirrored image is the mirrored merge.
    np.testing.assert_allclose(again[:, :, ::-1] * [-1, 1, 1], merged, atol=1e-3)


# ---- tiles ---------------------------------------------------------------------------------------


def test_one_tile_is_the_whole_image(pipe, rng):
    image = photo(rng)
    whole = pipe(image, processing_resolution=0).prediction
    one = pipe.tiled(image, 48, processing_resolution=0)
    np.testing.assert_allclose(one.prediction, whole, atol=1e-5)


def test_tiles_of_a_large_image_make_one_map(pipe, rng):
    image = photo(rng, 70, 101)
    before = pipe._predictor._network._cache_size()
    out = pipe.tiled(image, 48, batch_size=2, processing_resolution=0)
    assert out.prediction.shape == (1, 70, 101, 1)
    assert 0 <= out.prediction.min() <= out.prediction.max() <= 1
    # All tiles have one shape: one program, and one for the coarse prediction.
    assert pipe._predictor._network._cache_size() <= before + 2
    small = pipe.tiled(image, 64)  # the network sees 48 pixels of each
    assert small.prediction.shape == (1, 70, 101, 1)
    assert small.processing_resolution == 48


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 0}, "positive sizes"),
        ({"tile": 16, "overlap": 16}, "larger tiles"),
        ({"tile": 16, "latents": np.zeros(3)}, "no latents"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(pipe, options, words):
    with pytest.raises(UserError, match=words):
        pipe.tiled(np.zeros((40, 40, 3), np.uint8), **options)


# ---- sequences -----------------------------------------------------------------------------------


def test_a_sequence_flickers_less(noisy, rng):
    """The same picture again and again, with a little noise: the prediction should not change."""
    still = photo(rng).astype(np.float32) / 255
    frames = [
        np.clip(still + rng.normal(0, 0.002, still.shape), 0, 1).astype(np.float32)
        for _ in range(5)
    ]
    options = {"processing_resolution": 0, "num_inference_steps": 1}
    apart = [noisy(frame, seed=i, **options).prediction for i, frame in enumerate(frames)]
    together = [out.prediction for out in noisy.sequence(frames, **options)]

    def flicker(maps):
        maps = np.stack(maps)
        return np.abs(np.diff(maps, axis=0)).mean() / maps.std()

    assert flicker(together) < 0.4 * flicker(apart)


def test_deterministic_models_take_sequences_too(pipe, rng):
    image = photo(rng)
    outs = list(pipe.sequence([image, image], processing_resolution=0))
    np.testing.assert_allclose(outs[0].prediction, outs[1].prediction, atol=1e-4)


# ---- autoencoders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """A tiny autoencoder for latents of 2 x 2 pixels."""
    folder = tmp_path_factory.mktemp("taesd")
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    randomise(vae, 6).save_pretrained(folder)
    return folder


def test_another_autoencoder_decodes(marigold, noisy, taesd, rng):
    image = photo(rng)
    options = {"processing_resolution": 0, "num_inference_steps": 1}
    only = PerceptionPipeline.from_pretrained(marigold, decoder=taesd, mesh=one_device())
    both = PerceptionPipeline.from_pretrained(marigold, vae=taesd, mesh=one_device())
    own, decoded, whole = (p(image, **options) for p in (noisy, only, both))
    np.testing.assert_allclose(decoded.latent, own.latent, atol=1e-4)
    assert np.abs(decoded.prediction - own.prediction).max() > 0.01
    assert np.abs(whole.latent - own.latent).max() > 0.01


def test_an_autoencoder_of_another_factor_is_refused(marigold, tmp_path):
    vae = AutoencoderTiny(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="8 x 8 pixels, the model wants 4 of 2 x 2"):
        PerceptionPipeline.from_pretrained(marigold, decoder=tmp_path)


def test_the_autoencoder_in_tiles_is_near_the_whole(folder, pipe, rng):
    image = photo(rng, 64, 96)
    tiled = PerceptionPipeline.from_pretrained(folder, vae_tile=64, mesh=one_device())
    options = {"processing_resolution": 0}
    same = tiled(image[:60, :60], **options).prediction
    np.testing.assert_allclose(same, pipe(image[:60, :60], **options).prediction, atol=1e-5)
    assert tiled(image, **options).prediction.shape == (1, 64, 96, 1)
    with pytest.raises(UserError, match="multiple of 16"):
        PerceptionPipeline.from_pretrained(folder, vae_tile=24)


def test_padding_to_larger_multiples_shares_programs(folder, rng):
    padded = PerceptionPipeline.from_pretrained(folder, pad_multiple=16, mesh=one_device())
    for width in (34, 40, 48):
        out = padded(photo(rng, 32, width), processing_resolution=0)
        assert out.prediction.shape == (1, 32, width, 1)
        assert out.latent.shape[1:3] == (16, 24)
    assert padded._predictor._network._cache_size() == 1
    with pytest.raises(UserError, match="multiple of 2"):
        PerceptionPipeline.from_pretrained(folder, pad_multiple=15)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, rng):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(photo(rng, 30, 45)).save(folder / f"frame{i}.png")
    return folder


def test_predict_writes_clouds_and_panels(folder, photos, tmp_path):
    out = tmp_path / "out"
    failures = door.predict(
        str(folder), photos, out, point_cloud=True, panel=True, scale=3.0, shift=1.0, flip=True
    )
    assert failures == []
    names = {path.name for path in out.iterdir()}
    for ending in (".npy", ".png", "_16bit.png", ".json", ".ply", "_panel.png", "_uncertainty.npy"):
        assert f"frame1{ending}" in names
    facts = json.loads((out / "frame1.json").read_text())
    assert facts["ensemble_size"] == 2
    assert (out / "frame1.ply").read_bytes().startswith(b"ply\nformat binary_little_endian")


def test_predict_brings_a_sequence_to_one_scale(folder, photos, tmp_path):
    door.predict(str(folder), photos, tmp_path / "out", sequence=True)
    frames = np.stack([np.load(tmp_path / f"out/frame{i}.npy") for i in range(3)])
    assert frames.shape == (3, 30, 45)
    assert frames.min() == pytest.approx(0, abs=1e-6)
    assert frames.max() == pytest.approx(1, abs=1e-6)


def test_predict_in_tiles(folder, photos, tmp_path):
    door.predict(str(folder), photos / "frame0.png", tmp_path / "out", tile=16)
    assert np.load(tmp_path / "out/frame0.npy").shape == (30, 45)


def test_predict_for_intrinsics_and_normals(photos, tmp_path):
    lighting = families.FAMILIES["marigold_iid_lighting"](tmp_path / "iid", 7)
    options = {"processing_resolution": 32, "num_inference_steps": 1}
    image = photos / "frame0.png"
    door.predict(str(lighting.folder), image, tmp_path / "a", ensemble_size=2, **options)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"frame0_albedo.png", "frame0_shading.png", "frame0_residual.png"} <= names
    assert np.load(tmp_path / "a/frame0.npy").shape == (3, 30, 45, 3)
    normals = families.FAMILIES["marigold_normals_v1_1"](tmp_path / "n", 7)
    for convention in ("opengl", "opencv"):
        door.predict(
            str(normals.folder),
            image,
            tmp_path / convention,
            normals_convention=convention,
            **options,
        )
    gl, cv = (np.load(tmp_path / f"{name}/frame0.npy") for name in ("opengl", "opencv"))
    np.testing.assert_allclose(gl * [1, -1, -1], cv, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(gl, axis=-1), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"point_cloud": True}, "--scale and --shift"),
        ({"tile": 16, "sequence": True}, "cannot be combined"),
        ({"intrinsics": ["1", "2"]}, "four numbers"),
        ({"ensemble_size": 4}, "pointless"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, photos, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        door.predict(str(folder), photos, tmp_path / "out", **options)


def test_an_export_with_a_recipe_opens_again(marigold, noisy, tmp_path, rng):
    """Description and weights of a recognised family survive the package's own format."""
    params = {name: dict(weights) for name, weights in load_model(str(marigold))[1].items()}
    save_export(tmp_path / "export", noisy.description, params)
    again = PerceptionPipeline.from_pretrained(tmp_path / "export", mesh=one_device())
    image, options = photo(rng), {"processing_resolution": 0, "num_inference_steps": 1}
    np.testing.assert_array_equal(
        again(image, **options).prediction, noisy(image, **options).prediction
    )
