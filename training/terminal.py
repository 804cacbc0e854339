"""What a terminal shows: colours where a person looks at one, and with --json one result and nothing beside it.

A stage gives its result to `give_result` and prints what it likes. With --json (`results_only`) all that is printed, by
child processes and libraries too, goes to stderr, and the result alone to stdout.

What is printed ends no run: a character that a stream has no bytes for is written as its code, and what a stream does
not take (its reader went away, its disk is full) is lost and remembered (`sturdy_streams`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

COLOURS = {"red": 31, "green": 32, "yellow": 33}

_results: TextIO | None = None  # where results go; None: nobody asked for them
_stdout: _Sturdy | None = None  # what stdout is written through, once it is sturdy


class _Sturdy(io.FileIO):
    """A descriptor to write to that never fails: what cannot be written is lost, and `lost` says why."""

    lost: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def sturdy_streams() -> None:
    """Make stdout and stderr of this process streams that take all that is printed; for a process that will end soon.

    A stream that the process was started without is one that nobody reads.
    """
    global _stdout
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        else:
            stream.flush()
        raw = _Sturdy(descriptor, "wb", closefd=False)
        unbuffered = stream is not None and stream.write_through  # PYTHONUNBUFFERED
        sturdy = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=stream.encoding if stream is not None else "utf-8",
            errors="backslashreplace",
            line_buffering=stream is not None and stream.line_buffering,
            write_through=unbuffered,
        )
        setattr(sys, name, sturdy)
        setattr(sys, f"__{name}__", sturdy)
        if name == "stdout":
            _stdout = raw


def lost_output() -> OSError | None:
    """Why something that was printed to stdout was not written; None where all was."""
    sys.stdout.flush()
    return None if _stdout is None else _stdout.lost


def has_colour(stream: TextIO) -> bool:
    """Say if `stream` gets colours: a terminal does, unless NO_COLOR is set; FORCE_COLOR gives them to all streams."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """Return `text` in a colour (red, green or yellow) where `stream` has colours, else as it is."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if has_colour(stream) else text


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """In this block stdout gets what `give_result` is given; everything else that is printed goes to stderr."""
    global _results
    stdout = sys.stdout
    stdout.flush()
    own = os.dup(1)
    is_own = stdout is sys.__stdout__  # notebooks and pytest replace stdout by an object without a file descriptor
    _results = os.fdopen(os.dup(own), "w", encoding="utf-8", errors="backslashreplace") if is_own else stdout
    try:
        os.dup2(2, 1)  # for child processes, and libraries that print without Python
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(own, 1)
        os.close(own)
        given, _results = _results, None
        if is_own:
            given.close()


def give_result(value: Any) -> None:
    """Print `value` as one line of JSON on stdout if results were asked for. Only rank 0 prints.

    Values that JSON cannot hold become strings; NaN and infinity become null.
    """
    if _results is None or os.environ.get("RANK", "0") != "0":
        return
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    print(json.dumps(plain, ensure_ascii=False), file=_results, flush=True)


def has_reader(stream: TextIO | None) -> bool:
    """Whether someone may read what is written to `stream`: nobody does where it is a pipe closed at its other end."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, no descriptor, or a system without poll
        return True
