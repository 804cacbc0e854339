"""The report of the suite `op`: every measurement, ours against the fastest peers, and the plot of both."""

from __future__ import annotations

from pathlib import Path

from exo_fast.benchmarks.harness.provenance import MODELS, OURS, WORK, grouped
from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.benchmarks.report.cells import bandwidth, error_cell, left_out, seconds_cell, strong
from exo_fast.benchmarks.report.figure import DARK, colour_of, figure
from exo_fast.benchmarks.report.section import Section, paragraph


def claims(results: dict) -> str:
    """Compare ours with the fastest peers, a line for each problem."""
    lines = []
    for found in results["summary"]["comparisons"]:
        if "fastest" not in found:
            continue
        lines.append(
            [
                f"{found['width']:,} × {found['vocab']:,}",
                found["precision"],
                problem_name(found),
                f"{found['share']:.2f}",
                found["fastest"],
                f"{found['over_fastest']:.2f}",
                found.get("equal", ""),
                f"{found['over_equal']:.2f}" if "equal" in found else "",
            ]
        )
    header = ["head", "dtype", "problem", "of floor", "fastest peer", "ours / it", "with float32 logits", "ours / it"]
    return markdown(header, lines, left=3) if lines else ""


def table(results: dict) -> str:
    """Show every measurement, a table for each head and dtype."""
    rates = {_head(floor): floor["gflops"] for floor in results.get("summary", {}).get("floors", [])}
    blocks = []
    for head, rows in grouped(results["rows"], _head):
        title = f"**{MODELS.get(head[:2], 'Head')}, {head[0]:,} × {head[1]:,}, {head[2]}**"
        if head in rates:
            title += " (products: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates[head].items()) + " GF/s)"
        cce = {_problem(row): row for row in rows if row["method"] == "cce" and "seconds" in row}
        lines = [_line(row, cce.get(_problem(row)), head[2] == "bf16") for row in rows if "seconds" in row]
        header = ["problem", "method", *(["logits"] if head[2] == "bf16" else []), "seconds", "of floor", "/ CCE"]
        header += ["scratch, MB", "log-prob, nats", "loss", "dH", "dW"]
        if lines:
            blocks.append(f"{title}\n\n{markdown(header, lines, left=3 if head[2] == 'bf16' else 2)}")
    return "\n\n".join(blocks + left_out(results["rows"]) + bandwidth(results))


def _line(row: dict, cce: dict | None, narrow: bool) -> list[str]:
    errors = row["errors"]
    return [
        problem_name(row),
        strong(row["method"], row["method"] == OURS),
        *(["fp32" if row["float32_logits"] else "rounded"] if narrow else []),
        seconds_cell(row["seconds"]),
        f"{row['share']:.2f}",
        f"{cce['share'] / row['share']:.2f}" if cce else "",
        f"{row['scratch_mb']:,.0f}",
        *(error_cell(errors.get(name)) for name in ("logps", "loss", "dH", "dW")),
    ]


def problem_name(row: dict) -> str:
    """Describe a row's problem: "K = 4, N = 8,192, dH"."""
    tokens = f"N = {row['tokens']:,}"
    if row["operation"] == "kernel":
        return f"{row['method']} alone, {row['tokens']:,} rows"
    if row["operation"] == "logprobs":
        return f"log-probs, {tokens}, {WORK[row['work']]}"
    long = f" × {row['completion']:,}" if row["completion"] > 1000 else ""
    return f"K = {row['candidates']}{long}, {tokens}, {WORK[row['work']]}"


def _head(row: dict) -> tuple:
    return row["width"], row["vocab"], row["precision"]


def _problem(row: dict) -> tuple:
    return tuple(row[name] for name in ("operation", "candidates", "completion", "tokens", "work"))


def plotted(row: dict) -> bool:
    """Return whether `plot` may show a row."""
    return "seconds" in row and row["work"] == "both"


def plot(results: dict, path: Path) -> None:
    """Plot the time over the time of the matrix products alone: every method on one problem of each head and dtype."""
    chosen = []
    for head, rows in grouped(results["rows"], lambda row: (row["width"], row["vocab"], row["precision"])):
        timed = [row for row in rows if plotted(row)]
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
    with figure(path, results, title, (lines, columns), size, height_ratios=heights) as panels:
        for panel in panels.flat[len(chosen) :]:
            panel.remove()
        for panel, (head, rows) in zip(panels.flat, chosen, strict=False):
            rows = sorted(rows, key=lambda row: row["share"], reverse=True)
            cut = 4.0
            for place, row in enumerate(rows):
                value = 1 / row["share"]
                rounded = not row["float32_logits"]
                panel.barh(
                    place, min(value, cut), height=0.7, color=colour_of(row["method"]), alpha=0.45 if rounded else 1.0
                )
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


SECTIONS = {
    "op-claims": Section(
        "op",
        "The operation: ours against the fastest peers",
        paragraph("""
            Ours against the fastest peer of each problem, and against the fastest whose logits are float32 too. *of
            floor*: the time of the matrix products alone, at rates measured in the same process, over our time. *ours /
            it*: our time over the peer's, both taken as multiples of their own floor, so that a drift of the machine
            cancels; below 1 ours is faster. In the plot: every method on one problem of each head.
        """),
        claims,
        plot,
        plotted,
    ),
    "op": Section(
        "op",
        "The operation: every measurement",
        paragraph("""
            Hidden states and head to the loss and the gradients named. *of floor*: products alone over the time; */
            CCE*: time over Apple CCE's, both as multiples of their floor; *scratch*: peak memory above inputs, dH
            and a float32 dW; then errors against float64 on few rows of the same head: of log-probs (root mean square,
            nats), and of the loss, dH and dW (relative).
        """),
        table,
    ),
}
