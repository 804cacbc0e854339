"""Verdicts of `--compare` (worse, better, broken, missing), and the ratios they begin at."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from torch import Tensor, no_grad
from torch.utils.flop_counter import FlopCounterMode

from exo_fast.benchmarks import cli
from exo_fast.benchmarks.harness import compare
from exo_fast.benchmarks.methods import peers, problems
from exo_fast.benchmarks.suites import op
from exo_fast.training.errors import InputError

ROW = {
    "name": "op/ours",
    "seconds": 2.0,
    "baseline_seconds": 1.8,
    "peak_mb": 400.0,
    "errors": {"loss": 1e-4, "dH": 0.0},
}


def results(*rows: dict, cpu: str = "A", torch: str = "2.13.0", commit: str = "abc") -> dict:
    machine = {"cpu": cpu, "features": [], "cores": 2, "threads": 2, "memory_gb": 25.0, "device": "cpu"}
    head = {"date": "2026-01-02T03:04:05+00:00", "commit": commit, "machine": machine, "versions": {"torch": torch}}
    return {**head, "suite": "op", "rows": deepcopy(list(rows))}


def found(new: dict, old: dict = ROW, cpu: str = "A", **options) -> dict[str, list[str]]:
    got = compare.compare(results(old), results(new, cpu=cpu), **options)
    return {kind: [d.what for d in getattr(got, kind)] for kind in ("worse", "better") if getattr(got, kind)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"seconds": 2.15}, {}),
        ({"seconds": 2.25}, {"worse": ["time / baseline"]}),
        ({"seconds": 1.7}, {"better": ["time / baseline"]}),
        ({"seconds": 4.0, "baseline_seconds": 3.6}, {}),  # the machine was busy with something else
        ({"seconds": 2.0, "baseline_seconds": 0.9}, {"worse": ["time / baseline"]}),  # so was the other run's
        ({"peak_mb": 445.0}, {"worse": ["memory, MB"]}),
        ({"peak_mb": 300.0}, {"better": ["memory, MB"]}),
        ({"errors": {"loss": 1.4e-4, "dH": 0.0}}, {}),
        ({"errors": {"loss": 1.6e-4, "dH": 0.0}}, {"worse": ["error, loss"]}),
        ({"errors": {"loss": 1e-6, "dH": 0.0}}, {"better": ["error, loss"]}),
        ({"errors": {"loss": 1e-4, "dH": 1e-3}}, {"worse": ["error, dH"]}),
        ({"errors": {"loss": 1e-4, "dH": 9e-6}}, {}),  # rounding
        ({"errors": {"loss": math.nan, "dH": math.inf}}, {"worse": ["error, dH", "error, loss"]}),
        ({"seconds": math.nan}, {"worse": ["time / baseline"]}),
    ],
)
def test_what_counts(change: dict, expected: dict) -> None:
    got = found({**ROW, **change})
    assert {kind: sorted(what) for kind, what in got.items()} == expected


def test_a_small_difference_in_memory_is_none() -> None:
    assert found({**ROW, "peak_mb": 25.0}, old={**ROW, "peak_mb": 6.0}) == {}


def test_a_slowed_version_is_flagged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It makes the logits once more and computes the same: 4/3 of the products. Time is counted in products."""

    def products(call: Callable) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e6

    monkeypatch.setattr(problems, "seconds_of", products)
    monkeypatch.setattr(problems, "FLOOR_ROWS", 8)
    case = op.Case("full-logits", "group_loss", 16, 512, "fp32", 2, 64, 256, "both")

    def measured() -> dict:
        return results({"name": str(case), **vars(case), **op.measure(case, tmp_path)})

    first, second = measured(), measured()
    ours = peers.full_logits

    def slowed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with no_grad():
            hidden @ weight.T
        return ours(hidden, weight, targets)

    monkeypatch.setattr(peers, "full_logits", slowed)
    third = measured()
    assert first["rows"][0]["share"] == 1
    assert not compare.compare(first, second).regressed
    (difference,) = compare.compare(first, third).worse
    assert difference.what == "time / baseline"
    assert difference.ratio == pytest.approx(4 / 3)


def test_times_too_short_to_compare_are_not() -> None:
    short = {**ROW, "seconds": 0.01, "baseline_seconds": 0.06}
    assert found({**short, "seconds": 0.04}, old=short) == {}
    assert found({**short, "seconds": 0.06}, old=short) == {"worse": ["time / baseline"]}
    long = {**ROW, "baseline_seconds": 1e-4}
    assert found({**long, "baseline_seconds": 1e-5}, old=long) == {}
    assert found({**long, "seconds": 3.0}, old=long) == {"worse": ["seconds"]}


def test_a_gpus_times_are_shorter() -> None:
    old, new = (results({**ROW, "seconds": value, "baseline_seconds": 1e-3}) for value in (2e-3, 3e-3))
    assert not compare.compare(old, new).worse
    for run in (old, new):
        run["machine"]["device"] = "NVIDIA H200"
    assert [difference.what for difference in compare.compare(old, new).worse] == ["time / baseline"]


def test_predictions_are_compared_by_what_they_are_off() -> None:
    old = {**ROW, "errors": {"prediction": 0.01}}
    assert found({**old, "errors": {"prediction": 0.05}}, old=old) == {}
    assert found({**old, "errors": {"prediction": 0.07}}, old=old) == {"worse": ["error, prediction"]}
    assert found({**old, "errors": {"prediction": math.nan}}, old=old) == {"worse": ["error, prediction"]}
    far = {**old, "errors": {"prediction": 0.2}}
    assert found({**old, "errors": {"prediction": 0.26}}, old=far) == {"worse": ["error, prediction"]}
    assert found(old, old=far) == {"better": ["error, prediction"]}


def test_the_tolerance_is_of_times() -> None:
    slower = {**ROW, "seconds": 2.5}
    assert found(slower, tolerance=1.3) == {}
    assert found({**slower, "peak_mb": 900.0}, tolerance=1.3) == {"worse": ["memory, MB"]}


def test_seconds_are_compared_on_one_machine_only() -> None:
    alone = {name: value for name, value in ROW.items() if name != "baseline_seconds"}
    assert found({**alone, "seconds": 3.0}, old=alone) == {"worse": ["seconds"]}
    assert found({**alone, "seconds": 3.0}, old=alone, cpu="B") == {}
    assert found({**ROW, "seconds": 3.0}, cpu="B") == {"worse": ["time / baseline"]}


def test_broken_and_missing_cases_are_named() -> None:
    before = [{"name": f"op/{name}", "seconds": 1.0} for name in ("fails", "skips", "gone", "same")]
    now = [{"name": "op/fails", "failed": "x"}, {"name": "op/skips", "skipped": "y"}, before[3], {"name": "op/added"}]
    got = compare.compare(results(*before), results(*now))
    assert got.broken == [("op/fails", "x")]
    assert got.missing == [("op/skips", "y"), ("op/gone", "not in the new results")]
    assert got.compared == 1
    assert got.regressed
    for name, regressed in (("op/fails", True), ("op/skips", True), ("op/gone", True), ("op/none", False)):
        some = compare.compare(results(*before), results(*now), only={name, "op/same"})
        assert (some.regressed, some.compared) == (regressed, 1)
    assert not compare.compare(results(before[0]), results(now[0])).nothing_in_common
    assert compare.compare(results(before[2]), results(*now)).nothing_in_common


def test_what_both_are_from_is_said() -> None:
    kept = {**ROW, "run": {"date": "2025-06-07", "commit": "def", "versions": {"torch": "2.12.0"}}}
    text = compare.heads(results(kept, torch="2.12.1"), results(ROW, commit="123"))
    assert "2026-01-02 03:04 · commit abc · A, 2 cores" in text
    assert "1 row of earlier runs (2025-06-07, commit def, torch 2.12.0)" in text
    assert "commit 123" in text
    assert "versions that differ: torch 2.12.1 → 2.13.0" in text
    assert "WARNING" not in text
    assert "WARNING: the machines differ" in compare.heads(results(ROW), results(ROW, cpu="B"))


def test_results_with_nothing_in_common_are_an_error(tmp_path: Path) -> None:
    for name, row in (("old", ROW), ("new", {**ROW, "name": "op/other"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "op.json").write_text(json.dumps(results(row)))
    with pytest.raises(InputError, match=r"of op, no case .* is in the new results; run the same suites"):
        cli.main(["--compare", str(tmp_path / "old"), "--output_dir", str(tmp_path / "new")])


def test_command_prints_the_worst_first_and_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    peer = {**ROW, "name": "op/peer"}
    for name, rows in (("old", [ROW, peer]), ("new", [{**ROW, "seconds": 3.0}, {**peer, "seconds": 5.0}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "op.json").write_text(json.dumps(results(*rows)))
    old, new = tmp_path / "old" / "op.json", tmp_path / "new"
    assert cli.main(["--compare", str(old), "--output_dir", str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "op:"
    lines = lines[lines.index("") + 1 :]
    assert [line.split()[0] for line in lines[1:3]] == ["op/peer", "op/ours"]
    assert lines[2].split()[1:] == ["time", "/", "baseline", "1.111", "1.667", "1.50"]
    assert lines[-1] == "2 cases compared: 2 worse, 0 better."
    assert cli.main(["--compare", str(old), "--output_dir", str(new), "--tolerance", "3"]) == 0
    assert cli.main(["--compare", str(old), "--output_dir", str(tmp_path / "old")]) == 0


def test_files_that_hold_no_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "op.json").write_text("{")
    with pytest.raises(InputError, match="no result file"):
        compare.read_results(tmp_path)
    (tmp_path / "op.json").write_text('{"rows": []}')  # what is no suite's
    with pytest.raises(InputError, match="holds no results"):
        compare.read_results(tmp_path / "op.json")
