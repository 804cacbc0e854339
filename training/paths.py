"""Paths as people write them: ~ is the home directory, and what cannot be a path here is an InputError.

`Path.expanduser` raises for a user who is not there, and `Path.exists` for a name that is too long or a folder that may
not be entered.
"""

import tempfile
from pathlib import Path

from exo_fast.training.errors import InputError


def user_path(text: str | Path, field: str | None = None) -> Path:
    """`text` as a path with ~ expanded; nothing need be there.

    Raises InputError for ~name where there is no such user, and where whether something is there cannot even be asked;
    it names `field` if that is given.
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
    """Why no file can be written to `folder`, which is made where it is not there; None where one can."""
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        return str(getattr(error, "strerror", None) or error).rstrip(".")
    return None


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")
