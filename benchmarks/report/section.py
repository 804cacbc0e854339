"""A section of the page of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A table with its note and plot."""

    suite: str
    title: str
    note: str  # how to read it
    make: Callable[[dict], str]  # results of the suite → the table; "" if they have no rows for it
    plot: Callable[[dict, Path], None] | None = None  # results of the suite, PNG to write
    plotted: Callable[[dict], bool] = lambda row: "seconds" in row  # the rows that the plot shows


def paragraph(lines: str) -> str:
    """Join the words of several lines into one."""
    return " ".join(lines.split())
