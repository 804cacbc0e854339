"""Markdown tables, and the marks in a page that they are written between.

A page holds `<!-- LABEL: NAME -->`, the table, `<!-- end -->`. Whoever makes the tables rewrites what lies between, and
a test can hold the page to them.
"""

from __future__ import annotations

import re
from pathlib import Path


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table, all but the first `left` columns aligned right."""
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """About three significant digits."""
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def block(label: str, name: str) -> re.Pattern:
    """Matches the table called `name` in a page, between its marks; group 2 is what lies between."""
    return re.compile(rf"(<!-- {label}: {re.escape(name)} -->\n)((?!<!-- ).*?\n)??(<!-- end -->)", re.S)


def rewrite(page: Path, label: str, made: dict[str, str]) -> None:
    """Puts every table that the page has marks for between them."""
    text = page.read_text()
    for name, table in made.items():
        text = block(label, name).sub(lambda match, table=table: f"{match[1]}{table}\n{match[3]}", text)
    page.write_text(text)
