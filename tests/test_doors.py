"""The commands: flags, messages, exit statuses and the files they write."""

import json
import logging as python_logging
import os
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from absl import flags, logging
from commands import door, restore_logging  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image

import jaxpercept
from jaxpercept import analyze, cli, evaluate, predict
from jaxpercept.errors import UserError
from jaxpercept.inference import image_files
from jaxpercept.inference.outputs import ENDINGS

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model") / "export", np.random.default_rng())


def image(rng, *size) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))


# ---- what all commands share ---------------------------------------------------------------------


@pytest.mark.parametrize("module", [predict, evaluate, analyze])
def test_help_teaches(module, capsys):
    assert door(module, "--help") == 0
    text = capsys.readouterr().out
    assert f"python -m {module.__name__} --checkpoint=" in text
    for name in module.OWN_FLAGS:
        assert f"--{name}: " in text


@pytest.mark.parametrize("module", [predict, evaluate, analyze])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--checkpoint is required"),
        (["--checkpiont=x"], "checkpiont"),
        (["--checkpoint=x", "--batch_size=many"], "batch_size"),
        (["--checkpoint=x", "--dtype=int4"], "dtype"),
        (["x"], "unexpected argument 'x'"),
    ],
)
def test_wrong_flags_get_one_line(module, arguments, complaint, capsys):
    assert door(module, *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert complaint in lines[0]


def test_errors_statuses_and_messages(capsys):
    def run(main) -> tuple[int, str]:
        return cli.call(main, ["prog"], flag_values=flags.FlagValues()), capsys.readouterr().err

    def fail(error):
        raise error

    assert run(lambda: None) == (0, "")
    assert run(lambda: 1) == (1, "")
    assert run(lambda: fail(UserError("the file\n  x is bad."))) == (
        1,
        "error: the file x is bad.\n",
    )
    assert run(lambda: fail(KeyboardInterrupt())) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_only_own_messages_are_shown():
    cli.show_messages()
    handler = logging.get_absl_handler()

    def shown(level: int, path: str) -> bool:
        return bool(handler.filter(python_logging.LogRecord("x", level, path, 1, "m", (), None)))

    own = str(Path(jaxpercept.__file__).parent / "training/loop.py")
    assert shown(python_logging.INFO, own)
    assert not shown(python_logging.INFO, "/lib/orbax/checkpoint.py")
    assert shown(python_logging.WARNING, "/lib/orbax/checkpoint.py")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_an_unknown_key_of_a_config_is_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "c.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(preset=''):\n"
        "    if preset: raise ValueError('no preset ' + preset)\n"
        "    return ConfigDict({'steps': 3})\n"
    )
    for arguments, complaint in [
        ([f"--config={file}:huge"], "no preset huge"),
        ([f"--config={file}", "--config.stops=4"], "config.stops"),
        ([f"--config={file}", "--config.steps=many"], "config.steps"),
        ([f"--config={file}x"], "c.pyx"),
        ([], "--config is required"),
    ]:
        argv = ["prog", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "A config.", flag_values=values)
        assert cli.call(lambda: None, argv, required=["config"], flag_values=values) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert complaint in lines[0]
        assert "Traceback" not in lines[0]


def test_the_module_runs_as_a_command_and_version_is_the_package_s(tmp_path):
    code = "import sys, jaxpercept; assert 'jax' not in sys.modules; print(jaxpercept.__version__)"
    version = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert version.stdout.strip() == installed("jaxpercept"), version.stderr
    done = subprocess.run(
        [sys.executable, "-m", "jaxpercept.predict", "--checkpoint=x", "--input=no", "--output=o"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: --input no does not exist: give an image or a folder of images."
    ]


# ---- predict -------------------------------------------------------------------------------------


def test_predict_a_folder(checkpoint, tmp_path, rng, capsys):
    source, output = tmp_path / "photos", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    # Two sizes on disk that are processed at the same size.
    sizes = {"a.jpg": (32, 48), "a.png": (32, 48), "sub/b.png": (16, 24), "c.webp": (32, 48)}
    for name, size in sizes.items():
        image(rng, *size).save(source / name)
    turned = image(rng, 24, 16)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(source / "turned.jpg", exif=exif)
    (source / "notes.txt").write_text("not an image")
    (source / ".hidden.png").write_bytes(b"")
    (source / "broken.png").write_bytes(b"not an image either")
    (source / "cut.jpg").write_bytes((source / "a.jpg").read_bytes()[:500])

    arguments = [
        f"--checkpoint={checkpoint}",
        f"--input={source}",
        f"--output={output}",
        "--seed=5",
    ]
    assert door(predict, *arguments) == 1
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "cut.jpg" in error
    assert "2 image(s) could not be read" in error
    names = {"a_jpg": (32, 48), "a_png": (32, 48), "sub/b": (16, 24), "c": (32, 48)}
    names["turned"] = (16, 24)  # upright
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    endings = [".npy", ".png", "_16bit.png", ".json"]
    assert written == {name + ending for name in names for ending in endings}
    for name, size in names.items():
        assert np.load(output / f"{name}.npy").shape == size
    record = json.loads((output / "sub/b.json").read_text())
    assert record["kind"] == "affine_depth"
    assert record["seed"] == 5
    assert record["processing_resolution"] == 48
    assert record["checkpoint"] == str(checkpoint)
    assert record["source"] == str(source / "sub/b.png")
    assert record["version"] == jaxpercept.__version__

    # The same through the pipeline, and again as a single image.
    pipe = jaxpercept.PerceptionPipeline.from_pretrained(checkpoint)
    alone = pipe(Image.open(source / "sub/b.png")).prediction[0, ..., 0]
    np.testing.assert_allclose(np.load(output / "sub/b.npy"), alone, atol=1e-5)


@pytest.mark.parametrize("multiple", [0, 8])
def test_many_sizes_are_worth_a_hint(checkpoint, tmp_path, rng, capsys, monkeypatch, multiple):
    for width in range(16, 48, 4):
        image(rng, 16, width).save(tmp_path / f"{width}.png")
    monkeypatch.setattr(predict, "decoded", lambda *_: iter(()))  # no predictions
    predict.predict(str(checkpoint), tmp_path, tmp_path / "out", pad_multiple=multiple)
    shown = capsys.readouterr().err
    assert ("compiled for each: --pad_multiple=64" in shown) == (multiple == 0)


def test_predict_refuses_what_cannot_work(checkpoint, tmp_path, rng):
    photo = tmp_path / "photos/a.png"
    photo.parent.mkdir()
    image(rng, 16, 24).save(photo)
    with pytest.raises(UserError, match="another one"):
        predict.predict(str(checkpoint), photo.parent, photo.parent)
    with pytest.raises(UserError, match="would replace"):
        predict.predict(str(checkpoint), photo, photo.parent)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("x")
    with pytest.raises(UserError, match="holds no image"):
        predict.predict(str(checkpoint), tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="batch_size"):
        predict.predict(str(checkpoint), photo, tmp_path / "out", batch_size=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no folder"):
        predict.predict(str(checkpoint), photo, tmp_path / "file")
    with pytest.raises(UserError, match="reads no text"):
        predict.predict(str(checkpoint), photo, tmp_path / "out", prompt="a chair")
    with pytest.raises(UserError, match="gone is not there"):
        predict.predict(str(checkpoint), photo, tmp_path / "out", lora=tmp_path / "gone")
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_earlier_outputs_are_not_taken_for_images(tmp_path, rng):
    image(rng, 8, 8).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    image(rng, 8, 8).save(tmp_path / "out/a.png")
    jobs = image_files.find_images(tmp_path, tmp_path / "out")
    assert [job.path for job in jobs] == [tmp_path / "a.png"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "a_16bit", "a_png", "a_png_16bit", "s/a", "a.b"]),
            st.sampled_from([".png", ".jpg", ".PNG"]),
        ),
        unique=True,
        max_size=12,
    )
)
def test_output_names_never_collide(files):
    names = image_files.output_names([Path(stem + suffix) for stem, suffix in sorted(files)])
    written = [name + ending for name in names for ending in ENDINGS]
    assert len(set(written)) == len(written)
    assert len(names) == len(files)
    for (stem, _), name in zip(sorted(files), names, strict=True):
        assert name.startswith(stem)


# ---- evaluate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng, folder = np.random.default_rng(), tmp_path_factory.mktemp("dataset")
    for part in ("rgb", "depth"):
        (folder / part).mkdir()
    for name in "abc":
        image(rng, 32, 48).save(folder / f"rgb/{name}.jpg")
        depth = rng.integers(500, 5000, (32, 48)).astype(np.uint16)
        Image.fromarray(depth).save(folder / f"depth/{name}.png")
    return folder


def test_evaluate_a_folder(checkpoint, dataset, capsys):
    arguments = [f"--checkpoint={checkpoint}", "--dataset=folder", f"--data_dir={dataset}"]
    assert door(evaluate, *arguments, "--depth_scale=1000", "--limit=2") == 0
    out = capsys.readouterr().out
    folder = checkpoint / "evaluation/folder"
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "per_image.csv",
        "predictions.png",
    }
    content = json.loads((folder / "metrics.json").read_text())
    # Random weights: least squares makes of them what a constant is worth.
    worth = content["best_constant"]["abs_rel"]
    assert content["metrics"]["abs_rel"] == pytest.approx(worth, rel=0.2)
    assert content["protocol"]["images"] == 2
    assert content["protocol"]["depth_scale"] == 1000
    assert content["kind"] == "affine_depth"
    assert f"{content['metrics']['abs_rel']:.4f}" in out
    assert "best constant" in out
    assert len((folder / "per_image.csv").read_text().splitlines()) == 3


def test_evaluate_refuses_what_cannot_work(checkpoint, dataset, tmp_path, rng, capsys):
    base = [f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}"]
    bare = tmp_path / "bare"
    tiny_model.save(bare, rng, method={}, task="")
    for arguments, complaint in [
        ([*base, "--dataset=folder"], "data_dir"),
        ([*base, "--dataset=nyu3"], "nyu3"),
        ([*base, "--dataset=folder", f"--data_dir={dataset}", "--eval_crop=round"], "round"),
        ([*base, "--dataset=folder", f"--data_dir={dataset}", "--depth_scale=-1"], "depth_scale"),
        ([*base, "--dataset=scenes", f"--lora={tmp_path / 'gone'}"], "gone is not there"),
        ([f"--checkpoint={bare}", "--dataset=scenes"], "fine-tune it"),
    ]:
        assert door(evaluate, *arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert complaint in error
    assert not (tmp_path / "out").exists()


def test_default_output(tmp_path):
    assert evaluate.default_output(str(tmp_path), "nyuv2") == tmp_path / "evaluation/nyuv2"
    assert evaluate.default_output("user/model", "nyuv2") == Path("evaluation/nyuv2")


def test_torch_stays_out_where_it_is_installed(tmp_path):
    code = f"""
import sys
from pathlib import Path
from jaxpercept import evaluate, predict, pretrain, train
from jaxpercept.checkpoints.load import load_model
from jaxpercept.training.metric_writer import MetricWriter
writer = MetricWriter(Path({str(tmp_path)!r}))
writer.scalars(1, {{"loss": 1.0}})
writer.close()
load_model("sd-tiny")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
