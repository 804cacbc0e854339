"""Run the cases of a suite, each in a process of its own, and write a complete result file after each.

Separate processes make a process's peak memory the case's. No case inherits another's warm caches or compiled code,
and a case that crashes or hangs costs only one row.
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

from exo_fast.benchmarks.harness import worker
from exo_fast.training import machine
from exo_fast.training.errors import InputError
from exo_fast.training.processes import end_with_parent

LAST_WORDS = 12  # lines of a failed case that are shown
LIMIT_SECONDS = 1800  # per case: far above the longest, so that only a hanging case is ended

NO_TIME = {"skipped": "the time given by --minutes was up; --continue runs it"}


class CaseFailed(RuntimeError):
    """A case's process ended without a row. The message is the end of its output."""


def run_suite(
    suite: ModuleType,
    cases: Sequence[Any],
    output_dir: Path,
    *,
    quick: bool = False,
    keep: bool = False,
    until: float | None = None,
) -> dict:
    """Measure `cases` of `suite` into `<output_dir>/<NAME>.json`, and return the file's content.

    No case begins after the time `until` (of time.perf_counter); the rows of the remaining cases say so. Rows of other
    cases are dropped. With `keep` they are kept, even if the suite no longer has the case, and each names the run it
    is from ("run"). Raises InputError like `refuse_mixture`, and CaseFailed if the suite's extras fail.
    """
    path = output_dir / f"{suite.NAME}.json"
    here = machine.describe()
    order = {str(case): case for case in suite.cases(quick)}
    if keep:
        refuse_mixture(path, quick, here)
    fields = suite.Case.__dataclass_fields__.keys()  # rows written at another commit may have other fields
    rows = {name: row for name, row in _kept_rows(path).items() if fields <= row.keys()} if keep else {}

    def save(extras: dict) -> dict:
        for name in rows.keys() & order.keys():
            _add_baseline(suite, order[name], rows)
        ordered = [rows[name] for name in [*order, *(name for name in rows if name not in order)] if name in rows]
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
                found = NO_TIME if _is_past(until) else _row(suite, case, workdir, bar.write)
                rows[str(case)] = {"name": str(case), **asdict(case), **found}
                results = save(extras)
    return results


def _is_past(until: float | None) -> bool:
    return until is not None and time.perf_counter() > until


def _row(suite: ModuleType, case: Any, workdir: str, say: Any) -> dict:
    """Return the row of one case: a measurement, or the reason why there is no measurement."""
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
    """Return the row that `worker` prints. Raises CaseFailed. Processes that it started do not outlive the call."""
    command = [sys.executable, "-m", worker.__name__, suite.__name__, case, workdir]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent(signal.SIGKILL),  # else a case whose runner was killed would disturb the next
    )
    try:
        output, said = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CaseFailed(f"ended after {LIMIT_SECONDS / 60:.0f} minutes without a row") from error
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


def refuse_mixture(path: Path, quick: bool, here: dict | None = None) -> None:
    """Raises InputError if the rows of a result file cannot be mixed with new ones: rows from another machine, or quick
    cases with full ones. `here` is `machine.describe()`.
    """
    old = read(path)
    if old is None:
        return
    if old["machine"] != (here or machine.describe())["machine"]:
        raise InputError(
            f"{path} holds results of another machine ({machine_line(old)}); run the whole suite, "
            f"or give another --output_dir"
        )
    if old["quick"] != quick:
        kinds = ("the full cases", "those of --quick")
        raise InputError(
            f"{path} holds results of {kinds[old['quick']]}, and this run is of {kinds[quick]}: "
            f"give another --output_dir{'' if quick else ', or --quick'}"
        )


def read(path: Path) -> dict | None:
    """Read a result file; None if it does not exist. Raises InputError if the file is not a result file."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no result file ({error}); move it away or give another --output_dir") from error
    if "suite" not in found or "quick" not in found:
        raise InputError(f"{path} was not written by `exo-fast bench`; move it away or give another --output_dir")
    return found


def _kept_rows(path: Path) -> dict[str, dict]:
    """Return the rows of the result file by name, each with the run that it is from."""
    old = read(path)
    if old is None:
        return {}
    run = {name: old[name] for name in ("date", "commit", "command", "versions")}
    return {row["name"]: {"run": run, **row} for row in old["rows"]}


def left(suite: ModuleType, cases: Sequence[Any], path: Path) -> list[Any]:
    """Return the `cases` that a result file lacks: not in it, failed, skipped for a reason that is gone, or without
    their yardstick's time. Both are then measured again, because a ratio must come from one run.
    """
    rows = {row["name"]: row for row in (read(path) or {"rows": []})["rows"]}

    def is_left(case: Any) -> bool:
        row = rows.get(str(case))
        if row is None or "failed" in row:
            return True
        if "skipped" in row:
            return suite.impossible(case) is None
        yardstick = _baseline(suite, case)
        if yardstick is None or "baseline_seconds" in row:
            return False
        return "skipped" not in rows.get(yardstick, {}) and "seconds" not in rows.get(yardstick, {})

    return [case for case in cases if is_left(case)]


def with_baselines(suite: ModuleType, cases: Sequence[Any], among: Sequence[Any]) -> list[Any]:
    """Add to `cases` their yardsticks from `among`, in the order of `among`: a ratio must come from one run."""
    wanted = {str(case) for case in cases}
    wanted |= {_baseline(suite, case) for case in cases}
    return [case for case in among if str(case) in wanted]


def _baseline(suite: ModuleType, case: Any) -> str | None:
    """Return the name of a case's yardstick; None if the case is its own yardstick or has no yardstick."""
    name = suite.baseline(case) if hasattr(suite, "baseline") else None
    return None if name == str(case) else name


def _add_baseline(suite: ModuleType, case: Any, rows: dict[str, dict]) -> None:
    """Add the yardstick's time to a row of the same run."""
    row, yardstick = rows[str(case)], rows.get(_baseline(suite, case), {})
    if "seconds" in row and "seconds" in yardstick and row.get("run") == yardstick.get("run"):
        row["baseline_seconds"] = yardstick["seconds"]


def write(path: Path, results: dict) -> None:
    """Replace a result file in one step, so that it is complete even if the run is stopped."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def machine_line(results: dict) -> str:
    """Describe the machine of a result file in one line."""
    found = results["machine"]
    device = "no GPU" if found["device"] == "cpu" else found["device"]
    amx = " with AMX" if "amx_bf16" in found["features"] else ""
    cores = f"{found['cores']} cores" + ("" if found["threads"] == found["cores"] else f" ({found['threads']} threads)")
    return f"{found['cpu']}{amx}, {cores}, {found['memory_gb']:.0f} GB, {device}"


def table(rows: Sequence[dict]) -> str:
    """Format the rows as aligned text: seconds and spread, ratio to the yardstick, memory, the worst error."""
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
        time_ = "" if seconds is None else f"{seconds:.3f}" if seconds >= 0.01 else f"{seconds:.3g}"
        lines.append(f"{start}{time_:>10}{spread:>8}{ratio:>12}{peak:>9}{worst:>13}")
    return "\n".join(lines)
