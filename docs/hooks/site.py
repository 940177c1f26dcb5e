"""What mkdocs is told beside mkdocs.yml: pages made from the code, and links out of docs/."""

import re
from pathlib import Path
from typing import Any

import command_pages
import config_pages
from docstrings import REPOSITORY
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {"benchmarks/README.md": "benchmarks.md"}
"""Pages that lie outside docs/, and where they are in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and list them in the navigation."""
    pages = {**config_pages.pages(), **command_pages.pages()}
    pages |= {uri: (ROOT / path).read_text() for path, uri in OUTSIDE.items()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for section in config.nav:
        for title, entries in section.items():
            folder = title.lower()
            if isinstance(entries, list):
                listed = [uri for uri in pages if uri.startswith(f"{folder}/")]
                entries.extend(uri for uri in listed if uri not in entries)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links as they work on GitHub, from docs/ to the rest of the repository and back."""
    source = Path(page.file.src_uri)
    original = {uri: path for path, uri in OUTSIDE.items()}.get(page.file.src_uri)
    folder = Path(original or f"docs/{source}").parent

    def inside(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = Path(*_resolved(folder / target))
        if str(path) in OUTSIDE:
            uri = OUTSIDE[str(path)]
        elif path.parts[:1] == ("docs",):
            uri = str(Path(*path.parts[1:]))
        else:
            return f"]({REPOSITORY}{path})"
        return f"]({'../' * (len(source.parts) - 1)}{uri}{hash_}{anchor})"

    if original:
        return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", inside, markdown)
    return re.sub(r"\]\(((?:\.\./)+[^)\s]+)\)", inside, markdown)


def _resolved(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return parts
