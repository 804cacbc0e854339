"""The report of the suite `step`: every style, the gain of each part of ours, and their plots."""

from __future__ import annotations

import itertools
from pathlib import Path

from exo_fast.benchmarks.harness.provenance import OURS, grouped
from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.benchmarks.report.cells import error_cell, left_out, strong
from exo_fast.benchmarks.report.figure import BLUE, DARK, GREEN, GREY, ORANGE, figure
from exo_fast.benchmarks.report.section import Section, paragraph
from exo_fast.benchmarks.suites.step import CENTRE, GRID, LENGTH

EXTREMES = (max(GRID), min(GRID))  # (K, tokens of the prompt) with the largest gain of the step, and the smallest
STYLES = {"original": (GREY, "original"), "full-logits": (ORANGE, "full logits"), OURS: (BLUE, "exo_fast")}


def table(results: dict) -> str:
    """Show long and short prompts, then every case, a table for each dtype."""
    blocks = []
    for precision, rows in grouped(results["rows"], lambda row: row["precision"]):
        ours = {_problem(row): row for row in rows if row["style"] == OURS and "seconds" in row}
        lines = []
        for row in rows:
            if "seconds" not in row:
                continue
            best = ours.get(_problem(row))
            lines.append(
                [
                    f"K = {row['candidates']}, {row['prompt']} + {row['completion']}",
                    strong(row["style"], row["style"] == OURS),
                    f"{row['seconds']:.2f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['peak_mb']:,.0f}",
                    f"{row['seconds'] / best['seconds']:.2f}" if best else "",
                    f"{row['peak_mb'] / best['peak_mb']:.2f}" if best else "",
                    error_cell(row["errors"]["loss"]),
                    error_cell(row["errors"]["gradient"]),
                ]
            )
        header = ["prompt + completion", "style", "s/step", "tokens/s", "peak, MB", "× exo_fast", "× its memory"]
        if lines:
            made = markdown([*header, "error, loss", "error, gradient"], lines, left=2)
            blocks.append(f"**{precision}**\n\n{made}")
    return "\n\n".join(_claims(results) + blocks + left_out(results["rows"]))


def _claims(results: dict) -> list[str]:
    """Make a table of the step's largest and smallest gain, with long and short prompts; empty if not measured."""
    ratios = results["summary"]["ratios"]
    lines = []
    for candidates, prompt in EXTREMES:
        where = f"K{candidates}/{prompt}+{LENGTH - prompt}"
        for found in ratios:
            precision, _, at = found["problem"].partition("/")
            if at == where and found["other"] in ("original", "full-logits"):
                problem = f"K = {candidates}, {prompt} + {LENGTH - prompt}"
                times = f"{found['time']:.2f}", f"{found['memory']:.2f}"
                lines.append([problem, precision, found["other"], strong(found["ours"], found["ours"] == OURS), *times])
    header = ["prompt + completion", "dtype", "theirs", "ours", "their time / ours", "their memory / ours"]
    return [markdown(header, lines, left=4)] if lines else []


def _problem(row: dict) -> tuple:
    return row["candidates"], row["prompt"], row["completion"]


def ablation_table(results: dict) -> str:
    """Make the table of each part's gain, beginning with the original's step; "" if the ladder is not complete."""
    rungs, without = results["summary"]["ladder"], results["summary"]["without"]
    if not rungs:
        return ""
    first = rungs[0]["seconds"]
    lines = [
        [
            f"+ {rung['part']}" if rung["part"] else "the original's step",
            f"{rung['seconds']:.2f}",
            f"{rung['gain']:.2f}" if rung["part"] else "",
            f"{first / rung['seconds']:.2f}",
            f"{rung['peak_mb']:,.0f}",
            f"{without[rung['part']]['time']:.2f}" if rung["part"] in without else "",
        ]
        for rung in rungs
    ]
    header = ["", "s/step", "× by this part", "× in all", "peak, MB", "ours without it, ×"]
    return markdown(header, lines)


def plotted(row: dict) -> bool:
    """Return whether `plot` shows a row."""
    return "seconds" in row and row["style"] in STYLES


def plot(results: dict, path: Path) -> None:
    """Plot completion tokens a second and peak memory over prompt : completion, a column for each K."""
    measured = grouped((row for row in results["rows"] if plotted(row)), lambda row: row["precision"])
    precision, rows = max(measured, key=lambda found: len(found[1]))
    by_k = sorted(grouped(rows, lambda row: row["candidates"]))
    title = f"A training step, 135M model, 8 × 256 tokens, {precision}: over prompt + completion tokens"
    with figure(path, results, title, (2, len(by_k)), (3.2 * len(by_k) + 0.6, 5.2)) as panels:
        for column, (candidates, same) in enumerate(by_k):
            lengths = sorted({(row["prompt"], row["completion"]) for row in same}, reverse=True)
            for line, (name, unit, scale) in enumerate(
                (("tokens_per_second", "completion tokens / s", 1.0), ("peak_mb", "peak above the models, GB", 1e-3))
            ):
                panel = panels[line][column]
                for row in same:
                    place = lengths.index((row["prompt"], row["completion"]))
                    place += (list(STYLES).index(row["style"]) - 1) * 0.27
                    value = row[name] * scale
                    panel.bar(place, value, width=0.25, color=STYLES[row["style"]][0])
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

        handles = [Patch(color=colour, label=label) for colour, label in STYLES.values()]
        panels[0][0].legend(handles=handles, frameon=False, loc="upper left", fontsize=7.5)


def plot_ablation(results: dict, path: Path) -> None:
    """Plot a waterfall from the original's step to ours."""
    rungs = results["summary"]["ladder"]
    candidates, prompt = CENTRE
    title = f"From the original's step to ours: K = {candidates}, {prompt} + {LENGTH - prompt} tokens, bf16"
    with figure(path, results, title, (1, 1), (8, 3.1)) as panels:
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


SECTIONS = {
    "step": Section(
        "step",
        "A training step",
        paragraph("""
            The 135M demo model, 8 sequences of 256 tokens, a process for each case. *original*: padded to 512, full
            logits, the reference in every step; *full-logits*: no padding; *full-logits-cached*: the reference's
            log-probs known; *trl*: DPOTrainer, loss_type exo_pair, with gradient checkpointing, *trl-plain* without,
            *trl-cached* with reference log-probs computed beforehand; *exo_fast*: shared prompt, fused head, reference
            log-probs known; *exo_fast-reference*: with the reference in the step; *-unshared*, *-unfused*: without
            that part. *tokens/s*: of completions. *peak*: above the loaded models. Errors of the first step's loss and
            gradient against float64 of the same weights, relative. First the two ends of the grid: many candidates of
            a long prompt, and a pair of long completions.
        """),
        table,
        plot,
        plotted,
    ),
    "ablation": Section(
        "step",
        "What each part gives",
        paragraph(f"""
            K = {CENTRE[0]}, {CENTRE[1]} + {LENGTH - CENTRE[1]} tokens, bf16: from the original's step to ours, one part
            added after another; and ours without one part.
        """),
        ablation_table,
        plot_ablation,
    ),
}
