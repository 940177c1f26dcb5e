"""Attacks on checkpoints, and the doors through which they come."""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import families
import jax
import numpy as np
import pytest
import tiny_model
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpercept import PerceptionPipeline, convert, predict
from jaxpercept.checkpoints.load import load_model
from jaxpercept.errors import UserError

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS_FOLDER = "weights"
TOKENIZER = "tokenizer/tokenizer_config.json"
OWN = "jaxpercept.json"
BILLION = 10**9

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
)


class Compiles(BaseException):
    """Raised instead of compiling."""


# ---- checkpoints and what is done to them --------------------------------------------------------


@pytest.fixture(name="whole", scope="module")
def whole_checkpoints(tmp_path_factory):
    """A folder not to be changed: "depth", in diffusers' layout, and "export", in Orbax."""
    folder = tmp_path_factory.mktemp("whole")
    families.FAMILIES["marigold_depth_v1_1"](folder / "depth")
    tiny_model.save(folder / "export", np.random.default_rng())
    return folder


@pytest.fixture(name="broken")
def broken_checkpoints(whole, tmp_path):
    """`broken(name, attack)`: a copy of one of them, attacked."""

    def copy(name: str, attack: Callable[[Path], object] = lambda folder: None) -> Path:
        folder = Path(shutil.copytree(whole / name, tmp_path / "source"))
        attack(folder)
        return folder

    return copy


def change(file: str, **values):
    """An attack: values in a JSON file."""

    def attack(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return attack


def write(file: str, content: str | bytes):
    def attack(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return attack


def remove(file: str):
    def attack(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return attack


def header(edit, file: str = WEIGHTS):
    """An attack: `edit` changes a safetensors file's header, or gives other bytes for it."""

    def attack(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8 : 8 + length])
        text = edit(content) or json.dumps(content).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return attack


def tensors(edit, file: str = WEIGHTS):
    def attack(folder: Path) -> None:
        content = load_file(folder / file)
        edit(content)
        save_file(content, folder / file)

    return attack


def largest(folder: Path) -> Path:
    """The largest file of an Orbax export."""
    return max(store_files(folder), key=lambda path: path.stat().st_size)


def store_files(folder: Path) -> list[Path]:
    """All files of an Orbax export's weights."""
    return sorted(path for path in (folder / WEIGHTS_FOLDER).rglob("*") if path.is_file())


def renamed(name: str):
    """An edit of a header: one tensor has another name."""
    return lambda content: content.update({name: content.pop("conv_in.bias")})


def stored(**values):
    """An edit of a header: what it says of one tensor."""
    return lambda content: content["conv_in.bias"].update(values)


# ---- doors ---------------------------------------------------------------------------------------


def through_pipeline(folder: Path, work: Path) -> None:
    PerceptionPipeline.from_pretrained(folder)


def through_convert(folder: Path, work: Path) -> None:
    convert.convert(str(folder), work / "out")


def through_predict(folder: Path, work: Path) -> None:
    predict.predict(str(folder), work / "image.png", work / "out")


def through_load(folder: Path, work: Path) -> None:
    load_model(str(folder))


DOORS = (through_pipeline, through_convert, through_predict, through_load)


def contents(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if not path.is_dir()
    }


@contextlib.contextmanager
def nothing_compiles():
    before = len(compiled)
    with mock.patch.object(jax, "jit", side_effect=Compiles):
        yield
    assert len(compiled) == before


def refusal(folder: Path, enter=through_pipeline, **options) -> str:
    """The sentence that refuses a checkpoint; nothing was compiled, nothing written anywhere."""
    work = folder.parent
    if enter is through_predict:
        Image.new("RGB", (16, 16)).save(work / "image.png")
    before = contents(work)
    with nothing_compiles(), pytest.raises(UserError) as error:
        enter(folder, work, **options)
    assert contents(work) == before
    message = str(error.value)
    assert message.isprintable()  # no line break, no escape sequence
    assert len(message) < 2000
    return message.replace(str(work), "WORK")


def refused_or_ready(folder: Path, enter=through_pipeline) -> str | None:
    """The sentence that refuses a checkpoint; None where it is ready to run or to be compiled."""
    message = None
    try:
        with nothing_compiles():
            enter(folder, folder.parent)
    except UserError as error:
        message = str(error)
    except Compiles:
        pass
    assert message is None or message.isprintable()
    return message
