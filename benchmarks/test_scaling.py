"""`pytest benchmarks --benchmark-only -k scaling`: the operation on four numbers of tokens, each twice the last.

The last test needs the others' times: it fits their exponent, and that of their memory.
"""

from __future__ import annotations

import pytest

from exo_fast.benchmarks.methods import peers, problems
from exo_fast.benchmarks.suites import op, scaling

ROWS: dict[scaling.Case, dict] = {}
CASES = scaling.cases(quick=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaling(case: scaling.Case, benchmark) -> None:
    if why := scaling.impossible(case):
        pytest.skip(why)
    inputs = problems.make(case.op.problem, problems.device())
    with peers.settings(case.method, case.precision, problems.device()):
        found = op.few_errors(case.op, inputs)
        problems.prove(case.method, case.precision, found)
        call, clear = op.step(case.op, inputs)
        call()
        clear()
        floor = problems.Floor(inputs)
        floor.measure(case.op.work)
        peak = problems.Peak()
        call()
        scratch = peak.mb() - problems.gradient_mb(case.op.problem, case.op.work)
        benchmark.group = f"scaling/{case.axis}"
        benchmark.pedantic(lambda: (call(), problems.synchronize()), rounds=3)
    benchmark.extra_info.update(errors=found, scratch_mb=round(scratch, 1))
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        baseline = floor.seconds(case.tokens, case.op.work)
        benchmark.extra_info["share"] = round(baseline / seconds, 3)
        ROWS[case] = {**vars(case), "seconds": seconds, "baseline_seconds": baseline, "scratch_mb": scratch}


def test_scaling_exponents(benchmark) -> None:
    """Time in proportion to the tokens, memory constant; wider than in the full suite, for these runs are short."""
    if len(ROWS) < len(CASES):
        pytest.skip("not every case was timed")
    fits = benchmark.pedantic(lambda: scaling.summary(list(ROWS.values()))["fits"], rounds=1)
    benchmark.extra_info["fits"] = fits
    for fit in fits:
        assert abs(fit["time_over_floor"]) < 0.1, fit
        assert fit["memory"] < 0.1, fit
