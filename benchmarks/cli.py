"""`exo-fast bench`: run suites, compare two runs, write the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from exo_fast.benchmarks import compare, runner
from exo_fast.benchmarks.suites import SUITES, load
from exo_fast.training.errors import InputError

EXAMPLES = """examples:
  exo-fast bench all                              # every suite, to runs/bench: 40 minutes on 2 cores
  exo-fast bench op --quick                       # a first look at the operation, a few minutes
  exo-fast bench op --only op/exo_fast/576x49152  # cases whose name begins so; other rows are kept
  exo-fast bench step --list                      # the cases, and why some cannot run here
  exo-fast bench all --continue                   # what an interrupted run left out
  exo-fast bench op --quick --compare old         # run, then flag what became slower, larger or less exact
  exo-fast bench --compare old --output_dir new   # the same between two runs that are done; runs nothing
  exo-fast bench --report                         # report.md and plots beside the results
"""


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, or 1 when a case failed or `--compare` found something worse."""
    options = _parser().parse_args(argv)
    names = list(SUITES) if "all" in options.suites else list(dict.fromkeys(options.suites))
    if not names and not (options.compare or options.report):
        raise InputError(f"name a suite: {', '.join(SUITES)} or all (exo-fast bench --help shows examples)")
    old = compare.read_results(options.compare) if options.compare else {}  # before it may be written over
    chosen = _choose(names, options)
    if options.list:
        for suite, cases in chosen:
            for case in cases:
                why = suite.impossible(case)
                print(case, f"  (skipped: {why})" if why else "")
        return 0
    status, ran = 0, {}
    for suite, cases in chosen:
        begun = time.perf_counter()
        keep = bool(options.only or options.carry_on)
        results = runner.run_suite(suite, cases, options.output_dir, quick=options.quick, keep=keep)
        ran[suite.NAME] = {str(case) for case in cases}
        rows = [row for row in results["rows"] if row["name"] in ran[suite.NAME]]
        failed = [row["name"] for row in rows if "failed" in row]
        status = status or int(bool(failed))
        print(runner.table(rows))
        minutes = (time.perf_counter() - begun) / 60
        print(
            f"\n{suite.NAME}: {len(rows)} cases in {minutes:.1f} min"
            + (f", {len(failed)} failed ({', '.join(failed)})" if failed else "")
            + f"; written to {options.output_dir / suite.NAME}.json\n"
        )
    if options.report:
        from exo_fast.benchmarks import report

        page = options.output_dir / "report.md"
        page.unlink(missing_ok=True)
        report.write(options.output_dir, page, options.output_dir)
        print(f"report in {page}")
    if options.compare:
        status = max(status, _compare(old, options, ran))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exo-fast bench",
        description="Measure what exo_fast gains on this machine over the tools in use today.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    choices = [*SUITES, "all"]
    parser.add_argument("suites", nargs="*", metavar="SUITE", type=_suite, help=f"of {', '.join(choices)}")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases whose name begins so (with or without its suite); may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, for a first look")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--continue", action="store_true", dest="carry_on", help="only what the results lack")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="a result file, or a folder of them, to hold to")
    parser.add_argument(
        "--tolerance", type=_ratio, default=compare.TOLERANCE, help="ratio of times that counts [%(default)s]"
    )
    parser.add_argument("--report", action="store_true", help="write DIR/report.md and plots")
    return parser


def _suite(text: str) -> str:
    if text not in (*SUITES, "all"):
        raise argparse.ArgumentTypeError(f"no suite is called {text!r}; there are {', '.join(SUITES)} and all")
    return text


def _ratio(text: str) -> float:
    value = float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a ratio of at least 1 is needed")
    return value


def _choose(names: Sequence[str], options: argparse.Namespace) -> list[tuple[ModuleType, list[Any]]]:
    """The suites and cases that are asked for. Raises InputError when --only matches none."""
    chosen = []
    for name in names:
        suite = load(name)
        among = suite.cases(options.quick)
        beginnings = [text.removeprefix(f"{name}/") for text in options.only or [""]]
        cases = [case for case in among if str(case).removeprefix(f"{name}/").startswith(tuple(beginnings))]
        if options.carry_on:
            there = runner.done(options.output_dir / f"{name}.json")
            cases = [case for case in cases if str(case) not in there]
        cases = runner.with_baselines(suite, cases, among) if options.only or options.carry_on else cases
        if cases or not options.only:
            chosen.append((suite, cases))
    if options.only and not options.carry_on and not chosen:
        raise InputError(f"--only {' '.join(options.only)}: no case begins so; --list shows them")
    return chosen


def _compare(old: dict[str, dict], options: argparse.Namespace, ran: dict[str, set[str]]) -> int:
    """Print what differs from `old`: of the cases that ran, or of all results there are when nothing ran."""
    new = compare.read_results(options.output_dir)
    common = [name for name in old if name in new and (not ran or name in ran)]
    if not common:
        raise InputError(f"--compare {options.compare} has {', '.join(old)}; what is new is {', '.join(ran or new)}")
    found = compare.Comparison()
    for name in common:
        found.extend(compare.compare(old[name], new[name], options.tolerance, ran.get(name)))
    print(compare.table(found))
    return int(found.regressed)
