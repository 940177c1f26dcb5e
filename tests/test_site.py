"""The pages that the docs site makes of the code; `.ci/run` builds the site itself."""

import importlib
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxpercept import presets
from jaxpercept.config import base_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    """`hooks(name)`: a module of docs/hooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "docs/hooks"), *sys.path])
        yield importlib.import_module


@pytest.fixture(scope="module")
def configs(hooks):
    return hooks("config_pages").pages()


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entries):
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(value) if isinstance(value, list) else [value]

    docs = ROOT / "docs"
    written = {path.relative_to(docs).as_posix() for path in docs.glob("**/*.md")}
    listed = list(pages(site["nav"]))
    assert len(set(listed)) == len(listed)
    made = {"configs/index.md", "commands/index.md", "benchmarks.md"}
    assert set(listed) == written | made


def test_every_preset_has_its_command_and_its_keys(configs):
    count = 0
    for path in (ROOT / "configs").glob("*.py"):
        page = configs[f"configs/{path.stem}.md"]
        module = presets.load(path)
        assert page.startswith(f"# {path.name}\n\n{module.__doc__.split(chr(10))[0]}")
        for name in presets.names(module):
            title = path.name + (f":{name}" if name else "")
            _, _, section = page.partition(f"### `{title}`\n")
            section = section.partition("\n### ")[0]
            assert f"--config=configs/{title}" in section or path.stem == "pretrain"
            steps = module.get_config(name).steps
            assert f"| `steps` | `{steps}` | `30000` |" in section or steps == 30_000
            count += 1
    assert count > 130


def test_what_a_preset_does_is_said_beside_it(configs):
    page = configs["configs/ablation.md"]
    for preset, meaning in {
        "lora_256": "low-rank additions instead",
        "noise_0034": "with Gaussian noise",
        "sd21_dpt": "`dpt` at the paper's scale: DPT head",
    }.items():
        assert meaning in page.partition(f"### `ablation.py:{preset}`\n")[2][:200]


def test_all_keys_are_listed_with_their_defaults_and_comments(configs):
    def keys(config, prefix=""):
        for name, value in config.items():
            if isinstance(value, ConfigDict) and len(value):
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    page = configs["configs/keys.md"]
    for key, value in keys(base_config()):
        if key != "method.name" and not key.startswith("data.mixture."):
            value = value.to_dict() if isinstance(value, ConfigDict) else value
            assert f"| `{key}` | `{value!r}` | " in page
    assert "| `accumulate` | `1` | micro-batches a batch is cut into |" in page
    assert "| `recover.rollbacks` | `1` | A step whose loss or gradient is not finite" in page
    assert "| `data.augment.saturation` | `0.0` | factors are drawn from 1 +- these. |" in page
    assert "| `method.noise_strength` | `0.9` | of the coarser levels" in page


def test_every_flag_of_every_command_is_listed(hooks):
    doors = hooks("command_pages")
    pages = doors.pages()
    commands = {
        path.stem
        for path in (ROOT / "jaxpercept").glob("*.py")
        if "cli.run(main" in path.read_text()
    }
    assert set(doors.DOORS) == commands
    for name in doors.DOORS:
        module, page = importlib.import_module(f"jaxpercept.{name}"), pages[f"commands/{name}.md"]
        for flag in module.OWN_FLAGS:
            assert f"| `--{flag}`{{ .flag }} | " in page
    assert "Predictions at a time; default: one a device." in pages["commands/predict.md"]
    assert (
        "One of `orbax`, `diffusers`, `stablehlo`, `lora`. | `'orbax'` |"
        in (pages["commands/convert.md"])
    )


def test_docstrings_become_markdown(hooks):
    text = hooks("docstrings").to_markdown(
        "What *x* and --flag do, see docs/data.md.\n\n"
        "    python -m a --b=c \\\n        --d\n\nruns. Presets:\n\n"
        "`a`, `b_1`   first\n             line\n`c`   second | third\n"
    )
    assert text.split("\n\n") == [
        "What \\*x\\* and `--flag`{ .flag } do, see [docs/data.md](../data.md).",
        "```bash\npython -m a --b=c \\\n    --d\n```",
        "runs. Presets:",
        "| preset | what |\n| --- | --- |\n| `a`, `b_1` | first line |\n| `c` | second \\| third |",
    ]


def test_what_belongs_to_an_item_stays_with_it(hooks):
    pytest.importorskip("mkdocs")
    item, rest = "- one\n  more\n\n  | a |\n\n  ```x\n  y\n  ```\n\n- two\n", "\ntext\n  more\n"
    code = "```\n- x\n  y\n```\n  z"
    nested = hooks("site_hooks").nested(item + rest + code)
    assert nested == item.replace("\n  ", "\n    ") + rest + code


@pytest.mark.parametrize(
    ("page", "text", "linked"),
    [
        ("inference.md", "[b](../benchmarks/README.md#input)", "[b](benchmarks.md#input)"),
        ("configs/depth.md", "[d](../data.md)", "[d](../data.md)"),
        ("configs/depth.md", "[b](../../benchmarks/README.md)", "[b](../benchmarks.md)"),
        ("benchmarks.md", "[d](../docs/data.md), [s](input.py)", "[d](data.md), [s](URL)"),
        ("data.md", "[c](../CITATION.cff) [h](http://x)", "[c](URL) [h](http://x)"),
    ],
)
def test_links_of_the_repository_lead_somewhere_in_the_site(hooks, page, text, linked):
    pytest.importorskip("mkdocs")
    site = hooks("site_hooks")
    url = site.REPOSITORY + ("benchmarks/input.py" if page == "benchmarks.md" else "CITATION.cff")
    found = site.relinked(text, page)
    assert found == linked.replace("URL", url)
