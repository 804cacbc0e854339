"""`pytest benchmarks --benchmark-only`: the quick cases of the suites under pytest-benchmark, in one process.

    pytest benchmarks --benchmark-only -k op               the operation, in minutes
    pytest benchmarks --benchmark-only -m gpu              the cases on a GPU
    pytest benchmarks --benchmark-only --benchmark-save=a  to compare runs: --benchmark-compare

Each case first proves that its result is right (`trial` of the suite), then it is timed. `extra_info` has its errors,
and its share of the floor if there is one. `exo-fast bench` runs all cases, each in a process of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from exo_fast.benchmarks.harness.contract import SUITES, load
from exo_fast.benchmarks.methods import problems
from exo_fast.benchmarks.suites import scaling

ROUNDS = 3
ROWS: dict[scaling.Case, dict] = {}  # rows of `scaling`, for its exponents


def cases() -> list[Any]:
    """Return every quick case of a suite that has trials, as pytest's parameters."""
    found = []
    for suite in map(load, SUITES):
        on_gpu = suite.NAME in ("op", "scaling") and problems.device() == "cuda"
        marks = pytest.mark.gpu if on_gpu else ()
        for case in suite.cases(quick=True) if hasattr(suite, "trial") else ():
            found.append(pytest.param(suite, case, id=str(case), marks=marks))
    return found


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all cases, as the suites' contract requires."""
    return tmp_path_factory.mktemp("suites")


@functools.cache
def prepare(suite: ModuleType) -> None:
    """Fetch the inputs of a suite's cases, once."""
    if hasattr(suite, "prepare"):
        suite.prepare()


@pytest.mark.parametrize(("suite", "case"), cases())
def test_case(suite: ModuleType, case: Any, benchmark: Any, workdir: Path) -> None:
    if why := suite.impossible(case):
        pytest.skip(why)
    prepare(suite)
    torch.compiler.reset()
    call, found = suite.trial(case, workdir)
    method = getattr(case, "method", getattr(case, "style", None))
    benchmark.group = str(case).replace(f"/{method}/", "/")
    benchmark.extra_info.update(found)
    benchmark.pedantic(call, rounds=ROUNDS)
    if benchmark.stats and "baseline_seconds" in found:  # no stats under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["share"] = round(found["baseline_seconds"] / seconds, 3)
        if suite is scaling:
            ROWS[case] = {**vars(case), "seconds": seconds, **found}


def test_scaling_exponents() -> None:
    """Check that time grows with the tokens and memory does not; the limits are wide because these runs are short."""
    if len(ROWS) < len(scaling.cases(quick=True)):
        pytest.skip("not every case of scaling was timed")
    for fit in scaling.summary(list(ROWS.values()))["fits"]:
        assert abs(fit["time_over_floor"]) < 0.1, fit
        assert fit["memory"] < 0.1, fit
