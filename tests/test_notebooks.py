"""The notebooks of `colab/`: how they are stored, and that all of their cells run."""

import ast
import base64
import importlib
import io
import json
import os
import re
import warnings
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from plyfile import PlyData

from jaxpercept import presets
from jaxpercept.config import check_config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
ADDRESS = "https://colab.research.google.com/github/jaxpercept/jaxpercept/blob/main/colab/"
PAGES = "https://github.com/jaxpercept/jaxpercept/blob/main/"
# Flags of commands that a notebook names as what it does itself.
COMMAND = re.compile(r"`python -m jaxpercept\.(\w+)([^`]*)`")
KINDS = {"markdown", "code"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag: str) -> list[str]:
    """The sources of the code cells with a tag."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    assert all(cell.cell_type == "code" for cell in cells)
    return [cell.source for cell in cells]


def text_of(notebook, *kinds: str) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type in kinds)


def assigned(source: str) -> dict[str, object]:
    """The names of a cell of assignments, and their values."""
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}


# ---- as they are stored --------------------------------------------------------------------------


def test_there_are_five():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"train_depth", "your_folder", "predict_3d", "convert_marigold", "referring"}
    readme = (ROOT / "README.md").read_text()
    assert {f"{ADDRESS}{name}.ipynb" for name in names} <= set(
        re.findall(r"\((http[^\s()]+)\)", readme)
    )


@every_notebook
def test_stored_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert {cell.cell_type for cell in notebook.cells} == KINDS
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert re.fullmatch("[a-z0-9_]+", cell.id)
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@every_notebook
def test_title_badge_and_time(path):
    title = read(path).cells[0].source
    assert title.startswith("# ")
    assert f"({ADDRESS}{path.name})" in title
    assert re.search(r"minutes|quarter of an hour", title)


@every_notebook
def test_one_install_cell_one_of_parameters(path):
    notebook = read(path)
    [install] = tagged(notebook, "install")
    code = text_of(notebook, "code").replace(install, "")
    assert "pip install" in install
    assert not re.search(r"^\s*[%!]", code, re.MULTILINE)
    assert {tagged(read(other), "install")[0] for other in NOTEBOOKS} == {install}
    [parameters] = tagged(notebook, "parameters")
    values = assigned(parameters)
    assert values["FULL"] is False
    unused = {name for name in values if len(re.findall(rf"\b{name}\b", code)) < 2}
    assert not unused


@every_notebook
def test_what_it_names_is_there(path):
    notebook = read(path)
    text = text_of(notebook, *KINDS)
    files = re.findall(r"(configs/\w+\.py)(?::(\w+))?", text)
    assert files
    for file, preset in files:
        assert isinstance(presets.load(ROOT / file).get_config(preset), ConfigDict)
    for page in re.findall(re.escape(PAGES) + r"(\S+?)(?:#\S*)?\)", text):
        assert (ROOT / page).is_file()
    for other in re.findall(r"`(\w+\.ipynb)`", text):
        assert (ROOT / "colab" / other).is_file()


@every_notebook
def test_commands_are_as_they_say(path):
    commands = COMMAND.findall(text_of(read(path), "markdown"))
    assert commands
    for name, rest in commands:
        module = importlib.import_module(f"jaxpercept.{name}")
        flags = re.findall(r"--([\w.]+)", rest)
        for flag in flags:
            if flag.startswith("config."):
                file, preset = re.search(r"--config=([\w/]+\.py)(?::(\w+))?", rest).groups("")
                config = presets.load(ROOT / file).get_config(preset)
                assert flag.removeprefix("config.") in config
            else:
                assert flag in module.FLAGS, f"{name} --{flag}"
        assert set(module.REQUIRED) <= set(flags)


# ---- the cells that need more than there is here -------------------------------------------------


def namespace(notebook, **parameters) -> dict[str, object]:
    """What the notebook imports, and its parameters."""
    [source] = tagged(notebook, "parameters")
    names = {**assigned(source), **parameters}
    code = "\n".join(
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "install" not in cell.metadata.get("tags", ())
    )
    imports = [x for x in ast.parse(code).body if isinstance(x, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    return names


@every_notebook
def test_full_size_says_so_or_does_it(path, monkeypatch, capsys):
    """Without FULL a sentence; with it, a run of a config that could start."""
    monkeypatch.syspath_prepend(ROOT)
    notebook = read(path)
    [source] = tagged(notebook, "full")
    exec(source, namespace(notebook))
    said = capsys.readouterr().out
    assert said.startswith("Skipped: ")
    assert "FULL = True" in said
    full = namespace(notebook, FULL=True, FOLDER="mine")
    if "train(" not in source:
        return
    runs = []
    full |= {"train": lambda *arguments: runs.append(arguments), "display": lambda picture: None}
    full["Image"] = mock.Mock()
    exec(source, full)
    [(config, workdir)] = runs
    check_config(config, 1)
    assert config.checkpoint == full["CHECKPOINT"]
    folders = {options.data_dir for options in config.data.options.values()}
    assert "" not in folders
    assert workdir.startswith(full["RUN"])
    [(picture,)] = [call.args for call in full["Image"].open.call_args_list]
    assert picture == Path(workdir, "evaluation", config.evaluation.dataset, "predictions.png")


# ---- run -----------------------------------------------------------------------------------------

SMALL = {
    "train_depth": {"STEPS": 2, "EVALUATED": 8},
    "predict_3d": {"STEPS": 2},
    "convert_marigold": {"STEPS": 2},
    "your_folder": {"STEPS": 2, "ROOMS": 8},
    "referring": {"STEPS": 2, "SCENES": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where notebooks run one after the other, as in one session of Colab; kernels like the tests.

    They compile with little care, each program once.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield folder


def run(path: Path, folder: Path, **parameters) -> nbformat.NotebookNode:
    """All cells, with these parameters; raises where one fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of papermill and what it needs
        import papermill

        return papermill.execute_notebook(
            path, None, parameters, kernel_name="python3", cwd=folder, progress_bar=False
        )


def pictures(notebook) -> dict[str, list[np.ndarray]]:
    """What each cell has shown."""
    shown = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if png := output.get("data", {}).get("image/png"):
                image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
                shown.setdefault(cell.id, []).append(np.asarray(image))
    return shown


DRAWS = re.compile(r"^(?!    ).*(Image\.fromarray\(|Image\.open|plt\.show)", re.MULTILINE)


def said(cell) -> str:
    return "".join(
        output.get("text", "") + "".join(output.get("data", {}).get("text/markdown", ""))
        for output in cell.outputs
    )


def _train_depth(folder: Path, code) -> None:
    report = json.loads((folder / "runs/depth/evaluation/scenes/metrics.json").read_text())
    assert report["protocol"]["images"] == 8
    assert report["step"] == 2
    for scores in (report["metrics"], report["best_constant"]):
        assert f"{scores['abs_rel']:.3f}" in said(code["numbers"])


def _your_folder(folder: Path, code) -> None:
    names = {path.stem for path in (folder / "mine/rgb").iterdir()}
    assert len(names) == 8
    assert names == {path.stem for path in (folder / "mine/depth").iterdir()}
    trained, held_out = map(
        int, re.search(r"(\d+) images .* (\d+) held", said(code["examples"])).groups()
    )
    assert trained + held_out == 8
    report = json.loads((folder / "runs/depth-folder/evaluation/folder/metrics.json").read_text())
    assert report["protocol"]["images"] == held_out > 0


def _predict_3d(folder: Path, code) -> None:
    cloud = PlyData.read(folder / "room.ply")["vertex"]
    assert f"room.ply: {cloud.count} points" in said(code["ply"])
    assert 1 < np.median(cloud["z"]) < 10


def _convert_marigold(folder: Path, code) -> None:
    lines = re.findall(r"^(.+\S)\s+largest difference (\S+)$", said(code["agree"]), re.MULTILINE)
    assert [name for name, _ in lines] == [
        "the run",
        "Marigold layout",
        "Orbax",
        "diffusers itself",
    ]
    assert all(float(difference) < 1e-4 for _, difference in lines)
    assert "No problems." in said(code["examine"])


def _referring(folder: Path, code) -> None:
    assert "<- meant" in said(code["correct"])
    assert "<- clicked" in said(code["correct"])
    assert re.fullmatch(r"before .+\nafter .+\n", said(code["measure"]))


CHECKS = {
    "train_depth": _train_depth,
    "your_folder": _your_folder,
    "predict_3d": _predict_3d,
    "convert_marigold": _convert_marigold,
    "referring": _referring,
}


@pytest.mark.parametrize(
    "name",
    [
        "train_depth",
        "predict_3d",
        "your_folder",
        "convert_marigold",
        # A step of its own to compile, with the text encoder's gradients.
        pytest.param("referring", marks=pytest.mark.slow),
    ],
)
def test_it_runs_from_top_to_bottom(name, folder):
    """Every cell, on the built-in checkpoint; what it draws is there, and what it says is so."""
    notebook = run(ROOT / "colab" / f"{name}.ipynb", folder, **SMALL[name])
    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert all(cell.execution_count for cell in code.values())
    drawing = {cell for cell in code if DRAWS.search(code[cell].source)}
    assert drawing
    shown = pictures(notebook)
    assert drawing <= set(shown)
    for cell in drawing:
        assert all(picture.std() > 1 for picture in shown[cell]), cell
    assert said(code["full"]).startswith("Skipped: ")
    CHECKS[name](folder, code)


@pytest.mark.slow
def test_it_runs_again(folder):
    """Where the run is complete already."""
    for _ in range(2):
        notebook = run(ROOT / "colab" / "train_depth.ipynb", folder, **SMALL["train_depth"])
        assert "loss" in pictures(notebook)


def test_a_cell_that_fails_fails(folder, tmp_path):
    """A notebook whose cell raises does not pass for one that runs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(tmp_path / "broken.ipynb", tmp_path)
