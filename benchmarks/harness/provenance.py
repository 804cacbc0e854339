"""The provenance of a result and the names of its problems, shared by tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from exo_fast.benchmarks.harness import runner

OURS = "exo_fast"
VERSIONS = {
    "op": ("torch", "cut-cross-entropy", "liger_kernel", "trl"),
    "scaling": ("torch", "cut-cross-entropy"),
    "step": ("torch", "transformers", "trl"),
    "data": ("torch", "transformers", "deepspeed"),
    "memory": ("torch", "transformers", "trl"),
}
MODELS = {  # by a head's width and vocabulary
    (576, 49152): "SmolLM2-135M",
    (1024, 151936): "Qwen3-0.6B",
    (640, 262144): "Gemma-3-270m",
    (4096, 128256): "Llama-3-8B",
}
WORK = {"forward": "forward", "frozen": "dH", "both": "dH + dW"}


def provenance(results: dict) -> str:
    """Return the command, date, commit, machine and versions of a result file in one line."""
    names = VERSIONS[results["suite"]]
    versions = [f"{name} {results['versions'][name]}" for name in names if results["versions"][name]]
    parts = [f"`{results['command']}`", results["date"][:10]]
    if results["commit"]:
        parts.append(f"commit {results['commit']}")
    parts += [runner.machine_line(results), ", ".join(versions)]
    return " · ".join([*parts, *earlier(results)])


def earlier(results: dict) -> list[str]:
    """Describe the rows that a result file keeps from other runs: their number, date, commit and other versions.

    Empty if it keeps no such rows.
    """
    runs = [row["run"] for row in results["rows"] if "run" in row]
    if not runs:
        return []
    names = ("python", "exo_fast", *VERSIONS.get(results["suite"], ()))
    told = []
    for run in runs:
        then = run.get("versions", {})
        other = [
            f"{name} {then[name]}" for name in names if name in then and then[name] != results["versions"].get(name)
        ]
        told.append(", ".join([run["date"][:10], f"commit {run['commit']}" if run["commit"] else "no commit", *other]))
    return [f"{len(runs)} row{'s' * (len(runs) > 1)} of earlier runs ({'; '.join(sorted(set(told)))})"]


def grouped(rows: Iterable[dict], key: Callable[[dict], object]) -> list[tuple]:
    """Group rows as [(key, rows)], keys in the order of their first appearance."""
    rows = list(rows)
    order = list(dict.fromkeys(map(key, rows)))
    rows.sort(key=lambda row: order.index(key(row)))
    return [(name, list(same)) for name, same in groupby(rows, key)]
