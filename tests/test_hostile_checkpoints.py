"""Hostile and broken checkpoints end in one sentence, before anything is compiled or written."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch_checkpoints
from commands import door, restore_logging  # noqa: F401
from hostile import (
    DOORS,
    INDEX,
    OWN,
    SCHEDULER,
    TOKENIZER,
    UNET,
    WEIGHTS,
    broken_checkpoints,  # noqa: F401
    change,
    contents,
    header,
    largest,
    nothing_compiles,
    refusal,
    refused_or_ready,
    remove,
    renamed,
    stored,
    tensors,
    through_convert,
    through_load,
    through_pipeline,
    whole_checkpoints,  # noqa: F401
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxpercept import PerceptionPipeline, convert, predict
from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.load import load_model
from jaxpercept.errors import UserError

# ---- code ----------------------------------------------------------------------------------------


class Pickled:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def program(trace: Path) -> str:
    """Python source that creates a file when it is imported."""
    return f"import pathlib; pathlib.Path({str(trace)!r}).touch()"


@pytest.mark.parametrize("enter", DOORS)
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", WEIGHTS])
def test_pickles_are_not_opened(broken, tmp_path, enter, name):
    """Under their own name or that of a safetensors file."""
    trace = tmp_path.parent / f"{tmp_path.name}.unpickled"
    attack = pickle.dumps(Pickled(trace))
    pickle.loads(attack)
    assert trace.exists()  # it would
    trace.unlink()
    folder = broken("depth", remove(WEIGHTS))
    write(name, attack)(folder)
    message = refusal(folder, enter)
    assert not trace.exists()
    assert ("as a pickle" if name.endswith(".bin") else "no safetensors file") in message
    assert f"WORK/source/{'unet' if name.endswith('.bin') else WEIGHTS}" in message


@pytest.mark.parametrize("enter", DOORS)
@pytest.mark.parametrize(
    "value", [["pipeline", "Evil"], {"a": 1}, "../evil", "a.b", "a\nb", 5, None]
)
def test_pipelines_with_code_of_their_own_are_refused(broken, enter, value):
    message = refusal(broken("depth", change(INDEX, _class_name=value)), enter)
    assert "no code of a checkpoint is run" in message
    assert f"WORK/source/{INDEX}" in message


def test_code_and_links_in_a_good_checkpoint_stay_untouched(broken, tmp_path):
    """Modules beside the weights, classes and files named elsewhere: opened without any of them.

    Symbolic links are followed, for the hub's cache consists of them.
    """
    folder, trace = broken("depth"), tmp_path / "trace"
    for module in (
        "unet/unet.py",
        "pipeline.py",
        "tokenizer/evil.py",
        "unet/__init__.py",
        "evil.py",
    ):
        write(module, program(trace))(folder)
    exec(program(trace))
    trace.unlink()  # it would have been there
    write("unet/evil.pkl", pickle.dumps(Pickled(trace)))(folder)
    elsewhere = {"unet": ["evil", "Evil"], "../../x": ["..", "Evil"], "vae": ["/etc", "../x"]}
    change(INDEX, **elsewhere)(folder)
    change(
        TOKENIZER,
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        trust_remote_code=True,
        tokenizer_class="Evil",
        vocab_file="/etc/passwd",
        chat_template="{{ cycler.__init__.__globals__.os.system('touch " + str(trace) + "') }}",
    )(folder)
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to("../../blob")
    PerceptionPipeline.from_pretrained(folder)
    out = convert.convert(str(folder), tmp_path / "out", format="diffusers")
    assert not trace.exists()
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert not any(name.endswith((".py", ".pkl")) for name in written)
    index = json.loads((out / INDEX).read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["../../x"] == [None, None]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "blob", "out"}


# ---- safetensors ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(whole, tmp_path_factory):
    """A checkpoint whose UNet's file is written anew by every example."""
    return Path(shutil.copytree(whole / "depth", tmp_path_factory.mktemp("scratch") / "source"))


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), enter=st.sampled_from(DOORS))
def test_truncated_anywhere(whole, scratch, share, enter):
    raw = (whole / "depth" / WEIGHTS).read_bytes()
    (scratch / WEIGHTS).write_bytes(raw[: int(share * len(raw))])
    assert f"WORK/source/{WEIGHTS} is truncated" in refusal(scratch, enter)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_byte_of_a_header_may_be_another(whole, scratch, data):
    """It is refused, or it did not matter."""
    raw = bytearray((whole / "depth" / WEIGHTS).read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    place = data.draw(st.integers(0, 7 + length))
    raw[place] = data.draw(st.integers(0, 255))
    (scratch / WEIGHTS).write_bytes(raw)
    refused_or_ready(scratch)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (write(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "is truncated or no"),
        (write(WEIGHTS, struct.pack("<Q", 99) + b"{}"), "is truncated or no"),
        (header(lambda _: b"not JSON"), "is truncated or no"),
        (header(lambda _: b'{"a":' * 10**5), "is truncated or no"),
        (header(stored(data_offsets=[4, 68])), "invalid offset for tensor `conv_in.bias`"),
        (header(stored(data_offsets=[0, 2**62])), "is truncated or no"),
        (header(stored(data_offsets=[64, 0])), "is truncated or no"),
        (header(stored(dtype="F99")), "unknown variant `F99`"),
        (header(stored(dtype="I8", shape=[64])), "Tensor conv_in.bias of .* has type I8"),
        (header(stored(dtype="F8_E4M3", shape=[64])), "has type F8_E4M3"),
        (header(stored(shape=[2**40, 2**40])), "overflow"),
        (header(stored(shape=[2**63, 2])), "overflow"),
        (header(stored(shape=[-16])), "is truncated or no"),
        (header(renamed("a\n\x1b[2Jb")), r"named 'a\\n\\x1b\[2Jb', which is no layer's name"),
        (header(renamed("a" * 10**6)), "aaa..., which is no layer's name"),
    ],
)  # fmt: skip
def test_hostile_headers(broken, attack, words):
    message = refusal(broken("depth", attack))
    assert f"WORK/source/{WEIGHTS}" in message
    assert re.search(words, message), message


def test_tensors_that_do_not_fit_are_named(broken):
    def edit(content):
        del content["conv_out.bias"]
        content["extra.weight"] = np.ones(2, np.float32)
        content["conv_in.weight"] = content["conv_in.weight"][:, :3]

    message = refusal(broken("depth", tensors(edit)))
    for part in (
        "missing (1): conv_out.bias",
        "not expected (1): extra.weight",
        "conv_in.weight [16, 3, 3, 3] instead of [16, 8, 3, 3]",
        f"WORK/source/{WEIGHTS}",
    ):
        assert part in message


@pytest.mark.parametrize("enter", [through_pipeline, through_convert, through_load])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite(broken, component, value, enter):
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    file = f"{component}/{stem}.safetensors"
    names = []

    def edit(content):
        names.append(sorted(content)[-1])
        content[names[0]].reshape(-1)[-1] = value

    message = refusal(broken("depth", tensors(edit, file)), enter)
    assert f"Tensor {names[0]} of WORK/source/{file} holds NaN or infinite values" in message


def test_values_beyond_the_type_they_are_read_or_written_in(broken, tmp_path):
    big = broken("depth", tensors(lambda c: c.update({"conv_in.bias": np.full(16, 1e300)})))
    assert "Tensor conv_in.bias of" in refusal(big)
    shutil.rmtree(big)
    folder = broken("export")
    description, params = load_model(str(folder))
    params["unet"]["conv_in.bias"][:] = 1e6
    orbax.save_export(folder, description, params)

    def enter(folder, work):
        convert.convert(str(folder), work / "out", dtype="float16")

    assert "unet/conv_in.bias has values beyond float16's" in refusal(folder, enter)


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "source"
    torch_checkpoints.write_checkpoint(folder, max_shard_size="40KB")
    return folder


NAMES = ["../x.safetensors", "../../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors"]
NAMES += ["C:\\x.safetensors", "C:x.safetensors", "a/../x.safetensors", "x\x00.safetensors/.."]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_only_files_of_its_own_folder(shards, tmp_path, name):
    """Even where the file is a good one."""
    folder = Path(shutil.copytree(shards, tmp_path / "source"))
    path = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["conv_in.bias"]
    (folder / "unet/a").mkdir()
    with contextlib.suppress(ValueError, OSError):
        shutil.copy(folder / "unet" / shard, folder / "unet" / name.replace("/etc", "."))
    index["weight_map"]["conv_in.bias"] = name
    path.write_text(json.dumps(index))
    for enter in (through_pipeline, through_load):
        message = refusal(folder, enter)
        assert f"WORK/source/{path.relative_to(folder)} names {name!r}" in message
        assert "do not use this checkpoint" in message


def test_links_are_followed_and_lead_to_nothing_but_safetensors(shards, tmp_path):
    folder = Path(shutil.copytree(shards, tmp_path / "source"))
    shard = next(path for path in (folder / "unet").iterdir() if path.suffix == ".safetensors")
    expected = load_model(str(folder), components=("unet",))[1]
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")  # as in the hub's cache
    linked = load_model(str(folder), components=("unet",))[1]
    torch_checkpoints.assert_bit_equal(linked["unet"], expected["unet"])
    for place in ("/etc/passwd", "/dev/zero", "/no/such/file", str(tmp_path), str(shard)):
        shard.unlink()
        shard.symlink_to(place)
        message = refusal(folder, through_load)
        assert str(shard.relative_to(tmp_path)) in message
        assert "root" not in message  # nothing of the file's content


# ---- convert's target, and the commands ----------------------------------------------------------


def refuse_target(source: Path, target: Path) -> str:
    before = contents(source)
    with nothing_compiles(), pytest.raises(UserError) as error:
        convert.convert(str(source), target)
    assert contents(source) == before
    assert str(error.value).isprintable()
    return str(error.value)


def test_targets_that_cannot_be(whole, tmp_path, monkeypatch):
    """Found before the checkpoint is opened."""
    monkeypatch.setattr(convert, "open_model", None)
    source = whole / "export"
    (tmp_path / "file").write_text("mine")
    assert "exists and is not empty" in refuse_target(source, source)
    assert "exists and is not empty" in refuse_target(source, source / "weights")
    assert "exists and is not empty" in refuse_target(source, tmp_path / "file")
    assert "lies inside" in refuse_target(source, source / "out")
    assert "lies inside" in refuse_target(source, source / "a/b/out")
    (tmp_path / "link").symlink_to(source)
    assert "lies inside" in refuse_target(source, tmp_path / "link/out")
    assert "Not a directory" in refuse_target(source, tmp_path / "file/out")
    assert "File name too long" in refuse_target(source, tmp_path / ("x" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert os.strerror(errno.EACCES) in refuse_target(source, tmp_path / "a/out")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_in_the_place_of_the_partial_export(whole, tmp_path):
    """What an interrupted run left is removed; what a link points to is not touched."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    convert.convert(str(whole / "export"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


@pytest.mark.parametrize("content", ["{", "5", "{}", '{"metrics": 5}', '{"metrics": {"a": "b"}}'])
def test_damaged_evaluations_beside_a_model(broken, content):
    """The model card quotes them."""
    report = "evaluation/nyuv2/metrics.json"
    message = refusal(broken("export", write(report, content)), through_convert)
    assert f"WORK/source/{report}" in message


def test_a_description_cannot_break_the_card(broken, tmp_path):
    folder = broken("export")
    config = {"steps": "a\n# b", "data": 5, "batch_size": [1]}
    change(OWN, base_checkpoint="x\n---\n# evil", config=config)(folder)
    card = (convert.convert(str(folder), tmp_path / "out") / "README.md").read_text()
    assert "\n# evil" not in card
    assert "base_model: x --- # evil\n" in card


@pytest.mark.parametrize("source", ["x" * 5000, "a\nb", "x\x00y", "~nobody/x", "a/b/c/d", ""])
def test_sources_that_are_no_names(source, tmp_path):
    for enter in (PerceptionPipeline.from_pretrained, load_model):
        with pytest.raises(UserError) as error:
            enter(source)
        assert str(error.value).isprintable()


@pytest.mark.usefixtures("restore_logging")
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("depth", write(WEIGHTS, b"")),
        ("depth", change(SCHEDULER, beta_start="x")),
        ("depth", change(UNET, _class_name="a\nb")),
        ("export", change(OWN, recipe=5)),
        (
            "export",
            lambda folder: largest(folder).unlink(),
        ),
    ],
)
def test_commands_say_one_line_and_exit_with_1(broken, tmp_path, capfd, name, attack):
    folder = broken(name, attack)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    for command, arguments in [
        (convert, (f"--from={folder}", f"--to={tmp_path / 'out'}")),
        (predict, (f"--checkpoint={folder}", f"--input={tmp_path / 'image.png'}",
                   f"--output={tmp_path / 'out'}")),
    ]:  # fmt: skip
        with nothing_compiles():
            assert door(command, *arguments) == 1
        out, err = capfd.readouterr()
        (line,) = err.strip().splitlines()
        assert line.startswith("error: ")
        assert str(folder) in line
        assert out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"source", "image.png"}
