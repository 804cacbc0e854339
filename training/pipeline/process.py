"""Run a stage in a process of its own, and end it with its parent."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exo_fast.training.pipeline.recipe import PlannedStage
from exo_fast.training.processes import end_with_parent

CLI_MODULE = "exo_fast.training.cli"
STOP_SECONDS = 30  # the time an interrupted stage has to end by itself


def stage_command(stage: PlannedStage, config: Path, cli_module: str = CLI_MODULE) -> list[str]:
    """Return the command that runs the stage: Python, torchrun for several processes, or the recipe's launcher."""
    if stage.launcher is not None:
        start = [*stage.launcher, cli_module]
    elif stage.processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(stage.processes)]
        start = [sys.executable, "-m", *torchrun, "-m", cli_module]
    else:
        start = [sys.executable, "-m", cli_module]
    return [*start, stage.stage, "--config", str(config)]


def _run_process(command: list[str], log: Path, lock_fd: int) -> int:
    """Run `command` and return its exit status. Its output goes to the terminal and is appended to `log`.

    Ctrl-C and SIGTERM also stop the command. It gets time to end; then KeyboardInterrupt is raised.
    """
    with log.open("ab") as file, _sigterm_as_interrupt():
        file.write(f"$ {shlex.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            pass_fds=(lock_fd,),
            preexec_fn=end_with_parent(),
        )
        try:
            while block := os.read(process.stdout.fileno(), 1 << 16):
                sys.stdout.buffer.write(block)
                sys.stdout.buffer.flush()
                file.write(block)
                file.flush()
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    return status if status >= 0 else 128 - status


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen) -> None:
    for end in (process.send_signal, lambda _: process.terminate(), lambda _: process.kill()):
        end(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
