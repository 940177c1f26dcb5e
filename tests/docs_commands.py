"""The commands and the Python of the documentation, as its pages have them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md"))
)
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*.py"))
DOORS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("jaxpercept/*.py")
    if "cli.run(main" in path.read_text()
)
_COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:taskset -c \d+ )?"
    r"(?:(?:\.venv/bin/)?(?:python3?|pip|pytest|mkdocs)|apt-get|tfds) \S"
)
_FENCE = re.compile(r"( *)```(\w*)")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page: what stands between `&&`, its lines joined.

    inline: it stands in a sentence and may be short of what it needs.
    """

    page: str
    line: int
    text: str
    inline: bool = False

    @property
    def words(self) -> list[str]:
        """As the shell splits it, without comments."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Code:
    """A block of Python."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclasses.dataclass(frozen=True)
class _Block:
    language: str  # "" for text outside of any fence
    line: int
    lines: tuple[str, ...]


def of_page(page: str, text: str | None = None) -> list[Command | Code]:
    """The commands and the Python of a Markdown page, in its order.

    Raises:
        AssertionError: a command stands where none is looked for.
    """
    found: list[Command | Code] = []
    for block in _blocks((ROOT / page).read_text() if text is None else text):
        if block.language == "bash":
            found += _commands(page, block.line, block.lines)
        elif block.language == "python":
            found.append(Code(page, block.line, "\n".join(block.lines) + "\n"))
        elif block.language:
            _refuse_commands(page, block)
        else:
            found += _inline(page, block)
            _refuse_commands(page, block)
    return found


def of_docstring(path: str) -> list[Command]:
    """The commands of a module's docstring, which are its indented lines."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    found: list[Command] = []
    lines = docstring.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("    ") and _COMMAND.match(line.strip()):
            end = number
            while lines[end].endswith("\\"):
                end += 1
            found += _commands(path, number + 1, lines[number : end + 1])
    return found


def everything() -> list[Command | Code]:
    """Of all pages and docstrings."""
    pages = [item for page in PAGES for item in of_page(page)]
    return pages + [item for path in (*CONFIGS, *DOORS) for item in of_docstring(path)]


def of_configs() -> list[Command]:
    """The commands of the pages that the site makes of the configs: one for each preset."""
    sys.path.insert(0, str(ROOT / "docs/hooks"))
    try:
        pages = importlib.import_module("config_pages").pages()
    finally:
        sys.path.pop(0)
    found = [item for text in pages.values() for item in of_page("generated", text)]
    return [item for item in found if isinstance(item, Command)]


def _blocks(text: str) -> Iterator[_Block]:
    language, start, held = "", 1, []
    indent = 0
    for number, line in enumerate(text.splitlines(), 1):
        if match := _FENCE.match(line):
            yield _Block(language, start, tuple(held))
            language = "" if language else (match[2] or "text")
            indent, start, held = len(match[1]), number + 1, []
        else:
            held.append(line[indent:] if language else line)
    assert not language, "a fence is not closed"
    yield _Block("", start, tuple(held))


def _commands(page: str, first: int, lines: tuple[str, ...] | list[str]) -> list[Command]:
    found, held, start = [], "", first
    for number, line in enumerate(lines, first):
        start = start if held else number
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1].rstrip() + " "
            continue
        if held and not held.startswith("#"):
            parts = held.split(" && ")
            lexer = shlex.shlex(held, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            assert list(lexer).count("&&") == len(parts) - 1, held
            found += [Command(page, start, part) for part in parts]
        held = ""
    assert not held, f"{page}:{start}: the last line ends with a backslash"
    return found


def _inline(page: str, block: _Block) -> list[Command]:
    text = "\n".join(block.lines)
    found = []
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        line = block.line + text.count("\n", 0, match.start())
        parts = " ".join(match[1].split()).split(" && ")
        if _COMMAND.match(parts[0]):
            found += [Command(page, line, part, inline=True) for part in parts]
    return found


def _refuse_commands(page: str, block: _Block) -> None:
    for number, line in enumerate(block.lines, block.line):
        stands_alone = line.startswith("    ") or block.language
        if stands_alone and _COMMAND.match(line.strip()):
            raise AssertionError(f"{page}:{number}: a command outside of a block of bash: {line}")
