"""Run `exo-fast`, or a script, in processes of their own, for tests that kill it or need two of it (see `Team`)."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

from exo_fast.benchmarks.reliability.processes import PRELOAD, Team

PRELOAD.append("trl.trainer.dpo_trainer")


@contextmanager
def started(words: Sequence[object], processes: int = 1, **deaths: Any) -> Iterator[Team]:
    """Processes that run `exo-fast WORDS…`, or a script if the first word names one. Kills leftovers at the end."""
    with tempfile.TemporaryDirectory() as folder:
        team = Team([str(word) for word in words], Path(folder, "log"), processes, **deaths)
        try:
            yield team
        finally:
            team.kill()
            team.wait()


def run(*words: object, processes: int = 1, **deaths: Any) -> str:
    """Run the command to its end, which must be a good one; return its output."""
    with started(words, processes, **deaths) as team:
        statuses = team.wait(seconds=300)
        assert not any(statuses), (statuses, team.said()[-5000:])
        return team.said()


def run_and_kill(method: str, call: int, *words: object) -> None:
    """Kill the command at the `call`th call of a method of StageTrainer, and see that it died of that."""
    with started(words, deaths={0: (method, call)}) as team:
        assert team.wait() == [-SIGKILL], team.said()[-5000:]


def kill_halfway(script: Path, output_dir: Path, *, processes: int = 1) -> None:
    """SIGKILL `script` as soon as it has stored another batch below `output_dir`; it must not have finished."""
    before = stored_bytes(output_dir)
    with started([script], processes) as team:
        while stored_bytes(output_dir) <= before:
            assert team.alive(), team.said()[-5000:]
            time.sleep(0.005)
    assert not (output_dir / "summary.json").exists()


def stored_bytes(output_dir: Path) -> int:
    """Return the size of finished batches."""
    return sum(path.stat().st_size for path in output_dir.glob(".partial/*.jsonl"))
