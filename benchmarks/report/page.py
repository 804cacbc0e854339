"""Tables and plots of the results of `exo-fast bench`.

    python -m exo_fast.benchmarks.report.page        benchmarks/results → docs/performance.md, docs/images
    python -m exo_fast.benchmarks.report.page --results runs/bench --page runs/bench/report.md --images runs/bench

A section stands between `<!-- bench: NAME -->` and `<!-- end -->`: its plot, how to read it, its table, and the
command, machine, versions and date that it is from. What the results have nothing for is "Not measured yet.", not what
another run left there. A page that does not exist is made with the sections that there are.
`tests/benchmarks/test_report.py` holds the docs to the results that lie in the repository.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_fast.benchmarks.harness import compare
from exo_fast.benchmarks.harness.provenance import MODELS, OURS, WORK, grouped, provenance
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.benchmarks.report import figure
from exo_fast.benchmarks.suites.data import CANDIDATES, ROWS
from exo_fast.benchmarks.suites.step import CENTRE, GRID, LENGTH
from exo_fast.training.machine import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "performance.md"
IMAGES = REPOSITORY / "docs" / "images"
NOT_YET = "Not measured yet."
EXTREMES = (max(GRID), min(GRID))  # of (K, tokens of the prompt): what the step gains most, and least


@dataclass(frozen=True)
class Section:
    """A table, and what belongs to it."""

    suite: str
    title: str
    note: str  # how to read it
    make: Callable[[dict], str]  # results of the suite → the table; "" when they have nothing for it
    plot: Callable[[dict, Path], None] | None = None  # results of the suite, PNG to write
    plotted: Callable[[dict], bool] = lambda row: "seconds" in row  # the rows that the plot shows


def sections(results: dict[str, dict], images: str) -> dict[str, str]:
    """{name of the section: its text}, of the suites that have results. `images`: where the page finds its plots."""
    made = {}
    for name, section in SECTIONS.items():
        found = results.get(section.suite)
        table = section.make(found) if found else ""
        if table:
            plot = [f"![{section.title}]({images}{_png(name)})"] if _has_plot(section, found) else []
            made[name] = "\n\n".join([*plot, section.note, table, provenance(found)])
    return made


def _has_plot(section: Section, results: dict) -> bool:
    return bool(section.plot) and any(section.plotted(row) for row in results["rows"])


def draw(results: dict[str, dict], names: Iterable[str], folder: Path) -> list[Path]:
    """The plots of these sections, as PNG."""
    drawn = []
    for name in names:
        section = SECTIONS[name]
        if _has_plot(section, results[section.suite]):
            path = folder / _png(name)
            section.plot(results[section.suite], path)
            drawn.append(path)
    return drawn


def _png(name: str) -> str:
    return f"bench-{name}.png"


# The operation


def _op(results: dict) -> str:
    rates = {_head(floor): floor["gflops"] for floor in results.get("summary", {}).get("floors", [])}
    blocks = []
    for head, rows in grouped(results["rows"], _head):
        title = f"**{MODELS.get(head[:2], 'Head')}, {head[0]:,} × {head[1]:,}, {head[2]}**"
        if head in rates:
            title += " (products: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates[head].items()) + " GF/s)"
        cce = {_problem(row): row for row in rows if row["method"] == "cce" and "seconds" in row}
        lines = [_op_line(row, cce.get(_problem(row)), head[2] == "bf16") for row in rows if "seconds" in row]
        header = ["problem", "method", *(["logits"] if head[2] == "bf16" else []), "seconds", "of floor", "/ CCE"]
        header += ["scratch, MB", "log-prob, nats", "loss", "dH", "dW"]
        if lines:
            blocks.append(f"{title}\n\n{markdown(header, lines, left=3 if head[2] == 'bf16' else 2)}")
    return "\n\n".join(blocks + _left_out(results["rows"]) + _bandwidth(results))


def _op_line(row: dict, cce: dict | None, narrow: bool) -> list[str]:
    errors = row["errors"]
    return [
        problem_name(row),
        _strong(row["method"], row["method"] == OURS),
        *(["fp32" if row["float32_logits"] else "rounded"] if narrow else []),
        f"{row['seconds']:.2f}",
        f"{row['share']:.2f}",
        f"{cce['share'] / row['share']:.2f}" if cce else "",
        f"{row['scratch_mb']:,.0f}",
        *(_error(errors.get(name)) for name in ("logps", "loss", "dH", "dW")),
    ]


def problem_name(row: dict) -> str:
    """What the operation was asked for in a row: "K = 4, N = 8,192, dH"."""
    tokens = f"N = {row['tokens']:,}"
    if row["operation"] == "kernel":
        return f"{row['method']} alone, {row['tokens']:,} rows"
    if row["operation"] == "logprobs":
        return f"log-probs, {tokens}, {WORK[row['work']]}"
    long = f" × {row['completion']:,}" if row["completion"] > 1000 else ""
    return f"K = {row['candidates']}{long}, {tokens}, {WORK[row['work']]}"


def _op_claims(results: dict) -> str:
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


# How it grows


def _scaling(results: dict) -> str:
    fits = [
        [
            fit["axis"],
            _strong(fit["method"], fit["method"] == OURS),
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
            _strong(row["method"], row["method"] == OURS),
            f"{row['width']:,} × {row['vocab']:,}, {row['precision']}",
            f"K = {row['candidates']}, N = {row['tokens']:,}",
            f"{row['seconds']:.2f}",
            f"{row['share']:.2f}",
            f"{row['scratch_mb']:,.0f}",
            *(_error(row["errors"].get(name)) for name in ("logps", "loss", "dH", "dW")),
        ]
        for row in results["rows"]
        if "seconds" in row
    ]
    header = ["grows", "method", "head", "from – to", "time", "time over floor", "scratch"]
    below = ["grows", "method", "head", "problem", "seconds", "of floor", "scratch, MB", "log-prob, nats", "loss", "dH"]
    tables = [markdown(header, fits, left=4), "The points:", markdown([*below, "dW"], points, left=4)]
    return "\n\n".join(tables + _left_out(results["rows"]) + _bandwidth(results))


# The step


def _step(results: dict) -> str:
    blocks = []
    for precision, rows in grouped(results["rows"], lambda row: row["precision"]):
        ours = {_step_problem(row): row for row in rows if row["style"] == OURS and "seconds" in row}
        lines = []
        for row in rows:
            if "seconds" not in row:
                continue
            best = ours.get(_step_problem(row))
            lines.append(
                [
                    f"K = {row['candidates']}, {row['prompt']} + {row['completion']}",
                    _strong(row["style"], row["style"] == OURS),
                    f"{row['seconds']:.2f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['peak_mb']:,.0f}",
                    f"{row['seconds'] / best['seconds']:.2f}" if best else "",
                    f"{row['peak_mb'] / best['peak_mb']:.2f}" if best else "",
                    _error(row["errors"]["loss"]),
                    _error(row["errors"]["gradient"]),
                ]
            )
        header = ["prompt + completion", "style", "s/step", "tokens/s", "peak, MB", "× exo_fast", "× its memory"]
        if lines:
            table = markdown([*header, "error, loss", "error, gradient"], lines, left=2)
            blocks.append(f"**{precision}**\n\n{table}")
    return "\n\n".join(_step_claims(results) + blocks + _left_out(results["rows"]))


def _step_claims(results: dict) -> list[str]:
    """Long and short prompts: what the step gains most and least, in a table; or nothing."""
    ratios = results["summary"]["ratios"]
    lines = []
    for candidates, prompt in EXTREMES:
        where = f"K{candidates}/{prompt}+{LENGTH - prompt}"
        for found in ratios:
            precision, _, at = found["problem"].partition("/")
            if at == where and found["other"] in ("original", "full-logits"):
                problem = f"K = {candidates}, {prompt} + {LENGTH - prompt}"
                times = f"{found['time']:.2f}", f"{found['memory']:.2f}"
                lines.append(
                    [problem, precision, found["other"], _strong(found["ours"], found["ours"] == OURS), *times]
                )
    header = ["prompt + completion", "dtype", "theirs", "ours", "their time / ours", "their memory / ours"]
    return [markdown(header, lines, left=4)] if lines else []


def _ablation(results: dict) -> str:
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


# Data, and where an epoch goes


def _data(results: dict) -> str:
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
    return "\n\n".join([markdown(header, lines), *_left_out(results["rows"])]) if lines else ""


def _epoch(results: dict) -> str:
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


# Memory


def _memory(results: dict) -> str:
    lines = [
        [
            f"K = {row['candidates']}, {row['prompt']} + {row['completion']}, {row['sequences']} sequences",
            ", ".join([row["precision"], row["optimizer"], *["checkpointed"] * row["gradient_checkpointing"]]),
            _strong(row["method"], row["method"] == OURS),
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
        return "\n\n".join(_left_out(results["rows"]))
    header = ["prompt + completion", "step", "method", "measured, MB", "predicted, MB", "predicted / measured"]
    table = markdown([*header, "of which mostly, MB", "s/step"], lines, left=3)
    found = results["summary"]
    error = f"Largest error of a prediction {found['largest_error']:.0%}, mean {found['mean_error']:.0%}."
    return "\n\n".join([table, error, *_left_out(results["rows"])])


def _largest(parts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: part[1], reverse=True)[:3]


# What every table has in common


def _head(row: dict) -> tuple:
    return row["width"], row["vocab"], row["precision"]


def _problem(row: dict) -> tuple:
    return tuple(row[name] for name in ("operation", "candidates", "completion", "tokens", "work"))


def _step_problem(row: dict) -> tuple:
    return row["candidates"], row["prompt"], row["completion"]


def _strong(text: str, strong: bool) -> str:
    return f"**{text}**" if strong else text


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _bandwidth(results: dict) -> list[str]:
    """The rate of memory in a sentence, where the suite measured it."""
    return [f"A large copy moves {results['copy_gbps']:.1f} GB/s here."] if "copy_gbps" in results else []


def _left_out(rows: Iterable[dict]) -> list[str]:
    """A paragraph that names the cases without a measurement, by the reason, or none."""

    def reason(row: dict) -> str:
        return row.get("skipped") or f"failed: {row['failed']}"

    missing = grouped((row for row in rows if "skipped" in row or "failed" in row), reason)
    listed = [f"{', '.join(row['name'] for row in same)} ({why})" for why, same in missing]
    return [f"Not measured: {'; '.join(listed)}."] if listed else []


def _text(lines: str) -> str:
    return " ".join(lines.split())


SECTIONS = {
    "op-claims": Section(
        "op",
        "The operation: ours against the fastest peers",
        _text("""
            Ours against the fastest peer of each problem, and against the fastest whose logits are float32 too. *of
            floor*: the time of the matrix products alone, at rates measured in the same process, over our time. *ours /
            it*: our time over the peer's, both taken as multiples of their own floor, so that a drift of the machine
            cancels; below 1 ours is faster. In the plot: every method on one problem of each head.
        """),
        _op_claims,
        figure.operation,
        figure.in_operation,
    ),
    "op": Section(
        "op",
        "The operation: every measurement",
        _text("""
            Hidden states and head to the loss and the gradients named. *of floor*: products alone over the time; */
            CCE*: time over that of Apple CCE, both as multiples of their floor; *scratch*: peak memory above inputs, dH
            and a float32 dW; then errors against float64 on few rows of the same head: of log-probs (root mean square,
            nats), and of the loss, dH and dW (relative).
        """),
        _op,
    ),
    "scaling": Section(
        "scaling",
        "How time and memory grow",
        _text("""
            One size grows and the others stay. *time*, *scratch*: b of a·size^b, by least squares of the logarithms.
            *time over floor*: the same of the time over that of the products alone, measured in the same process: 0
            where the time grows as the products do.
        """),
        _scaling,
        figure.scaling,
    ),
    "step": Section(
        "step",
        "A training step",
        _text("""
            The 135M demo model, 8 sequences of 256 tokens, a process for each case. *original*: padded to 512, full
            logits, the reference in every step; *full-logits*: no padding; *full-logits-cached*: the reference's
            log-probs known; *trl*: DPOTrainer, loss_type exo_pair, with gradient checkpointing, *trl-plain* without,
            *trl-cached* with reference log-probs computed beforehand; *exo_fast*: shared prompt, fused head, reference
            log-probs known; *exo_fast-reference*: with the reference in the step; *-unshared*, *-unfused*: without
            that part. *tokens/s*: of completions. *peak*: above the loaded models. Errors of the first step's loss and
            gradient against float64 of the same weights, relative. First the two ends of the grid: many candidates of
            a long prompt, and a pair of long completions.
        """),
        _step,
        figure.step,
        figure.in_step,
    ),
    "ablation": Section(
        "step",
        "What each part gives",
        _text(f"""
            K = {CENTRE[0]}, {CENTRE[1]} + {LENGTH - CENTRE[1]} tokens, bf16: from the original's step to ours, one part
            added after another; and ours without one part.
        """),
        _ablation,
        figure.ablation,
    ),
    "data": Section(
        "data",
        "Reading, tokenising and packing",
        _text(f"""
            {ROWS:,} prompts with K = {CANDIDATES} candidates. *× the least*: over parsing the rows' JSON, one call of
            the tokenizer on all texts, and making one tensor of all ids.
        """),
        _data,
    ),
    "epoch": Section(
        "data",
        "Where an epoch goes",
        _text("""
            A run of `exo-fast align` on DeepSpeed. *demo*: the demo's 135M model and lengths; *long*: the same model,
            prompts of 192 and candidates of 64 tokens; *tiny*: a model of two layers, which takes next to nothing, so
            that what is left is what surrounds it.
        """),
        _epoch,
        figure.epoch,
    ),
    "memory": Section(
        "memory",
        "Memory, predicted and measured",
        _text("""
            Steps of a model of SmolLM2-135M's shape, a process each: the peak of resident memory, models and optimizer
            included, beside what `exo-fast memory` works out from the configuration alone, which is of tensors: holes
            that the C library's heap keeps between them are not in it, but in the margin of its verdict.
        """),
        _memory,
        figure.memory,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files [benchmarks/results]")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write to [docs/performance.md]")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of plots [docs/images]")
    options = parser.parse_args(argv)
    written = write(options.results, options.page, options.images)
    print("Written: " + ", ".join(str(path) for path in written))
    return 0


def write(folder: Path, page: Path, images: Path) -> list[Path]:
    """Results of a folder → sections of a page (made when there is none) and plots. Returns what was written.

    Plots that the results have nothing for are removed from the folder.
    """
    results = compare.read_results(folder)
    where = Path(os.path.relpath(images, page.parent)).as_posix()
    made = sections(results, "" if where == "." else f"{where}/")
    if not page.exists():
        page.write_text(_empty_page(made))
    rewrite(page, "bench", dict.fromkeys(SECTIONS, NOT_YET) | made)
    images.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, made, images)
    for path in (images / _png(name) for name in SECTIONS):
        if path not in drawn:
            path.unlink(missing_ok=True)
    return [page, *drawn]


def _empty_page(names: Iterable[str]) -> str:
    parts = [f"## {SECTIONS[name].title}\n\n<!-- bench: {name} -->\n<!-- end -->\n" for name in names]
    return "\n".join(["# Benchmarks of exo_fast\n", *parts])


if __name__ == "__main__":
    sys.exit(main())
