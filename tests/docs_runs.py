"""Runs a page: its commands and its Python in its order, in a folder that has what they presuppose.

A command is run as it stands; what makes it short is appended to it. `DIR` and its like are names
of folders like all others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from docs_checks import config_of
from docs_commands import ROOT, Command

from jaxpercept import presets
from jaxpercept.inference.suite import SUITES
from jaxpercept.train import default_workdir

if TYPE_CHECKING:  # it imports torch
    from docs_world import Stock

SECONDS = 1500
SHORT = {
    "train": "--config.steps=2 --config.evaluation.limit=1 --config.data.num_workers=0",
    "evaluate": "--limit=1 --batch_size=1",
    "analyze": "--images=1 --seeds=0 --steps=20 --starts=1",
    "prepare": "--limit=2 --workers=1",
    "pretrain": "--steps=2 --batch_size=4 --num_workers=0",
    "app": "--port=0 --nowarm_up",
}
FULL_SIZE = '--config.resolution="(64,128)"'
LARGE_BATCH = "--config.batch_size=8"
SMALL = {"checkpoint": "small", "resolution": '"(32,48)"', "batch_size": "4"}
"""Instead of `sd-tiny`, which takes a minute and a half to compile; the default run has it."""
DEFAULT = "configs/depth.py"
ABLATION = {"steps": "1", "evaluation.limit": "1"}
PARTS = ("configs", "benchmarks", "docs", "tests", "README.md")


class Page:
    """A folder in which the commands of a page are run.

    stock: what they read. runs: folders of finished runs by the command that made them, for all
    pages; makers: the command that makes a run, by the run's folder.
    """

    def __init__(
        self, folder: Path, stock: Stock, runs: dict[str, Path], makers: Mapping[str, Command]
    ):
        self.folder, self._stock, self._runs, self._makers = folder, stock, runs, makers
        for part in PARTS:
            (folder / part).symlink_to(ROOT / part)
        tools = folder / ".venv/bin"
        tools.mkdir(parents=True)
        for name in ("python", "python3"):
            (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            (tools / name).chmod(0o755)
        paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        quick = {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(stock.folder / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._env = {**os.environ, **paths, **quick}

    def run(self, command: Command) -> None:
        """Run a command, and look whether it left what it says it leaves.

        Raises:
            AssertionError: it ended with another status than 0, or left nothing.
        """
        words = _words(command)
        if words is None:
            self._shell(command.text)
            return
        door, flags = words
        self.provide(f"{' '.join(command.words)} {SMALL['checkpoint']}")
        for folder, names in _datasets(door, flags, command, self._stock.datasets).items():
            lay_out(self.folder / folder, [self._stock.dataset(name) for name in names])
        made = workdir_of(command)
        if made and not self._is_there(made) and command.text in self._runs:
            shutil.copytree(self._runs[command.text], self.folder / made, symlinks=True)
            return
        line = " ".join([_plain(command.text), *shortened(door, flags, command)])
        if door == "app":
            self._serve(line)
            return
        self._shell(line)
        if made:
            kept = self._stock.folder / "runs" / str(len(self._runs))
            self._runs[command.text] = Path(shutil.copytree(self.folder / made, kept))
        for path in _outputs(door, flags):
            assert list(self.folder.glob(path)), f"{line} left no {path}"

    def provide(self, text: str) -> None:
        """Make what a text names and is not there: runs, checkpoints, photographs."""
        for name in re.findall(r"runs/[\w/-]+", text):
            maker = self._makers.get(_run_of(name, self._makers))
            if not self._is_there(name) and maker and f"--workdir={name}" not in text:
                self._make_run(maker)
        for name in re.findall(r"[\w.-]+(?:/[\w.-]+)*", text.replace("=", " ").replace(",", " ")):
            if not self._is_there(name) and (found := self._stock.checkpoint(name)):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).symlink_to(found)
                if name.startswith("guangkaixu/"):
                    (self.folder / name).with_name("vae").symlink_to(found.with_name("vae"))
        for name in ("photos", "frames", "photo.jpg", "room.jpg"):
            if re.search(rf"\b{re.escape(name)}\b", text) and not self._is_there(name):
                (self.folder / name).symlink_to(self._stock.photographs(name))

    def _make_run(self, maker: Command) -> None:
        if _words(maker)[0] == "train" or maker.text in self._runs:
            self.run(maker)

    def _is_there(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def _shell(self, line: str) -> None:
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self._env | _environment(line),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
        print(f"{time.monotonic() - started:6.1f} s  {line}", flush=True)
        said = "\n".join([*done.stdout.splitlines()[-5:], *done.stderr.splitlines()[-15:]])
        assert done.returncode == 0, f"{line}\nended with {done.returncode}:\n{said}"

    def _serve(self, line: str) -> None:
        """A web page: it is there, and goes with Ctrl-C."""
        served = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self._env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # Where this test runs in the background, Ctrl-C is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        said = []
        try:
            for text in served.stdout:
                said.append(text)
                if address := re.search(r"http://127\.0\.0\.1:\d+", text):
                    with contextlib.closing(urllib.request.urlopen(address[0], timeout=60)) as page:
                        assert page.status == 200
                    break
            else:
                raise AssertionError(f"{line} served nothing:\n{''.join(said[-15:])}")
        finally:
            served.send_signal(signal.SIGINT)
            try:
                served.wait(timeout=60)
            finally:
                served.kill()
        print(f"served  {line}", flush=True)


def lay_out(folder: Path, sources: Iterable[Path]) -> None:
    """A folder that has what each source has, by links; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in itertools.chain.from_iterable(source.iterdir() for source in sources):
        target = folder / entry.name
        if target.is_symlink() and entry.is_dir() and target.resolve() != entry:
            other = target.resolve()
            target.unlink()
            lay_out(target, (other, entry))
        elif target.is_dir() and not target.is_symlink():
            lay_out(target, (entry,))
        elif not target.exists():
            target.symlink_to(entry)


def makers(commands: list[Command]) -> dict[str, Command]:
    """The first command that makes a run, by the run's folder."""
    found: dict[str, Command] = {}
    for command in commands:
        for folder in made_by(command):
            found.setdefault(folder, command)
    return found


def made_by(command: Command) -> list[str]:
    """The folders of the runs that a command makes."""
    words = _words(command)
    if words is None or words[0] not in ("train", "ablate", "pretrain"):
        return []
    door, flags = words
    if door != "ablate":
        return [workdir_of(command)] if workdir_of(command) else [flags.get("workdir", "")]
    config = flags.get("config", "configs/ablation.py")
    names = flags.get("presets") or ",".join(presets.load(ROOT / config).PRESETS)
    folder = flags.get("workdir", "runs/ablation")
    seeds = flags.get("seeds", "0,1").split(",")
    return [folder, *(f"{folder}/{name}/{seed}" for name in names.split(",") for seed in seeds)]


def workdir_of(command: Command) -> str:
    """Of a training; "" of other commands, and of a training that is only tried out."""
    words = _words(command)
    if words is None or words[0] != "train" or "dry_run" in words[1]:
        return ""
    return words[1].get("workdir", str(default_workdir(words[1]["config"])))


def runs_read(text: str) -> set[str]:
    """The runs that a text names, without those that it makes."""
    made = re.sub(r"--workdir=\S+", "", text)
    return {name.rstrip("/") for name in re.findall(r"runs/[\w/-]+", made)}


def _run_of(name: str, known: Mapping[str, Command]) -> str:
    """The run that a path lies in."""
    while name and name not in known:
        name = name.rpartition("/")[0]
    return name


def _words(command: Command) -> tuple[str, dict[str, str]] | None:
    """The door and its flags; None of what is no door of the package."""
    words = command.words
    at = next((i for i, word in enumerate(words) if word.startswith("jaxpercept.")), None)
    if at is None:
        return None
    flags = (word.removeprefix("--").partition("=") for word in words[at + 1 :])
    return words[at].removeprefix("jaxpercept."), {name: value for name, _, value in flags}


def _plain(text: str) -> str:
    """Without the comment at its end, behind which nothing could be appended."""
    return re.sub(r"\s+#[^\"']*$", "", text)


def shortened(door: str, flags: Mapping[str, str], command: Command) -> Iterator[str]:
    """What is appended to a command."""
    yield SHORT.get(door, "")
    if door == "train":
        config = config_of(_arguments(command))
        if config.checkpoint == "sd-tiny" and flags != {"config": DEFAULT}:
            given = {name.removeprefix("config.") for name in flags}
            yield from (f"--config.{k}={v}" for k, v in SMALL.items() if k not in given)
        elif config.resolution[0] > 128:
            yield FULL_SIZE
        if config.batch_size > 64:
            yield LARGE_BATCH
    if door == "evaluate" and "suite" in flags:
        yield "--processing_resolution=64"
    if door == "ablate" and "list" not in flags:
        given = dict(pair.split("=", 1) for pair in flags.get("set", "").split(",") if pair)
        small = {"checkpoint": SMALL["checkpoint"], "batch_size": SMALL["batch_size"]}
        yield "--set=" + ",".join(f"{k}={v}" for k, v in {**small, **given, **ABLATION}.items())
        yield "--seeds=0 --ensembles= --corrections="
        if "presets" not in flags:
            yield f"--presets={next(iter(presets.load(ROOT / _config(flags)).PRESETS))}"


def _config(flags: Mapping[str, str]) -> str:
    return flags.get("config", "configs/ablation.py")


def _arguments(command: Command) -> list[str]:
    words = command.words
    return words[words.index("jaxpercept.train") + 1 :]


def _environment(line: str) -> dict[str, str]:
    """As many devices as a mesh asks for, where the command does not say so itself."""
    match = re.search(r"--config\.mesh\.\w+=(\d+)", line)
    return {"JAX_NUM_CPU_DEVICES": match[1]} if match else {}


def _datasets(
    door: str, flags: Mapping[str, str], command: Command, known: Iterable[str]
) -> dict[str, list[str]]:
    """The data sets that a command reads, by the folder it reads them from."""
    if door == "train":
        return _of_config(config_of(_arguments(command)))
    if door == "ablate" and "list" not in flags:
        module = presets.load(ROOT / _config(flags))
        config = module.get_config(
            (flags.get("presets") or next(iter(module.PRESETS))).split(",")[0]
        )
        given = dict(pair.split("=", 1) for pair in flags.get("set", "").split(",") if pair)
        config.data_dir = given.get("data_dir", "")
        return _of_config(config)
    if "suite" in flags:
        root = flags.get("data_root", flags.get("data_dir"))
        names = {entry.dataset for entry in SUITES[flags["suite"]]} & set(known)
        return {f"{root}/{name}": [name] for name in names}
    if "dataset" in flags:
        folder = flags.get("data_dir") or flags.get("from")
        return {folder: [flags["dataset"]]} if folder else {}
    return {flags["data_dir"]: ["tiny_imagenet"]} if "data_dir" in flags else {}


def _of_config(config) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, options in config.data.options.items():
        stocked = "mattes" if (name, config.task) == ("folder", "matting") else name
        found.setdefault(options.data_dir, []).append(stocked)
    return found


def _outputs(door: str, flags: Mapping[str, str]) -> list[str]:
    """Patterns of files that a command leaves."""
    if door == "train" and "dry_run" not in flags:
        return [f"{flags.get('workdir', default_workdir(flags['config']))}/checkpoints/2"]
    return {
        "predict": [f"{flags.get('output')}/**/*.npy", f"{flags.get('output')}/**/*.json"],
        "convert": [f"{flags.get('to')}/README.md"],
        "prepare": [f"{flags.get('to')}/{flags.get('dataset')}/*/report/index.html"],
        "pretrain": [f"{flags.get('output')}/model_index.json"],
        "evaluate": ["**/metrics.json"],
        "analyze": [f"{flags.get('checkpoint')}/analysis/*/table.json"],
        "ablate": [] if "list" in flags else ["runs/*/ablation.md"],
    }.get(door, [])
