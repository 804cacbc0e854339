"""Markdown tables, and the marks in a page that they are written between.

A page holds `<!-- LABEL: NAME -->`, the table, `<!-- end -->`. The module that makes the tables rewrites the text
between the marks, and a test can compare the page with them.
"""

from __future__ import annotations

import re
from pathlib import Path


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Make a Markdown table, all but the first `left` columns aligned right."""
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Format a number with about three significant digits."""
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def block(label: str, name: str) -> re.Pattern:
    """Return a pattern for the table called `name` in a page; group 2 is the text between its marks."""
    return re.compile(rf"(<!-- {label}: {re.escape(name)} -->\n)((?!<!-- ).*?\n)??(<!-- end -->)", re.S)


def rewrite(page: Path, label: str, made: dict[str, str]) -> None:
    """Write each table between its marks, if the page has marks for it."""
    text = page.read_text()
    for name, table in made.items():
        text = block(label, name).sub(lambda match, table=table: f"{match[1]}{table}\n{match[3]}", text)
    page.write_text(text)
