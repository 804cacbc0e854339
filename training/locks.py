"""One run to a directory: a lock that is gone with the process that holds it, however that ends."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from exo_fast.training import processes
from exo_fast.training.errors import InputError

LOCK = ".lock"
PATIENCE = 5.0  # seconds: what a killed run left behind is on its way out

_held: dict[Path, IO[str]] = {}


def acquire(path: Path) -> IO[str] | None:
    """The locked file, or None when another process holds it for longer than PATIENCE. Closing it gives it back, and so
    does the end of this process and of those that inherited it."""
    file = path.open("a+")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.2)


def hold(directory: Path) -> None:
    """Make `directory` and keep it for this run, until `release` or the end of the process; a collective call.

    Raises InputError, in every process, where it cannot be written or another run writes there.
    """
    directory = directory.expanduser().resolve()
    problem = processes.from_first(_take(directory) if processes.index() == 0 else None)
    if problem is not None:
        raise InputError(problem)


def release(directory: Path) -> None:
    """Give back what `hold` took."""
    file = _held.pop(directory.expanduser().resolve(), None)
    if file is not None:
        file.close()


def _take(directory: Path) -> str | None:
    """Why the directory cannot be had."""
    if directory in _held:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = acquire(directory / LOCK)
        if file is None:
            holder = (directory / LOCK).read_text() or "another run"
            return f"output_dir={str(directory)!r}: {holder} writes there; wait for it or end it, or name another one."
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},")
        file.flush()
    except OSError as error:
        return f"output_dir={str(directory)!r}: cannot be written ({error.strerror}); name another one."
    _held[directory] = file
    return None
