"""Every command and every block of Python of the documentation does what the page says.

The quick tests read the pages and look whether all that a command names is there. The slow ones run
them; `-k` chooses pages.
"""

import functools
import importlib
import json
import re
import sys
from pathlib import Path

import docs_commands
import docs_runs
import numpy as np
import pytest
import tiny_run
from commands import door, restore_logging  # noqa: F401
from docs_checks import problems
from docs_commands import CONFIGS, DOORS, PAGES, Code, Command
from PIL import Image
from tiny_model import one_device

from jaxpercept import train

pytestmark = [
    pytest.mark.usefixtures("restore_logging"),
    # How ml_collections reads a config file.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
ITEMS = docs_commands.everything()
GENERATED = docs_commands.of_configs()
COMMANDS = [item for item in ITEMS if isinstance(item, Command)]
CODE = [item for item in ITEMS if isinstance(item, Code)]

NOT_RUN = {
    r"^python3 -m venv ": "the environment is the one that runs the tests",
    r"pip install ": "tests have no network; .ci/run installs a clean clone",
    r"^\.venv/bin/pytest -n auto$": "this suite",
    r"^pytest -m slow tests/test_app_browser\.py$": "a slow test itself",
    r"^apt-get install ": "changes the machine",
    r"runs/edges": "run by tests/test_extending.py, which makes the page's config",
}
"""Commands that the slow tests leave out, and why."""
PRELUDE = """
from pathlib import Path
import numpy as np
from PIL import Image
from jaxpercept import PerceptionPipeline
image, room = (Image.open(name).convert("RGB") for name in ("photo.jpg", "room.jpg"))
hall = image
"""
PRESUPPOSED = {
    "docs/inference.md": 'pipe = PerceptionPipeline.from_pretrained("runs/referring")\n'
    'pipe_of_all = PerceptionPipeline.from_pretrained("runs/generalist")\n',
}
"""What blocks of Python take for granted."""
FOLDERS = {
    "docs/data.md": {"nyuv2": ["nyuv2"], "refer": ["refcoco", "refcocog"]},
    "docs/evaluation.md": {"nyuv2": ["nyuv2"], "datasets/nyuv2": ["nyuv2"]},
}
"""The data sets that they read."""


# ---- every command -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS, *DOORS, "generated"])
def test_all_that_a_command_names_is_there(page):
    wrong = [
        f"{command}: {problem}"
        for command in [*COMMANDS, *GENERATED]
        if command.page == page
        for problem in problems(command)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_commands():
    assert len(COMMANDS) > 150
    assert len(CODE) > 12
    assert {command.page for command in COMMANDS} >= {*CONFIGS, *DOORS, "README.md"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("python -m jaxpercept.trian --config=configs/depth.py", "no command trian"),
        ("python -m jaxpercept.train --config=configs/depht.py", "depht.py is not in"),
        ("python -m jaxpercept.train --config=configs/depth.py:nyu", "has the presets"),
        ("python -m jaxpercept.train --config=configs/depth.py --config.stepz=3", "config.stepz"),
        ("python -m jaxpercept.train --config=configs/depth.py --config.steps=x", "config.steps"),
        ("python -m jaxpercept.train --config=configs/depth.py --config.steps=0", "config.steps"),
        ("python -m jaxpercept.train --config=configs/depth.py ...", "unexpected argument"),
        ("python -m jaxpercept.train --workdir=runs/x", "--config is required"),
        ("python -m jaxpercept.evaluate --checkpoint=x --dataset=nyu", "--dataset=nyu"),
        ("python -m jaxpercept.evaluate --checkpoint=x --suite=dept", "suite"),
        ("python -m jaxpercept.predict --checkpoint=x --input=a --output=b --tsk=a", "tsk"),
        ("python -m jaxpercept.predict --checkpoint=x --input=a --output=b --task=a", "--task=a"),
        ("python -m jaxpercept.ablate --presets=baseline,dtp", "no preset dtp"),
        ("python -m jaxpercept.ablate --set=stepz=1", "no key stepz"),
        ("pip install 'jaxpercept[plot]'", "no extra plot"),
        ("pip install jaxpercpt", "not this project"),
        ("python benchmarks/inputs.py", "inputs.py is not in"),
        ("python benchmarks/input.py --image 3", "no flag --image"),
        ("pytest -m slow tests/test_none.py", "test_none.py"),
        ("mkdocs serv", "serv is not known"),
        ("curl x", "no program"),
    ],
)
def test_a_wrong_command_is_found(text, problem):
    assert any(problem in found for found in problems(Command("page", 1, text)))


def test_no_command_escapes():
    page = "Text.\n\n    python -m jaxpercept.train --config=configs/depth.py\n"
    with pytest.raises(AssertionError, match="page:3: a command outside"):
        docs_commands.of_page("page", page)
    fenced = page.replace("    python", "```\npython").rstrip() + "\n```\n"
    with pytest.raises(AssertionError, match="page:4: a command outside"):
        docs_commands.of_page("page", fenced)
    found = docs_commands.of_page("page", fenced.replace("```\npython", "```bash\n# x\nA=1 python"))
    assert [(item.line, item.text[:8]) for item in found] == [(5, "A=1 pyth")]
    sentence = docs_commands.of_page("page", "By `python -m\njaxpercept.x`, and `python` is.\n")
    assert [(item.text, item.inline) for item in sentence] == [("python -m jaxpercept.x", True)]


def test_a_run_that_is_read_is_made_by_some_command():
    made = docs_runs.makers([*COMMANDS, *GENERATED])
    read = {(str(item), name) for item in ITEMS for name in docs_runs.runs_read(item.text)}
    assert len(read) > 50
    lost = [f"{where} reads {name}" for where, name in read if not docs_runs._run_of(name, made)]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("code", CODE, ids=str)
def test_python_can_be_read_and_imports_what_there_is(code):
    compile(code.text, str(code), "exec")
    lines = [
        line for line in code.text.splitlines() if re.match(r"(from|import) (?!diffusers)", line)
    ]
    exec("\n".join(lines), {})


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_there(pattern):
    assert any(re.search(pattern, command.text) for command in COMMANDS)


# ---- run: the first steps ------------------------------------------------------------------------


def test_the_quickstart_trains_predicts_evaluates_and_hands_on(tmp_path, monkeypatch, rng):
    """Its commands, of a small model, one after the other."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(docs_commands.ROOT / "configs")
    Path("photos").mkdir()
    pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photos/a.png")
    small = {"checkpoint": tiny_run.text_to_image(tmp_path / "small"), "resolution": (16, 24)}
    small |= {"steps": 2, "batch_size": 4, "evaluation.limit": 1}
    short = {
        "train": [f"--config.{key}={value}" for key, value in small.items()],
        "evaluate": ["--limit=1"],
    }
    monkeypatch.setattr(train, "train", functools.partial(train.train, mesh=one_device()))
    done = []
    for command in (c for c in COMMANDS if c.page == "docs/quickstart.md"):
        name = command.words[2].removeprefix("jaxpercept.")
        if name not in ("train", "predict", "evaluate", "convert") or "--workdir" in command.text:
            continue
        module = importlib.import_module(f"jaxpercept.{name}")
        words = [*command.words[3:], *short.get(name, [])]
        monkeypatch.setattr(sys, "argv", [name, *words])  # where overrides are looked for
        assert door(module, *words) == 0
        done.append(name)
    assert done == ["train", "predict", "evaluate", "convert"]
    assert np.load("predictions/a.npy").shape == (20, 30)
    index = json.loads(Path("depth/model_index.json").read_text())
    assert index["_class_name"] == "MarigoldDepthPipeline"


# ---- run: all ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What all pages read, the runs that were made, and who makes which."""
    import docs_world

    stock = docs_world.Stock(tmp_path_factory.mktemp("stock"), np.random.default_rng())
    return stock, {}, docs_runs.makers([*COMMANDS, *GENERATED])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's libraries, which two blocks of Python use
@pytest.mark.parametrize("source", [*PAGES, *CONFIGS, *DOORS])
def test_a_page_runs(source, shared, tmp_path, monkeypatch):
    todo = [item for item in ITEMS if item.page == source and not getattr(item, "inline", False)]
    todo = [item for item in todo if not any(re.search(p, item.text) for p in NOT_RUN)]
    if source == "docs/extending.md" or not todo:
        pytest.skip("nothing to be run")
    stock, runs, makers = shared
    page, failures, names = docs_runs.Page(tmp_path, stock, runs, makers), [], {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "the blue box")
    for item in todo:
        try:
            if isinstance(item, Command):
                page.run(item)
                continue
            if not names:
                presupposed = PRELUDE + PRESUPPOSED.get(source, "")
                page.provide(presupposed)
                exec(presupposed, names)
            page.provide(item.text)
            for folder, members in FOLDERS.get(source, {}).items():
                docs_runs.lay_out(Path(folder), [stock.dataset(member) for member in members])
            exec(compile(item.text, str(item), "exec"), names)
        except Exception as error:
            failures.append(f"{item}\n  {type(error).__name__}: {error}")
    assert not failures, "\n\n".join(failures)
