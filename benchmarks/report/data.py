"""The report of the suite `data`: rows a second, and the stages of an epoch."""

from __future__ import annotations

import itertools
from pathlib import Path

from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.benchmarks.methods.epoch_profile import MODEL
from exo_fast.benchmarks.report.cells import left_out
from exo_fast.benchmarks.report.figure import BLUE, DARK, ORANGE, figure
from exo_fast.benchmarks.report.section import Section, paragraph
from exo_fast.benchmarks.suites.data import CANDIDATES, ROWS


def table(results: dict) -> str:
    """Make the table of rows read, tokenised and packed."""
    lines = [
        [
            row["part"],
            f"{row['examples_per_second']:,}",
            f"{row['tokens_per_second']:,}",
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / row['baseline_seconds']:.2f}",
        ]
        for row in results["rows"]
        if "examples_per_second" in row
    ]
    header = ["", "examples / s", "tokens / s", "seconds", "× the least"]
    return "\n\n".join([markdown(header, lines), *left_out(results["rows"])]) if lines else ""


def epoch_table(results: dict) -> str:
    """Make the table of every epoch's stages, in seconds and shares; "" if no epoch was profiled."""
    epochs = [row for row in results["rows"] if "stages" in row]
    if not epochs:
        return ""
    blocks = []
    for key, kind in (("share_of_steps", "every step"), ("share_of_run", "once a run")):
        names = dict.fromkeys(s["stage"] for row in epochs for s in row["stages"] if s["when"] == kind)
        at = [{stage["stage"]: stage for stage in row["stages"]} for row in epochs]
        lines = []
        for name in names:
            found = [stages.get(name) for stages in at]
            cells = [f"{stage[key]:.1%}" if stage else "" for stage in found]
            lines.append([name, *itertools.chain(*zip((_seconds(stage) for stage in found), cells, strict=True))])
        share = "of the steps" if key == "share_of_steps" else "of the run"
        header = [kind, *itertools.chain(*((f"{row['part'].removeprefix('epoch/')}, s", share) for row in epochs))]
        blocks.append(markdown(header, lines))
    over = results["summary"]["over_5_percent"]
    if over:
        told = [f"{part.removeprefix('epoch/')}: {_stages(stages)}" for part, stages in over.items()]
        blocks.append(f"Over 5% of the steps, besides the model, attention, head and loss: {'; '.join(told)}.")
    return "\n\n".join(blocks)


def _stages(shares: dict[str, float]) -> str:
    return ", ".join(f"{stage} {share:.1%}" for stage, share in shares.items()) or "none"


def _seconds(stage: dict | None) -> str:
    return "" if stage is None else f"{stage['seconds']:.3f}"


def plot_epoch(results: dict, path: Path) -> None:
    """Plot the stages' shares of the steps of every profiled epoch, largest first."""
    epochs = [row for row in results["rows"] if "stages" in row]
    names = [stage["stage"] for stage in epochs[0]["stages"] if stage["when"] == "every step"]
    title = "Where the steps of an epoch go: share of their time (dotted: 5%)"
    with figure(path, results, title, (1, len(epochs)), (3.2 * len(epochs) + 2.2, 3.4), sharey=True) as panels:
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


SECTIONS = {
    "data": Section(
        "data",
        "Reading, tokenising and packing",
        paragraph(f"""
            {ROWS:,} prompts with K = {CANDIDATES} candidates. *× the least*: over parsing the rows' JSON, one call of
            the tokenizer on all texts, and making one tensor of all ids.
        """),
        table,
    ),
    "epoch": Section(
        "data",
        "Where an epoch goes",
        paragraph("""
            A run of `exo-fast align` on DeepSpeed. *demo*: the demo's 135M model and lengths; *long*: the same model,
            prompts of 192 and candidates of 64 tokens; *tiny*: a model of two layers, which takes next to nothing, so
            that what is left is what surrounds it.
        """),
        epoch_table,
        plot_epoch,
    ),
}
