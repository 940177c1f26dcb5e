"""What can be said of a command without running it: that everything it names is there."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from absl import flags
from commands import door
from docs_commands import ROOT, Command
from ml_collections import ConfigDict

from jaxpercept import presets
from jaxpercept.config import check_config
from jaxpercept.data.datasets import DATASETS
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.errors import UserError
from jaxpercept.methods.recipe import FAMILIES
from jaxpercept.tasks import TASKS

PLACEHOLDERS = {"SEED": "0"}
"""Values that a page leaves open where a number stands."""
MADE_BY_THE_PAGE = ("configs/edges.py",)
"""Files of the repository's folders that docs/extending.md writes."""
PACKAGES = ("chromium",)
_TASKS = {name.rpartition(":")[2] for name in TASKS} | {"seg"}
_FOLDERS = ("configs", "docs", "tests", "benchmarks", "jaxpercept")


def problems(command: Command) -> list[str]:
    """What is wrong with a command; nothing for one that may be run."""
    words = command.words
    while words and re.fullmatch(r"[A-Z][A-Z_]*=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["taskset", "-c"]:
        words = words[3:]
    program = words[0].removeprefix(".venv/bin/")
    for name, check in _PROGRAMS.items():
        if [program, *words[1:]][: len(name)] == list(name):
            try:
                return _files(words) or [*check(words[len(name) :])]
            except UserError as error:
                return [str(error)]
    return [f"{program} is no program that this test understands"]


def config_of(words: list[str]) -> ConfigDict:
    """The config that the arguments of `train` make.

    Raises:
        UserError: a flag, the file, its preset, a key or a value is wrong.
    """
    module = importlib.import_module("jaxpercept.train")
    _parse(module, words)
    return module.FLAGS.config


def _files(words: list[str]) -> list[str]:
    """Files of the repository that are not there."""
    named = [word.rpartition("=")[2].partition(":")[0] for word in words]
    inside = [path for path in named if path.partition("/")[0] in _FOLDERS and "/" in path]
    return [
        f"{path} is not in the repository"
        for path in inside
        if not (ROOT / path).exists() and path not in MADE_BY_THE_PAGE
    ]


def _parse(module: ModuleType, words: list[str]) -> None:
    words = [re.sub(r"=(\w+)$", lambda m: f"={PLACEHOLDERS.get(m[1], m[1])}", x) for x in words]
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module.__name__, *words]),  # where overrides are looked for
        contextlib.chdir(ROOT),
        contextlib.redirect_stderr(said),
    ):
        if door(module, *words, main=lambda: 0):
            raise UserError(said.getvalue().strip())


def _door(words: list[str]) -> Iterator[str]:
    name, words = words[0].removeprefix("jaxpercept."), words[1:]
    if not (ROOT / f"jaxpercept/{name}.py").is_file():
        yield f"there is no command {name}"
        return
    if "configs/edges.py" in " ".join(words):
        return  # its file is there while the page is read
    module = importlib.import_module(f"jaxpercept.{name}")
    _parse(module, words)
    values = {flag: module.FLAGS[flag].value for flag in module.OWN_FLAGS}
    known: dict[str, Callable[[str], bool]] = {
        "dataset": DATASETS.__contains__,
        "task": _TASKS.__contains__,
        "family": FAMILIES.__contains__,
        "workdir": lambda folder: folder.startswith("runs/"),
    }
    for flag, fits in known.items():
        if values.get(flag) and not fits(values[flag]):
            yield f"--{flag}={values[flag]} is not known"
    if name == "train":
        check_config(module.FLAGS.config, 1)
        timesteps = module.FLAGS.config.method.get("timesteps", "uniform")
        if not timesteps.startswith("file:"):
            TimestepPolicy.parse(timesteps)
    if name == "ablate":
        yield from _ablation(values)


def _ablation(values: dict[str, flags.Flag]) -> Iterator[str]:
    module = presets.load(ROOT / values["config"])
    names = presets.names(module)
    for name in values["presets"] or ():
        if name not in names:
            yield f"{values['config']} has no preset {name}"
    keys = module.get_config(names[0]).keys()
    for pair in values["set"]:
        if pair.partition("=")[0].partition(".")[0] not in keys:
            yield f"the config has no key {pair}"


def _pip(words: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:] if words[:1] == ["-e"] else words:
        match = re.fullmatch(rf"(?:\.|{project['name']})(?:\[([\w,]+)\])?", word)
        if not match:
            yield f"{word} is not this project"
        for extra in filter(None, ((match and match[1]) or "").split(",")):
            if extra not in project["optional-dependencies"]:
                yield f"there is no extra {extra}"


def _script(words: list[str]) -> Iterator[str]:
    source = (ROOT / words[0]).read_text()
    source += (ROOT / "benchmarks/common.py").read_text()
    for word in words[1:]:
        if word.startswith("-") and f'"{word}"' not in source:
            yield f"{words[0]} has no flag {word}"


def _pytest(words: list[str]) -> Iterator[str]:
    known = ("-n", "auto", "-m", "slow", "-s")
    yield from (f"{w} is no file" for w in words if w not in known and not Path(ROOT, w).is_file())


def _only(*known: str) -> Callable[[list[str]], Iterator[str]]:
    return lambda words: (f"{word} is not known" for word in words if word not in known)


_PROGRAMS: dict[tuple[str, ...], Callable[[list[str]], Iterator[str]]] = {
    ("python", "-m"): _door,
    ("python3", "-m", "venv"): _only(".venv"),
    ("python",): _script,
    ("pip", "install"): _pip,
    ("pytest",): _pytest,
    ("mkdocs",): _only("build", "serve", "--strict"),
    ("apt-get", "install"): _only(*PACKAGES),
    ("tfds", "build"): _only("ref_coco", "--file_format=array_record"),
}
