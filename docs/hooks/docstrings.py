"""Docstrings as Markdown: prose, blocks of commands, and lists of names with what they mean."""

import re
from collections.abc import Iterator

REPOSITORY = "https://github.com/jaxpercept/jaxpercept/blob/main/"
_COMMAND = re.compile(r"[A-Z_]+=\S+ |python |pip |pytest ")
_ITEM = re.compile(r"(`[^`]+`(?:(?:, | \.\.\. )`[^`]+`)*)\s+(.*)")
_ATTRIBUTE = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")


def to_markdown(docstring: str) -> str:
    """The Markdown of a docstring, for a page one folder below `docs`.

    Indented lines are code; lines that begin with a name in backticks after an empty line are a
    list of names. Files of docs/ become links.
    """
    return "\n\n".join(_block(kind, lines) for kind, lines in _blocks(docstring))


def items(docstring: str) -> list[tuple[str, str]]:
    """(names in backticks, what they mean) of every entry of the docstring's lists."""
    return [item for kind, lines in _blocks(docstring) if kind == "items" for item in _items(lines)]


def attributes(cls: type) -> dict[str, str]:
    """What a class says of its attributes."""
    _, _, section = (cls.__doc__ or "").partition("Attributes:\n")
    lines = section.splitlines()
    indent = min((_indent(line) for line in lines if line.strip()), default=0)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        match = _ATTRIBUTE.fullmatch(line.strip())
        if _indent(line) == indent and match:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(value: object) -> str:
    """A value as it is written in Python."""
    return f"`{value!r}`"


def flag(name: str) -> str:
    """A flag, which is not broken at its hyphens."""
    return f"`{name}`{{ .flag }}"


def prose(text: str) -> str:
    """Text without Markdown but for backticks: what would be taken for some is escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    text = re.sub(r"([*_<\[\]])", r"\\\1", text)
    text = re.sub(r"(?<![\w\\/])--[a-z](?:\w|\\_)*", lambda m: flag(_plain(m[0])), text)
    return re.sub(r"\bdocs/(\w+)\.md", r"[docs/\1.md](../\1.md)", text)


def _plain(text: str) -> str:
    return text.replace("\\", "")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _blocks(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """("prose", "code" or "items", its lines)."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = paragraph.rstrip().splitlines()
        while lines:
            kind = "code" if lines[0].startswith("    ") else "prose"
            if lines[0].startswith("`") and _ITEM.fullmatch(lines[0]):
                yield "items", lines
                break
            inside = (i for i, x in enumerate(lines) if x.startswith("    ") != (kind == "code"))
            end = next(inside, len(lines))
            yield kind, lines[:end]
            lines = lines[end:]


def _items(lines: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in lines:
        match = _ITEM.fullmatch(line)
        if match:
            found.append((match[1], match[2]))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def _block(kind: str, lines: list[str]) -> str:
    if kind == "prose":
        return prose("\n".join(lines))
    if kind == "items":
        return table(["preset", "what"], [[names, prose(text)] for names, text in _items(lines)])
    language = "bash" if _COMMAND.match(lines[0].strip()) else "text"
    return "\n".join([f"```{language}", *(line[4:] for line in lines), "```"])
