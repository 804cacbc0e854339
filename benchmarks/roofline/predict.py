"""Write kernels/tuned/<target>.json by prediction: the kernels use it until a run on a card measures a better one.

For some values of D, 8,192 rows and a vocabulary of 128,256: the configuration of `linear_logsumexp` that is predicted
fastest, and whether a chunk of bf16 keeps U or takes the library's float32 logits, in the default memory budget. Times
closer than the margins below are no reason to leave the kernel's own rule, or the schedule that holds less memory.
float16 has bf16's rates. float32 is not predicted, and neither is a target without a board in the model: these keep
their rules. A file whose source is a measurement is left alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from exo_fast.benchmarks.roofline import model, nvidia, tables
from exo_fast.kernels import linear_logsumexp, tuned
from exo_fast.kernels.launch import Config

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
ROWS = 8192
TILE_MARGIN = 0.02
SCHEDULE_MARGIN = 0.05
COMMAND = "python -m exo_fast.benchmarks.roofline.predict"
LAUNCHES = (("bf16", False), ("bf16", True), ("fp16", False))  # dtypes and whether U is stored


def fastest(board: model.Board, width: int, store: bool) -> Config:
    """Return the configuration of `linear_logsumexp` that is predicted fastest, or the kernel's rule if it is near."""
    head = replace(model.HEADS[0], width=width)

    def seconds(config: Config) -> float:
        return model.predict(model.linear_logsumexp_launch(board, head, ROWS, store, config), board)

    rule = linear_logsumexp.rule(board.target, "bf16", width)
    best = min(linear_logsumexp.configs(board.target, "bf16"), key=seconds)
    return best if seconds(best) < (1 - TILE_MARGIN) * seconds(rule) else rule


def schedule(board: model.Board, width: int) -> str:
    """Return "chunked" if it is predicted clearly faster than "kept"."""
    head = replace(model.HEADS[0], width=width)
    budget = tuned.SCRATCH.budget(int(board.memory))
    chunked = model.chunked(board, head, ROWS, budget).seconds(board)
    kept = model.kept(board, head, ROWS, budget, fastest(board, width, store=True)).seconds(board)
    return "chunked" if chunked < (1 - SCHEDULE_MARGIN) * kept else "kept"


def predicted(board: model.Board, date: str) -> tuned.Table:
    """Return the table of a board's target."""
    rows = [
        tuned.Row("linear_logsumexp", dtype, store, up_to, config)
        for dtype, store in LAUNCHES
        for up_to, config in tuned.ranges({width: fastest(board, width, store) for width in WIDTHS})
    ]
    schedules = [
        tuned.Schedule("bf16", up_to, name)
        for up_to, name in tuned.ranges({width: schedule(board, width) for width in WIDTHS})
    ]
    by = "benchmarks/roofline/model.py" + (f" with {nvidia.source()}" if board.heuristics else "")
    source = {"kind": "prediction", "model": by, "board": board.name, "date": date, "command": COMMAND}
    return tuned.Table(board.target.name, source, tuple(rows), tuple(schedules))


def write(folder: Path, date: str, boards: tuple[model.Board, ...]) -> list[str]:
    """Write the tables of all boards into `folder`; return a line about each. The date of a table that is as before
    stays."""
    lines = []
    for board in boards:
        path, made = folder / f"{board.target.name}.json", predicted(board, date)
        before = tuned.read_table(path) if path.exists() else None
        if before is not None and before.source["kind"] == "measurement":
            lines.append(f"{path}: measured on {before.source['card']}, {before.source['date']}: left as it is")
            continue
        if before is not None and replace(made, source=before.source, path=before.path) == before:
            made = replace(made, source={**made.source, "date": before.source["date"]})
        tuned.write_table(path, made)
        lines.append(f"{path}: predicted for {board.name}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    import datetime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=tuned.FOLDER, help="for the tables [kernels/tuned]")
    options = parser.parse_args(argv)
    found = json.loads(tables.OUTPUT.read_text())["resources"] if tables.OUTPUT.exists() else []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print("\n".join(write(options.folder, today, tables.boards_of(found))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
