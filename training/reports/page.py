"""The shell of a report: one HTML file with nothing outside it, readable without scripts, light or dark, on any width.

Whatever stands in a page is text of others (completions, paths, warnings), so everything goes through `text`, and a
Content-Security-Policy allows this file's own style and script by their hashes and nothing else: no request, no
frame, no other script, even where escaping were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #5c636b; --line: #dfe3e7; --card: #f6f7f9;
  --warn: #fff4d6; --warn-ink: #6b4a00; --link: #0a5ea8;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #a8528c; --c4: #8a6d00; --c5: #3b9ed8; --c6: #666; --c7: #b8860b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e8ea; --soft: #9aa3ab; --line: #2f353b;
  --card: #1c2126; --warn: #3a2f10; --warn-ink: #f3d58a; --link: #7cc0f5;
  --c0: #56b4e9; --c1: #ff9a4d; --c2: #2fc79b; --c3: #e39ac8; --c4: #f0e442; --c5: #9cd2f5; --c6: #aaa;
  --c7: #e0b64a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
section.stage { border-top: 2px solid var(--line); margin-top: 2.5rem; }
a { color: var(--link); }
p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption output, .none { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .8rem 0; }
pre, code { font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; background: var(--card); border-radius: 6px; padding: .7rem .9rem; margin: .5rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: .7rem;
  margin-top: 1rem; }
.tile { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.15rem; white-space: nowrap; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .7rem .7rem .4rem; }
figcaption { font-size: .9rem; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem; }
figcaption output { font-variant-numeric: tabular-nums; font-size: .82rem; min-height: 1.3em; }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 .7rem; }
.legend i { display: inline-block; width: 1.1rem; height: 3px; border-radius: 2px; margin-right: .45rem;
  vertical-align: middle; background: var(--c); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
svg .y { text-anchor: end; } svg .x, svg .none { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; } svg .axis { stroke: var(--soft); fill: none; }
svg .cursor { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
svg polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
svg g:not(.marked) polyline { stroke-width: 1.2; opacity: .7; }
svg circle { fill: var(--c); stroke: transparent; stroke-width: 9; } svg .bar { stroke: var(--c); opacity: .55; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.changed td { font-weight: 600; } tr.changed td:first-child::before { content: "● "; color: var(--c1); }
.warnings { background: var(--warn); color: var(--warn-ink); border-radius: 8px; padding: .6rem 1rem; margin: 1rem 0; }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem; } .warnings b { font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  margin-top: .8rem; }
.sample { background: var(--card); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.sample, p, pre, h1, li { overflow-wrap: anywhere; }
.sample blockquote { margin: 0 0 .4rem; white-space: pre-wrap; color: var(--soft); }
.sample .completion { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .7rem;
  margin: .5rem 0 0; }
.sample .numbers { font-size: .82rem; color: var(--soft); font-variant-numeric: tabular-nums; padding-left: .85rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
@media print { details { display: block; } figure, .sample { break-inside: avoid; } }
""".strip()

# Values under the pointer, or a finger, in the plot's caption. Without it browsers still show each point's title.
SCRIPT = """
for (const svg of document.querySelectorAll("figure svg")) {
  const shown = svg.closest("figure").querySelector("output"), cursor = svg.querySelector(".cursor");
  if (!shown || !cursor) continue;
  const groups = [...svg.querySelectorAll("g[data-label]")].map((g) => [g, [...g.querySelectorAll("circle")]]);
  const distance = (circle, x) => Math.abs(circle.cx.baseVal.value - x);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = groups.filter(([, all]) => all.length).map(([g, all]) =>
      [g, all.reduce((best, one) => (distance(one, x) < distance(best, x) ? one : best))]);
    if (!nearest.length) return;
    const [, first] = nearest.reduce((best, one) => (distance(one[1], x) < distance(best[1], x) ? one : best));
    cursor.setAttribute("transform", `translate(${first.cx.baseVal.value} 0)`);
    cursor.style.visibility = "visible";
    shown.textContent = nearest.map(([g, one]) => `${g.dataset.label} ${one.dataset.y} @ ${one.dataset.x}`).join(" · ");
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; shown.textContent = ""; });
}
""".strip()


def text(value: object) -> str:
    """Any value as text that HTML cannot take for markup, in an attribute too."""
    return escape(str(value), quote=True)


def page(title: str, body: str) -> str:
    """The whole file."""
    policy = (
        f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def link(path: str, label: str | None = None) -> str:
    """A link to a file or folder beside the page; never one with a scheme."""
    return f'<a href="{text("./" + quote(path))}">{text(label or path)}</a>'


def table(
    rows: Iterable[Sequence[object]],
    *,
    head: Sequence[str] = (),
    numbers: int = 0,
    changed: Mapping[str, bool] | None = None,
) -> str:
    """Rows of values, all escaped; the last `numbers` columns are set to the right. `changed` marks rows by what is in
    their first cell."""
    columns = len(head)
    lines = []
    if head:
        cells = [f"<th{_side(i, columns, numbers)}>{text(cell)}</th>" for i, cell in enumerate(head)]
        lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>")
    for row in rows:
        mark = ' class="changed"' if changed and changed.get(str(row[0])) else ""
        cells = [f"<td{_side(i, len(row), numbers)}>{text(cell)}</td>" for i, cell in enumerate(row)]
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _side(index: int, columns: int, numbers: int) -> str:
    return ' class="n"' if index >= columns - numbers else ""


def details(title: str, content: str) -> str:
    """Content that is shown when it is asked for; no script is needed."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"
