"""One training step on a long row: its seconds and the peak memory of a process, in one piece and in parts.

    python -m exo_fast.benchmarks.suites.long
    python -m exo_fast.benchmarks.suites.long --completion 4000 --parts 1 2 4

The demo's 135M model and one group of random tokens, a prompt and K completions that share it, through `exo-fast align
--long_sequence`, by itself and with `--sequence_parallel`. Every run is a process of its own (or as many as parts),
which reads the data, checks the layout, computes the reference log-probs, takes one step and saves the model; the peak
is the largest resident memory of any process over all of this.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exo_fast.benchmarks.harness.tables import markdown
from exo_fast.training import downloads

PLAIN_IDS = range(1000, 49000)  # no special tokens
COLUMNS = ["run", "processes", "tokens of the row", "whole run, s", "step, s", "peak memory, MB", "loss"]


def write_group(tokenizer: PreTrainedTokenizerBase, path: Path, candidates: int, completion: int) -> None:
    """Write one row of data: `candidates` completions of `completion` random tokens, and a prompt that is cut to
    fit."""
    rng = random.Random(0)
    ids = [rng.choices(PLAIN_IDS, k=completion) for _ in range(candidates)]
    row = {
        "prompt": "the film was long " * 100,
        "completions": tokenizer.batch_decode(ids, skip_special_tokens=True),
        "completion_ids": ids,
        "rewards": list(range(candidates)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row]))


def command(model: Path, data: Path, output: Path, *, prompt: int, completion: int, parts: int) -> list[str]:
    """Return the command line of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(parts)] if parts > 1 else []
    fields = {
        "model_name_or_path": model,
        "data": data,
        "output_dir": output,
        "reference_cache_dir": output / "reference",
        "long_sequence": True,
        "sequence_parallel": parts,
        "max_seq_len": prompt + completion,
        "max_gen_len": completion,
        "loss_type": "exo-rw",
        "max_steps": 1,
        "matmul_precision": "fast",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    options = [f"--{name}={value}" for name, value in fields.items()]
    return [sys.executable, *launcher, "-m", "exo_fast.training.cli", "align", *options]


def measure(words: Sequence[str], output: Path, *, parts: int, row: int) -> list[str]:
    """Run the command and read its summary; return the cells of COLUMNS."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parts)), **os.environ}
    subprocess.run(words, check=True, env=environment)
    summary = json.loads((output / "summary.json").read_text())
    first = summary["metrics"]["train"]["first"]
    return [
        "in one piece" if parts == 1 else f"in {parts} parts",
        str(summary["processes"]),
        f"{row:,}",
        f"{summary['total_seconds']:.0f}",
        f"{row / summary['tokens_per_second']:.0f}",
        f"{summary['peak_memory_mb']:,.0f}",
        f"{first['loss']:.6f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--completion", type=int, default=8128, help="tokens of each completion [%(default)s]")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt [%(default)s]")
    parser.add_argument("--candidates", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2], help="runs, by their processes [%(default)s]")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long"), help="[%(default)s]")
    options = parser.parse_args(argv)
    model = downloads.get_model(downloads.cache_dir())
    output = options.output_dir / time.strftime("%Y%m%d-%H%M%S")  # a finished run would not run again
    write_group(AutoTokenizer.from_pretrained(model), output / "train.json", options.candidates, options.completion)
    row = options.prompt + options.candidates * options.completion
    rows = []
    for parts in options.parts:
        place = output / f"parts-{parts}"
        sizes = {"prompt": options.prompt, "completion": options.completion}
        words = command(model, output / "train.json", place, **sizes, parts=parts)
        rows.append(measure(words, place, parts=parts, row=row))
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
