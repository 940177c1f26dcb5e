"""A page for each file of configs/ with every preset, and one for all keys with their defaults."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from docstrings import attributes, code, items, prose, table, to_markdown
from ml_collections import ConfigDict

from jaxpercept import methods, presets
from jaxpercept.config import base_config
from jaxpercept.data.augment import Augment
from jaxpercept.data.datasets import DATASETS, options_of
from jaxpercept.tasks import TASKS

ROOT = Path(__file__).parents[2]
FILES = tuple(sorted((ROOT / "configs").glob("*.py")))
METHODS = {
    "one_step": methods.OneStep,
    "denoising": methods.Denoising,
    "text_to_image": methods.TextToImage,
    "autoencoder": methods.Autoencoder,
}
_WHOLE = ("data.mixture",)  # whose keys mean nothing alone


def pages() -> dict[str, str]:
    """Markdown by path below docs/."""
    files = {path.stem: presets.load(path) for path in FILES}
    return {
        "configs/index.md": _index(files),
        **{f"configs/{name}.md": _page(name, module) for name, module in files.items()},
        "configs/keys.md": _keys(),
    }


def _index(files: Mapping[str, ModuleType]) -> str:
    rows = [
        [
            f"[`configs/{name}.py`]({name}.md)",
            prose(module.__doc__.partition("\n\n")[0]),
            ", ".join(f"`{preset}`" for preset in _shown(presets.names(module))),
        ]
        for name, module in files.items()
    ]
    return f"""# Configs

A config file is Python; `--config=configs/FILE.py:PRESET` names it and one of its presets, and
`--config.KEY=VALUE` changes any [key](keys.md). These pages are made from the files.

{table(["file", "what", "presets"], rows)}
"""


def _shown(names: tuple[str, ...]) -> list[str]:
    """The names, without those that are others at full size."""
    return [x for x in names if x and not (x.startswith("sd21_") and x[5:] in names)]


# ---- a file --------------------------------------------------------------------------------------


def _page(name: str, module: ModuleType) -> str:
    names = presets.names(module)
    meanings = _meanings(module.__doc__, names)
    parts = [f"# {name}.py", to_markdown(module.__doc__), "## Presets"]
    for preset in names:
        parts.append(_preset(name, preset, meanings.get(preset, ""), module.get_config(preset)))
    return "\n\n".join(parts) + "\n"


def _preset(file: str, preset: str, meaning: str, config: ConfigDict) -> str:
    title = f"{file}.py:{preset}" if preset else f"{file}.py"
    changed = [
        [f"`{key}`", code(value), "" if default is _NONE else code(default)]
        for key, value, default in _changes(config)
    ]
    return "\n\n".join(
        [
            f"### `{title}`",
            *([prose(meaning)] if meaning else []),
            "A stage of `pretrain`." if file == "pretrain" else _command(title, config),
            f'??? note "{len(changed)} keys that are not at their default"',
            _indented(table(["key", "here", "default"], changed)),
        ]
    )


def _command(title: str, config: ConfigDict) -> str:
    """How to train it, naming the folders that it reads."""
    options = config.data.options
    folders = [f"--config.data.options.{name}.data_dir=DIR" for name in options]
    folders = ["--config.data_dir=DIR"] if len(folders) == 1 else folders
    words = [f"python -m jaxpercept.train --config=configs/{title}", *folders]
    return "```bash\n{}\n```".format(" \\\n    ".join(words))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _meanings(docstring: str, names: tuple[str, ...]) -> dict[str, str]:
    """What the docstring's lists say of each preset; `a_1`, `_2` stand for a_1 and a_2, and
    `a_1` ... `_9` for all that begin with a_."""
    found: dict[str, str] = {}
    for heads, text in items(docstring):
        before = ""
        for head in re.findall(r"`([^`]+)`", heads):
            name = head.partition(":")[2] or head
            name = before.rpartition("_")[0] + name if name.startswith("_") else name
            found[name] = text
            before = name
        if " ... " in heads:
            start = before.rpartition("_")[0] + "_"
            found |= {name: text for name in names if name.startswith(start) and name not in found}
    small = {name: name.removeprefix("sd21_") for name in names}
    return {
        name: found[name] if name in found else f"`{other}` at the paper's scale: {found[other]}"
        for name, other in small.items()
        if other in found
    }


_NONE = object()


def _changes(config: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of what differs from the default."""
    defaults = _defaults(config)
    return [
        (key, value, defaults.get(key, _NONE))
        for key, value in _flat(config.to_dict()).items()
        if defaults.get(key, _NONE) is _NONE or _plain(defaults[key]) != _plain(value)
    ]


def _defaults(config: ConfigDict) -> dict[str, Any]:
    """Of every key of a config: of the base, and of what its options are given to."""
    defaults = _flat(base_config().to_dict())
    if config.method.name in METHODS:
        method = _fields(METHODS[config.method.name])
        defaults |= {f"method.{name}": value for name, value in method.items()}
        defaults |= {
            f"method.pixel_weights.{k}": 0.0 for k in config.method.get("pixel_weights", ())
        }
    if config.task:
        task = _fields(TASKS[config.task])
        defaults |= {f"task_options.{name}": value for name, value in task.items()}
    for dataset in config.data.options:
        options = {"data_dir": config.data_dir, **options_of(dataset)}
        defaults |= {f"data.options.{dataset}.{name}": x for name, x in options.items()}
    return defaults


def _fields(cls: type) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, Mapping) and value and key not in _WHOLE:
            found |= _flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


# ---- all keys ------------------------------------------------------------------------------------


def _keys() -> str:
    meanings = comments(inspect.getsource(base_config))
    meanings |= {f"data.augment.{name}": text for name, text in attributes(Augment).items()}
    values = _flat(base_config().to_dict())
    # In the order of the source, which has sections of its own.
    values = {key: values[key] for key in sorted(values, key=lambda k: _place(k, list(meanings)))}
    parts = [
        "# All keys",
        "Every config has these keys, and `--config.KEY=VALUE` changes them; the defaults are "
        "those of `jaxpercept/config.py`, which the presets change. Lists are written as Python's: "
        "`--config.trainable=\"('unet/','head/')\"`, `--config.resolution=\"(480,640)\"`.",
    ]
    groups: dict[str, list[list[str]]] = {}
    told: set[str] = set()
    for key, value in values.items():
        if key == "method.name":
            continue
        named = key if key in meanings else key.rpartition(".")[0]
        meaning = "" if named in told else meanings.get(named, "")
        told.add(named)
        group = "data.augment" if key.startswith("data.augment") else key.partition(".")[0]
        in_group = group if "." in key else "The run"
        groups.setdefault(in_group, []).append([f"`{key}`", code(value), prose(meaning)])
    for group, rows in groups.items():
        parts.append(f"## {group}\n\n{table(['key', 'default', ''], rows)}")
    parts.append("## method\n\n`method.name` is one of these; the other keys are its options.")
    for name, cls in METHODS.items():
        parts.append(_options(f"method: {name}", "method", cls))
    parts.append("## task_options\n\nOf the task that `task` names.")
    for name, cls in TASKS.items():
        if _fields(cls) and ":" not in name:
            parts.append(_options(f"task: {name}", "task_options", cls))
    parts.append(_dataset_options())
    return "\n\n".join(parts) + "\n"


def _place(key: str, order: list[str]) -> int:
    while key not in order:
        key = key.rpartition(".")[0]
    return order.index(key)


def comments(source: str) -> dict[str, str]:
    """The keys of assignments `c.KEY = ...`, with the comments above them and at their end."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        if match := re.fullmatch(r"    c\.([\w.]+) = .*?(?:  # (.*))?", line):
            found[match[1]] = " ".join([*above, *([match[2]] if match[2] else [])])
            above = []
        elif line.strip().startswith("# "):
            above.append(line.strip()[2:])
    return found


def _options(title: str, key: str, cls: type) -> str:
    meanings = attributes(cls)
    rows = [
        [f"`{key}.{name}`", code(value), prose(meanings.get(name, ""))]
        for name, value in _fields(cls).items()
    ]
    about = prose(" ".join(cls.__doc__.partition("\n\n")[0].split()))
    return f"### {title}\n\n{about}\n\n{table(['key', 'default', ''], rows)}"


def _dataset_options() -> str:
    rows = []
    for name in DATASETS:
        options = options_of(name)
        told = [
            f"`{key}`" + (f" ({code(x)})" if x is not None else "") for key, x in options.items()
        ]
        rows.append([f"`{name}`", ", ".join(told)])
    return (
        "## data.options\n\n`data.options.NAME` has the dataset's `data_dir`, where it is not that "
        "of the config, and these options, in brackets their defaults where the dataset's row does "
        "not say them; [docs/data.md](../data.md) says what they mean.\n\n"
        + table(["dataset", "options"], rows)
    )
