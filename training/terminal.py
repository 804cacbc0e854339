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
import logging
import os
import select
import sys
import warnings
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
    """Whether `stream` gets colours: a terminal does, unless NO_COLOR is set; FORCE_COLOR gives them to all streams."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in a colour (red, green or yellow) where `stream` has colours, else as it is."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if has_colour(stream) else text


class _Painted(logging.Formatter):
    """What another formatter makes of a record, painted by its level."""

    def __init__(self, inner: logging.Formatter):
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        text = self.inner.format(record)
        if record.levelno < logging.WARNING:
            return text
        return paint(text, "yellow" if record.levelno < logging.ERROR else "red", sys.stderr)


def _painted_warning(*about: Any, **more: Any) -> str:
    return paint(_plain_warning(*about, **more), "yellow", sys.stderr)


_plain_warning = warnings.formatwarning


def paint_warnings() -> None:
    """Warnings of Python, of ours and of transformers yellow from now on, errors red, where stderr has colours.

    Loggers that have a handler by now: to be called again when transformers has been imported.
    """
    if not has_colour(sys.stderr):
        return
    warnings.formatwarning = _painted_warning
    for handler in (logging.lastResort, *logging.getLogger("transformers").handlers):
        if handler is not None and not isinstance(handler.formatter, _Painted):
            handler.setFormatter(_Painted(handler.formatter or logging.Formatter()))


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """In this block stdout gets what `give_result` is given; everything else that is printed goes to stderr."""
    global _results
    stdout = sys.stdout
    stdout.flush()
    own = os.dup(1)
    is_own = stdout is sys.__stdout__  # a notebook's or a test's is none of a descriptor
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
    """Print `value` as a line of JSON on stdout if results were asked for; of several processes, the first does.

    What JSON has no form for becomes text, and numbers that are not finite null, so that any reader can parse it.
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
