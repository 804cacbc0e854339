"""Helpers of the fuzz tests: how many cases, what counts as well refused, and the tally that is printed at the end.

A case either gives a result, which the test then judges, or the one error that is documented, whose text names what
was wrong. `make test` runs a few cases of each property, always the same; EXO_FAST_FUZZ=1500 runs so many of each,
other ones every time (pytest prints how to repeat one that fails).
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("EXO_FAST_FUZZ", "0"))
SECONDS = 60  # a case that takes longer hangs
REFUSED = object()
TALLY: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])  # by test: cases, refused ones, seconds


def fuzzed(cases: int) -> settings:
    """The settings of a property; `cases` is how many `make test` runs."""
    return settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def judge(call: Callable[[], Any], error: type[Exception], names: Iterable[str]) -> Any:
    """Return the result of `call`, or REFUSED if it raises `error` with a text that has one of `names`."""
    tally = TALLY[os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]]
    tally[0] += 1
    start = time.monotonic()
    try:
        with _alarm():
            return call()
    except error as refusal:
        tally[1] += 1
        if not any(name in str(refusal) for name in names):
            raise AssertionError(f"{refusal!r} names none of {list(names)}") from refusal
        return REFUSED
    finally:
        tally[2] += time.monotonic() - start


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Values

CHARACTERS = st.characters(exclude_categories=())  # with the halves of surrogate pairs, which JSON can write
TEXTS = st.text(CHARACTERS, max_size=8) | st.sampled_from(
    ["", "\0", "a\u2028b", "\ud800", "../x", "~nosuchuser/x", "x" * 300]
)
NUMBERS = (
    st.integers(-3, 12)
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400])
    | st.floats()
    | st.sampled_from([1e39, 5e-324, -0.0])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any, junk: st.SearchStrategy = JSON) -> Any:
    """A JSON value with something in it replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        changed = dict(value)
        match draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename", "add"])):
            case "inside":
                changed[key] = draw(mutated(changed[key], junk))
            case "remove":
                del changed[key]
            case "rename":
                changed[draw(TEXTS)] = changed.pop(key)
            case "add":
                changed[draw(TEXTS)] = draw(junk)
        return changed
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        changed = list(value)
        match draw(st.sampled_from(["inside", "inside", "inside", "remove", "repeat"])):
            case "inside":
                changed[index] = draw(mutated(changed[index], junk))
            case "remove":
                del changed[index]
            case "repeat":
                changed.insert(index, changed[index])
        return changed
    return draw(junk)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut, changed, or have others put in."""
    at = draw(st.integers(0, len(content)))
    end = draw(st.integers(at, min(at + 8, len(content))))
    inserted = draw(
        st.binary(max_size=4)
        | st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"[" * 5000, b"{", b'"', b"9" * 5000])
    )
    match draw(st.sampled_from(["cut", "insert", "replace"])):
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + inserted + content[at:]
        case "replace":
            return content[:at] + inserted + content[end:]
