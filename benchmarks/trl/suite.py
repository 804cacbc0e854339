"""TRL's own DPO tests, run by TRL's trainer and by ours: which pass, and why the others do not.

The tests come from a checkout of TRL that you have (`git clone https://github.com/huggingface/trl`); they run
against the TRL that is installed, without a hub, and unchanged. Each trainer is a pytest process of its own:

    trl      TRL itself, the control
    patched  TRL's DPOTrainer after `patch_trl()`
    class    ExoDPOTrainer in place of DPOTrainer, with TRL's DPOConfig
    ours     ExoDPOTrainer and ExoDPOConfig, so that every option that a test leaves is our default

`trl_plugin` puts the trainer in place, `trl_standins` makes the models and data sets. The exit status is 1 when a test
that TRL itself passes is failed by another trainer for a reason that INTENDED does not name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.harness import runner
from exo_fast.benchmarks.harness.provenance import grouped
from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.training import machine
from exo_fast.training.errors import InputError

TRAINERS = ("trl", "patched", "class", "ours")
TITLES = {"trl": "TRL itself", "patched": "`patch_trl()`", "class": "`ExoDPOTrainer`", "ours": "and `ExoDPOConfig`"}
SAME_LOSS = ("patched", "class")  # the control's loss, so that first steps can be compared
TESTS = Path("tests", "test_dpo_trainer.py")
SCRIPTS = Path("scripts", "generate_tiny_models")
OUTPUT = machine.REPOSITORY / "benchmarks" / "results" / "trl_suite.json"
LABEL = "trl_suite"  # in a page: <!-- trl_suite: summary -->, <!-- trl_suite: tests -->
EXPLAINED = {  # the meaning of a reason that does not explain itself
    r"\d+ active drivers": "the kernels of Liger need a GPU",
    r"DID NOT RAISE": "this TRL does not raise here any more",
    r"assert 'ref' not in": "with this PEFT, TRL makes the reference adapter that the test says it cannot",
    r"KeyError: 'chosen'": "this TRL takes metrics here, and comes as far as the test's data, which has no pairs",
}
INTENDED = {  # a reason of ours, and why it is intended
    r"are not for loss_type": "an option of TRL's losses of pairs; the default of `ExoDPOConfig`, `exo-pref`, has none",
}
EXAMPLES = """examples:
  python -m exo_fast.benchmarks.trl.suite --trl_checkout trl                          all, into results/trl_suite.json
  python -m exo_fast.benchmarks.trl.suite --trl_checkout trl --markdown docs/trl.md   also rewrite that page's tables
  python -m exo_fast.benchmarks.trl.suite --trl_checkout trl --trainer trl ours --only loss_types
"""


def run(checkout: Path, trainers: Sequence[str], only: str | None = None) -> dict[str, Any]:
    """Run the tests with each trainer. Return {"checkout": its version, "rows": a row for each test and trainer}.

    Raises InputError if the folder is not a checkout of TRL, or its tests cannot be collected.
    """
    for part in (TESTS, SCRIPTS):
        if not (checkout / part).exists():
            raise InputError(f"--trl_checkout {checkout}: no {part} in it; give a checkout of TRL's repository")
    rows = []
    with tempfile.TemporaryDirectory(prefix="exo-fast-trl-") as folder:
        home = Path(folder)
        environment = {
            **os.environ,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
        }
        for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "PYTEST_ADDOPTS"):
            environment.pop(name, None)

        def python(*arguments: str | Path) -> subprocess.CompletedProcess:
            return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=home, env=environment)

        checkout = checkout.resolve()
        python("exo_fast.benchmarks.trl.standins", checkout, home).check_returncode()
        for trainer in trainers:
            print(f"\n{trainer}: {checkout.name}/{TESTS}", flush=True)
            record = home / f"{trainer}.jsonl"
            options: list[str | Path] = ["-p", "exo_fast.benchmarks.trl.plugin", "-p", "no:cacheprovider"]
            options += ["-q", "--tb=no", "-W", "ignore"]
            options += ["--rootdir", checkout, "--trl_trainer", trainer, "--trl_home", home, "--trl_record", record]
            options += ["-k", only] if only else []
            ended = python("pytest", *options, checkout / TESTS)
            if ended.returncode not in (0, 1):
                raise InputError(f"--trl_checkout {checkout}: its tests could not be run (pytest: {ended.returncode})")
            rows += [{"trainer": trainer, **json.loads(line)} for line in record.read_text().splitlines()]
    return {"checkout": describe_checkout(checkout), "trainers": list(trainers), "rows": rows}


def describe_checkout(checkout: Path) -> str:
    """Return version and commit: "1.10.0.dev0 (f2cd577)"."""
    version = (checkout / "VERSION").read_text().strip() if (checkout / "VERSION").exists() else "unknown version"
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True) if (checkout / ".git").exists() else None
    return f"{version} ({found.stdout.strip()})" if found and not found.returncode else version


# Results


def lost(results: dict[str, Any], trainer: str) -> list[dict[str, Any]]:
    """Return the rows of tests that TRL itself passes and a trainer does not."""
    passed = {row["test"] for row in results["rows"] if row["trainer"] == "trl" and row["outcome"] == "passed"}
    own = (row for row in results["rows"] if row["trainer"] == trainer)
    return [row for row in own if row["test"] in passed and row["outcome"] != "passed"]


def intended(why: str) -> str | None:
    """Return why a trainer of ours should fail for this reason; None if it should not."""
    return next((meant for pattern, meant in INTENDED.items() if re.search(pattern, why)), None)


def differences(results: dict[str, Any], trainer: str) -> tuple[float, float] | None:
    """Return the largest relative differences from TRL of the loss and of the gradient's norm, over the first steps of
    all trainings in the tests. None if no training ran with both."""
    steps = {(row["trainer"], row["test"]): row["first_steps"] for row in results["rows"]}
    found = [
        [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(ours, control, strict=True)]
        for (name, test), own in steps.items()
        if name == trainer
        for ours, control in zip(own, steps.get(("trl", test), ()), strict=False)
    ]
    return (max(loss for loss, _ in found), max(norm for _, norm in found)) if found else None


def summary(results: dict[str, Any]) -> str:
    lines = []
    for trainer in results["trainers"]:
        outcomes = [row["outcome"] for row in results["rows"] if row["trainer"] == trainer]
        counts = [str(outcomes.count(outcome)) for outcome in ("passed", "failed", "skipped")]
        apart = differences(results, trainer) if trainer in SAME_LOSS else None
        beside = [str(len(lost(results, trainer))) if trainer != "trl" else ""]
        beside += [f"{value:.0e}" for value in apart] if apart else ["", ""]
        lines.append([TITLES[trainer], *counts, *beside])
    header = ["trainer", "passed", "failed", "skipped", "failed, and TRL passes", "Δ loss", "Δ gradient"]
    return f"{markdown(header, lines)}\n\n{_from(results)}"


def tests_table(results: dict[str, Any]) -> str:
    """Make a table with a line for each test function: how many of its cases pass, and why the others do not."""
    lines = []
    for name, rows in grouped(results["rows"], lambda row: row["test"].split("[")[0]):
        cells = [_passed([row for row in rows if row["trainer"] == trainer]) for trainer in results["trainers"]]
        lines.append([f"`{name.split('::')[-1]}`", *cells, "; ".join(reasons(rows, results["trainers"]))])
    header = ["test", *(TITLES[trainer] for trainer in results["trainers"]), "why not"]
    return f"{markdown(header, lines, left=len(header))}\n\n{_from(results)}"


def _passed(rows: Sequence[dict[str, Any]]) -> str:
    run = [row for row in rows if row["outcome"] != "skipped"]
    return f"{sum(row['outcome'] == 'passed' for row in run)} of {len(run)}" if run else "–"


def reasons(rows: Sequence[dict[str, Any]], trainers: Sequence[str]) -> list[str]:
    """Explain why cases of a test do not pass: each reason once, after the trainers that have it unless all do."""
    whose: dict[str, list[str]] = {}
    for row in rows:
        if row["outcome"] != "passed":
            names = whose.setdefault(explain(row["why"]), [])
            if row["trainer"] not in names:
                names.append(row["trainer"])
    return [why if len(names) == len(trainers) else f"{', '.join(names)}: {why}" for why, names in whose.items()]


def explain(why: str) -> str:
    """Explain a reason to the reader, in a cell of a table."""
    known = {**EXPLAINED, **INTENDED}
    text = next((meaning for pattern, meaning in known.items() if re.search(pattern, why)), why)
    return " ".join(text.replace("|", "\\|").split())


def _from(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"`{results['command']}` · tests of TRL {results['checkout']} · {results['date'][:10]} · "
        f"commit {results['commit']} · {runner.machine_line(results)} · {versions}"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exo_fast.benchmarks.trl.suite",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--trl_checkout", type=Path, required=True, metavar="DIR", help="a checkout of TRL's repository"
    )
    parser.add_argument("--trainer", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="which [all]")
    parser.add_argument("--only", metavar="EXPRESSION", help="the tests that pytest selects by -k EXPRESSION")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="results as JSON [%(default)s]")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite the tables of this page")
    options = parser.parse_args(argv)
    try:
        found = run(options.trl_checkout, options.trainer, options.only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = "python -m exo_fast.benchmarks.trl.suite --trl_checkout trl"  # without local paths
    results = {**machine.describe(), "command": command, "suite": "trl_suite", **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    runner.write(options.output, results)
    tables = {"summary": summary(results), "tests": tests_table(results)}
    print("\n\n".join(tables.values()))
    if options.markdown:
        rewrite(options.markdown, LABEL, tables)
    return int(any(not intended(row["why"]) for trainer in options.trainer for row in lost(results, trainer)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
