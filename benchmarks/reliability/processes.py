"""Run `exo-fast` or a script in processes over gloo on this machine, forked from one that has imported the packages.

A process takes ten seconds to import the packages of training, and a tiny model less than one second to train. A
process forked after the imports starts at once, and behaves like any other for the kernel, gloo and SIGKILL.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

PRELOAD = [
    "exo_fast.training.cli",
    "exo_fast.training.stages.align",
    "exo_fast.training.arguments",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which DeepSpeed imports with every optimizer, and torch's compiler
    "peft",
]
DIED = "killed at its call "
LIMIT_SECONDS = 180  # an undisturbed run that takes longer is taken to hang
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Team:
    """Starts one command in `processes` processes, and appends their output to `log`.

    The command is `exo-fast` and its words, or a script (a first word that ends in .py) and its own. `deaths` give by
    rank a method of StageTrainer, and the number of its call at which the process gets `end`.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        processes: int = 2,
        deaths: dict[int, tuple[str, int]] | None = None,
        end: signal.Signals = signal.SIGKILL,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # before the first of them is imported
        self.log, self.begun = log, log.stat().st_size if log.exists() else 0
        self.members = [
            context.Process(
                target=_run, args=(list(words), environment, str(log), (deaths or {}).get(rank), end), daemon=True
            )
            for rank, environment in enumerate(environments(processes))
        ]
        for member in self.members:
            member.start()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Send SIGKILL to these processes, by default to all."""
        for rank, member in enumerate(self.members):
            if ranks is None or rank in ranks:
                member.kill()

    def terminate(self) -> None:
        """Send SIGTERM to all processes."""
        for member in self.members:
            member.terminate()

    def alive(self) -> bool:
        """Return whether a process still runs."""
        return any(member.is_alive() for member in self.members)

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """Return the exit statuses (−N: ended by signal N). Processes that run for longer than `seconds` are killed."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
            if any(member.exitcode for member in self.members):  # like a launcher, end the others too
                deadline = min(deadline, time.monotonic() + 3)
        self.kill()
        for member in self.members:
            member.join()
        return [member.exitcode for member in self.members]

    def died(self) -> bool:
        """Return whether a process has died by one of its `deaths`."""
        return DIED in self.said()

    def said(self) -> str:
        """Return the output of the processes."""
        with self.log.open("rb") as file:
            file.seek(self.begun)
            return file.read().decode(errors="replace")


def environments(processes: int) -> list[dict[str, str]]:
    """Return the environment of each process: one thread, and a launcher's variables for two processes or more."""
    common = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(
    words: list[str], environment: dict[str, str], log: str, death: tuple[str, int] | None, end: signal.Signals
) -> None:
    """Run the command in a forked process, and end it before the interpreter shuts down under gloo."""
    gc.freeze()  # garbage collections skip the imported objects
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from exo_fast.training.cli.command import main

    if death is not None:
        _die_at(*death, end)
    try:
        status = _run_script(words) if words[0].endswith(".py") else main(words)
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_script(words: list[str]) -> int:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    return 0


def _die_at(method: str, call: int, end: signal.Signals) -> None:
    """Send `end` to this process at the `call`th call of a method of StageTrainer."""
    from exo_fast.training.trainer.trainer import StageTrainer

    original, calls = getattr(StageTrainer, method), count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.write(1, f"{DIED}{call} of {method}\n".encode())
            os.kill(os.getpid(), end)
        return original(*args, **kwargs)

    setattr(StageTrainer, method, deadly)
