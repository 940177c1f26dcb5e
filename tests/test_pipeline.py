"""Images in, predictions out: canonical form, resizing, options, sharding, compile counts."""

import copy
import math

import jax
import numpy as np
import pytest
import tiny_model
import torch
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import Mirror

import jaxpercept
from jaxpercept import PerceptionPipeline
from jaxpercept.errors import UserError
from jaxpercept.inference.batches import local_mesh, plan_batches, put_rows
from jaxpercept.inference.images import to_batch
from jaxpercept.inference.predictor import Predictor, processing_size, resolve_resolution

# ---- images --------------------------------------------------------------------------------------


def test_every_form_of_an_image_is_the_same_image(rng):
    image = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for form in (image, image[None], Image.fromarray(image), [image], (Image.fromarray(image),)):
        np.testing.assert_array_equal(to_batch(form), image[None])
    np.testing.assert_array_equal(to_batch(jax.numpy.asarray(image)), image[None])
    two = to_batch([image, Image.fromarray(image[::-1])])
    np.testing.assert_array_equal(two, np.stack([image, image[::-1]]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_is_repeated(rng, dtype):
    grey = rng.integers(0, np.iinfo(dtype).max, (4, 6)).astype(dtype)
    expected = np.repeat(grey[None, :, :, None], 3, axis=-1)
    for form in (grey, grey[..., None], grey[None, ..., None], Image.fromarray(grey)):
        batch = to_batch(form)
        assert batch.dtype == dtype
        np.testing.assert_array_equal(batch, expected)


def test_transparency_lies_over_white(rng):
    rgba = rng.integers(0, 256, (4, 6, 4)).astype(np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    batch = to_batch(rgba)
    np.testing.assert_array_equal(batch[0, 0], np.full((6, 3), 255))
    np.testing.assert_array_equal(batch[0, 1], rgba[1, :, :3])
    np.testing.assert_array_equal(to_batch(Image.fromarray(rgba)), batch)
    as_float = to_batch(rgba / np.float32(255))
    assert as_float.dtype == np.float32
    np.testing.assert_allclose(as_float * 255, batch, atol=0.51)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((3, 5, 6), np.uint8), "channels last"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), "channels last"),
        (np.zeros((5, 6), np.int32), "int32"),
        (np.zeros((5, 6), bool), "bool"),
        (np.full((5, 6), 1.5), r"\[0, 1\]"),
        (np.full((5, 6), np.nan), r"\[0, 1\]"),
        (np.zeros((0, 6, 3), np.uint8), "no pixels"),
        ([], "empty"),
        ([np.zeros((5, 6), np.uint8), np.zeros((6, 5), np.uint8)], "differ in size"),
        ([np.zeros((5, 6), np.uint8), np.zeros((5, 6))], "differ in size or type"),
        ("photo.jpg", "no agreed range"),
    ],
)
def test_what_is_no_image_is_refused(image, complaint):
    with pytest.raises(UserError, match=complaint):
        to_batch(image)


# ---- sizes and batches ---------------------------------------------------------------------------


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), resolution=st.integers(1, 128))
def test_processing_size_is_that_of_marigold(height, width, resolution):
    resolution *= 8
    long = max(height, width)
    expected = (height * resolution // long, width * resolution // long)
    assert processing_size((height, width), resolution) == tuple(max(e, 1) for e in expected)
    assert processing_size((height, width), 0) == (height, width)


def test_resolution_is_checked():
    assert resolve_resolution(None, (96, 128), 8) == 128
    assert resolve_resolution(None, None, 8) == 0
    assert resolve_resolution(0, (96, 128), 8) == 0
    for wrong in (-8, 756):
        with pytest.raises(UserError, match="multiple of 8"):
            resolve_resolution(wrong, (96, 128), 8)


@given(
    keys=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_plan_covers_every_item_once_with_one_size_a_key(keys, batch_size, multiple):
    plan = plan_batches(keys, batch_size, multiple)
    assert sorted(item for items, _ in plan for item in items) == list(range(len(keys)))
    rows_of = {}
    for items, rows in plan:
        assert len({keys[item] for item in items}) == 1
        assert rows % multiple == 0
        assert 0 < len(items) <= rows <= math.ceil(batch_size / multiple) * multiple
        assert rows_of.setdefault(keys[items[0]], rows) == rows


# ---- the resize chain, against diffusers ---------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(st.integers(9, 70), st.integers(9, 70)),
    resolution=st.sampled_from([0, 16, 40, 72]),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_resizing_is_that_of_diffusers_marigold(size, resolution, dtype, seed):
    rng = np.random.default_rng(seed)
    image = rng.random((2, *size, 3), np.float32)
    if dtype != "float32":
        image = (image * np.iinfo(dtype).max).astype(dtype)
    mesh = local_mesh()
    predict = Predictor(Mirror(), mesh)
    rows = mesh.size
    batch = put_rows(image, rows, mesh)
    prediction, _, latent, raw = predict({}, batch, resolution=resolution)
    small = predict({}, batch, resolution=resolution, match_input=False).prediction
    np.testing.assert_array_equal(raw, small)

    processor = MarigoldImageProcessor(vae_scale_factor=8)
    reference, padding, original = processor.preprocess(image, resolution, "bilinear")
    depth = processor.unpad_image(reference, padding).mean(1, keepdim=True)
    depth = (depth.clip(-1, 1) + 1) / 2
    resized = processor.resize_antialias(depth, original, "bilinear", is_aa=False)

    def nhwc(x: torch.Tensor) -> np.ndarray:
        return x.numpy().transpose(0, 2, 3, 1)

    np.testing.assert_allclose(np.asarray(latent)[:2], nhwc(reference), atol=1e-5)
    np.testing.assert_allclose(np.asarray(small)[:2], nhwc(depth), atol=1e-5)
    np.testing.assert_allclose(np.asarray(prediction)[:2], nhwc(resized), atol=1e-5)


# ---- the pipeline --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model") / "export", np.random.default_rng())


@pytest.fixture(scope="module")
def pipe(folder):
    return PerceptionPipeline.from_pretrained(folder)


def test_output_says_what_it_is(pipe, folder, rng):
    out = pipe(rng.integers(0, 256, (30, 45, 3)).astype(np.uint8), seed=7)
    assert out.prediction.shape == (1, 30, 45, 1)
    assert out.prediction.dtype == np.float32
    assert 0 <= out.prediction.min() < out.prediction.max() <= 1
    assert out.latent.shape == (1, 16, 24, 4)
    assert out.latent.dtype == np.float32
    assert out.uncertainty is None
    assert (out.kind, out.range) == ("affine_depth", (0.0, 1.0))
    assert "affine-invariant" in out.convention
    assert out.processing_resolution == 48
    assert (out.checkpoint, out.step, out.seed) == (str(folder), None, 7)


def test_prediction_on_all_devices_is_that_of_the_method_on_one(pipe, rng):
    """At the processing size nothing is resized or padded: the method alone decides."""
    assert pipe.mesh.size == 8
    images = rng.random((11, 32, 48, 3), np.float32)
    out = pipe(images)
    weights = jax.tree.map(np.asarray, pipe.params)

    @jax.jit
    def predict(weights, rgb):
        return pipe.perception.predict(weights, pipe.perception.encode(weights, rgb))

    decoded, latent = predict(weights, images * 2 - 1)
    expected = np.clip(np.asarray(decoded).mean(-1, keepdims=True), -1, 1) / 2 + 0.5
    np.testing.assert_allclose(out.prediction, expected, atol=1e-5)
    np.testing.assert_allclose(out.latent, latent, atol=1e-4)


def test_the_network_is_compiled_once_for_each_processing_size(pipe, rng):
    images = rng.integers(0, 256, (11, 20, 30, 3)).astype(np.uint8)
    together = pipe(images)  # batches of 8 and 3, the second padded to 8
    compiled = pipe._predictor._network._cache_size()
    # Another order, another number of images, another size of image with the same aspect.
    backwards = pipe(images[::-1])
    np.testing.assert_allclose(together.prediction, backwards.prediction[::-1], atol=1e-5)
    assert pipe(images[:4, :10, :15]).prediction.shape == (4, 10, 15, 1)
    assert pipe._predictor._network._cache_size() == compiled == 1


def test_greyscale_16_bit_and_match_input(pipe, rng):
    grey = Image.fromarray(rng.integers(0, 65536, (64, 96)).astype(np.uint16))
    out = pipe(grey, match_input_resolution=False)
    assert out.prediction.shape == (1, 32, 48, 1)
    back = pipe(grey)
    assert back.prediction.shape == (1, 64, 96, 1)
    np.testing.assert_allclose(back.latent, out.latent, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_inference_steps": 4}, "one step"),
        ({"ensemble_size": 5}, "pointless"),
        ({"latents": np.zeros((1, 16, 24, 4))}, "not from noise"),
        ({"prompt": "a cat"}, "no text"),
        ({"processing_resolution": 45}, "multiple of 2: use 4[46]"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(pipe, options, complaint):
    with pytest.raises(UserError, match=complaint):
        pipe(np.zeros((8, 8, 3), np.uint8), **options)


def test_one_is_a_valid_number_of_steps(pipe, rng):
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pipe(image, 1).prediction, pipe(image).prediction)


def test_half_precision_is_close_and_keeps_kernels_small(folder, pipe, rng):
    half = PerceptionPipeline.from_pretrained(folder, dtype="bfloat16")
    assert half.params["unet"]["conv_in.kernel"].dtype == "bfloat16"
    assert half.params["unet"]["conv_norm_out.scale"].dtype == np.float32
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    error = np.abs(half(image).prediction - pipe(image).prediction)
    assert error.mean() < 0.03


def test_models_that_predict_nothing_are_refused(tmp_path, rng):
    bare = tiny_model.description(method={}, task="", resolution=None)
    with pytest.raises(UserError, match=r"fine-tune it with python -m jaxpercept\.train"):
        PerceptionPipeline(bare, tiny_model.params(rng), checkpoint="sd")
    with pytest.raises(UserError, match="dtype 'int8'"):
        PerceptionPipeline(tiny_model.description(), tiny_model.params(rng), dtype="int8")
    with pytest.raises(UserError, match="lacks prompt"):
        PerceptionPipeline(
            tiny_model.description(),
            {k: v for k, v in tiny_model.params(rng).items() if k != "prompt"},
        )


def test_damaged_weights_are_reported(pipe):
    broken = copy.copy(pipe)
    bias = jax.numpy.full_like(pipe.params["unet"]["conv_out.bias"], np.nan)
    broken.params = pipe.params | {"unet": pipe.params["unet"] | {"conv_out.bias": bias}}
    with pytest.raises(UserError, match="not finite"):
        broken(np.zeros((32, 48, 3), np.uint8))


def test_importing_the_package_is_lazy():
    assert jaxpercept.PerceptionPipeline is PerceptionPipeline
    with pytest.raises(AttributeError, match="nothing"):
        jaxpercept.nothing  # noqa: B018
