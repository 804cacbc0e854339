"""What the benchmarks under pytest share: their modules lie beside them, and a run's numbers are written once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest runs in importlib mode, which leaves a script's folder off it
REPORT = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator["gpu_op.Results"]:  # noqa: F821
    """Collects the rows of a run, writes them to benchmarks/results/gpu_op.json and prints them at its end."""
    import gpu_op

    found = gpu_op.Results()
    yield found
    if found.rows or found.kernels:
        request.config.stash[REPORT] = gpu_op.report(found.save())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if REPORT in config.stash:
        terminalreporter.section("benchmarks/results/gpu_op.json")
        terminalreporter.write_line(config.stash[REPORT])
