"""Output to a terminal: colours for people, and with --json one result and nothing beside it.

A stage passes its result to `give_result` and prints what it likes. With --json (`results_only`) stdout gets only the
result. All that is printed, by child processes and libraries too, goes to stderr.

Printing never ends a run (`sturdy_streams`). A character that a stream cannot encode is written as its code. Output
that a stream does not take (its reader went away, its disk is full) is lost, and the error is remembered.
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
_stdout: _Sturdy | None = None  # the descriptor under stdout, once it is sturdy


class _Sturdy(io.FileIO):
    """A file descriptor whose writes never fail: output that cannot be written is lost, and `lost` says why."""

    lost: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def sturdy_streams() -> None:
    """Make stdout and stderr of this process take all that is printed; for a process that will end soon.

    A stream that is missing at the start becomes one that nobody reads.
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
    """Return why some output to stdout was not written, or None if all was."""
    sys.stdout.flush()
    return None if _stdout is None else _stdout.lost


def has_colour(stream: TextIO) -> bool:
    """Check whether `stream` gets colours: a terminal does, unless NO_COLOR is set; with FORCE_COLOR all streams do."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """Return `text` in a colour (red, green or yellow) if `stream` has colours, else as it is."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if has_colour(stream) else text


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Send to stdout in this block only the values of `give_result`, and everything else that is printed to stderr."""
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
    """Check whether someone may read `stream`: nobody does if it is a pipe closed at its other end."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, no descriptor, or a system without poll
        return True
