"""Start Python afresh, for tests of what a command does before and while it imports its packages."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from exo_fast.benchmarks.reliability.processes import environments


def environment() -> dict[str, str]:
    """Return the environment without a launcher's variables, for one thread."""
    return environments(1)[0]


def run(command: Sequence[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run the command in `environment()`."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd)
