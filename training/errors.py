"""Exceptions that end a stage early. The command line prints them without a traceback."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

DIGEST_LENGTH = 64  # of a SHA-256 in hexadecimal; a reader learns nothing from it


class InputError(ValueError):
    """Bad configuration, data or paths, for the user to fix. The message names the thing, its value and the fix.
    Exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a loss that is not finite. The message says what happened, what is safe and
    what to do. Exit status 1."""


class Stopped(Exception):
    """A run that stopped because it was asked to (SIGTERM). The message says what was saved. Exit status 0."""


def nearest(word: str, known: Iterable[str], *, otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """Return the end of an error message: the known word that is nearest to `word`.

    If no word is near (`cutoff`, from 0 to 1), return `otherwise`, by default a list of all known words.
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}." if otherwise is None else otherwise


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 5) -> str:
    """Name the settings that differ, at most `most` of them. Empty if all are the same."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [
        f"another {name}"
        if isinstance(before.get(name), dict) or len(str(before.get(name))) == DIGEST_LENGTH
        else f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in names[:most]
    ]
    return "; ".join([*told, f"{len(names) - most} more"] if len(names) > most else told)


def not_its_own(config: Any, hint: str, found: str) -> InputError:
    """Return the error for a model of this transformers config whose numbers for a text depend on other texts in the
    batch. `hint` names the likely cause (`exo_fast.masks.neighbours_hint`), `found` says what was measured."""
    return InputError(
        f"model type {config.model_type!r}: it has {hint}, and what it gives for a text depends on the other texts of "
        f"the batch: {found}. Numbers from different batches cannot be compared; use another model."
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the error's name if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
