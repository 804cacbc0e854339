"""Tables and plots of the results of `exo-fast bench`.

    python -m exo_fast.benchmarks.report.page        benchmarks/results → docs/performance.md, docs/images
    python -m exo_fast.benchmarks.report.page --results runs/bench --page runs/bench/report.md --images runs/bench

A section is between `<!-- bench: NAME -->` and `<!-- end -->`: its plot, how to read it, its table, and the
command, machine, versions and date that it is from. A section without results is "Not measured yet.", not the table of
another run. A page that does not exist is made with the sections that have results.
`tests/benchmarks/test_report.py` holds the docs to the results in the repository.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from exo_fast.benchmarks.harness import compare
from exo_fast.benchmarks.harness.provenance import provenance
from exo_fast.benchmarks.harness.tables import rewrite
from exo_fast.benchmarks.report import data, memory, op, scaling, step
from exo_fast.benchmarks.report.section import Section
from exo_fast.training.machine import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "performance.md"
IMAGES = REPOSITORY / "docs" / "images"
NOT_YET = "Not measured yet."
SECTIONS = {**op.SECTIONS, **scaling.SECTIONS, **step.SECTIONS, **data.SECTIONS, **memory.SECTIONS}


def sections(results: dict[str, dict], images: str) -> dict[str, str]:
    """Return {name of the section: its text} for the suites that have results. The page finds its plots in
    `images`."""
    made = {}
    for name, section in SECTIONS.items():
        found = results.get(section.suite)
        table = section.make(found) if found else ""
        if table:
            plot = [f"![{section.title}]({images}{_png(name)})"] if _has_plot(section, found) else []
            made[name] = "\n\n".join([*plot, section.note, table, provenance(found)])
    return made


def _has_plot(section: Section, results: dict) -> bool:
    return bool(section.plot) and any(section.plotted(row) for row in results["rows"])


def draw(results: dict[str, dict], names: Iterable[str], folder: Path) -> list[Path]:
    """Draw the plots of these sections as PNG."""
    drawn = []
    for name in names:
        section = SECTIONS[name]
        if _has_plot(section, results[section.suite]):
            path = folder / _png(name)
            section.plot(results[section.suite], path)
            drawn.append(path)
    return drawn


def _png(name: str) -> str:
    return f"bench-{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files [benchmarks/results]")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write to [docs/performance.md]")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of plots [docs/images]")
    options = parser.parse_args(argv)
    written = write(options.results, options.page, options.images)
    print("Written: " + ", ".join(str(path) for path in written))
    return 0


def write(folder: Path, page: Path, images: Path) -> list[Path]:
    """Write the results of a folder as sections of a page (made if it does not exist) and plots. Return the files
    written.

    Plots without results are removed from the folder.
    """
    results = compare.read_results(folder)
    where = Path(os.path.relpath(images, page.parent)).as_posix()
    made = sections(results, "" if where == "." else f"{where}/")
    if not page.exists():
        page.write_text(_empty_page(made))
    rewrite(page, "bench", dict.fromkeys(SECTIONS, NOT_YET) | made)
    images.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, made, images)
    for path in (images / _png(name) for name in SECTIONS):
        if path not in drawn:
            path.unlink(missing_ok=True)
    return [page, *drawn]


def _empty_page(names: Iterable[str]) -> str:
    parts = [f"## {SECTIONS[name].title}\n\n<!-- bench: {name} -->\n<!-- end -->\n" for name in names]
    return "\n".join(["# Benchmarks of exo_fast\n", *parts])


if __name__ == "__main__":
    sys.exit(main())
