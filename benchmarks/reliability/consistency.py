"""Check that training gives the same answer however it is cut over processes: one table from one command.

Tiny Llamas are aligned for five optimizer steps from one start. A single process in float32 without DeepSpeed gives
the answer; it is compared with 1, 2 and 4 processes × ZeRO stages 0 to 3 and offloading × tied and untied heads ×
full training and LoRA × gradient accumulation over 1 and 3 micro-batches, and bf16. The exit status is 1 when one of
them is further from the answer than LIMITS, or fails.

A step is 12 groups however they are cut, and an epoch 53, so that the last step has 5, which no cut divides evenly:
a mean of the parts' means is off there. Completions are of unequal lengths, gradients are clipped, weights
decay. AdamW's epsilon is of the size of a gradient's entries, 1e-2: with the default of 1e-8 an entry whose gradient is
next to nothing moves as far as any other, and rounding decides where to (PyTorch alone is then 1e-4 off in a LoRA
tensor between accumulation over 1 and over 3).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from exo_fast.benchmarks.harness import runner
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.benchmarks.reliability.processes import Team
from exo_fast.training import machine

OUTPUT = machine.REPOSITORY / "benchmarks" / "results" / "consistency.json"
MARK = ("consistency", "table")  # in a page: <!-- consistency: table -->
EXAMPLES = """examples:
  python -m exo_fast.benchmarks.reliability.consistency                          all, into results/consistency.json
  python -m exo_fast.benchmarks.reliability.consistency --markdown docs/reliability.md  also rewrite its table
  python -m exo_fast.benchmarks.reliability.consistency --quick                  1 and 2 processes, ZeRO 0 and 3
"""
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}  # for a relative difference
PROCESSES, ACCUMULATIONS = (1, 2, 4), (1, 3)
HEADS, TRAINED = ("tied", "untied"), ("full", "LoRA")
SHARDINGS = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))  # (ZeRO stage, offloaded)
GLOBAL_BATCH, GROUPS, HELD_OUT, CANDIDATES, STEPS = 12, 53, 7, 3, 5
WORDS = 61  # in the vocabulary: not a multiple of 4, so that ZeRO has to pad its shards
MAX_GRAD_NORM = 1.7  # gradients are clipped in some of the steps
WITHOUT_COMPILER = "DeepSpeed compiles its Adam for CPUs when it is first used: needs ninja and a C++ compiler"


@dataclass(frozen=True)
class Cell:
    """One way to cut the training, or to store its weights."""

    processes: int
    zero_stage: int
    offload: bool = False
    head: str = "tied"
    trained: str = "full"
    accumulation: int = 1
    precision: str = "fp32"

    def __str__(self) -> str:
        """Return the cell's name, which is also its folder."""
        stage = f"zero{self.zero_stage}" + "-offloaded" * self.offload
        parts = (f"processes{self.processes}", stage, self.head, self.trained, f"accumulation{self.accumulation}")
        return "/".join([*parts, self.precision])


def cells(quick: bool = False) -> list[Cell]:
    """Return all cells, by number of processes; quick: the nine in which most can go wrong."""
    if quick:
        fp32 = [Cell(*cut, accumulation=a) for *cut, a in product((1, 2), (0, 3), ACCUMULATIONS)]
        return [*fp32, Cell(1, 0, precision="bf16")]
    made = []
    for processes in PROCESSES:
        ways = product(SHARDINGS, HEADS, TRAINED, ACCUMULATIONS)
        made += [Cell(processes, *sharding, *rest) for sharding, *rest in ways]
        made += [Cell(processes, stage, precision="bf16") for stage in range(4)]
    return made


def impossible(cell: Cell) -> str | None:
    """Return why a cell cannot run on this machine; None if it can."""
    if cell.offload and not (shutil.which("ninja") and shutil.which(os.environ.get("CXX", "c++"))):
        return WITHOUT_COMPILER
    return None


# Models, data and settings of the trainings


def write_inputs(folder: Path) -> None:
    """Write `folder/tied` and `folder/untied`, models with a tokenizer, and `folder/data`: train.json, test.json."""
    from exo_fast.training.processes import announce_cpu

    announce_cpu()  # before transformers is imported
    for head in HEADS:
        save_model(folder / head, tied=head == "tied")
    rng = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS - 2)}" for _ in range(rng.randint(1, longest)))

    def row() -> dict[str, Any]:
        completions = [text(12) for _ in range(CANDIDATES)]
        return {"prompt": text(8), "completions": completions, "rewards": [rng.random() for _ in completions]}

    (folder / "data").mkdir()
    for split, count in (("train", GROUPS), ("test", HELD_OUT)):
        (folder / "data" / f"{split}.json").write_text(json.dumps([row() for _ in range(count)]))


def save_model(folder: Path, *, tied: bool) -> None:
    """Save a Llama of two layers whose weights are exact in bf16, so that both precisions start from one point."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = ["<unk>", "<eos>", *(f"w{i}" for i in range(WORDS - 2))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=18,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=1,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().float().save_pretrained(folder)


def settings(folder: Path, head: str, trained: str, output: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of the AlignConfig of a training into `folder/output`: by default one process, float32, no
    DeepSpeed."""
    return {
        "model_name_or_path": str(folder / head),
        "data": str(folder / "data"),
        "output_dir": str(folder / output),
        "reference_cache_dir": str(folder / output / "reference"),  # its own, so that every cell computes it
        "loss_type": "exo-rw",
        "max_seq_len": 32,
        "max_gen_len": 16,
        "lora_r": 4 if trained == "LoRA" else 0,
        "engine": "torch",
        "per_device_train_batch_size": GLOBAL_BATCH,
        "per_device_eval_batch_size": 2,
        "learning_rate": 2e-2,
        "adam_epsilon": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def answer_settings(folder: Path, head: str, trained: str) -> list[dict[str, Any]]:
    """Return the training that others are compared with, and the same with a learning rate of 0, which gives the start
    of all."""
    return [
        settings(folder, head, trained, f"answer/{head}/{trained}"),
        settings(folder, head, trained, f"start/{head}/{trained}", learning_rate=0.0),
    ]


def cell_settings(folder: Path, cell: Cell) -> dict[str, Any]:
    """Return the settings of a cell's training into `folder/str(cell)`."""
    return settings(
        folder,
        cell.head,
        cell.trained,
        str(cell),
        engine="deepspeed",
        zero_stage=cell.zero_stage,
        offload=cell.offload,
        bf16=cell.precision == "bf16",
        per_device_train_batch_size=GLOBAL_BATCH // (cell.processes * cell.accumulation),
        gradient_accumulation_steps=cell.accumulation,
    )


# Running and comparing


def measure(chosen: Sequence[Cell], folder: Path, bar: Any) -> dict[str, Any]:
    """Train all cells in `folder`, which is empty, and compare them. `bar` is tqdm's.

    Raises RuntimeError if there is no answer to compare them with.
    """
    write_inputs(folder)
    models = list(dict.fromkeys((cell.head, cell.trained) for cell in chosen))
    answers = [training for model in models for training in answer_settings(folder, *model)]
    skipped = {cell: why for cell in chosen if (why := impossible(cell))}
    groups: dict[int, list[dict]] = {1: [*answers]}
    for cell in chosen:
        if cell not in skipped:
            groups.setdefault(cell.processes, []).append(cell_settings(folder, cell))
    bar.total = sum(map(len, groups.values()))
    failed: dict[str, str] = {}
    for processes, group in groups.items():
        bar.set_postfix_str(f"{processes} process{'es' * (processes > 1)}")
        for training in group:
            if why := train(training, processes, folder):
                failed[training["output_dir"]] = why
            bar.update()
    for training in answers:
        if why := failed.get(training["output_dir"]):
            raise RuntimeError(f"the training that others are held to failed: {why}")

    def row(cell: Cell) -> dict[str, Any]:
        if cell in skipped:
            return {"skipped": skipped[cell]}
        why = failed.get(str(folder / str(cell)))
        return {"failed": why} if why else compare(folder, cell)

    return {
        "limits": LIMITS,
        "answers": [describe_answer(folder, *model) for model in models],
        "rows": [{"name": str(cell), **asdict(cell), **row(cell)} for cell in chosen],
    }


def train(training: dict[str, Any], processes: int, folder: Path) -> str:
    """Run a training, given as the fields of an AlignConfig. Return why it failed, "" if it did not."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(training))
    team = Team(["align", "--config", str(recipe)], folder / "log", processes)
    statuses = team.wait()
    if not any(statuses):
        return ""
    words = team.said().strip().splitlines()
    return f"ended with {statuses}: {words[-1][:300] if words else 'it said nothing'}"


def compare(folder: Path, cell: Cell) -> dict[str, Any]:
    """Return how far the training of `cell` is from the answer.

    `parameters` is the largest ‖a − b‖ / ‖b‖ of a parameter tensor, where a is the cell's and b the answer's, and
    `tensor` is its name; `change` is the largest ‖a − b‖ / ‖b − start‖; `evaluation` is the relative difference of the
    loss on held-out data.
    """
    found, answer = folder / str(cell), folder / "answer" / cell.head / cell.trained
    summary, right_summary = (json.loads((place / "summary.json").read_text()) for place in (found, answer))
    if summary["steps"] != STEPS:
        return {"failed": f"made {summary['steps']} optimizer steps where {STEPS} are right"}
    tensors, right, start = map(load, (found, answer, folder / "start" / cell.head / cell.trained))
    if tensors.keys() != right.keys():
        return {"failed": f"saved other tensors: {', '.join(sorted(tensors.keys() ^ right.keys()))}"}
    distance = {name: (tensors[name] - right[name]).norm().item() for name in right}
    relative = {name: distance[name] / right[name].norm().item() for name in right}
    loss, right_loss = (entry["metrics"]["eval"]["last"]["eval_loss"] for entry in (summary, right_summary))
    tensor = max(relative, key=relative.__getitem__)
    return {
        "parameters": relative[tensor],
        "tensor": tensor,
        "change": max(distance[name] / (right[name] - start[name]).norm().item() for name in right),
        "evaluation": abs(loss / right_loss - 1),
        "seconds": round(summary["total_seconds"], 2),
    }


def load(folder: Path) -> dict[str, Any]:
    """Load the tensors that a training saved (with LoRA, only adapters) in float64."""
    from safetensors.torch import load_file

    adapter = folder / "adapter_model.safetensors"
    tensors = load_file(adapter if adapter.exists() else folder / "model.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


def describe_answer(folder: Path, head: str, trained: str) -> dict[str, Any]:
    """Describe the answer's training: how far it moved parameters, and in how many steps it clipped."""
    place = folder / "answer" / head / trained
    right, start = load(place), load(folder / "start" / head / trained)
    history = json.loads((place / "trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    moved = [((right[name] - start[name]).norm() / right[name].norm()).item() for name in right]
    return {
        "head": head,
        "trained": trained,
        "parameters": sum(tensor.numel() for tensor in right.values()),
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norm": norms,
        "clipped_steps": sum(norm > MAX_GRAD_NORM for norm in norms),
        "evaluation_loss": next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry),
        "moved": [min(moved), max(moved)],
    }


def within_limits(row: dict[str, Any]) -> bool:
    """Check whether a row is within its limits of the answer. A skipped row passes."""
    if "skipped" in row:
        return True
    limit = LIMITS[row["precision"]]
    return "failed" not in row and row["parameters"] <= limit and row["evaluation"] <= limit  # False for a NaN


# Output


def text(results: dict[str, Any]) -> str:
    """Format as Markdown: an explanation, the table, the cells that failed or were skipped, and the provenance."""
    kinds = ("failed", "skipped")
    troubles = [f"- {row['name']}: {kind}: {row[kind]}" for row in results["rows"] for kind in kinds if kind in row]
    parts = [explanation(results), table(results["rows"]), "\n".join(troubles), provenance(results)]
    return "\n\n".join(part for part in parts if part)


def table(rows: Sequence[dict]) -> str:
    """Make a table with a line for each number of processes and ZeRO stage, and its worst cells."""
    models = list(product(HEADS, TRAINED))
    lines = []
    for processes, sharding in dict.fromkeys(map(cut, rows)):
        here = [row for row in rows if cut(row) == (processes, sharding)]
        fp32, bf16 = ([row for row in here if row["precision"] == precision] for precision in LIMITS)
        of_model = [[row for row in fp32 if (row["head"], row["trained"]) == model] for model in models]
        cells = [worst(of, "parameters") for of in of_model]
        cells += [worst(fp32, "change"), worst(fp32, "evaluation")]
        lines.append([processes, sharding, *cells, worst(bf16, "parameters"), worst(bf16, "evaluation")])
    header = ["processes", "ZeRO", *(f"{head}, {trained}" for head, trained in models)]
    return markdown([*header, "of the change", "evaluation loss", "bf16", "its evaluation loss"], lines, left=2)


def cut(row: dict) -> tuple[str, str]:
    """Describe a row's number of processes and ZeRO stage in words."""
    return str(row["processes"]), f"{row['zero_stage']}{', offloaded' * row['offload']}"


def worst(rows: Sequence[dict], key: str) -> str:
    """Return the largest value of some rows, in bold if one exceeds its limit; "–" without rows."""
    if not rows or any("failed" in row for row in rows):
        return "**failed**" if rows else "–"
    if all("skipped" in row for row in rows):
        return "skipped"
    value = max((row[key] for row in rows if key in row), key=lambda value: (math.isnan(value), value))
    past = key != "change" and not value <= LIMITS[rows[0]["precision"]]
    return f"**{value:.0e}**" if past else f"{value:.0e}"


def explanation(results: dict[str, Any]) -> str:
    """Explain the trainings and the columns."""
    answers = results["answers"]
    parameters = [answer["parameters"] for answer in answers]
    moved = [share for answer in answers for share in answer["moved"]]
    clipped = min(answer["clipped_steps"] for answer in answers)
    return (
        f"{len(results['rows'])} trainings of {STEPS} optimizer steps: {GLOBAL_BATCH} groups of K = {CANDIDATES} a "
        f"step, {GROUPS % GLOBAL_BATCH} in the last; at most {max(parameters):,} parameters. Shown "
        "is the largest ‖a − b‖ / ‖b‖ of a parameter tensor, where b comes from one process in float32 without "
        "DeepSpeed, the worse of accumulation over 1 and over 3 micro-batches. *Of the change*: ‖a − b‖ over how far "
        f"training moved the tensor, which was {min(moved):.0%} to {max(moved):.0%} of its norm. Gradients were "
        f"clipped in at least {clipped} steps. Limits: {LIMITS['fp32']:.0e}, and {LIMITS['bf16']:.0e} in bf16 (tied "
        "head, full training); a number past its limit is bold."
    )


def provenance(results: dict[str, Any]) -> str:
    """Return command, date, commit, machine and versions in one line."""
    versions = [f"{name} {results['versions'][name]}" for name in ("torch", "transformers", "deepspeed")]
    commit = [f"commit {results['commit']}"] if results["commit"] else []
    parts = [f"`{results['command']}`", results["date"][:10], *commit, runner.machine_line(results)]
    return " · ".join([*parts, ", ".join(versions)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 and 2 processes, ZeRO 0 and 3, tied, full")
    parser.add_argument("--output", type=Path, help="JSON to write [benchmarks/results/consistency.json; quick: none]")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite its table, between markers")
    options = parser.parse_args(argv)
    from tqdm import tqdm

    with tempfile.TemporaryDirectory(prefix="exo-fast-consistency-") as folder, tqdm(unit="training") as bar:
        found = measure(cells(options.quick), Path(folder), bar)
    results = {**machine.describe(), "suite": "consistency", "quick": options.quick, **found}
    output = options.output or (None if options.quick else OUTPUT)
    return report(results, output, options.markdown)


def report(results: dict[str, Any], output: Path | None, page: Path | None) -> int:
    """Print the results, write them to `output` and `page` if given, and return the exit status."""
    print(text(results))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        runner.write(output, results)
    if page:
        label, name = MARK
        rewrite(page, label, {name: text(results)})
    past = [row["name"] for row in results["rows"] if not within_limits(row)]
    print("".join(f"\npast its limit: {name}" for name in past) or "\nall within their limits")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
