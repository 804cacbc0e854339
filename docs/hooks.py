"""Hooks for mkdocs: pages that lie outside docs/, and links to files that are not pages.

CONTRIBUTING.md and CHANGELOG.md stay where hosting sites look for them, the examples' README beside the examples, and
all are pages of the site as well. A link from a page to a recipe or to code leads nowhere in a built site, so its text
is kept and the link is not; tests/docs/test_docs.py checks that every such file exists.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {  # by their place in the repository
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
CODE = r"(?P<code>^(?P<fence>```+)[^\n]*\n.*?^(?P=fence)|`[^`\n]+`)"
LINK = re.compile(CODE + r"|(?<!!)\[(?P<text>(?:[^][]|\[[^][]*\])*)\]\((?P<target>[^)\s]+)\)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    root = Path(config.config_file_path).parent
    for source, name in PAGES.items():
        if (root / source).exists():
            files.append(File.generated(config, name, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links relative to the site: a link to a page, plain text for any other file."""
    uri = page.file.src_uri
    source = next((source for source, name in PAGES.items() if name == uri), f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target, hash_, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            return match["text"]
        # One below docs/ that does not exist is left to mkdocs, which warns of it.
        return f"[{match['text']}]({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}{hash_}{anchor})"

    return LINK.sub(link, markdown)
