"""Compare the losses of docs/other-losses.md with their papers, TRL and Liger: value, dH and dW.

    python -m exo_fast.benchmarks.equality.check [--markdown docs/other-losses.md]

The page is the code: its functions are taken from it and run on the batches of `loss_formulas` (the papers' formulas,
on full logits in float64) and `loss_peers` (the libraries' own code). The exit status is 1 when a relative difference
exceeds LIMIT. A library that is not installed is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_fast.benchmarks.equality import peers
from exo_fast.benchmarks.equality.formulas import Case, Functions, Problem, formula_cases, is_float, with_gradients
from exo_fast.benchmarks.harness import process_memory, runner
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.training import machine

PAGE = machine.REPOSITORY / "docs" / "other-losses.md"
LABEL = "loss equality"  # in a page: <!-- loss equality: equality --> and <!-- loss equality: memory -->
LOSSES = {
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "cpo": "CPO",
    "ppo": "PPO",
    "grpo": "GRPO",
}
PARTS = ("value", "dH", "dW")
VERSIONS = ("python", "torch", "transformers", "trl", "liger_kernel")
LIMIT = 1e-5  # for a relative difference in float32
TOKENS, VOCAB, HIDDEN, BUDGET = 4096, 32768, 64, 64 << 20  # for the table of memory; budget in bytes


FAMILIES: dict[str, tuple[str | None, Callable[[Functions], Iterator[Case]]]] = {  # the package it needs, its cases
    "formulas": (None, formula_cases),
    "Liger": ("liger_kernel", peers.liger_cases),
    "TRL DPO": ("trl", peers.trl_dpo_cases),
    "TRL KTO": ("trl", peers.trl_kto_cases),
    "TRL CPO": ("trl", peers.trl_cpo_cases),
    "TRL ORPO": ("trl", peers.trl_orpo_cases),
    "TRL GRPO": ("trl", peers.trl_grpo_cases),
}


def snippets(page: Path = PAGE) -> Functions:
    """Return the functions of a page by name. Each ```python block runs by itself, so each must be complete."""
    found: Functions = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        names: dict[str, Any] = {"__name__": page.stem}
        exec(block, names)
        found |= {n: f for n, f in names.items() if getattr(f, "__module__", None) == page.stem}
    return found


def differences(case: Case, function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Return the relative differences of `value`, `dH` and `dW` between the page's function in `dtype` and the case."""
    arguments = {k: v.to(dtype) if is_float(v) else v for k, v in case.arguments.items()}
    value, d_hidden, d_weight = with_gradients(function, case.hidden.to(dtype), case.weight.to(dtype), arguments)
    return {
        "value": _relative(value, case.value),
        "dH": _relative(d_hidden, case.d_hidden),
        "dW": _relative(d_weight, case.d_weight),
    }


def _relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def unavailable(family: str) -> str | None:
    """Return why the cases of a family cannot be made; None if they can."""
    package = FAMILIES[family][0]
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install -e .[bench]"
    return None


def memory(
    functions: Functions,
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    budget: int = BUDGET,
    only: Sequence[str] = tuple(LOSSES),
) -> Iterator[dict[str, Any]]:
    """Return for each loss the peak MB that value, dH and dW add to the process: with `full` logits, and `ours`. Linux
    only.

    Both use the page's function: full logits are `backend="reference"`. All tokens of the six sequences are scored.
    """
    problem = Problem.make(HIDDEN, vocab, [(0, 0, tokens // 6)] * 6)
    inputs = problem.inputs(functions)
    for loss in only:
        row: dict[str, Any] = {"loss": loss}
        for name, how in (("full", {"backend": "reference"}), ("ours", {"memory_budget": budget})):
            before = process_memory.resident_mb()
            process_memory.reset_peak()
            with_gradients(functions[f"{loss}_loss"], problem.hidden, problem.weight, {**inputs[loss], **how})
            row[name] = process_memory.peak_mb() - before
        yield row


def measure(page: Path = PAGE) -> dict[str, Any]:
    """Return machine and versions, `rows` of differences in the order of LOSSES, the families `skipped` with the
    reason, and `memory`."""
    functions = snippets(page)
    rows, skipped = [], {}
    for family, (_, cases) in FAMILIES.items():
        if why := unavailable(family):
            skipped[family] = why
            continue
        for case in cases(functions):
            found = differences(case, functions[f"{case.loss}_loss"])
            rows.append({"loss": case.loss, "variant": case.variant, "peer": case.peer, **found})
    rows.sort(key=lambda row: list(LOSSES).index(row["loss"]))
    return {**machine.describe(), "rows": rows, "skipped": skipped, "memory": list(memory(functions))}


def equality_table(results: dict[str, Any]) -> str:
    """Format the rows as a Markdown table, with their provenance and the families left out."""
    lines = [
        [LOSSES[row["loss"]], row["peer"], row["variant"], *(f"{row[part]:.0e}" for part in PARTS)]
        for row in results["rows"]
    ]
    header = ["loss", "compared with", "as", "relative difference of the value", "of dH", "of dW"]
    left_out = [f"{family} left out: {why}" for family, why in results["skipped"].items()]
    return f"{markdown(header, lines, left=3)}\n\n{' · '.join([_from(results), *left_out])}"


def memory_table(results: dict[str, Any]) -> str:
    """Format the peaks as a Markdown table."""
    lines = [[LOSSES[row["loss"]], f"{row['full']:,.0f}", f"{row['ours']:,.0f}"] for row in results["memory"]]
    return f"{markdown(['loss', 'full logits, MB', 'linear_logprobs, MB'], lines)}\n\n{_from(results)}"


def _from(results: dict[str, Any]) -> str:
    versions = [f"{name} {results['versions'][name]}" for name in VERSIONS if results["versions"][name]]
    parts = [f"`python -m {__spec__.name}`", results["date"][:10]]
    if results["commit"]:
        parts.append(f"commit {results['commit']}")
    return " · ".join([*parts, runner.machine_line(results), ", ".join(versions)])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exo_fast.benchmarks.equality.check", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite the tables of this page")
    options = parser.parse_args(argv)
    if not PAGE.is_file():
        parser.error(f"{PAGE.name} is not there: the losses are in docs/ of a checkout")
    results = measure()
    tables = {"equality": equality_table(results), "memory": memory_table(results)}
    print("\n\n".join(tables.values()))
    if options.markdown:
        rewrite(options.markdown, LABEL, tables)
    return int(any(not row[part] <= LIMIT for row in results["rows"] for part in PARTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
