"""Plots of benchmark results: light, in the colours of Okabe and Ito, values and names written where they belong.

Every plot is a function of one suite's results and the PNG to write. Its foot says what it is from.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.harness.provenance import MODELS, OURS, grouped, provenance
from exo_fast.benchmarks.methods.epoch_profile import MODEL
from exo_fast.benchmarks.suites.step import CENTRE, LENGTH

BLUE, ORANGE, GREEN, SKY, GREY, DARK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#B3B3B3", "#333333"
PEERS = {"full-logits": ORANGE, "cce": GREEN}
STEP_STYLES = {"original": (GREY, "original"), "full-logits": (ORANGE, "full logits"), OURS: (BLUE, "exo_fast")}
SIZE = 8


@contextmanager
def _figure(
    path: Path, results: dict, title: str, shape: tuple[int, int], size: tuple[float, float], **options: Any
) -> Iterator[Any]:
    """The panels of a new figure, (rows, columns); saved at the end with title and foot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": SIZE, "axes.edgecolor": "#777777", "axes.linewidth": 0.6}):
        figure, panels = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained", **options)
        for panel in panels.flat:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(length=2, color="#777777")
        yield panels
        figure.suptitle(textwrap.fill(title, width=int(size[0] * 13)), fontsize=11, x=0.01, ha="left")
        foot = textwrap.fill(provenance(results).replace("`", ""), width=int(size[0] * 19))
        figure.supxlabel(foot, fontsize=6, color="#777777", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def _of(style: str) -> str:
    return BLUE if style.startswith(OURS) else GREY


def in_operation(row: dict) -> bool:
    """Whether `operation` may show a row."""
    return "seconds" in row and row["work"] == "both"


def operation(results: dict, path: Path) -> None:
    """Time over that of the matrix products alone, every method of one problem of each head and dtype."""
    chosen = []
    for head, rows in grouped(results["rows"], lambda row: (row["width"], row["vocab"], row["precision"])):
        timed = [row for row in rows if in_operation(row)]
        problems = grouped(timed, lambda row: (row["operation"], row["candidates"], row["completion"], row["tokens"]))
        if problems:
            chosen.append((head, max(problems, key=lambda found: (len(found[1]), found[0][-1]))[1]))
    columns = 2
    lines = -(-len(chosen) // columns)
    heights = [1.6 + max(len(rows) for _, rows in chosen[i : i + columns]) for i in range(0, len(chosen), columns)]
    title = "Loss, dH and dW: time as a multiple of the matrix products alone, and scratch memory"
    if any(not row["float32_logits"] for _, rows in chosen for row in rows):
        title += " (pale: logits rounded to bf16)"
    size = (10, 0.6 + 0.25 * sum(heights))
    with _figure(path, results, title, (lines, columns), size, height_ratios=heights) as panels:
        for panel in panels.flat[len(chosen) :]:
            panel.remove()
        for panel, (head, rows) in zip(panels.flat, chosen, strict=False):
            rows = sorted(rows, key=lambda row: row["share"], reverse=True)
            cut = 4.0
            for place, row in enumerate(rows):
                value = 1 / row["share"]
                rounded = not row["float32_logits"]
                panel.barh(place, min(value, cut), height=0.7, color=_of(row["method"]), alpha=0.45 if rounded else 1.0)
                text = f"{value:.2f}{' →' if value > cut else ''}   {row['scratch_mb']:,.0f} MB"
                panel.text(min(value, cut) + 0.04, place, text, va="center", fontsize=7, color=DARK)
            panel.axvline(1, color=DARK, linewidth=0.8, linestyle=":")
            panel.set_yticks(range(len(rows)), [row["method"] for row in rows])
            for label in panel.get_yticklabels():
                label.set_fontweight("bold" if label.get_text() == OURS else "normal")
            panel.invert_yaxis()
            panel.set_xlim(0, cut + 1.2)
            panel.set_xticks([0, 1, 2, 3, 4])
            problem = f"{head[2]}, K = {rows[0]['candidates']}, N = {rows[0]['tokens']:,}"
            panel.set_title(
                f"{MODELS.get(head[:2], '')} {head[0]:,} × {head[1]:,}, {problem}", fontsize=8.5, loc="left"
            )


def in_step(row: dict) -> bool:
    """Whether `step` may show a row."""
    return "seconds" in row and row["style"] in STEP_STYLES


def step(results: dict, path: Path) -> None:
    """Completion tokens a second and peak memory over prompt : completion, a column for each K."""
    measured = grouped((row for row in results["rows"] if in_step(row)), lambda row: row["precision"])
    precision, rows = max(measured, key=lambda found: len(found[1]))
    by_k = sorted(grouped(rows, lambda row: row["candidates"]))
    title = f"A training step, 135M model, 8 × 256 tokens, {precision}: over prompt + completion tokens"
    with _figure(path, results, title, (2, len(by_k)), (3.2 * len(by_k) + 0.6, 5.2)) as panels:
        for column, (candidates, same) in enumerate(by_k):
            lengths = sorted({(row["prompt"], row["completion"]) for row in same}, reverse=True)
            for line, (name, unit, scale) in enumerate(
                (("tokens_per_second", "completion tokens / s", 1.0), ("peak_mb", "peak above the models, GB", 1e-3))
            ):
                panel = panels[line][column]
                for row in same:
                    place = lengths.index((row["prompt"], row["completion"]))
                    place += (list(STEP_STYLES).index(row["style"]) - 1) * 0.27
                    value = row[name] * scale
                    panel.bar(place, value, width=0.25, color=STEP_STYLES[row["style"]][0])
                    text = f"{value:,.0f}" if scale == 1 else f"{value:.1f}"
                    panel.text(place, value, text, ha="center", va="bottom", fontsize=6.5, color=DARK)
                panel.set_xticks(range(len(lengths)), [f"{prompt} + {completion}" for prompt, completion in lengths])
                panel.set_xlim(-0.5, len(lengths) - 0.5)
                panel.tick_params(axis="x", length=0)
                panel.margins(y=0.12)
                if line == 0:
                    panel.set_title(f"K = {candidates}", fontsize=9, loc="left")
                if column == 0:
                    panel.set_ylabel(unit)
        for panel_row in panels:
            top = max(panel.get_ylim()[1] for panel in panel_row)
            for panel in panel_row:
                panel.set_ylim(0, top)
        from matplotlib.patches import Patch

        handles = [Patch(color=colour, label=label) for colour, label in STEP_STYLES.values()]
        panels[0][0].legend(handles=handles, frameon=False, loc="upper left", fontsize=7.5)


def ablation(results: dict, path: Path) -> None:
    """A waterfall from the original's step to ours."""
    rungs = results["summary"]["ladder"]
    candidates, prompt = CENTRE
    title = f"From the original's step to ours: K = {candidates}, {prompt} + {LENGTH - prompt} tokens, bf16"
    with _figure(path, results, title, (1, 1), (8, 3.1)) as panels:
        panel = panels[0][0]
        first, last = rungs[0]["seconds"], rungs[-1]["seconds"]
        bars = [(0, first, GREY, "the original's step", f"{first:.2f} s")]
        for before, rung in itertools.pairwise(rungs):
            saved = before["seconds"] - rung["seconds"]
            colour = GREEN if saved >= 0 else ORANGE
            bars.append(
                (
                    rung["seconds"],
                    saved,
                    colour,
                    f"+ {rung['part']}",
                    f"{-saved:+.2f} s, {rung['gain']:.2f}×".replace("-", "−"),
                )
            )
        bars.append((0, last, BLUE, "exo_fast", f"{last:.2f} s, {first / last:.1f}× in all"))
        for place, (start, width, colour, _, text) in enumerate(bars):
            panel.barh(place, width, left=start, height=0.62, color=colour)
            panel.text(max(start, start + width) + first * 0.01, place, text, va="center", color=DARK)
            if place:
                end = bars[place - 1][0] if place > 1 else first
                panel.plot([end, end], [place - 1, place], color="#777777", linewidth=0.6, zorder=0)
        panel.set_yticks(range(len(bars)), [label for *_, label, _ in bars])
        panel.invert_yaxis()
        panel.set_xlim(0, first * 1.16)
        panel.set_xlabel("seconds a step")
        panel.tick_params(axis="y", length=0)


def scaling(results: dict, path: Path) -> None:
    """Time and scratch over N, V and K, each with the exponent of its curve."""
    sizes_of = {"N": ("tokens", "tokens N"), "V": ("vocab", "vocabulary V"), "K": ("candidates", "candidates K")}
    timed = [row for row in results["rows"] if "seconds" in row]
    axes = grouped(timed, lambda row: row["axis"])
    fits = {_curve(fit): fit for fit in results["summary"]["fits"]}
    title = "Loss, dH and dW: how time and scratch memory grow, with the exponents of the curves"
    with _figure(path, results, title, (2, len(axes)), (3.6 * len(axes) + 0.3, 6.2)) as panels:
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
                names = 0.05 + 0.07 * len(grouped(points, _curve))  # share of the panel that they take, above
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
    """What tells the curves of an axis apart, of a fit or of a row."""
    axis = row["axis"]
    return axis, row["method"], row["width"], None if axis == "V" else row["vocab"], row["precision"]


def epoch(results: dict, path: Path) -> None:
    """Shares of the steps of every profiled epoch, largest first."""
    epochs = [row for row in results["rows"] if "stages" in row]
    names = [stage["stage"] for stage in epochs[0]["stages"] if stage["when"] == "every step"]
    title = "Where the steps of an epoch go: share of their time (dotted: 5%)"
    with _figure(path, results, title, (1, len(epochs)), (3.2 * len(epochs) + 2.2, 3.4), sharey=True) as panels:
        for panel, row in zip(panels[0], epochs, strict=True):
            shares = {stage["stage"]: stage["share_of_steps"] for stage in row["stages"]}
            for place, name in enumerate(names):
                value = 100 * (shares.get(name) or 0)
                panel.barh(place, value, height=0.7, color=BLUE if name in MODEL else ORANGE)
                panel.text(max(value, 5) + 1, place, f"{value:.1f}", va="center", fontsize=7, color=DARK)
            panel.axvline(5, color=DARK, linewidth=0.8, linestyle=":")
            panel.set_yticks(range(len(names)), names)
            panel.set_xlim(0, 100)
            panel.set_xlabel("%")
            label = row["part"].removeprefix("epoch/")
            panel.set_title(f"{label}: {row['seconds'] / row['steps']:.3f} s a step", fontsize=8.5, loc="left")
            panel.tick_params(axis="y", length=0)
        panels[0][0].invert_yaxis()
        panels[0][-1].annotate(
            "blue: the model, attention, head and loss\norange: what surrounds them", (1, 0.42), ha="right",
            xycoords="axes fraction", fontsize=7, color=DARK,
        )  # fmt: skip


def memory(results: dict, path: Path) -> None:
    """Measured peaks as bars, predictions as marks."""
    rows = [row for row in results["rows"] if "seconds" in row]
    with _figure(
        path, results, "Peak memory of a step, 135M model: measured (bars) and predicted (marks)",
        (1, 1), (8, 0.9 + 0.27 * len(rows)),
    ) as panels:  # fmt: skip
        panel = panels[0][0]
        labels = []
        for place, row in enumerate(rows):
            measured, predicted = row["peak_mb"] / 1e3, row["predicted_mb"] / 1e3
            panel.barh(place, measured, height=0.66, color=_of(row["method"]))
            panel.plot([predicted] * 2, [place - 0.42, place + 0.42], color=ORANGE, linewidth=2.2)
            text = f"{measured:.2f}, predicted {predicted:.2f}"
            panel.text(max(measured, predicted) * 1.01 + 0.05, place, text, va="center", fontsize=7, color=DARK)
            extras = [row["precision"], row["optimizer"], *["checkpointed"] * row["gradient_checkpointing"]]
            size = f"{row['sequences']} × ({row['prompt']} + {row['completion']})"
            labels.append(f"{row['method']}, K = {row['candidates']}, {size}, {', '.join(extras)}")
        panel.set_yticks(range(len(rows)), labels)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.3 * max(max(row["peak_mb"], row["predicted_mb"]) for row in rows) / 1e3)
        panel.set_xlabel("GB")
        panel.tick_params(axis="y", length=0)
