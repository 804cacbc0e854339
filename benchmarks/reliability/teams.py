"""`exo-fast` in processes that can be killed: several over gloo on this machine, forked from one that has imported all.

A process takes ten seconds to import what training needs; forked from one that has, it starts at once, and is a process
like any other to the kernel, to gloo and to SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.reliability import trainings

PRELOAD = [
    "exo_fast.training.cli",
    "exo_fast.training.stages.align",
    "exo_fast.training.arguments",
    "deepspeed",
    "peft",
]
DIED = "killed at its call "
LIMIT_SECONDS = 180  # of a run that is left alone, after which it is taken to hang


class Team:
    """One command in `processes` processes, from now on. What they print is added to `log`.

    `deaths` are, by rank, the method of StageTrainer and the number of its call that a process does not survive.
    """

    def __init__(
        self, words: Sequence[str], log: Path, processes: int = 2, deaths: dict[int, tuple[str, int]] | None = None
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # before the first of them is imported
        self.log, self.begun = log, log.stat().st_size if log.exists() else 0
        self.members = [
            context.Process(
                target=_run, args=(list(words), environment, str(log), (deaths or {}).get(rank)), daemon=True
            )
            for rank, environment in enumerate(trainings.environments(processes))
        ]
        for member in self.members:
            member.start()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL to these processes, by default to all."""
        for rank, member in enumerate(self.members):
            if ranks is None or rank in ranks:
                member.kill()

    def terminate(self) -> None:
        """SIGTERM to all."""
        for member in self.members:
            member.terminate()

    def alive(self) -> bool:
        return any(member.is_alive() for member in self.members)

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """The exit statuses when all have ended (−N: by signal N). Those that have not by then are killed."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
            if any(member.exitcode for member in self.members):  # a launcher ends the others, too
                deadline = min(deadline, time.monotonic() + 3)
        self.kill()
        for member in self.members:
            member.join()
        return [member.exitcode for member in self.members]

    def died(self) -> bool:
        """Whether a process has met its death."""
        return DIED in self.said()

    def said(self) -> str:
        """What was printed since the start."""
        with self.log.open("rb") as file:
            file.seek(self.begun)
            return file.read().decode(errors="replace")


def _run(words: list[str], environment: dict[str, str], log: str, death: tuple[str, int] | None) -> None:
    """What a forked process does."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from exo_fast.training.cli.command import main

    if death is not None:
        _die_at(*death)
    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_at(method: str, call: int) -> None:
    """End this process by SIGKILL at the `call`th call of a method of StageTrainer."""
    from exo_fast.training.trainer.trainer import StageTrainer

    original, calls = getattr(StageTrainer, method), count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.write(1, f"{DIED}{call} of {method}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(StageTrainer, method, deadly)
