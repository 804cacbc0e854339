"""The report of the suite `memory`: measurements beside predictions."""

from __future__ import annotations

from pathlib import Path

from exo_fast.benchmarks.harness.provenance import OURS
from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.benchmarks.report.cells import left_out, strong
from exo_fast.benchmarks.report.figure import DARK, ORANGE, colour_of, figure
from exo_fast.benchmarks.report.section import Section, paragraph


def table(results: dict) -> str:
    """Make the table of every step: measured, predicted, and its largest parts."""
    lines = [
        [
            f"K = {row['candidates']}, {row['prompt']} + {row['completion']}, {row['sequences']} sequences",
            ", ".join([row["precision"], row["optimizer"], *["checkpointed"] * row["gradient_checkpointing"]]),
            strong(row["method"], row["method"] == OURS),
            f"{row['peak_mb']:,.0f}",
            f"{row['predicted_mb']:,.0f}",
            f"{row['predicted_mb'] / row['peak_mb']:.2f}",
            ", ".join(f"{name} {size:,.0f}" for name, size in _largest(row["parts_mb"])),
            f"{row['seconds']:.2f}",
        ]
        for row in results["rows"]
        if "seconds" in row
    ]
    if not lines:
        return "\n\n".join(left_out(results["rows"]))
    header = ["prompt + completion", "step", "method", "measured, MB", "predicted, MB", "predicted / measured"]
    made = markdown([*header, "of which mostly, MB", "s/step"], lines, left=3)
    found = results["summary"]
    error = f"Largest error of a prediction {found['largest_error']:.0%}, mean {found['mean_error']:.0%}."
    return "\n\n".join([made, error, *left_out(results["rows"])])


def _largest(parts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: part[1], reverse=True)[:3]


def plot(results: dict, path: Path) -> None:
    """Plot measured peaks as bars, predictions as marks."""
    rows = [row for row in results["rows"] if "seconds" in row]
    with figure(
        path, results, "Peak memory of a step, 135M model: measured (bars) and predicted (marks)",
        (1, 1), (8, 0.9 + 0.27 * len(rows)),
    ) as panels:  # fmt: skip
        panel = panels[0][0]
        labels = []
        for place, row in enumerate(rows):
            measured, predicted = row["peak_mb"] / 1e3, row["predicted_mb"] / 1e3
            panel.barh(place, measured, height=0.66, color=colour_of(row["method"]))
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


SECTIONS = {
    "memory": Section(
        "memory",
        "Memory, predicted and measured",
        paragraph("""
            Steps of a model of SmolLM2-135M's shape, a process each: the peak of resident memory, models and optimizer
            included, beside what `exo-fast memory` works out from the configuration alone, which is of tensors: holes
            that the C library's heap keeps between them are not in it, but in the margin of its verdict.
        """),
        table,
        plot,
    ),
}
