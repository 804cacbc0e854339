"""Cells and sentences that the tables of several suites share."""

from __future__ import annotations

from collections.abc import Iterable

from exo_fast.benchmarks.harness.provenance import grouped


def strong(text: str, strong: bool) -> str:
    """Make the text bold if `strong`."""
    return f"**{text}**" if strong else text


def error_cell(value: float | None) -> str:
    """Format an error to one digit; "" for an error that was not measured."""
    return "" if value is None else f"{value:.0e}"


def seconds_cell(value: float) -> str:
    """Format seconds to 10 ms, shorter times to three digits."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def bandwidth(results: dict) -> list[str]:
    """Describe the rate of memory in a sentence, if the suite measured it."""
    return [f"A large copy moves {results['copy_gbps']:.1f} GB/s here."] if "copy_gbps" in results else []


def left_out(rows: Iterable[dict]) -> list[str]:
    """Return a paragraph that names the cases without a measurement, by reason; empty if all were measured."""

    def reason(row: dict) -> str:
        return row.get("skipped") or f"failed: {row['failed']}"

    missing = grouped((row for row in rows if "skipped" in row or "failed" in row), reason)
    listed = [f"{', '.join(row['name'] for row in same)} ({why})" for why, same in missing]
    return [f"Not measured: {'; '.join(listed)}."] if listed else []
