"""The doctor, called as its tests call it."""

import json
import logging as python_logging
from pathlib import Path

import pytest
from absl import logging
from safetensors.torch import load_file, save_file

from jaxpercept import PerceptionPipeline, cli, doctor
from jaxpercept.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def restore_logging():
    """A command sets up logging for the whole process."""
    handler = logging.get_absl_handler()
    root = python_logging.getLogger()
    before = logging.get_verbosity(), handler.formatter, list(handler.filters), list(root.handlers)
    yield
    logging.set_verbosity(before[0])
    handler.setFormatter(before[1])
    handler.filters[:], root.handlers[:] = before[2], before[3]


def door(*arguments: str) -> int:
    """Run the command as the shell would, in this process."""
    doctor.FLAGS.unparse_flags()
    argv = ["doctor", *arguments]
    return cli.call(doctor.main, argv, required=doctor.REQUIRED, flag_values=doctor.FLAGS)


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
