"""The table of what was fuzzed, printed at the end of a run with EXO_FAST_FUZZ, also from several workers."""

from collections.abc import Iterator
from typing import Any

import pytest
from fuzzing import CASES, TALLY


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    if call.when == "call" and item.nodeid in TALLY:
        outcome.get_result().user_properties.append(("fuzz", TALLY[item.nodeid]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    rows = [
        (r.nodeid.rpartition("/")[2], *value) for r in reports for name, value in r.user_properties if name == "fuzz"
    ]
    if not CASES or not rows:
        return
    terminalreporter.section("fuzzed")
    rows.sort()
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    width = max(len(row[0]) for row in rows)
    terminalreporter.write_line(f"{'':<{width}}{'cases':>9}{'accepted':>10}{'refused':>9}{'seconds':>9}")
    for name, cases, refused, seconds in rows:
        terminalreporter.write_line(f"{name:<{width}}{cases:>9,}{cases - refused:>10,}{refused:>9,}{seconds:>9.1f}")
