"""The templates of reports, HTML and Markdown, and the shell of an HTML page.

A page shows text from elsewhere: completions, paths, warnings. Jinja2 escapes all of it. A Content-Security-Policy
allows the page's own style and script by their hashes, pictures inside the page, and nothing else: no request, no
frame, no other script, even if a template forgets to escape.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from exo_fast.training.reports.curves import number

HERE = Path(__file__).parent
TEMPLATES, UPLOT = HERE / "templates", HERE / "uplot"


def plain(value: object) -> str:
    """Return any value as one line of text that Markdown and HTML cannot take for markup."""
    text = " ".join(str(value).split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|*_`[]#~":
        text = text.replace(mark, "\\" + mark)
    return text


def render(name: str, **values: Any) -> str:
    """Render the template `name` with these values. An HTML template gives Markup, with every value escaped."""
    content = _environment().get_template(name).render(**values)
    return Markup(content) if name.endswith(".html.j2") else content


def page(title: str, body: str) -> bytes:
    """Return the whole HTML file; `body` is the output of `render`."""
    style = _text(UPLOT / "uPlot.min.css", TEMPLATES / "page.css")
    licence = _text(UPLOT / "LICENSE")
    script = f"/* uPlot:\n{licence}*/\n" + _text(UPLOT / "uPlot.iife.min.js", TEMPLATES / "page.js")
    return render(
        "page.html.j2",
        title=title,
        body=body,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    ).encode()


def _text(*paths: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _beside(path: str) -> str:
    """Return a link to a file or folder beside the page, never with a scheme."""
    return "./" + quote(path)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "plain": plain, "beside": _beside}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
