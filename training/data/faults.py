"""All rows of a data set are read before any fault is raised, so that one run shows ten faults, not one."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from exo_fast.data.fields import BadField
from exo_fast.data.forms import ACCEPTED
from exo_fast.training.data.places import Place
from exo_fast.training.errors import InputError

MAX_SHOWN = 10
Row = TypeVar("Row")


def collect(
    what: Any, rows: Iterable[tuple[Place, Any]], convert: Callable[[Place, Any], Row | None], advice: str = ""
) -> list[Row]:
    """Return the result of `convert` for each row, without results that are None.

    Raises InputError that lists the first ten BadFields with their places (and then `advice`, or the accepted forms of
    rows if a field is missing), or that says that `what` has no rows.
    """
    converted: list[Row] = []
    faults: list[str] = []
    count, missing = 0, False
    for place, record in rows:
        count += 1
        try:
            row = convert(place, record)
        except BadField as fault:
            faults.append(f"{place}, {fault}" if len(faults) < MAX_SHOWN else "")
            missing |= fault.missing
        else:
            if row is not None:
                converted.append(row)
    if faults:
        advice = advice or (f"\n{ACCEPTED}" if missing else "")
        raise InputError(f"{what}: {len(faults)} of {count} rows cannot be used:{listed(faults)}{advice}")
    if not count:
        raise InputError(f"{what}: no rows; at least one is needed.")
    return converted


def listed(faults: list[str]) -> str:
    """Return the first ten faults, a line each, and how many more there are."""
    more = f"\n  … and {len(faults) - MAX_SHOWN} more." if len(faults) > MAX_SHOWN else ""
    return "".join(f"\n  {fault}" for fault in faults[:MAX_SHOWN]) + more
