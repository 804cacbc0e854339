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
    faults: list[str] = []
    count = 0
    for place, record in rows:
        count += 1
        try:
            row = convert(place, record)
        except BadField as fault:
            faults.append(f"{place}, {fault}")
        else:
            if row is not None:
                converted.append(row)
    if faults:
        shown = "\n  ".join(faults[:MAX_SHOWN])
        more = f"\n  … and {len(faults) - MAX_SHOWN} more." if len(faults) > MAX_SHOWN else ""
        raise InputError(f"{what}: {len(faults)} of {count} rows cannot be used:\n  {shown}{more}{advice}")
    if not count:
        raise InputError(f"{what}: no rows; at least one is needed.")
    return converted


def short(value: Any, width: int = 80) -> str:
    """`repr(value)`, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
