"""The plot of the predicted schedules."""

from __future__ import annotations

from pathlib import Path

from exo_fast.benchmarks.report.figure import DARK, GREEN, GREY, ORANGE, PURPLE, SKY

COLOURS = {"full logits": GREY, "chunked": SKY, "kept": GREEN, "two-pass": ORANGE, "fused": PURPLE}


def plot(rows: list[dict], path: Path) -> None:
    """Plot the time of every schedule over the time of its 6·N·D·V flops at the peak, a panel for each board."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    boards = list(rows[0]["boards"])
    models = list(dict.fromkeys(row["model"] for row in rows))
    end = 6.0  # longer bars are cut but keep their number
    figure, panels = pyplot.subplots(1, len(boards), figsize=(12, 4.4), sharex=True, sharey=True, layout="constrained")
    for panel, board in zip(panels, boards, strict=True):
        for row in rows:
            time = row["boards"][board]
            if not time["fits"]:
                continue
            slot = list(COLOURS).index(row["schedule"])
            place = models.index(row["model"]) + (slot - 2) * 0.16
            value = 1 / time["share_of_peak"]
            label = row["schedule"] if row["model"] == models[0] and board == boards[0] else None
            panel.barh(place, min(value, end), height=0.15, color=COLOURS[row["schedule"]], label=label)
            text = f"{value:.1f}" + (" →" if value > end else "")
            panel.text(min(value, end) + 0.08, place, text, va="center", fontsize=7, color=DARK)
        panel.axvline(1, color=DARK, linewidth=0.8, linestyle=":")
        panel.set_xlim(0, end + 1)
        panel.set_title(board, fontsize=11)
        panel.set_xlabel("× time of 6·N·D·V flops at peak", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(models)), models)
    panels[0].invert_yaxis()
    figure.suptitle(f"Predicted, not measured: group loss, forward and backward, {rows[0]['tokens']:,} tokens, bf16")
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
