"""`pytest benchmarks -k compare`: `exo-fast bench --compare` flags a version that was made slower on purpose.

Timed, so it lies here and not among the tests. The slower version makes the logits once more and changes nothing else:
it computes the same, in 4/3 of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from exo_fast.benchmarks.harness import compare
from exo_fast.benchmarks.methods import peers
from exo_fast.benchmarks.suites import op
from exo_fast.training import machine

CASE = op.Case("exo_fast", "group_loss", 576, 49152, "fp32", 2, 64, 1024, "both")


def results(row: dict) -> dict:
    return {**machine.describe(), "suite": op.NAME, "rows": [{"name": str(CASE), **asdict(CASE), **row}]}


def test_a_slowed_version_is_flagged(benchmark: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = (results(op.measure(CASE, tmp_path)) for _ in range(2))
    ours = peers.operation(CASE.method)

    def slowed(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor, **options: float):
        with torch.no_grad():
            for rows in hidden.split(1024):
                rows @ weight.T
        return ours(hidden, weight, *rest, **options)

    monkeypatch.setattr(peers, "operation", lambda method: slowed)
    third = results(benchmark.pedantic(op.measure, args=(CASE, tmp_path), rounds=1))
    benchmark.extra_info["seconds"] = [found["rows"][0]["seconds"] for found in (first, second, third)]

    # Twice the same: more than the tolerance apart only where something else disturbs the machine.
    assert not compare.compare(first, second, tolerance=1.15).regressed, compare.table(compare.compare(first, second))
    flagged = compare.compare(first, third)
    assert "time / baseline" in [difference.what for difference in flagged.worse]
    assert "error" not in "".join(difference.what for difference in flagged.worse)
