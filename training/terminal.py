"""What a terminal shows: colours where a person looks at one, and with --json one result and nothing beside it.

A stage gives its result to `give_result` and prints what it likes. With --json (`results_only`) all that is printed, by
child processes and libraries too, goes to stderr, and the result alone to stdout.
"""

from __future__ import annotations

import contextlib
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
    _results = os.fdopen(os.dup(own), "w", encoding="utf-8") if is_own else stdout
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
