"""Curves and scatter plots as SVG text: a few hundred points, axes with round numbers, a value on every point.

They stand in a page that has to be read without scripts, without the network and without matplotlib. Colours are
classes (`c0`, `c1`, …) that the page's style sheet gives, so that a plot follows light and dark. Every point carries
its numbers as a <title>, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 34
MOST_POINTS = 240  # of a curve; of more, the extremes are kept
COLOURS = 8


@dataclass(frozen=True)
class Curve:
    """Values over steps (or rewards over KL); points whose value is not finite are left out."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    marked: bool = False  # points are drawn larger
    errors: Sequence[tuple[float, float]] = ()  # half-widths in x and y of each point
    names: Sequence[str] = ()  # of the points, for their titles


def number(value: float | int | None, digits: int = 4) -> str:
    """A number as a person reads it: `digits` digits, thousands apart, a minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.{digits}g}"
    return text.replace("-", "−")


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` (4 or more) of the points in their order: the first, the last, and of each stretch between its
    lowest and its highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        part = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`, which differ; with `whole`, none between two whole ones."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for m in (1, 2, 2.5, 5, 10) if (step := m * power) >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [index * step + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers with as many digits as tell each from the next."""
    if len(values) < 2:
        return [number(value) for value in values]
    digits = math.log10(max(map(abs, values)) / (values[1] - values[0]))
    return [number(value, min(15, max(1, math.ceil(digits + 1.4)))) for value in values]


def plot(title: str, curves: Sequence[Curve], *, x_label: str = "step", y_label: str = "", joined: bool = True) -> str:
    """An <svg> of the curves; one with no finite point says so.

    `joined` draws lines between a curve's points. Of a curve with many points MOST_POINTS are drawn (see `thin`).
    """
    drawn = []
    for curve in curves:
        finite = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
        keep_all = bool(curve.errors or curve.names) and len(finite) == len(curve.points)
        drawn.append((curve, finite if keep_all else thin(finite)))
    xs = [x for _, points in drawn for x, _ in points]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    if not xs:
        return f'{head}<text class="none" x="{WIDTH // 2}" y="{HEIGHT // 2}">no finite value</text></svg>'
    spread = [
        (x + sign * dx, y + sign * dy)
        for curve, points in drawn
        for (x, y), (dx, dy) in zip(points, _errors(curve, points), strict=True)
        for sign in (-1, 1)
    ]
    low_x, high_x = _range([x for x, _ in spread], 0.0 if joined else 0.04)
    low_y, high_y = _range([y for _, y in spread], 0.06)

    def place(x: float, y: float) -> tuple[str, str]:
        right = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f}", f"{down:.1f}"

    parts = [head]
    y_ticks, x_ticks = ticks(low_y, high_y), ticks(low_x, high_x, whole=x_label == "step")
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        _, y = place(low_x, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y}" dy=".32em">{label}</text>')
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x, _ = place(tick, low_y)
        parts.append(f'<text class="x" x="{x}" y="{HEIGHT - BOTTOM + 15}">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text class="x" transform="translate(11 {HEIGHT // 2}) rotate(-90)">{escape(y_label)}</text>')
    parts.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>')
    for curve, points in drawn:
        parts += _curve(curve, points, place, x_label, joined)
    return "".join([*parts, "</svg>"])


def _curve(
    curve: Curve,
    points: list[tuple[float, float]],
    place: Callable[[float, float], tuple[str, str]],
    x_label: str,
    joined: bool,
) -> list[str]:
    """The line, the bars and the points of one curve."""
    label, colour = escape(curve.label, quote=True), f"c{curve.colour % COLOURS}"
    placed = [place(x, y) for x, y in points]
    parts = [f'<g class="{colour}{" marked" if curve.marked else ""}" data-label="{label}">']
    if joined and len(points) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
    for (x, y), (dx, dy) in zip(points, _errors(curve, points), strict=True) if curve.errors else ():
        (left, down), (right, up) = place(x - dx, y - dy), place(x + dx, y + dy)
        across, along = place(x, y)
        parts.append(f'<path class="bar" d="M{left} {along}H{right}M{across} {down}V{up}"/>')
    radius = 3 if curve.marked else 1.7 if len(points) <= 60 else 0.6
    for index, ((x, y), (across, down)) in enumerate(zip(points, placed, strict=True)):
        name = curve.names[index] if curve.names else f"{x_label} {number(x)}"
        said = f"{escape(name)}, {label}: {number(y)}" if curve.label else f"{escape(name)}: {number(y)}"
        value = f'data-x="{number(x)}" data-y="{number(y)}"'
        parts.append(f'<circle cx="{across}" cy="{down}" r="{radius}" {value}><title>{said}</title></circle>')
    return [*parts, "</g>"]


def _errors(curve: Curve, points: list[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return curve.errors if len(curve.errors) == len(points) else [(0.0, 0.0)] * len(points)


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):  # one value, or the roundings of one
        half = abs(low) * 0.1 or 1.0
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)
