"""Test this checkout with other versions of what it stands on: one table from one command.

Each environment is made anew in build/matrix, with the versions that it pins, and this checkout installed beside them.
Pip's own check and four groups of tests run in it, one after the other. Results are written after each environment, and
--continue leaves out the ones that have some. The exit status is 1 if anything failed.

Environments of frameworks have the versions that the framework pins, without the framework itself: they show that
exo_fast can be installed and used beside these versions, and not that the framework calls it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from exo_fast.benchmarks.harness.tables import markdown, rewrite
from exo_fast.training import machine

ROOT = machine.REPOSITORY
FOLDER = ROOT / "build" / "matrix"
OUTPUT = ROOT / "benchmarks" / "results" / "matrix.json"
EXAMPLES = """examples:
  python -m exo_fast.benchmarks.reliability.matrix --list                  the environments and their versions
  python -m exo_fast.benchmarks.reliability.matrix --only pinned --only verl     two of them
  python -m exo_fast.benchmarks.reliability.matrix --markdown docs/compatibility.md   all, and the page's table
"""
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "psutil", "matplotlib", "scipy", "gguf", "lightning", "build")


@dataclass(frozen=True)
class Environment:
    """Versions that are installed together."""

    name: str
    whose: str  # who has these versions
    pins: tuple[str, ...]
    trl: bool = True  # with exo_fast[trl], whose versions are 1.15 and 1.16


TORCH = "torch==2.13.0"  # ours, if the framework takes it
ENVIRONMENTS = (
    Environment("pinned", "constraints.txt of this project", ("-c", "constraints.txt")),
    Environment("transformers-5.9", "oldest transformers, torch as pinned", (TORCH, "transformers==5.9.0")),
    Environment("transformers-5.24", "newest transformers, torch as pinned", (TORCH, "transformers==5.24.0")),
    Environment(
        "oldest",
        "the oldest of every range",
        ("torch==2.9.1", "transformers==5.9.0", "deepspeed==0.18.6", "peft==0.17.1", "datasets==4.7.0", "trl==1.15.0",
         "numpy<2.3"),
    ),
    Environment("newest", "the newest", ("torch==2.14.1", "transformers==5.24.0", "trl==1.16.0")),
    Environment("torch-2.11", "torch 2.11", ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy<2.3")),
    Environment(
        "axolotl", "Axolotl 0.19.0", (TORCH, "transformers==5.16.1", "trl==1.9.0", "deepspeed<0.19"), trl=False
    ),
    Environment("openrlhf", "OpenRLHF 0.11.2", (TORCH, "transformers==5.15.0", "deepspeed==0.19.6"), trl=False),
    Environment("verl", "verl 0.9.1", ("torch==2.11.0", "transformers==5.9.0", "numpy<2.3"), trl=False),
    Environment("unsloth", "Unsloth 2026.10.9", (TORCH, "transformers==5.17.0", "trl==1.15.0")),
    Environment("vllm", "vLLM 0.33", ("torch==2.14.0", "transformers==5.20.2"), trl=False),
)  # fmt: skip
CHECKS = {
    "library": ("tests/library", "tests/kernels"),
    "transformers": ("tests/integrations/test_transformers.py",),
    "align": ("tests/training/stages/test_align.py", "tests/training/trainer/test_compat.py"),
    "TRL": ("tests/integrations/test_trl.py", "tests/integrations/test_candidates.py"),
}
SHOWN = ("torch", "triton", "transformers", "trl", "deepspeed", "peft", "datasets", "numpy")
VERSIONS = f"""
import importlib.metadata as m, json
print(json.dumps({{n: m.version(n) for n in {SHOWN!r} if any(d.name.lower() == n for d in m.distributions())}}))
"""


def make(environment: Environment) -> Path:
    """Make the environment anew and return its Python."""
    folder = FOLDER / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    extras = "train,trl" if environment.trl else "train"
    run(python, "-m", "pip", "install", "-q", "--progress-bar", "off", f"{ROOT}[{extras}]", *environment.pins, *TOOLS)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "exo_fast")  # the tests import the checkout
    return python


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[1:5]))} …: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def check(python: Path, name: str) -> dict[str, object]:
    """Run a group of tests and return its counts."""
    report, start = python.parents[1] / f"{name}.xml", time.time()
    report.unlink(missing_ok=True)
    words = ["-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={report}", *CHECKS[name]]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
    environ = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-m", "pytest", *words], cwd=ROOT, env=environ, capture_output=True, text=True)
    (python.parents[1] / f"{name}.log").write_text(done.stdout + done.stderr)
    if not report.exists():
        return {"error": (done.stderr or done.stdout).strip()[-600:]}
    suite = ET.parse(report).getroot().find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(failed) - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(time.time() - start)}


def measured(environment: Environment) -> dict[str, object]:
    """Return the results of one environment."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    row: dict[str, object] = {"whose": environment.whose, "date": today, "checks": {}}
    try:
        python = make(environment)
        row["versions"] = json.loads(run(python, "-c", VERSIONS))
        try:
            run(python, "-m", "pip", "check")
            row["pip check"] = "clean"
        except RuntimeError as error:
            row["pip check"] = str(error)
    except RuntimeError as error:
        row["error"] = str(error)
        return row
    for name in CHECKS:
        if name != "TRL" or environment.trl:
            print(f"{environment.name}: {name} …", flush=True)
            row["checks"][name] = found = check(python, name)
            print(f"{environment.name}: {name}: {cell(found)}", flush=True)
    return row


def cell(found: dict | None) -> str:
    """Return the words of a table for the counts of a group."""
    if found is None:
        return "–"
    if "error" in found:
        return "did not run"
    failed = f", **{len(found['failed'])} failed**" if found["failed"] else ""
    return f"{found['passed']:,} passed{failed}"


def table(results: dict[str, dict]) -> str:
    header = ["environment", *SHOWN, "pip check", *CHECKS, "date"]
    rows = []
    for environment in ENVIRONMENTS:
        row = results.get(environment.name)
        name = f"{environment.name}: {environment.whose}"
        if row is None or "error" in row:
            rows.append([name, *["–"] * (len(header) - 2), "not run" if row is None else "could not be installed"])
            continue
        versions = [row["versions"].get(package, "–") for package in SHOWN]
        clean = "clean" if row["pip check"] == "clean" else "**conflicts**"
        rows.append([name, *versions, clean, *(cell(row["checks"].get(check)) for check in CHECKS), row["date"]])
    return markdown(header, rows, left=len(header))


def red(row: dict) -> bool:
    groups = row.get("checks", {}).values()
    return "error" in row or row["pip check"] != "clean" or any("error" in g or g["failed"] for g in groups)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exo_fast.benchmarks.reliability.matrix",
        description="Test this checkout in environments with other versions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", action="append", choices=names, help="an environment; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the environments and stop")
    parser.add_argument("--continue", action="store_true", dest="resume", help="leave out what has results")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: benchmarks/results/matrix.json")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite the table of this page")
    parser.add_argument("--keep", action="store_true", help="keep the environments, several GB each")
    options = parser.parse_args(arguments)
    if options.list:
        for environment in ENVIRONMENTS:
            print(f"{environment.name:18} {environment.whose}: {' '.join(environment.pins)}")
        return 0
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    wanted = [e for e in ENVIRONMENTS if e.name in (options.only or names)]
    for environment in wanted:
        if options.resume and environment.name in results:
            continue
        results[environment.name] = measured(environment)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        if options.markdown:
            rewrite(options.markdown, "matrix", {"table": table(results)})
        if not options.keep:
            shutil.rmtree(FOLDER / environment.name, ignore_errors=True)
    print(table(results))
    return int(any(red(results[environment.name]) for environment in wanted))


if __name__ == "__main__":
    sys.exit(main())
