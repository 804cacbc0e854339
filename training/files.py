"""Paths as people write them, hashes, writing in one step, and locks of directories.

In paths ~ is the home directory. Text that cannot be a path here is an InputError: `Path.expanduser` raises for an
unknown user, and `Path.exists` for a name that is too long or a folder that may not be entered.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from exo_fast.training import processes
from exo_fast.training.errors import InputError

LOCK = ".lock"
PATIENCE = 5.0  # seconds: processes of a killed run may still be ending
_held: dict[Path, IO[str]] = {}


def user_path(text: str | Path, field: str | None = None) -> Path:
    """Return `text` as a path with ~ expanded. The path need not exist.

    Raises InputError for ~name of an unknown user, and if the system cannot check whether the path exists. The message
    names `field` if that is given.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, not permitted, a loop; a NUL byte; no such user
        name = f"{field}={str(text)!r}" if field else repr(str(text))
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise InputError(f"{name}: cannot be a path: {reason}.") from error
    return path


def why_not_writable(folder: str | Path) -> str | None:
    """Return why no file can be written to `folder`, or None if one can. Makes the folder if it does not exist."""
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ cannot be expanded
        return str(getattr(error, "strerror", None) or error).rstrip(".")
    return None


def is_plain_name(name: str) -> bool:
    """Check whether `name` is a plain file name, which cannot lead out of its folder."""
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a folder beside the target, from which ready files move into place in one step; remove it at the end."""
    path = Path(tempfile.mkdtemp(prefix="partial-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_file(folder: Path, name: str, content: bytes) -> Path:
    """Write `folder/name` in one step, forced to disk. Raises InputError when `name` is more than a plain file name."""
    if not is_plain_name(name):
        raise InputError(f"refusing to write {name!r}: a plain file name is needed.")
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch:
        with (scratch / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the name without the content
        os.replace(scratch / name, folder / name)
    return folder / name


def acquire(path: Path) -> IO[str] | None:
    """Return the locked file, or None when another process holds it for longer than PATIENCE.

    Closing it unlocks it, and so does the end of this process and of all that inherited it.
    """
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


def lock_directory(directory: Path) -> None:
    """Make `directory` and lock it until `unlock_directory` or the end of the process; all ranks must call it.

    Raises InputError, in every process, if it cannot be written or another run writes there.
    """
    directory = directory.expanduser().resolve()
    problem = processes.from_first(_take(directory) if processes.index() == 0 else None)
    if problem is not None:
        raise InputError(problem)


def unlock_directory(directory: Path) -> None:
    """Release the lock of `lock_directory`."""
    file = _held.pop(directory.expanduser().resolve(), None)
    if file is not None:
        file.close()


def _take(directory: Path) -> str | None:
    """Lock the directory, or return why it cannot be locked."""
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
