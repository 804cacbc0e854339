"""`exo-fast bench`: run suites, compare two runs, write the report."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from exo_fast.benchmarks.harness import compare, runner
from exo_fast.benchmarks.harness.contract import SHARES, SUITES, load
from exo_fast.training.errors import InputError
from exo_fast.training.terminal import give_result

EXAMPLES = """examples:
  exo-fast bench all --minutes 40                 # every suite, to runs/bench; what finds no time is left out
  exo-fast bench op --quick                       # a first look at the operation, a few minutes
  exo-fast bench op --only op/exo_fast/576x49152  # cases whose name begins so; other rows are kept
  exo-fast bench step --list                      # the cases, and why some cannot run here
  exo-fast bench all --continue                   # what an interrupted run left out
  exo-fast bench op --quick --compare old         # run, then flag what became slower, larger or less exact
  exo-fast bench --compare old --output_dir new   # the same between two runs that are done; runs nothing
  exo-fast bench --report                         # report.md and plots beside the results
"""


def main(argv: Sequence[str]) -> int:
    """Run `exo-fast bench`; return the exit status: 1 if a case failed or `--compare` found something worse, else 0."""
    options = parser().parse_args(argv)
    names = list(SUITES) if "all" in options.suites else list(dict.fromkeys(options.suites))
    if not names and not (options.compare or options.report):
        raise InputError(f"name a suite: {', '.join(SUITES)} or all (exo-fast bench --help shows examples)")
    old = compare.read_results(options.compare) if options.compare else {}  # before the run may overwrite it
    chosen = _choose(names, options)
    if options.list:
        found = [{"case": str(case), "skipped": suite.impossible(case)} for suite, _, cases in chosen for case in cases]
        for entry in found:
            print(entry["case"], f"  (skipped: {entry['skipped']})" if entry["skipped"] else "")
        give_result({"cases": found})
        return 0
    keep = bool(options.only or options.carry_on)
    for suite, _, _ in chosen if keep else ():  # check all suites before spending hours on the first
        runner.refuse_mixture(options.output_dir / f"{suite.NAME}.json", options.quick)
    status, asked = 0, {}
    ends = _ends([suite.NAME for suite, _, _ in chosen], options.minutes)
    for (suite, names_asked, cases), until in zip(chosen, ends, strict=True):
        failed = _run(suite, cases, options, keep, until)
        status = status or int(failed is None or failed > 0)
        if failed is not None:
            asked[suite.NAME] = names_asked
    if options.report:
        from exo_fast.benchmarks.report import page as report

        page = options.output_dir / "report.md"
        page.unlink(missing_ok=True)
        report.write(options.output_dir, page, options.output_dir)
        print(f"report in {page}")
    result: dict[str, Any] = {"suites": {name: runner.read(options.output_dir / f"{name}.json") for name in asked}}
    if options.compare and (asked or not chosen):
        found = _compare(old, options, asked)
        status = max(status, int(found.regressed))
        result["comparison"] = asdict(found)
    give_result({"passed": status == 0, **result})
    return status


def _ends(names: Sequence[str], minutes: float | None) -> list[float | None]:
    """Return the time at which each suite begins its last case, so that all take about `minutes`. The next suite gets
    the time that one leaves."""
    if minutes is None:
        return [None] * len(names)
    total = sum(SHARES[name] for name in names)
    shares = itertools.accumulate(SHARES[name] / total for name in names)
    now = time.perf_counter()
    return [now + 60 * minutes * share for share in shares]


def _run(
    suite: ModuleType, cases: Sequence[Any], options: argparse.Namespace, keep: bool, until: float | None
) -> int | None:
    """Run cases of a suite and print their results. Return how many failed; None if an error stopped the suite. The
    error is printed and not raised, so that the next suite runs.
    """
    path = options.output_dir / f"{suite.NAME}.json"
    if keep and not cases:
        print(f"{suite.NAME}: nothing is left to run; {path} holds it\n")
        return 0
    begun = time.perf_counter()
    try:
        results = runner.run_suite(suite, cases, options.output_dir, quick=options.quick, keep=keep, until=until)
    except Exception as error:
        if not isinstance(error, (InputError, runner.CaseFailed)):
            traceback.print_exc()
        print(f"{suite.NAME} was stopped: {error}\n", file=sys.stderr)
        return None
    ran = {str(case) for case in cases}
    rows = [row for row in results["rows"] if row["name"] in ran]
    failed = [row["name"] for row in rows if "failed" in row]
    print(runner.table(rows))
    minutes = (time.perf_counter() - begun) / 60
    print(
        f"\n{suite.NAME}: {len(rows)} cases in {minutes:.1f} min"
        + (f", {len(failed)} failed ({', '.join(failed)})" if failed else "")
        + f"; written to {path}\n"
    )
    return len(failed)


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast bench`."""
    made = argparse.ArgumentParser(
        prog="exo-fast bench",
        description="Measure what exo_fast gains on this machine over the tools in use today.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    choices = [*SUITES, "all"]
    suites = made.add_argument("suites", nargs="*", metavar="SUITE", type=_suite, help=f"of {', '.join(choices)}")
    suites.words = choices  # for shell completion
    made.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases whose name begins so (with or without its suite); may be repeated",
    )
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases, for a first look")
    made.add_argument("--output_dir", type=Path, default=Path("runs/bench"), metavar="DIR", help="[%(default)s]")
    made.add_argument("--list", action="store_true", help="print the cases and stop")
    made.add_argument("--continue", action="store_true", dest="carry_on", help="only what the results lack")
    made.add_argument("--compare", type=Path, metavar="OLD", help="a result file, or a folder of them, to hold to")
    made.add_argument(
        "--tolerance", type=_ratio, default=compare.TOLERANCE, help="ratio of times that counts [%(default)s]"
    )
    made.add_argument(
        "--minutes",
        type=_minutes,
        metavar="M",
        help="begin no case after about so long; --continue runs what was left out",
    )
    made.add_argument("--report", action="store_true", help="write DIR/report.md and plots")
    return made


def _suite(text: str) -> str:
    if text not in (*SUITES, "all"):
        raise argparse.ArgumentTypeError(f"no suite is called {text!r}; there are {', '.join(SUITES)} and all")
    return text


def _minutes(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a positive number of minutes is needed")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a ratio of at least 1 is needed")
    return value


def _choose(names: Sequence[str], options: argparse.Namespace) -> list[tuple[ModuleType, set[str] | None, list[Any]]]:
    """Return (suite, names of the chosen cases, cases to run): with --continue some cases are measured already.

    Names are None for all cases of a suite. Raises InputError if --only matches no case.
    """
    chosen = []
    for name in names:
        suite = load(name)
        among = suite.cases(options.quick)
        beginnings = [text.removeprefix(f"{name}/") for text in options.only or [""]]
        cases = [case for case in among if str(case).removeprefix(f"{name}/").startswith(tuple(beginnings))]
        if not cases:
            continue
        if options.only:
            cases = runner.with_baselines(suite, cases, among)
        asked = {str(case) for case in cases} if options.only or options.quick else None
        if options.carry_on:
            cases = runner.left(suite, cases, options.output_dir / f"{name}.json")
            cases = runner.with_baselines(suite, cases, among)
        chosen.append((suite, asked, cases))
    if options.only and not chosen:
        raise InputError(f"--only {' '.join(options.only)}: no case begins so; --list shows them")
    return chosen


def _compare(
    old: dict[str, dict], options: argparse.Namespace, asked: dict[str, set[str] | None]
) -> compare.Comparison:
    """Print and return the differences from `old`: for the chosen cases, or for all results if nothing ran.

    Raises InputError if a suite has no case in common with the old results.
    """
    new = compare.read_results(options.output_dir)
    found, apart = compare.Comparison(), []
    for name in (name for name in old if not asked or name in asked):
        if name not in new:
            apart.append(name)
            continue
        print(compare.heads(old[name], new[name]) + "\n")
        of_suite = compare.compare(old[name], new[name], options.tolerance, asked.get(name))
        found.extend(of_suite)
        if of_suite.nothing_in_common:
            apart.append(name)
    print(compare.table(found))
    if apart or not found.compared:
        raise InputError(
            f"--compare {options.compare}: of {', '.join(apart or old)}, no case that was measured there is in the new "
            f"results; run the same suites, --quick and --only as they were, or give the old results of what was run"
        )
    return found
