"""`pytest benchmarks --benchmark-only -k op`: the operation under pytest-benchmark, on SmolLM2's head and few rows.

Each method first shows that its loss, log-probs and gradients are those of float64; then it is timed. `extra_info` has
the errors, the share of the floor and the peak of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from exo_fast.benchmarks.methods import peers, problems
from exo_fast.benchmarks.suites import op

ROUNDS = 3
# The method last: one problem's inputs and floor serve all methods.
CASES = sorted(op.cases(quick=True), key=lambda case: op.problem_of(vars(case)))


@pytest.fixture(scope="module")
def shared() -> Iterator[dict]:
    """Inputs and floors by problem, one at a time: a head and its logits are large."""
    found: dict = {}
    yield found
    found.clear()


def inputs_of(case: op.Case, shared: dict) -> tuple[problems.Inputs, problems.Floor]:
    key = (case.problem, case.work)
    if key not in shared:
        shared.clear()
        inputs = problems.make(case.problem, problems.device())
        floor = problems.Floor(inputs)
        floor.measure(case.work)
        shared[key] = inputs, floor
    return shared[key]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case: op.Case, shared: dict, benchmark) -> None:
    if why := op.impossible(case):
        pytest.skip(why)
    torch.compiler.reset()
    inputs, floor = inputs_of(case, shared)
    with peers.settings(case.method, case.precision, problems.device()):
        found = op.few_errors(case, inputs)
        problems.prove(case.method, case.precision, found)
        call, clear = op.step(case, inputs)
        call()
        clear()
        peak = problems.Peak()
        call()
        peak_mb = peak.mb()
        benchmark.group = "/".join(str(case).split("/")[2:])

        def synchronized() -> None:
            call()
            problems.synchronize()

        benchmark.pedantic(synchronized, rounds=ROUNDS)
    baseline = floor.seconds(case.tokens, case.work)
    benchmark.extra_info.update(
        errors=found,
        peak_mb=round(peak_mb, 1),
        scratch_mb=round(peak_mb - problems.gradient_mb(case.problem, case.work), 1),
        baseline_seconds=baseline,
    )
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["share"] = round(baseline / benchmark.stats.stats.median, 3)
