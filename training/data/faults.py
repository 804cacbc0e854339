"""What is wrong with a row, and how it is said: all rows are read first, so that one run shows ten faults, not one."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from exo_fast.training.data.records import Place
from exo_fast.training.errors import InputError

MAX_SHOWN = 10
Row = TypeVar("Row")


class Missing:
    """Stands for the value of a field that is not there."""

    def __repr__(self) -> str:
        return "missing"


class BadField(Exception):
    """A fault in one field of one row, before its place is known."""

    def __init__(self, field: str, value: Any, fix: str):
        super().__init__(f"field `{field}`, value {short(value)}: {fix}")


def collect(
    what: Any, rows: Iterable[tuple[Place, Any]], convert: Callable[[Place, Any], Row | None], advice: str = ""
) -> list[Row]:
    """What `convert` makes of each row, without those it makes None of.

    Raises InputError that lists the first ten BadFields with their places (and then `advice`), or that says
    that `what` has no rows.
    """
    converted: list[Row] = []
    shown: list[str] = []
    faults = count = 0
    for place, record in rows:
        count += 1
        try:
            row = convert(place, record)
        except BadField as fault:
            faults += 1
            if faults <= MAX_SHOWN:
                shown.append(f"{place}, {fault}")
        else:
            if row is not None:
                converted.append(row)
    if faults:
        listed = "\n  ".join(shown)
        more = f"\n  … and {faults - MAX_SHOWN} more." if faults > MAX_SHOWN else ""
        raise InputError(f"{what}: {faults} of {count} rows cannot be used:\n  {listed}{more}{advice}")
    if not count:
        raise InputError(f"{what}: no rows; at least one is needed.")
    return converted


def short(value: Any, width: int = 80) -> str:
    """`repr(value)`, cut to `width` characters."""
    try:
        text = repr(value[:width] if isinstance(value, (str, bytes)) else value)
    except (RecursionError, ValueError):  # lists in lists in lists, a number of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= width else text[: width - 1] + "…"


def field_names(row: dict[str, Any]) -> str:
    """The names of a row's fields, the first ten of them, for an error's text."""
    names = [short(name)[1:-1] for name in list(row)[:MAX_SHOWN]]
    return ", ".join(names + ["…"] * (len(row) > MAX_SHOWN)) or "no fields"
