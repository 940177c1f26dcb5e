"""Denoising from config to prediction: the widened UNet, training on devices, the saved model."""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import one_device
from tiny_run import base_of_module, data_of_module  # noqa: F401

from jaxpercept import PerceptionPipeline, presets
from jaxpercept.checkpoints.load import load_model
from jaxpercept.errors import UserError
from jaxpercept.methods.one_step import to_signed
from jaxpercept.training import sharding
from jaxpercept.training.loop import train
from jaxpercept.training.setup import initial_weights, set_up


def config(base, noise, **changes):
    c = tiny_run.config(base, **changes)
    c = presets.denoising(c, noise, 0.0034, 0.048)
    c.method.num_steps = 2
    return c


def weights_of(c):
    trained, frozen = initial_weights(c, set_up(c))
    assert trained.keys() == {"unet"}
    return trained["unet"], frozen


# ---- the first layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "multi_resolution"])
def test_the_unet_sees_the_image_beside_the_noise(base, rng, noise):
    """Marigold's way: the kernel twice, halved, so that two equal inputs count as one."""
    setup = set_up(config(base, noise))
    assert setup.description.components["unet"].in_channels == 8
    unet, frozen = weights_of(config(base, noise))
    given = load_model(str(base))[1]
    kernel = given["unet"]["conv_in.kernel"]
    np.testing.assert_array_equal(
        unet["conv_in.kernel"], np.concatenate([kernel, kernel], axis=2) / np.float32(2)
    )
    for path, weight in given["unet"].items():
        if path != "conv_in.kernel":
            np.testing.assert_array_equal(unet[path], weight, err_msg=path)
    tiny_run.assert_bit_equal(frozen, {k: given[k] for k in ("vae", "prompt")})

    narrow = set_up(config(base, "image")).method.model.unet
    x = jnp.asarray(rng.normal(size=(2, 8, 12, 4)), jnp.float32)
    arguments = jnp.array([3, 900], jnp.int32), jnp.asarray(given["prompt"]["embedding"])[[0, 0], :]
    once = jax.jit(lambda p, x: narrow.bind(p)(x, *arguments))(given["unet"], x)
    wide = setup.method.model.unet
    twice = jax.jit(lambda p, x: wide.bind(p)(x, *arguments))(unet, jnp.concatenate([x, x], -1))
    np.testing.assert_allclose(twice, once, atol=2e-5)


def test_blending_leaves_the_first_layer_as_it_is(base):
    unet, _ = weights_of(config(base, "image"))
    tiny_run.assert_bit_equal(unet, load_model(str(base))[1]["unet"])


def test_a_unet_from_scratch_has_random_weights_for_both(base):
    c = config(base, "gaussian")
    c.random_init = ("unet",)
    kernel = weights_of(c)[0]["conv_in.kernel"]
    assert kernel.shape[2] == 8
    assert np.abs(kernel[:, :, :4] - kernel[:, :, 4:]).max() > 0.01


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """`(config, workdir, state)` of two steps with Marigold's noise on one device.

    The timesteps are drawn by a table in a file, and the losses weighed inversely.
    """
    folder = tmp_path_factory.mktemp("denoising")
    c = config(base, "multi_resolution", steps=2, accumulate=2, **tiny_run.on_folder(data))
    write_table(folder / "table.json", [1, 3, 0.5])
    c.method.update({"timesteps": f"file:{folder / 'table.json'}", "timestep_use": "importance"})
    state = train(c, folder / "run", mesh=one_device())
    return c, folder / "run", state


def write_table(path, weights):
    path.write_text(json.dumps({"weights": weights, "checkpoint": "runs/other"}))


def test_four_devices_train_like_one(run, tmp_path):
    c, workdir, state = run
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    other = train(c, tmp_path / "run", mesh=mesh)
    ours, theirs = tiny_run.curve(workdir), tiny_run.curve(tmp_path / "run")
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    norms = (tiny_run.curve(folder, "grad_norm") for folder in (tmp_path / "run", workdir))
    np.testing.assert_allclose(*norms, rtol=1e-4)
    left, right = (tiny_run.leaves(s["params"]) for s in (state, other))
    # Adam's first update is the gradient's sign, whatever its size.
    moved = np.concatenate([np.abs(left[k] - right[k]).ravel() for k in left])
    assert np.quantile(moved, 0.99) < 1e-5


def test_the_saved_model_predicts_as_the_trained_one(run, rng):
    c, workdir, state = run
    pipe = PerceptionPipeline.from_pretrained(workdir, mesh=one_device())
    assert pipe.description.method["noise"] == "multi_resolution"
    assert pipe.description.method["timesteps"] == "weighted:1,3,0.5"
    rgb = rng.integers(0, 256, (*tiny_run.SIZE, 3)).astype(np.uint8)
    noise = rng.normal(size=(1, 8, 12, 4)).astype(np.float32)
    out = pipe(rgb, latents=noise, processing_resolution=0)
    assert (out.kind, out.num_inference_steps) == ("affine_depth", 2)

    setup = set_up(c)
    params = {**initial_weights(c, setup)[1], **jax.device_get(state["params"])}
    perception = setup.method.perception

    @jax.jit
    def predict(params, rgb, noise):
        image = perception.encode(params, to_signed(rgb))
        decoded, latent = perception.predict(params, image, noise)
        return perception.to_prediction(decoded), latent

    expected, latent = predict(params, rgb[None], noise)
    np.testing.assert_allclose(out.latent, latent, atol=1e-4)
    np.testing.assert_allclose(out.prediction, expected, atol=1e-4)

    # Its noise is the seed's, and steps and members are free.
    again, other = (pipe(rgb, seed=s, processing_resolution=0).prediction for s in (1, 2))
    np.testing.assert_array_equal(pipe(rgb, seed=1, processing_resolution=0).prediction, again)
    assert np.abs(other - again).max() > 1e-3


def test_training_goes_on_from_the_widened_model(run):
    """A workdir as the checkpoint: its UNet has the channels already."""
    c, workdir, state = run
    c = c.copy_and_resolve_references()
    c.checkpoint = str(workdir)
    unet, _ = weights_of(c)
    tiny_run.assert_bit_equal(unet, jax.device_get(state["params"]["unet"]))


def test_a_run_keeps_the_table_it_began_with(run, caplog):
    """It goes on without the file, and not with another table."""
    c, workdir, state = run
    assert set_up(c).method.batch_size == c.batch_size
    file = pathlib.Path(c.method.timesteps.removeprefix("file:"))
    content = file.read_text()
    try:
        write_table(file, [1, 3, 0.25])
        with pytest.raises(UserError, match=r"table of method.timesteps \(weighted:1,3,0.5, now"):
            train(c, workdir, mesh=one_device())
        file.unlink()
        with caplog.at_level(logging.INFO, logger="absl"):
            again = train(c, workdir, mesh=one_device())
        assert "going on with the table the run began with" in caplog.text
        tiny_run.assert_bit_equal(again, state)
        # Another run has not begun with it.
        with pytest.raises(UserError, match=r"table.json' cannot be read \(no such file"):
            set_up(c, workdir / "other")
        c = c.copy_and_resolve_references()
        c.method.timesteps = f"file:{file}.json"
        with pytest.raises(UserError, match="cannot be read"):
            set_up(c, workdir)
    finally:
        file.write_text(content)
