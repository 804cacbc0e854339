"""Run a training stage in a process of its own that is killed (SIGKILL) at a known moment.

`python killing.py METHOD CALL STAGE …` ends at the CALLth call of StageTrainer.METHOD: `training_step` for a kill
between two steps, `_save_rng_state` for one in the middle of writing a checkpoint. With METHOD:SIGTERM it is asked to
stop there instead.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_and_kill(method: str, call: int, words: Sequence[str], **options: Any) -> None:
    """Start `exo-fast WORDS…`, kill it at the `call`th call of `method`, and see that it died of that."""
    command = [sys.executable, __file__, method, str(call), *words]
    done = run(command, **options)
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-3000:]


def run_stage(words: Sequence[str], **options: Any) -> str:
    """`exo-fast WORDS…` in a process of its own; returns what it printed."""
    done = run([sys.executable, "-m", "exo_fast.training.cli", *words], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def environment() -> dict[str, str]:
    """Without a launcher's variables, on one thread."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launcher} | {"OMP_NUM_THREADS": "1"}


def run(command: Sequence[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """The command in `environment()`."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd)


def main() -> None:
    from exo_fast.training.cli.command import main as cli
    from exo_fast.training.trainer.trainer import StageTrainer

    call, words = int(sys.argv[2]), sys.argv[3:]
    method, _, name = sys.argv[1].partition(":")
    deed = signal.Signals[name or "SIGKILL"]
    original = getattr(StageTrainer, method)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), deed)
        return original(*args, **kwargs)

    setattr(StageTrainer, method, deadly)
    sys.exit(cli(words))


if __name__ == "__main__":
    main()
