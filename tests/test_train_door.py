"""The train command and bad input: one sentence, exit status 1, before any compile, nothing lost.

One test for each bad input through the door itself. The rest of what can be wrong is tested where
it is found: checkpoints in test_checkpoints_refused.py, dataset files in test_data_sources.py,
options of methods in test_methods.py, another config for the same workdir and one unreadable image
among good ones (skipped, named, counted) in test_training.py.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model
import tiny_run
from commands import door, restore_logging  # noqa: F401
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_run import base_of_module, data_of_module  # noqa: F401

from jaxpercept import train
from jaxpercept.checkpoints import load
from jaxpercept.checkpoints.orbax import load_params, save_export, save_params
from jaxpercept.training import loop

pytestmark = [
    pytest.mark.usefixtures("restore_logging"),
    # How ml_collections reads a config file.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def killed(base, data, tmp_path_factory):
    """The workdir of a run that was killed before its first save, with what else lies there."""
    workdir = tmp_path_factory.mktemp("killed") / "run"

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    config = tiny_run.config(base, **tiny_run.on_folder(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", die)
        with pytest.raises(Killed):
            loop.train(config, workdir)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (workdir / "notes.txt").write_text("mine")
    return workdir


@pytest.fixture
def workdir(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture
def compiled():
    """Grows with every program that is compiled."""
    names = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(workdir, compiled, tmp_path, monkeypatch, capsys):
    """`refused(config, *flags)`: the one sentence with which the train command ends."""

    def files():
        paths = [path for path in workdir.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    def refused(config, *flags):
        file = tiny_run.write_config(tmp_path / "tiny.py", config)
        argv = ["train", f"--config={file}", f"--workdir={workdir}", *flags]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        before = files()
        compiled.clear()
        status = door(train, *argv[1:])
        lines = capsys.readouterr().err.strip().splitlines()
        assert status == 1
        assert files() == before
        assert compiled == []
        assert [line.startswith("error: ") for line in lines].count(True) == 1, lines
        sentence = lines[-1].removeprefix("error: ")
        assert sentence != lines[-1]
        assert "Traceback" not in sentence
        assert sentence[-1] in ".?"
        return sentence

    return refused


@pytest.fixture
def config(base, data):
    return tiny_run.config(base, **tiny_run.on_folder(data))


def test_an_unknown_key(refused, config):
    sentence = refused(config, "--config.batchsize=4")
    assert "no key --config.batchsize" in sentence
    assert 'Did you mean "batch_size"' in sentence


def test_an_unknown_key_of_a_section(refused, config):
    config.method.latent_wieght = 1.0
    sentence = refused(config)
    assert "'latent_wieght'" in sentence
    assert "use decoder, inference_timestep, latent_weight" in sentence


def test_a_batch_that_does_not_fit_the_devices(refused, config):
    sentence = refused(config, "--config.batch_size=12")
    assert sentence == (
        "config.batch_size 12 is not a multiple of accumulate x devices = 1 x 8: change one of "
        "them."
    )


def test_a_resolution_that_is_not_divisible(refused, config):
    sentence = refused(config, "--config.resolution=(17, 24)")
    assert "(17, 24) is not divisible by 2" in sentence
    assert "use (16, 24)" in sentence


# ---- the checkpoint ------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path):
    """A copy of the built-in checkpoint, to be damaged."""
    return Path(shutil.copytree(load.resolve("sd-tiny"), tmp_path / "pretrained"))


def test_a_missing_component(refused, config, pretrained):
    config.checkpoint = str(pretrained)
    shutil.rmtree(pretrained / "vae")
    sentence = refused(config)
    assert str(pretrained) in sentence
    assert "lacks vae/config.json" in sentence


def test_missing_weights(refused, config, pretrained):
    config.checkpoint = str(pretrained)
    (pretrained / "unet/diffusion_pytorch_model.safetensors").unlink()
    sentence = refused(config)
    assert f"{pretrained} lacks unet/diffusion_pytorch_model.safetensors" in sentence


def test_nan_weights_of_a_diffusers_folder(refused, config, pretrained):
    config.checkpoint = str(pretrained)
    config.resolution = (64, 64)
    file = pretrained / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][1] = np.nan
    save_file(tensors, file)
    sentence = refused(config)
    assert "conv_in.bias" in sentence
    assert "NaN" in sentence


def test_nan_weights_of_an_export(refused, config, base, tmp_path):
    config.checkpoint = str(shutil.copytree(base, tmp_path / "export"))
    params = load_params(base / "weights")
    params["unet"]["conv_out.bias"][0] = np.inf
    save_params(tmp_path / "export" / "weights", params)
    sentence = refused(config)
    assert config.checkpoint in sentence
    assert "unet/conv_out.bias" in sentence


def test_a_checkpoint_that_is_no_text_to_image_model(refused, config, base, tmp_path):
    config.checkpoint = str(shutil.copytree(base, tmp_path / "export"))
    params = load_params(base / "weights")
    del params["prompt"]
    save_params(tmp_path / "export" / "weights", params)
    sentence = refused(config)
    assert "no text encoder" in sentence
    assert "complete text-to-image checkpoint" in sentence


def test_a_checkpoint_without_unet(refused, config, tmp_path, rng):
    vae = {"vae": tiny_model.COMPONENTS["vae"]}
    weights = {part: tiny_model.params(rng)[part] for part in ("vae", "prompt")}
    save_export(tmp_path / "vae", tiny_model.description(components=vae), weights)
    config.checkpoint = str(tmp_path / "vae")
    sentence = refused(config)
    assert f"needs unet, which {config.checkpoint} does not hold" in sentence


def test_a_checkpoint_that_is_not_there(refused, config, tmp_path):
    config.checkpoint = str(tmp_path / "gone")
    assert config.checkpoint in refused(config)


# ---- the data: found before weights are read -----------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """Weights must not be read."""
    for name in ("initial_weights", "load_frozen"):
        monkeypatch.setattr(loop, name, None)


@pytest.mark.usefixtures("unread")
def test_no_data_dir(refused, config):
    config.data.options = {}
    assert refused(config) == "Dataset folder needs a folder; set data_dir."


@pytest.mark.usefixtures("unread")
def test_a_data_dir_that_does_not_exist(refused, config, tmp_path):
    config.data.options.folder.data_dir = str(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(config)


@pytest.mark.usefixtures("unread")
def test_an_empty_dataset(refused, config, tmp_path):
    for name in ("rgb", "depth"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    config.data.options.folder.data_dir = str(tmp_path / "empty")
    assert f"{tmp_path / 'empty/rgb'} holds no file" in refused(config)


@pytest.mark.usefixtures("unread")
def test_no_data_to_evaluate_on(refused, config):
    config.evaluation.dataset = "nyuv2"
    assert refused(config) == "Dataset nyuv2 needs a folder; set data_dir."


@pytest.fixture
def damaged(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "damaged"))


@pytest.mark.usefixtures("unread")
def test_no_image_is_readable(refused, config, damaged):
    for path in (damaged / "rgb").iterdir():
        path.write_bytes(b"not an image")
    config.data.options.folder.data_dir = str(damaged)
    sentence = refused(config)
    assert "None of 12 records" in sentence
    assert f"{damaged}/rgb/" in sentence


@pytest.mark.usefixtures("unread")
def test_every_mask_is_empty(refused, config, damaged):
    for path in (damaged / "depth").iterdir():
        Image.fromarray(np.zeros(tiny_run.SIZE, np.uint16)).save(path)
    config.data.options.folder.data_dir = str(damaged)
    sentence = refused(config)
    assert "None of 12 records" in sentence
    assert "check depth_scale" in sentence


@pytest.mark.usefixtures("unread")
def test_one_empty_mask_in_the_images_to_evaluate_on(refused, config, damaged):
    config.evaluation.dataset = "folder"
    Image.fromarray(np.zeros(tiny_run.SIZE, np.uint16)).save(damaged / "depth" / "07.png")
    config.data.options.folder.data_dir = str(damaged)
    sentence = refused(config)
    assert sentence.startswith("No depth of 07 lies between")
    assert "check depth_scale" in sentence


# ---- a process of its own ------------------------------------------------------------------------


def test_the_command_says_it_in_one_line(config, workdir, tmp_path):
    file = tiny_run.write_config(tmp_path / "tiny.py", config)
    process = tiny_run.command(file, workdir, "--config.resolution=(16, 23)")
    ((status, error),) = tiny_run.finish(process)
    assert status == 1
    lines = [line for line in error.splitlines() if not line.startswith("2 device(s)")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: config.resolution (16, 23) is not divisible by 2")
