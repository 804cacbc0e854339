"""Runs the cases of a suite, each in a process of its own, and keeps the result file whole after every one.

A process of its own: the peak of its memory is the case's, no case inherits another's warm caches or compiled code, and
a crash costs one row.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from exo_fast.benchmarks import machine, worker
from exo_fast.training.errors import InputError

LAST_WORDS = 12  # lines of a failed case that are shown


class CaseFailed(RuntimeError):
    """A case's process ended without a row. The message is the end of what it said."""


def run_suite(
    suite: ModuleType, cases: Sequence[Any], output_dir: Path, *, quick: bool = False, keep: bool = False
) -> dict:
    """Measure `cases` of `suite` into `<output_dir>/<NAME>.json`, and return what the file holds.

    Rows of other cases are dropped, or with `keep` kept: each then names the run that it is from ("run"). Raises
    InputError where rows of another machine would have to be kept.
    """
    path = output_dir / f"{suite.NAME}.json"
    here = machine.describe()
    order = {str(case): case for case in suite.cases(quick)}
    kept = _kept_rows(path, here) if keep else {}
    rows = {name: row for name, row in kept.items() if name in order}
    fresh: set[str] = set()

    def save(extras: dict) -> dict:
        for name in fresh:
            _add_baseline(suite, order[name], rows)
        ordered = [rows[name] for name in order if name in rows]
        results = {**here, "suite": suite.NAME, "quick": quick, **extras, "rows": ordered}
        if hasattr(suite, "summary"):
            results["summary"] = suite.summary(ordered)
        write(path, results)
        return results

    from tqdm import tqdm

    if hasattr(suite, "prepare"):
        suite.prepare()
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"exo-fast-bench-{suite.NAME}-") as workdir:
        extras = in_process(suite, worker.EXTRAS, workdir) if hasattr(suite, "extras") else {}
        results = save(extras)
        with tqdm(cases, desc=suite.NAME, unit="case") as bar:
            for case in bar:
                bar.set_postfix_str(str(case))
                fresh.add(str(case))
                rows[str(case)] = {"name": str(case), **asdict(case), **_row(suite, case, workdir, bar.write)}
                results = save(extras)
    return results


def _row(suite: ModuleType, case: Any, workdir: str, say: Any) -> dict:
    """What one case gave: a measurement, or why there is none."""
    why = suite.impossible(case)
    if why:
        return {"skipped": why}
    begun = time.perf_counter()
    try:
        row = in_process(suite, json.dumps(asdict(case)), workdir)
    except CaseFailed as failure:
        say(f"{case} failed:\n{failure}")
        row = {"failed": str(failure).strip().splitlines()[-1][:300]}
    return {**row, "took": round(time.perf_counter() - begun, 1)}


def in_process(suite: ModuleType, case: str, workdir: str) -> dict:
    """What `worker` finds. Raises CaseFailed. Nothing that it started outlives the call."""
    command = [sys.executable, "-m", worker.__name__, suite.__name__, case, workdir]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        output, said = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != 0:
        words = said.strip().splitlines()[-LAST_WORDS:]
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            words.append(f"ended by {name}" + (": out of memory?" if name == "SIGKILL" else ""))
        raise CaseFailed("\n".join(words) or f"ended with status {process.returncode}")
    return json.loads(output)


def _kept_rows(path: Path, here: dict) -> dict[str, dict]:
    """Rows of the result file by name, each with the run that it is from."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    if old["machine"] != here["machine"]:
        raise InputError(
            f"{path} holds results of another machine ({machine_line(old)}); run the whole suite, "
            f"or give another --output_dir"
        )
    run = {name: old[name] for name in ("date", "commit", "command")}
    return {row["name"]: {"run": run, **row} for row in old["rows"]}


def done(path: Path) -> set[str]:
    """Names of the cases that a result file has and that did not fail."""
    if not path.exists():
        return set()
    return {row["name"] for row in json.loads(path.read_text())["rows"] if "failed" not in row}


def with_baselines(suite: ModuleType, cases: Sequence[Any], among: Sequence[Any]) -> list[Any]:
    """`cases` and those of `among` that are their yardsticks, in the order of `among`: a ratio is of one run."""
    wanted = {str(case) for case in cases}
    if hasattr(suite, "baseline"):
        wanted |= {suite.baseline(case) for case in cases}
    return [case for case in among if str(case) in wanted]


def _add_baseline(suite: ModuleType, case: Any, rows: dict[str, dict]) -> None:
    name = suite.baseline(case) if hasattr(suite, "baseline") else None
    row = rows[str(case)]
    if name != str(case) and "seconds" in rows.get(name, {}) and "seconds" in row:
        row["baseline_seconds"] = rows[name]["seconds"]


def write(path: Path, results: dict) -> None:
    """Replace a result file in one go: whoever stops the run finds it whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def machine_line(results: dict) -> str:
    """The machine of a result file in a line."""
    found = results["machine"]
    device = "no GPU" if found["device"] == "cpu" else found["device"]
    amx = " with AMX" if "amx_bf16" in found["features"] else ""
    cores = f"{found['cores']} cores" + ("" if found["threads"] == found["cores"] else f" ({found['threads']} threads)")
    return f"{found['cpu']}{amx}, {cores}, {found['memory_gb']:.0f} GB, {device}"


def table(rows: Sequence[dict]) -> str:
    """The rows as aligned text: seconds and their spread, how the yardstick compares, memory, the worst error."""
    width = max([len(row["name"]) for row in rows], default=4)
    head = f"{'case':<{width}}{'seconds':>10}{'spread':>8}{'baseline/s':>12}{'peak MB':>9}{'worst error':>13}"
    lines = [head, "-" * len(head)]
    for row in rows:
        start = f"{row['name']:<{width}}"
        why = next((f"{kind}: {row[kind]}" for kind in ("skipped", "failed") if kind in row), None)
        if why:
            lines.append(f"{start}  {why}")
            continue
        seconds, times = row.get("seconds"), row.get("all_seconds") or []
        spread = f"{(max(times) - min(times)) / statistics.median(times):.0%}" if len(times) > 1 else ""
        ratio = f"{row['baseline_seconds'] / seconds:.2f}" if seconds and "baseline_seconds" in row else ""
        peak = f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else ""
        errors = [error for error in (row.get("errors") or {}).values() if error is not None]
        worst = f"{max(errors):.1e}" if errors else ""
        time_ = f"{seconds:.3f}" if seconds is not None else ""
        lines.append(f"{start}{time_:>10}{spread:>8}{ratio:>12}{peak:>9}{worst:>13}")
    return "\n".join(lines)
