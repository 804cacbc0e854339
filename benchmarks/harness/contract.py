"""The suites that `exo-fast bench` runs, and the definition of a suite.

A suite is a module with

    NAME: str                             its name in SUITES, and the first part of every case's name
    Case                                  a frozen dataclass of JSON values; str(case) is its name, unique, such as
                                          "op/exo_fast/576x49152/bf16/K4/N8192/both"
    cases(quick=False) -> list[Case]      in the order they run, because time may run out before the last (--minutes);
                                          quick: a few minutes at most, for a first look
    impossible(case) -> str | None        why it cannot run on this machine, None if it can
    measure(case, workdir: Path) -> dict  runs the case in a process of its own; returns its row

and may have

    trial(case, workdir: Path) -> tuple[Callable, dict]
                                          proves that the case computes the right result, or raises AssertionError;
                                          returns a function that does the case's work once, warmed up, and the row's
                                          entries besides times (such as "errors"). `pytest benchmarks` times it
    prepare() -> None                     once a run, in the runner's process: fetch the cases' inputs, and say so
    baseline(case) -> str | None          the name of the case of the same problem whose time is its yardstick
    extras(workdir: Path) -> dict         measured once a run, in a process of its own, before the first case; stored
                                          beside the rows (such as {"bandwidth_gbs": 21.3})
    summary(rows: list[dict]) -> dict     results derived from the rows (such as exponents); stored as "summary"

`workdir` is one folder for all cases of a run, empty at first. A case can leave files there that later cases would
otherwise make themselves. The output that `measure` prints goes to the runner's log, not to the result.

A row is {"name": str(case), **fields of the case, **the result of measure}. Keys with a meaning here:

    seconds            median of the timed calls
    all_seconds        all of them
    peak_mb            peak resident memory above the memory held before, MB (1e6 bytes); on CUDA torch's counters
    errors             {name: relative or absolute error against float64}
    baseline_seconds   seconds of the yardstick in the same run, added by measure, or by the runner from `baseline`
    skipped            why the case was not run (then the other keys are absent)
    failed             the last words of a case that crashed (likewise)
    took               seconds of the whole process, set-up included (added by the runner)

A result file is `<output_dir>/<NAME>.json`: machine, versions, date, command and commit (`machine.describe`), "suite",
"quick", "rows", "summary" and the extras.
"""

from __future__ import annotations

import importlib
from types import ModuleType

SUITES = {
    "op": "exo_fast.benchmarks.suites.op",
    "scaling": "exo_fast.benchmarks.suites.scaling",
    "step": "exo_fast.benchmarks.suites.step",
    "data": "exo_fast.benchmarks.suites.data",
    "memory": "exo_fast.benchmarks.suites.memory",
}
# Shares of the time that a run may take (--minutes), in proportion to the time of the whole suites.
SHARES = {"op": 0.44, "scaling": 0.13, "step": 0.31, "data": 0.07, "memory": 0.05}


def load(name: str) -> ModuleType:
    """Import the suite called `name`. Raises KeyError for a name that is not in SUITES."""
    return importlib.import_module(SUITES[name])
