"""The report of the suite `scaling`: exponents, points and curves."""

from __future__ import annotations

import math
from pathlib import Path

from exo_fast.benchmarks.harness.provenance import OURS, grouped
from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.benchmarks.report.cells import bandwidth, error_cell, left_out, seconds_cell, strong
from exo_fast.benchmarks.report.figure import BLUE, GREEN, ORANGE, SKY, figure
from exo_fast.benchmarks.report.section import Section, paragraph

PEERS = {"full-logits": ORANGE, "cce": GREEN}


def table(results: dict) -> str:
    """Make the table of the curves' exponents, then of their points."""
    fits = [
        [
            fit["axis"],
            strong(fit["method"], fit["method"] == OURS),
            f"{fit['width']:,} × {'V' if fit['vocab'] is None else format(fit['vocab'], ',')}, {fit['precision']}",
            f"{fit['from']:,} – {fit['to']:,}",
            f"{fit['time']:.3f}",
            f"{fit['time_over_floor']:+.3f}",
            f"{fit['memory']:+.3f}",
        ]
        for fit in results["summary"]["fits"]
    ]
    points = [
        [
            row["axis"],
            strong(row["method"], row["method"] == OURS),
            f"{row['width']:,} × {row['vocab']:,}, {row['precision']}",
            f"K = {row['candidates']}, N = {row['tokens']:,}",
            seconds_cell(row["seconds"]),
            f"{row['share']:.2f}",
            f"{row['scratch_mb']:,.0f}",
            *(error_cell(row["errors"].get(name)) for name in ("logps", "loss", "dH", "dW")),
        ]
        for row in results["rows"]
        if "seconds" in row
    ]
    header = ["grows", "method", "head", "from – to", "time", "time over floor", "scratch"]
    below = ["grows", "method", "head", "problem", "seconds", "of floor", "scratch, MB", "log-prob, nats", "loss", "dH"]
    tables = [markdown(header, fits, left=4), "The points:", markdown([*below, "dW"], points, left=4)]
    return "\n\n".join(tables + left_out(results["rows"]) + bandwidth(results))


def plot(results: dict, path: Path) -> None:
    """Plot time and scratch over N, V and K, each with the exponent of its curve."""
    sizes_of = {"N": ("tokens", "tokens N"), "V": ("vocab", "vocabulary V"), "K": ("candidates", "candidates K")}
    timed = [row for row in results["rows"] if "seconds" in row]
    axes = grouped(timed, lambda row: row["axis"])
    fits = {_curve(fit): fit for fit in results["summary"]["fits"]}
    title = "Loss, dH and dW: how time and scratch memory grow, with the exponents of the curves"
    with figure(path, results, title, (2, len(axes)), (3.6 * len(axes) + 0.3, 6.2)) as panels:
        from matplotlib.ticker import FuncFormatter, LogLocator

        for column, (axis, points) in enumerate(axes):
            name, label = sizes_of[axis]
            sizes = sorted({row[name] for row in points})
            for line, (quantity, unit, fit) in enumerate(
                (("seconds", "seconds", "time"), ("scratch_mb", "scratch, MB", "memory"))
            ):
                panel = panels[line][column]
                shown = []
                for key, rows in grouped(points, _curve):
                    rows = sorted(rows, key=lambda row: row[name])
                    method, precision = rows[0]["method"], rows[0]["precision"]
                    colour = {"fp32": SKY, "bf16": BLUE}[precision] if method == OURS else PEERS[method]
                    exponent = f": {round(fits[key][fit], 2) + 0:.2f}".replace("-", "−") if key in fits else ""
                    text = f"{method}, {precision}, D = {rows[0]['width']}{exponent}"
                    values = [max(row[quantity], 0.01) for row in rows]
                    panel.plot(
                        [row[name] for row in rows], values, color=colour, label=text,
                        marker="o", markersize=3, linewidth=1.3,
                    )  # fmt: skip
                    shown += values
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                height = math.log(max(6.0, max(shown) / min(shown)))
                names = 0.05 + 0.07 * len(grouped(points, _curve))  # the share of the panel that the names take, above
                height /= 0.95 - names
                panel.set_ylim(min(shown) * math.exp(-0.05 * height), min(shown) * math.exp(0.95 * height))
                panel.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
                panel.yaxis.set_major_locator(LogLocator(10, (1, 3)))
                panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                panel.minorticks_off()
                panel.legend(frameon=False, loc="upper left", fontsize=7)
                if column == 0:
                    panel.set_ylabel(unit)
                if line == 1:
                    panel.set_xlabel(label)


def _curve(row: dict) -> tuple:
    """Return the key, of a fit or of a row, that distinguishes the curves of an axis."""
    axis = row["axis"]
    return axis, row["method"], row["width"], None if axis == "V" else row["vocab"], row["precision"]


SECTIONS = {
    "scaling": Section(
        "scaling",
        "How time and memory grow",
        paragraph("""
            One size grows and the others stay. *time*, *scratch*: b of a·size^b, by least squares of the logarithms.
            *time over floor*: the same for the time over the products' alone, measured in the same process: 0
            where the time grows as the products do.
        """),
        table,
        plot,
    ),
}
