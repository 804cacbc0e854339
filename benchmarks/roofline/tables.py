"""Predict the time of the GPU kernels and schedules from their flops and bytes; nothing is measured.

A100, H100, B200 and MI300X × the heads of Llama-3-8B, Qwen3-0.6B and Gemma-3-270m × 2,048, 8,192 and 32,768 tokens;
bf16 operands, float32 logits. The model and its assumptions: benchmarks/roofline/model.py; their sources:
docs/gpu-analysis.md. Registers, shared memory and occupancy come from `make certify` if it has run here, otherwise
from the last roofline.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from exo_fast.benchmarks.harness.tables import markdown, number, rewrite
from exo_fast.benchmarks.roofline import model, nvidia
from exo_fast.benchmarks.roofline.plot import plot
from exo_fast.kernels import linear_logsumexp
from exo_fast.training import machine

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "benchmarks" / "results" / "roofline.json"
PLOT = ROOT / "docs" / "images" / "roofline.png"
CERTIFICATION = ROOT / "build" / "certification.json"
EXAMPLES = """examples:
  python -m exo_fast.benchmarks.roofline.tables                  tables, results/roofline.json, docs/images/roofline.png
  python -m exo_fast.benchmarks.roofline.tables --tokens 32768   tables for 32,768 completion tokens
  python -m exo_fast.benchmarks.roofline.tables --triton 0.5     what if Triton products reach half of every peak
  python -m exo_fast.benchmarks.roofline.tables --budget 256     chunks of 256 MiB
  make roofline                                  as the first, and the tables of the docs
"""
BUDGETS = (256, 512, 1024, 2048, 4096)  # MiB
DEFAULT_BUDGET = 4096  # MiB, the default of the triton backend on all of these boards
TABLE_TOKENS = 8192
WIDTHS = range(256, 16385, 256)
# Products: (layout in nvidia.py, m, n, depth). Logits, dH and dW of both shapes below, and of 2,731 rows.
PRODUCTS = (
    ("logits", 8192, 128256, 4096),
    ("logits", 16384, 151936, 1024),
    ("logits", 512, 151936, 1024),
    ("dH", 2731, 1024, 151936),
    ("dH", 8192, 1024, 151936),
    ("dW", 151936, 1024, 2731),
    ("dW", 128256, 4096, 8192),
)
STEPS = ((8192, model.HEADS[0]), (512, model.HEADS[0]), (16384, model.HEADS[1]), (512, model.HEADS[1]))
LETTER = {"products": "P", "memory": "M", "L2": "C", "exponentials": "E"}


def kernel_rows(boards: tuple[model.Board, ...], tokens: int) -> Iterator[dict]:
    """Return every launch on all `tokens` rows at once, with its time on each board."""
    for head in model.HEADS:
        of_board = [model.launches(board, head, tokens) for board in boards]
        for launches in zip(*of_board, strict=True):
            times = {}
            for board, launch in zip(boards, launches, strict=True):
                floor, bound = model.floor(launch, board)
                times[board.name] = {
                    "floor_ms": floor * 1e3,
                    "bound": bound,
                    "predicted_ms": model.predict(launch, board) * 1e3,
                    "cached_bytes": launch.cached,
                    "read_bytes": launch.read,
                    "written_bytes": launch.written,
                }
            first = launches[0]
            yield {
                "model": head.model,
                "tokens": tokens,
                "launch": first.name,
                "flops": first.flops,
                "exponentials": first.exponentials,
                "logits_bytes": first.logits,
                "boards": times,
            }


def schedule_rows(boards: tuple[model.Board, ...], tokens: int, budget: int) -> Iterator[dict]:
    """Return forward and backward of the group loss for every schedule."""
    for head in model.HEADS:
        work = tokens * head.width * head.vocab
        for make in model.SCHEDULES:
            times = {}
            for board in boards:
                schedule = make(board, head, tokens, budget)
                seconds = schedule.seconds(board)
                times[board.name] = {
                    "predicted_ms": seconds * 1e3,
                    "share_of_peak": 6 * work / board.target.flops / seconds,
                    "bytes": schedule.bytes,
                    "fits": schedule.resident(head) <= board.memory,
                }
            yield {
                "model": head.model,
                "tokens": tokens,
                "schedule": schedule.name,
                "flops": schedule.flops,
                "flops_per_ndv": schedule.flops / work,
                "logits_bytes_per_logit": schedule.logits / (tokens * head.vocab),
                "scratch_bytes": schedule.scratch,
                "chunks": schedule.chunks,
                "boards": times,
            }


def even_share(board: model.Board, head: model.Head, tokens: int, budget: int) -> float | None:
    """Return the Triton share of peak at which `kept` takes as long as `chunked`; None if it is above 1."""
    goal = model.chunked(board, head, tokens, budget).seconds(board)

    def slower(share: float) -> bool:
        changed = replace(board, triton=share)
        return model.kept(changed, head, tokens, budget).seconds(changed) > goal

    low, high = 0.0, 1.0
    if slower(high):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if slower(middle) else (low, middle)
    return high


def widest(board: model.Board, tokens: int, budget: int) -> int:
    """Return the largest hidden size, in steps of 256, at which `kept` is no slower than `chunked` (V of Llama-3)."""
    best = 0
    for width in WIDTHS:
        if advantage(board, replace(model.HEADS[0], width=width), tokens, budget) < 1:
            break
        best = width
    return best


def fused_against_chunks(board: model.Board, head: model.Head, tokens: int) -> dict:
    """Return the rows of a chunk, a power of two, from which `kept` is no slower than `fused`, which needs no chunk;
    and how many times slower `fused` is than chunks of 192 rows."""

    def kept(rows: int) -> float:
        return model.kept(board, head, tokens, rows * model.kept_row(head)).seconds(board)

    fused = model.fused(board, head, tokens, 0).seconds(board)
    rows = next(2**power for power in range(20) if kept(2**power) <= fused)
    return {"least_rows": rows, "least_bytes": rows * model.kept_row(head), "fused_over_192_rows": fused / kept(192)}


def advantage(board: model.Board, head: model.Head, tokens: int, budget: int) -> float:
    """Return how many times faster `kept` is than `chunked`."""
    chunked, kept = (make(board, head, tokens, budget) for make in (model.chunked, model.kept))
    return chunked.seconds(board) / kept.seconds(board)


def choice_rows(boards: tuple[model.Board, ...], tokens: int, budget: int) -> Iterator[dict]:
    """Compare `kept` with `chunked` on each board: how much faster it is, and from which Triton share on."""
    for board in boards:
        row = {"board": board.name, "triton": board.triton, "library": board.library, "heads": {}}
        for head in model.HEADS:
            row["heads"][head.model] = {
                "even_share": even_share(board, head, tokens, budget),
                "faster": {n: advantage(board, head, n, budget) for n in model.TOKENS},
                **fused_against_chunks(board, head, tokens),
            }
        row["widest"] = widest(board, tokens, budget)
        yield row


def budget_rows(board: model.Board, tokens: int) -> Iterator[dict]:
    """Return the effect of the memory budget on `kept` and `chunked`: chunks, and the traffic of dW's float32 sums."""
    for head in model.HEADS:
        for budget in BUDGETS:
            row = {"board": board.name, "model": head.model, "tokens": tokens, "budget_mib": budget}
            for make in (model.kept, model.chunked):
                schedule = make(board, head, tokens, budget * model.MIB)
                row[schedule.name] = {
                    "chunks": schedule.chunks,
                    "rows": -(-tokens // schedule.chunks),
                    "sums_bytes": 4 * head.vocab * head.width * (2 * schedule.chunks - 1),
                    "predicted_ms": schedule.seconds(board) * 1e3,
                }
            yield row


def published_rows(boards: tuple[model.Board, ...]) -> list[dict]:
    """Return the model's predictions for three times that others measured and published."""
    a100, h100 = boards[:2]
    gemma, qwen = model.Head("Gemma-2-2B", 2304, 256000), model.Head("Qwen3.5", 2048, 248320)
    cce = model.linear_logsumexp_launch(a100, gemma, 8192, store=False)
    found = [
        ("CCE, forward only", a100, 8192, gemma, 46.4, "apple/ml-cross-entropy README", model.predict(cce, a100)),
        ("full logits", a100, 8192, gemma, 208.8, "the same", None),
        ("full logits", h100, 16384, qwen, 137.0, "huggingface/trl#6858", None),
    ]
    rows = []
    for what, board, tokens, head, published, source, seconds in found:
        if seconds is None:
            seconds = model.full_logits(board, head, tokens, 0).seconds(board)
        shape = [tokens, head.width, head.vocab]
        predicted = seconds * 1e3
        rows.append(
            {"what": what, "board": board.name, "shape": shape, "published_ms": published, "predicted_ms": predicted}
            | {"source": source}
        )
    return rows


def product_rows(boards: tuple[model.Board, ...]) -> Iterator[dict]:
    """Return flop/s of products by NVIDIA's model, of any kernel and of its idea of Triton's, and by assumed shares."""
    for board in boards:
        if board.heuristics is None:
            continue
        for layout, m, n, depth in PRODUCTS:
            flops = 2 * m * n * depth
            best, of_triton = (
                nvidia.product(board.heuristics, layout, m, n, depth, family) for family in ("GENERIC", "TRITON")
            )
            yield {
                "board": board.name,
                "product": layout,
                "shape": [m, n, depth],
                "nvidia": flops / best.seconds,
                "tile": [*best.tile],
                "stages": best.stages,
                "splits": best.splits,
                "nvidia_triton": flops / of_triton.seconds,
                "library": board.library * board.target.flops * depth / (depth + model.LIBRARY_FILL),
                "triton": board.triton * board.target.flops,
            }


def loop_rows(boards: tuple[model.Board, ...]) -> Iterator[dict]:
    """Return the times of `linear_logsumexp`, U stored, by its loop over the vocabulary, each in the configuration that
    is fastest with it, and of a step (`kept`, all rows in one chunk) with it.

    "drained": the pipeline fills again for every block, and the epilogue comes after the product. "flattened": it fills
    once. "hidden": a program's epilogue also runs beside its next product, the most that any loop can reach."""
    for tokens, head in STEPS:
        for board in boards:
            step = model.kept(board, head, tokens, tokens * model.kept_row(head)).seconds(board)
            rest = step - model.predict(model.linear_logsumexp_launch(board, head, tokens, store=True), board)
            loops = {}
            for loop in ("drained", "flattened", "hidden"):
                times = {}
                for config in linear_logsumexp.configs(board.target, "bf16"):
                    launch = model.linear_logsumexp_launch(board, head, tokens, True, config, loop != "drained")
                    launch = replace(launch, alone=launch.alone and loop != "hidden")
                    times[str(config)] = model.predict(launch, board)
                config = min(times, key=times.__getitem__)
                loops[loop] = {
                    "config": config,
                    "kernel_ms": times[config] * 1e3,
                    "step_ms": (rest + times[config]) * 1e3,
                }
            work = tokens * head.width * head.vocab / board.target.flops
            yield {
                "board": board.name,
                "model": head.model,
                "shape": [tokens, head.width, head.vocab],
                "floor_ms": 2 * work * 1e3,
                "step_floor_ms": 6 * work * 1e3,
                "loops": loops,
            }


def resources(certification: Path, earlier: Path) -> tuple[list[dict], str]:
    """Return (registers, shared memory and occupancy of the bf16 configurations in use, their source)."""
    if certification.exists():
        rows = json.loads(certification.read_text())["rows"]
        boards = {board.target.name: board for board in model.BOARDS}
        found = [
            {
                "board": boards[row["target"]].name,
                "kernel": row["kernel"],
                "variant": row["variant"],
                "config": row["config"],
                "registers": row["code"]["registers"],
                "shared_bytes": row["shared_memory"],
                "programs": row["programs"],
                "occupancy": row["occupancy"],
            }
            for row in rows
            if row["target"] in boards
            and row["code"]
            and row["dtype"] == ("fp32" if row["kernel"] == "group_loss" else "bf16")
            and _used(row, boards[row["target"]])
        ]
        return found, "make certify"
    if earlier.exists():
        return json.loads(earlier.read_text())["resources"], "the last roofline.json"
    return [], "missing: run make certify first"


def _used(row: dict, board: model.Board) -> bool:
    """Check whether a launch of the tables has this configuration; `linear_logsumexp` has one for narrow heads too."""
    if row["kernel"] != "linear_logsumexp":
        return row["default"]
    used = {str(model.default_config(board, head.width)) for head in model.HEADS}
    return row["config"] in used and "products" in row["claims"]  # not its merge


def boards_of(found: list[dict], **shares: float | None) -> tuple[model.Board, ...]:
    """Return the boards, with the number of programs on a multiprocessor from certification and the `shares` given. A
    library's share takes the place of NVIDIA's model."""
    given = {name: value for name, value in shares.items() if value}
    boards = []
    for board in model.BOARDS:
        resident: dict[str, int] = {}
        for row in found:
            if row["kernel"] == "linear_logsumexp" and row["board"] == board.name:
                config = row["config"]
                resident[config] = min(row["programs"], resident.get(config, row["programs"]))
        source = {"heuristics": None} if "library" in given else {}
        boards.append(replace(board, resident=tuple(resident.items()), **given, **source))
    return tuple(boards)


def collect(boards: tuple[model.Board, ...], budget: int, found: list[dict]) -> dict:
    """Collect all data of the tables as values that JSON can hold."""
    scratch = budget * model.MIB
    h200 = replace(model.H200, resident=boards[1].resident)
    nvidias = (*boards[:2], h200, boards[2])
    return {
        "predictions": "Nothing here was measured.",
        "products_by": nvidia.source(),
        "budget_mib": budget,
        "boards": [
            {
                **{key: value for key, value in asdict(board).items() if key not in ("target", "resident")},
                "board": board.name,
                "target": board.target.name,
                "flops": board.target.flops,
                "bandwidth": board.target.bandwidth,
                "exponentials": board.exponentials,
            }
            for board in boards
        ],
        "published": published_rows(boards),
        "kernels": [row for tokens in model.TOKENS for row in kernel_rows(boards, tokens)],
        "schedules": [row for tokens in model.TOKENS for row in schedule_rows(boards, tokens, scratch)],
        "choice": list(choice_rows(boards, TABLE_TOKENS, scratch)),
        "products": list(product_rows(nvidias)),
        "loops": list(loop_rows(nvidias)),
        "budgets": list(budget_rows(boards[1], TABLE_TOKENS)),
        "streams": model.stream_traffic(boards[1], scratch),
        "resources": found,
    }


# Tables: name -> Markdown. The docs hold them between markers of the same name.


def tables(results: dict, tokens: int = TABLE_TOKENS) -> dict[str, str]:
    """Return all tables of `results`; the tables of kernels and schedules are for `tokens` rows."""
    kernels = [row for row in results["kernels"] if row["tokens"] == tokens]
    schedules = [row for row in results["schedules"] if row["tokens"] == tokens]
    made = {
        "boards": _boards(results["boards"]),
        "published": _published(results["published"]),
        "bytes": _bytes(kernels),
        "times": _times(kernels),
        "schedules": _schedules(schedules),
        "choice": _choice(results["choice"]),
        "tokens": _by_tokens(results["choice"]),
        "fused": _fused(results["choice"]),
        "products": _products(results["products"]),
        "loops": _loops(results["loops"]),
        "budgets": _budgets(results["budgets"]),
        "streams": _streams(results["streams"]),
    }
    if results["resources"]:
        made["resources"] = _resources(results["resources"])
    return made


def _boards(rows: list[dict]) -> str:
    header = ["", "peak, Tflop/s", "memory, TB/s", "L2, TB/s", "exponentials, T/s", "library", "Triton", "stream"]
    return markdown(
        header,
        [
            [
                row["board"],
                *(number(row[key] / 1e12) for key in ("flops", "bandwidth", "l2", "exponentials")),
                "by NVIDIA" if row["heuristics"] else f"{row['library']:.2f}",
                *(f"{row[key]:.2f}" for key in ("triton", "stream")),
            ]
            for row in rows
        ],
    )


def _published(rows: list[dict]) -> str:
    return markdown(
        ["what", "board", "N × D × V", "source", "published, ms", "model, ms", "ratio"],
        [
            [
                row["what"],
                row["board"],
                " × ".join(f"{size:,}" for size in row["shape"]),
                row["source"],
                number(row["published_ms"]),
                number(row["predicted_ms"]),
                f"{row['predicted_ms'] / row['published_ms']:.2f}",
            ]
            for row in rows
        ],
        left=4,
    )


def _bytes(rows: list[dict]) -> str:
    header = ["model", "launch", "Tflop", "read, GB", "written, GB", "of these logits, GB", "through L2, GB", "G exp"]
    lines = []
    for row in rows:
        h100 = row["boards"]["H100"]
        sizes = (h100["read_bytes"], h100["written_bytes"], row["logits_bytes"], h100["cached_bytes"])
        cells = [number(row["flops"] / 1e12), *(number(size / 1e9) for size in sizes)]
        lines.append([row["model"], f"`{row['launch']}`", *cells, number(row["exponentials"] / 1e9)])
    return markdown(header, lines, left=2)


def _times(rows: list[dict]) -> str:
    boards = list(rows[0]["boards"])
    lines = []
    for row in rows:
        cells = [
            f"{number(time['floor_ms'])} {LETTER[time['bound']]} → {number(time['predicted_ms'])}"
            for time in row["boards"].values()
        ]
        lines.append([row["model"], f"`{row['launch']}`", *cells])
    return markdown(["model", "launch", *boards], lines, left=2)


def _schedules(rows: list[dict]) -> str:
    boards = list(rows[0]["boards"])
    fastest = {
        (row["model"], board): min(
            other["boards"][board]["predicted_ms"] for other in rows if other["model"] == row["model"]
        )
        for row in rows
        for board in boards
    }
    lines = []
    for row in rows:
        cells = []
        for board, time in row["boards"].items():
            text = f"{number(time['predicted_ms'])} ({time['share_of_peak']:.0%})"
            if not time["fits"]:
                text = "too large"
            elif time["predicted_ms"] == fastest[row["model"], board]:
                text = f"**{text}**"
            cells.append(text)
        lines.append(
            [
                row["model"],
                row["schedule"],
                f"{row['flops_per_ndv']:.0f}",
                f"{row['logits_bytes_per_logit']:.0f}",
                number(row["scratch_bytes"] / 1e9),
                str(row["chunks"]),
                *cells,
            ]
        )
    header = ["model", "schedule", "flops / NDV", "bytes a logit", "scratch, GB", "chunks", *boards]
    return markdown(header, lines, left=2)


def _choice(rows: list[dict]) -> str:
    models = list(rows[0]["heads"])
    lines = []
    for row in rows:
        even = [row["heads"][name]["even_share"] for name in models]
        cells = ["never" if share is None else f"{share:.2f}" for share in even]
        limit = f"{row['widest']:,}" if row["widest"] < WIDTHS[-1] else f"≥ {WIDTHS[-1]:,}"
        lines.append([row["board"], f"{row['triton']:.2f}", *cells, limit])
    header = ["", "Triton share", *(f"even at, {name}" for name in models), "kept wins up to D"]
    return markdown(header, lines)


def _by_tokens(rows: list[dict]) -> str:
    models = list(rows[0]["heads"])
    lines = [
        [name, f"{n:,}", *(f"{_ratio(row['heads'][name]['faster'], n):.2f}" for row in rows)]
        for name in models
        for n in model.TOKENS
    ]
    return markdown(["model", "tokens", *(row["board"] for row in rows)], lines)


def _fused(rows: list[dict]) -> str:
    models = list(rows[0]["heads"])
    lines = []
    for row in rows:
        cells = []
        for name in models:
            part = row["heads"][name]
            mib = part["least_bytes"] / model.MIB
            cells.append(f"{part['least_rows']} rows, {mib:.0f} MiB; {part['fused_over_192_rows']:.1f}")
        lines.append([row["board"], *cells])
    return markdown(["", *models], lines)


def _ratio(faster: dict, tokens: int) -> float:
    return faster[tokens] if tokens in faster else faster[str(tokens)]  # JSON turns keys into text


def _products(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = [number(row[key] / 1e12) for key in ("nvidia", "library", "nvidia_triton", "triton")]
        kernel = " × ".join(map(str, row["tile"])) + f", {row['stages']} stages"
        kernel += f", {row['splits']} splits" if row["splits"] > 1 else ""
        shape = " × ".join(f"{size:,}" for size in row["shape"])
        lines.append([row["board"], f"{row['product']} {shape}", kernel, *cells])
    header = ["board", "product", "NVIDIA's kernel", "NVIDIA", "our share", "NVIDIA's Triton", "our Triton"]
    return markdown(header, lines, left=3)


def _loops(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        loops = row["loops"]
        kernel = [number(loop["kernel_ms"]) for loop in loops.values()]
        first, second, last = (loop["kernel_ms"] for loop in loops.values())
        step = " → ".join(number(loops[loop]["step_ms"]) for loop in ("drained", "flattened", "hidden"))
        shape = " × ".join(f"{size:,}" for size in row["shape"])
        configs = " → ".join(dict.fromkeys(loops[loop]["config"] for loop in ("drained", "flattened")))
        gain = f"{1 - second / first:.0%} to {1 - last / first:.0%}"
        lines.append([row["board"], shape, configs, number(row["floor_ms"]), *kernel, gain, step])
    header = ["board", "N × D × V", "configuration", "floor", "drained", "flattened", "epilogue hidden", "less", "step"]
    return markdown(header, lines, left=3)


def _budgets(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = [row["model"], f"{row['budget_mib']:,}"]
        for name in ("kept", "chunked"):
            part = row[name]
            line += [f"{part['rows']:,}", number(part["sums_bytes"] / 1e9), number(part["predicted_ms"])]
        lines.append(line)
    header = ["model", "budget, MiB", "kept: rows", "dW sums, GB", "ms", "chunked: rows", "dW sums, GB", "ms"]
    return markdown(header, lines)


def _streams(rows: list[dict]) -> str:
    return markdown(
        ["kernel", "what is read and written", "moved, B a logit", "least, B a logit", "least / moved"],
        [
            [
                f"`{row['kernel']}`",
                row["what"],
                f"{row['moved']:.3f}",
                f"{row['least']:.3f}",
                f"{row['least'] / row['moved']:.3f}",
            ]
            for row in rows
        ],
        left=2,
    )


def _resources(rows: list[dict]) -> str:
    """Return the worst variant of a kernel, for each board and dtype of the schedules."""
    lines = []
    for key in dict.fromkeys((row["kernel"], row["board"], row["config"]) for row in rows):
        group = [row for row in rows if (row["kernel"], row["board"], row["config"]) == key]
        lines.append(
            [
                f"`{key[0]}`",
                *key[1:],
                str(max(row["registers"] for row in group)),
                f"{max(row['shared_bytes'] for row in group) / 1024:.0f}",
                str(min(row["programs"] for row in group)),
                f"{min(row['occupancy'] for row in group):.0%}",
            ]
        )
    header = ["kernel", "board", "configuration", "registers", "shared, KiB", "programs", "occupancy"]
    return markdown(header, lines, left=3)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, choices=model.TOKENS, default=TABLE_TOKENS, help="of tables and plot [%(default)s]"
    )
    parser.add_argument("--budget", type=int, default=DEFAULT_BUDGET, metavar="MIB", help="of logits [%(default)s]")
    parser.add_argument("--triton", type=share, metavar="SHARE", help="of peak that Triton products reach [by board]")
    parser.add_argument("--library", type=share, metavar="SHARE", help="of peak that library products reach [by board]")
    parser.add_argument("--certification", type=Path, default=CERTIFICATION, help="what make certify wrote")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON to write")
    parser.add_argument("--plot", type=Path, default=PLOT, help="PNG to write")
    parser.add_argument(
        "--markdown", type=Path, nargs="+", default=[], metavar="PAGE", help="rewrite its tables, between markers"
    )
    options = parser.parse_args(argv)
    found, source = resources(options.certification, options.output)
    boards = boards_of(found, triton=options.triton, library=options.library)
    try:
        results = collect(boards, options.budget, found)
    except ValueError as error:
        parser.error(str(error))

    made = tables(results, options.tokens)
    print(f"Predictions for {options.tokens:,} tokens; nothing was measured.")
    for name, table in made.items():
        print(f"\n## {name}\n\n{table}")
    print(f"\nRegisters, shared memory and occupancy: {source}.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**machine.describe(), **results}, indent=1) + "\n")
    plot([row for row in results["schedules"] if row["tokens"] == options.tokens], options.plot)
    for page in options.markdown:
        rewrite(page, "roofline", made)
    print("Written: " + ", ".join(str(path) for path in (options.output, options.plot, *options.markdown)))
    return 0


def share(text: str) -> float:
    """Parse a share of a peak from the command line, above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of a peak: give a number above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
