"""The doctor, called as its tests call it."""

import json
from pathlib import Path

import commands
import pytest
from commands import restore_logging  # noqa: F401
from safetensors.torch import load_file, save_file

from jaxpercept import PerceptionPipeline, doctor
from jaxpercept.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def door(*arguments: str) -> int:
    """Run the command."""
    return commands.door(doctor, *arguments)


def check(folder, **named):
    """The report on a checkpoint, which JSON can hold and text can show."""
    report = doctor.doctor(str(folder), **named)
    assert report["ok"] == (not report["problems"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    doctor.render(report)
    return report["checkpoint"]


def refused_alike(folder, **named) -> str:
    """The sentence with which a checkpoint is refused, here as by the pipeline."""
    report = check(folder, **named)
    with pytest.raises(UserError) as error:
        PerceptionPipeline.from_pretrained(folder, **named)
    assert report["pipeline"]["reason"] == str(error.value)
    assert not report["pipeline"]["runs"]
    return str(error.value)


def edit(path: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
