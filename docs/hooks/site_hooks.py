"""What mkdocs is told beside mkdocs.yml: pages made from the code, and links out of docs/."""

import os
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
    """Links and lists as they work on GitHub."""
    return relinked(nested(markdown), page.file.src_uri)


def nested(markdown: str) -> str:
    """The text with what belongs to an item of a list indented by four, not by two as on GitHub."""
    lines, in_item, in_code = [], False, False
    for line in markdown.splitlines():
        in_code ^= line.startswith("```")
        if line.strip() and not in_code:
            starts = re.match(r"- |\d+\. ", line)
            in_item = bool(starts) or (in_item and line.startswith("  "))
            line = "  " * (in_item and not starts) + line
        lines.append(line)
    return "\n".join(lines)


def relinked(markdown: str, uri: str) -> str:
    """The text of a page with links from its place in the site, also those out of docs/.

    uri: its place. What is not in the site is linked in the repository.
    """
    source = {uri: path for path, uri in OUTSIDE.items()}.get(uri, f"docs/{uri}")
    up = "../" * uri.count("/")

    def inside(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = os.path.normpath(Path(source).parent / target)
        if path in OUTSIDE:
            return f"]({up}{OUTSIDE[path]}{hash_}{anchor})"
        if path.startswith("docs/"):
            return f"]({up}{path.removeprefix('docs/')}{hash_}{anchor})"
        return f"]({REPOSITORY}{path})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", inside, markdown)
