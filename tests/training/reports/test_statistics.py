"""The numbers and plots of reports, on known data."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from exo_fast.training.reports.statistics import mean_and_error, paired_bootstrap, plot_training


def test_paired_bootstrap_agrees_with_the_normal_interval_of_many_differences() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=400)
    after = before + rng.normal(0.2, 0.5, size=400)
    found = paired_bootstrap(before, after)
    error = (after - before).std(ddof=1) / 20
    assert found.value == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_paired_bootstrap_uses_the_pairing() -> None:
    before = np.random.default_rng(1).normal(size=64) * 100
    found = paired_bootstrap(before, before + np.linspace(0.9, 1.1, 64))
    assert 0.95 < found.low < 1.0 < found.high < 1.05


def test_paired_bootstrap_of_equal_gains_is_a_point_and_repeats_itself() -> None:
    values = np.arange(5.0)
    assert paired_bootstrap(values, values + 0.5) == paired_bootstrap(values, values + 0.5)
    assert dataclasses.astuple(paired_bootstrap(values, values + 0.5)) == (0.5, 0.5, 0.5)
    noisy = np.random.default_rng(2).normal(size=5)
    assert paired_bootstrap(values, noisy, seed=3) == paired_bootstrap(values, noisy, seed=3)


def test_paired_bootstrap_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match=r"before has shape \(3,\) and after \(4,\)"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_standard_error_counts_prompts_not_samples() -> None:
    assert mean_and_error([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]) == (2.0, pytest.approx(1.0))


def test_training_is_drawn_also_where_little_was_logged(tmp_path: Path) -> None:
    plot_training([{"step": 1, "loss": 0.5, "group_accuracy": 0.5}, {"step": 2, "eval_loss": 0.4}], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
