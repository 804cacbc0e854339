"""Faults of a row's fields, and their wording."""

from typing import Any

MAX_NAMES = 10


class Missing:
    """The value of a missing field."""

    def __repr__(self) -> str:
        return "missing"


class BadField(ValueError):
    """A fault in one field of one row; `place` says which row, if known."""

    def __init__(self, field: str, value: Any, fix: str, *, place: Any = None):
        super().__init__(f"{'' if place is None else f'{place}, '}field `{field}`, value {shorten(value)}: {fix}")
        self.missing = isinstance(value, Missing)


def shorten(value: Any, width: int = 80) -> str:
    """Return `repr(value)`, cut to `width` characters."""
    try:
        text = repr(value[:width] if isinstance(value, (str, bytes)) else value)
    except (RecursionError, ValueError):  # lists in lists in lists, a number of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= width else text[: width - 1] + "…"


def is_unicode(text: str) -> bool:
    """Return whether `text` has no half of a surrogate pair, which is no character and which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def field_names(row: dict[str, Any]) -> str:
    """Return the names of a row's first ten fields, for an error's text."""
    names = [shorten(name)[1:-1] for name in list(row)[:MAX_NAMES]]
    return ", ".join(names + ["…"] * (len(row) > MAX_NAMES)) or "no fields"
