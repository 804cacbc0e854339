"""`make matrix`: its table, and that the page shows what the results hold."""

import json

from tree import ROOT

from exo_fast.benchmarks.reliability import matrix

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
GREEN = {"passed": 7, "failed": [], "skipped": 1, "seconds": 3}
DONE = {"date": "2026-12-01", "versions": VERSIONS, "pip check": "clean", "checks": {"library": GREEN}}


def test_a_failure_is_red() -> None:
    assert not matrix.red(DONE)
    assert matrix.red({**DONE, "checks": {"library": {**GREEN, "failed": ["tests::test_x"]}}})
    assert matrix.red({**DONE, "checks": {"library": {"error": "no module"}}})
    assert matrix.red({**DONE, "pip check": "a needs b"})
    assert matrix.red({"error": "no such version"})


def test_the_table_says_what_was_run() -> None:
    made = matrix.table({"pinned": DONE, "newest": {"error": "no such version"}}).splitlines()
    pinned, newest, oldest = (
        next(line for line in made if f"| {name}:" in line) for name in ("pinned", "newest", "oldest")
    )
    assert "| 2.13.0 | – | 5.23.0 |" in pinned
    assert "| clean | 7 passed | – | – | – | 2026-12-01 |" in pinned
    assert newest.endswith("| could not be installed |")
    assert oldest.endswith("| not run |")


def test_the_page_shows_the_results() -> None:
    results = json.loads(matrix.OUTPUT.read_text()) if matrix.OUTPUT.exists() else {}
    assert matrix.table(results) in (ROOT / "docs" / "compatibility.md").read_text()
