"""What the benchmarks under pytest share: a run's numbers are written once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from exo_fast.benchmarks.suites import gpu_op

REPORT = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[gpu_op.Results]:
    """Collects the rows of a run, writes them to benchmarks/results/gpu_op.json and prints them at its end."""
    from exo_fast.benchmarks.suites import gpu_op  # Triton's kernels: not for who runs no GPU benchmark

    found = gpu_op.Results()
    yield found
    if found.rows or found.kernels:
        request.config.stash[REPORT] = gpu_op.report(found.save())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if REPORT in config.stash:
        terminalreporter.section("benchmarks/results/gpu_op.json")
        terminalreporter.write_line(config.stash[REPORT])
