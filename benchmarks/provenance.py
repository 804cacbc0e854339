"""What a result is from and how its problems are called: shared by tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from exo_fast.benchmarks import runner

OURS = "exo_fast"
VERSIONS = {
    "op": ("torch", "cut-cross-entropy", "liger_kernel", "trl"),
    "scaling": ("torch", "cut-cross-entropy"),
    "step": ("torch", "transformers", "trl"),
    "data": ("torch", "transformers", "deepspeed"),
    "memory": ("torch", "transformers", "trl"),
}
MODELS = {  # of a head's width and vocabulary
    (576, 49152): "SmolLM2-135M",
    (1024, 151936): "Qwen3-0.6B",
    (640, 262144): "Gemma-3-270m",
    (4096, 128256): "Llama-3-8B",
}
WORK = {"forward": "forward", "frozen": "dH", "both": "dH + dW"}


def provenance(results: dict) -> str:
    """The command, date, commit, machine and versions of a result file, in a line."""
    names = VERSIONS[results["suite"]]
    versions = [f"{name} {results['versions'][name]}" for name in names if results["versions"][name]]
    parts = [f"`{results['command']}`", results["date"][:10]]
    if results["commit"]:
        parts.append(f"commit {results['commit']}")
    parts += [runner.machine_line(results), ", ".join(versions)]
    earlier = sorted({row["run"]["date"][:10] for row in results["rows"] if "run" in row})
    if earlier:
        count = sum("run" in row for row in results["rows"])
        parts.append(f"{count} rows of earlier runs ({', '.join(earlier)})")
    return " · ".join(parts)


def grouped(rows: Iterable[dict], key: Callable[[dict], object]) -> list[tuple]:
    """[(key, rows)], keys in the order in which they appear first."""
    rows = list(rows)
    order = list(dict.fromkeys(map(key, rows)))
    rows.sort(key=lambda row: order.index(key(row)))
    return [(name, list(same)) for name, same in groupby(rows, key)]
