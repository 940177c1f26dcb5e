"""A page for each command: the module's docstring and its flags, as `--help` prints them."""

import importlib
from types import ModuleType

from absl import flags
from docstrings import code, flag, prose, table, to_markdown

from jaxpercept import cli

DOORS = (
    "train",
    "evaluate",
    "predict",
    "convert",
    "doctor",
    "prepare",
    "analyze",
    "ablate",
    "app",
    "pretrain",
)


def pages() -> dict[str, str]:
    """Markdown by path below docs/."""
    doors = {name: importlib.import_module(f"jaxpercept.{name}") for name in DOORS}
    return {
        "commands/index.md": _index(doors),
        **{f"commands/{name}.md": _page(name, door) for name, door in doors.items()},
    }


def _index(doors: dict[str, ModuleType]) -> str:
    rows = [
        [f"[`python -m jaxpercept.{name}`]({name}.md)", prose(_title(door))]
        for name, door in doors.items()
    ]
    return f"""# Commands

{table(["command", "what it does"], rows)}

Each is a function as well, `jaxpercept.NAME.NAME` ([API](../api/commands.md)); `train` is
`jaxpercept.training.loop.train`. Flags are written `--name=value`. Errors are one sentence, and
exit status 1. These pages are made of what `--help` prints.
"""


def _title(door: ModuleType) -> str:
    return door.__doc__.partition("\n\n")[0].strip()


def _page(name: str, door: ModuleType) -> str:
    own = cli.own_flags(door.main, door.FLAGS)
    rows = [
        [flag(f"--{each.name}"), prose(_meaning(each)), _default(each, each.name in door.REQUIRED)]
        for each in own
    ]
    return f"""# {name}

{to_markdown(door.__doc__)}

## Flags

{table(["flag", "meaning", "default"], rows)}
"""


def _meaning(each: flags.Flag) -> str:
    text = " ".join(each.help.split()).partition("; repeat this option")[0]
    choices = getattr(each.parser, "enum_values", None)
    if choices:
        text = f"{text.partition('>: ')[2]} One of {', '.join(f'`{name}`' for name in choices)}."
    return text.replace(".;", ".")


def _default(each: flags.Flag, required: bool) -> str:
    if required:
        return "required"
    if each.default in (None, "", []):
        return ""
    return code(",".join(each.default) if isinstance(each.default, list) else each.default)
