"""benchmarks/suites/op.py: which cases there are, what a measured row holds, and what the summary makes of rows."""

from pathlib import Path

import pytest
import torch

from exo_fast.backends import head_attention
from exo_fast.backends import torch as chunked
from exo_fast.benchmarks.methods import kernels, peers, problems
from exo_fast.benchmarks.report import op as report
from exo_fast.benchmarks.suites import op
from exo_fast.head import Head


def tiny(**changes) -> op.Case:
    fields = {
        "method": "exo_fast",
        "operation": "group_loss",
        "width": 16,
        "vocab": 512,
        "precision": "fp32",
        "candidates": 2,
        "completion": 64,
        "tokens": 256,
        "work": "both",
    }
    return op.Case(**{**fields, **changes})


@pytest.mark.parametrize("quick", [False, True])
def test_names_are_unique_and_problems_can_be_made(quick: bool) -> None:
    cases = op.cases(quick)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert case.tokens % (case.candidates * case.completion) == 0
        if case.method.startswith("liger"):
            assert case.candidates == 2
        if case.operation == "logprobs":
            peers.token_logps_of(case.method)


def test_every_method_is_timed_in_both_dtypes() -> None:
    for precision in ("fp32", "bf16"):
        timed = {c.method for c in op.cases() if c.precision == precision and c.tokens >= 8192 and c.work == "both"}
        known = {m for m in peers.METHODS if peers.unavailable(m, precision, "cpu") is None}
        left_out = {"exo_fast-chunked", "exo_fast-two-pass", *(op.FULL_LOGITS_TOO if precision == "fp32" else ())}
        assert timed == known - left_out


@pytest.mark.parametrize("quick", [False, True])
def test_cases_of_a_gpu_are_the_methods_that_run_there_and_kernels(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "device", lambda: "cuda")
    monkeypatch.setattr(problems, "free_bytes", lambda: 70e9)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: True)
    cases = op.cases(quick)
    assert len({str(case) for case in cases}) == len(cases)
    assert all(case.tokens % (case.candidates * case.completion) == 0 for case in cases)
    timed = {case.method for case in cases if op.impossible(case) is None}
    fused = [case for case in cases if case.method.startswith(("exo_fast", *kernels.KERNELS))]
    assert not any("GB" in (op.impossible(case) or "") for case in fused)
    if quick:
        assert len(cases) < 45
        assert {"exo_fast", "full-logits", *kernels.KERNELS} <= timed
    else:
        known = {m for m in peers.METHODS if not all(peers.unavailable(m, p, "cuda") for p in ("bf16", "fp32"))}
        assert timed == known | set(kernels.KERNELS)


def test_names() -> None:
    assert str(tiny()) == "op/exo_fast/16x512/fp32/K2/N256/both"
    assert str(tiny(completion=128)) == "op/exo_fast/16x512/fp32/K2x128/N256/both"
    assert str(tiny(operation="logprobs", work="forward")) == "op/exo_fast/16x512/fp32/logprobs/N256/forward"


@pytest.mark.parametrize("work", problems.WORK)
@pytest.mark.parametrize("operation", ["group_loss", "logprobs"])
def test_a_row(operation: str, work: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(problems, "FLOOR_ROWS", 8)
    row = op.measure(tiny(operation=operation, work=work), tmp_path)
    assert 0 < row["seconds"] < 10
    assert len(row["all_seconds"]) == problems.CALLS
    assert row["share"] == pytest.approx(row["baseline_seconds"] / row["seconds"], abs=0.1)
    assert set(row["gflops"]) == set(problems.PRODUCTS[work])
    assert set(row["errors"]) == {"loss", "logps", *problems.PRODUCTS[work]} - {"logits"}
    problems.prove("exo_fast", "fp32", row["errors"])
    assert row["float32_logits"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_a_row_of_a_kernel(kernel: str, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its launch gives what float64 gives, here in Triton's interpreter, and its floor is a copy."""
    monkeypatch.setattr(problems, "COPY_BYTES", 2**20)
    case = tiny(method=kernel, operation="kernel", precision=precision, vocab=100, tokens=4, work="forward")
    assert "for a GPU only" in op.impossible(case)
    row = op.measure(case, tmp_path)
    assert row["seconds"] > row["baseline_seconds"] >= 0
    assert max(row["errors"].values()) <= kernels.TOLERANCE[precision]
    shown = {"name": str(case), **vars(case), **row}
    assert op.summary([shown])["comparisons"] == []
    assert f"{kernel} alone, 4 rows" in report.problem_name(shown)


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(kernels.TOLERANCE, "bf16", 0.0)
    with pytest.raises(AssertionError, match="logits_to_grad in bf16: error"):
        op.measure(tiny(method="logits_to_grad", operation="kernel", precision="bf16", work="forward"), tmp_path)


@pytest.mark.parametrize("method", ["exo_fast", "full-logits"])
def test_a_trial_proves_and_returns_the_work(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(problems, "FLOOR_ROWS", 8)
    runs = []
    run = problems.run
    monkeypatch.setattr(problems, "run", lambda *args: runs.append(args) or run(*args))
    call, found = op.trial(tiny(method=method), tmp_path)
    problems.prove(method, "fp32", found["errors"])
    assert found["baseline_seconds"] > 0
    before = len(runs)
    call()
    assert len(runs) == before + 1


def test_only_what_the_work_needs_gets_a_gradient() -> None:
    for work, expected in (("forward", (False, False)), ("frozen", (True, False)), ("both", (True, True))):
        case = tiny(work=work)
        inputs = problems.make(case.problem).require(work)
        call, clear = op.step(case, inputs)
        call()
        clear()
        assert tuple(t.grad is not None for t in (inputs.hidden, inputs.weight)) == (False, False)  # not the caller's
        found = problems.errors("full-logits", "group_loss", work, inputs)
        assert tuple(name in found for name in ("dH", "dW")) == expected


def test_errors_are_measured_on_the_way_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long group is one group that exceeds its budget, and rows are as many as head attention needs."""
    calls = []
    monkeypatch.setattr(problems, "errors", lambda *args: calls.append(args[-2:]) or {})
    for completion in (4096, op.COMPLETION):
        case = tiny(vocab=49152, tokens=8192, completion=completion)
        op.few_errors(case, problems.make(case.problem))
    (long, budget), (short, none) = calls
    plan = chunked.Plan.of(1024, long.hidden, Head(long.weight), budget, together=1024)
    assert long.ref_logps.shape == (1, 2)
    assert 0 < plan.rows < 1024
    assert none is None
    assert len(short.hidden) >= head_attention.MIN_ROWS


def test_a_method_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = peers.token_logps_of("full-logits")
    monkeypatch.setattr(peers, "full_logits", lambda *args: exact(*args) * 1.01)
    for measured in (op.measure, op.trial):
        with pytest.raises(AssertionError, match="full-logits in fp32: error"):
            measured(tiny(method="full-logits"), tmp_path)


def test_full_logits_that_do_not_fit_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "free_bytes", lambda: 20e9)
    large = {"width": 640, "vocab": 262144, "tokens": 32768}
    assert op.impossible(tiny(**large)) is None
    assert op.impossible(tiny(**large, method="full-logits")) == "needs about 112 GB, 20 GB are free"
    assert op.impossible(tiny(method="full-logits")) is None


def row(method: str, seconds: float, share: float, precision: str = "bf16", **changes) -> dict:
    found = {**vars(tiny(method=method, precision=precision)), "seconds": seconds, "share": share}
    rounded = precision == "bf16" and method == "cce"
    return {**found, "gflops": {"logits": 100 * share}, "float32_logits": not rounded, **changes}


def test_summary_compares_with_the_fastest_and_the_fastest_of_float32_logits() -> None:
    rows = [
        row("exo_fast", 2.0, 0.8),
        row("cce", 1.9, 0.9),
        row("full-logits-fp32", 4.0, 0.4),
        row("full-logits", 1.0, 0.9, precision="fp32"),
        {**vars(tiny(method="liger")), "skipped": "liger_kernel is not installed"},
    ]
    summary = op.summary(rows)
    (comparison,) = summary["comparisons"]
    assert (comparison["fastest"], comparison["over_fastest"]) == ("cce", 1.125)
    assert (comparison["equal"], comparison["over_equal"]) == ("full-logits-fp32", 0.5)
    assert [(f["precision"], f["gflops"]) for f in summary["floors"]] == [
        ("bf16", {"logits": 80.0}),
        ("fp32", {"logits": 90.0}),
    ]


def test_the_floor_is_of_the_products_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "FLOOR_ROWS", 10)
    floor = problems.Floor(problems.make(tiny().problem))
    floor.times = {"logits": [1.0, 3.0, 2.0], "dH": [1.0], "dW": [4.0]}
    assert [floor.seconds(20, work) for work in problems.WORK] == [2.0, 4.0, 12.0]
    assert floor.gflops["dW"] == pytest.approx(2 * 10 * 16 * 512 / 4e9, abs=0.1)


def test_peak_counts_what_a_call_held() -> None:
    peak = problems.Peak()
    block = torch.ones(10_000_000)
    del block
    assert 39 < peak.mb() < 60
