"""`exo-fast gpu`: the whole run. Each step is a process with a time limit of its own; this one writes its findings."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo_fast.benchmarks.gpu import page, worker
from exo_fast.benchmarks.gpu.plan import STEPS
from exo_fast.benchmarks.harness import runner
from exo_fast.kernels.tuned import write_table
from exo_fast.training import machine
from exo_fast.training.errors import InputError
from exo_fast.training.files import why_not_writable
from exo_fast.training.processes import end_with_parent
from exo_fast.training.terminal import give_result

DESCRIPTION = """\
Test, time and tune the kernels on the GPU of this machine, and say in plain words whether they are right, how fast they
are beside the other implementations that are installed, and what to set. Nothing is downloaded.

It has seven steps, each in a process of its own that is ended when its time is up. Every result is in
OUTPUT_DIR/results.json as soon as it is known. The same command again runs what is missing."""

EXAMPLES = """\
examples:
  exo-fast gpu                                     # all steps; at most an hour, mostly a quarter of it
  exo-fast gpu --minutes 10 --output_dir runs/h200
  exo-fast gpu --only times --only host            # these steps alone; the results of others are kept
  exo-fast gpu --dry-run                           # without a GPU: the same steps on tiny sizes, to see that they run
"""

RESULTS, LOG, REPORT = "results.json", "log.txt", "report.md"
MINUTES = 60.0
LAST_WORDS = 5  # lines


def parser() -> argparse.ArgumentParser:
    """Return the options of `exo-fast gpu`."""
    made = argparse.ArgumentParser(
        prog="exo-fast gpu",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), metavar="DIR", help="[%(default)s]")
    made.add_argument("--minutes", type=_minutes, default=MINUTES, metavar="M", help="of all steps [%(default)g]")
    made.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    made.add_argument("--dry-run", action="store_true", help="on the CPU in Triton's interpreter, with tiny sizes")
    made.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="also rewrite this page's tables, as docs/gpu.md has"
    )
    return made


def _minutes(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a positive number of minutes is needed")
    return value


def main(argv: Sequence[str]) -> int:
    """Run the steps; return the exit status: 1 if a number is wrong or something failed, else 0."""
    options = parser().parse_args(argv)
    check(options)
    results = opened(options)
    names = [name for name in STEPS if not options.only or name in options.only]
    total, begun = sum(STEPS[name].share for name in names), time.monotonic()
    until = begun
    for place, name in enumerate(names, 1):
        until += 60 * options.minutes * STEPS[name].share / total  # a step also gets the time that others left
        if finished(results["steps"].get(name)):
            print(f"[{place}/{len(names)}] {name}: done before")
            continue
        print(
            f"[{place}/{len(names)}] {name}: {STEPS[name].question} (at most {until - time.monotonic():.0f} s)",
            flush=True,
        )
        run_step(name, results, options, until)
        write(results, options)
    words = page.verdict(results)
    print("\n" + "\n".join(words))
    files = ", ".join(sorted(path.name for path in options.output_dir.iterdir()))
    print(f"\n{time.monotonic() - begun:.0f} s; in {options.output_dir}: {files}")
    wrong = page.wrong(results)
    give_result({"passed": not wrong, "verdict": words, "wrong": wrong, "results": str(options.output_dir / RESULTS)})
    return int(bool(wrong))


def check(options: argparse.Namespace) -> None:
    """Raises InputError if the run cannot be made here."""
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        built = built if torch.version.cuda or torch.version.hip else "the CPU only"
        raise InputError(
            f"torch sees no GPU here (torch {torch.__version__} is built for {built}; `exo-fast doctor` looks for the "
            "reason). exo-fast gpu --dry-run runs the same steps on the CPU with tiny sizes."
        )
    if options.dry_run and options.markdown:
        raise InputError("--markdown: a dry run has no numbers for a page; leave out one of --dry-run and --markdown")
    if (why := why_not_writable(options.output_dir)) is not None:
        raise InputError(f"--output_dir {options.output_dir}: {why}")


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far, or empty ones. Raises InputError if they are of another machine or sort of run."""
    path, about = options.output_dir / RESULTS, machine.describe()
    fresh = {**about, "dry_run": options.dry_run, "steps": {}}
    if not path.exists():
        return fresh
    try:
        old = json.loads(path.read_text())
        same = (old["machine"], old["dry_run"], old["versions"]) == (
            about["machine"], options.dry_run, about["versions"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of exo-fast gpu ({error}); give another --output_dir") from error
    if not same:
        raise InputError(
            f"{path} is of another machine, other versions or another sort of run: give another --output_dir"
        )
    return {**fresh, "steps": old["steps"]}


def finished(step: dict | None) -> bool:
    """Check whether a step needs no second run: it came to its end, and no row failed."""
    if step is None or step["state"] not in ("done", "unavailable"):
        return False
    return not any(page.lost(row) or row.get("time_was_up") for row in step["rows"].values())


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the results, the report and, if `linear_logsumexp` was timed, the table of its configurations."""
    runner.write(options.output_dir / RESULTS, results)
    (options.output_dir / REPORT).write_text(page.report(results))
    if (made := page.tuned(results)) is not None:
        write_table(options.output_dir / f"{made.target}.json", made)
    if options.markdown:
        page.rewrite_page(options.markdown, results)


def run_step(name: str, results: dict[str, Any], options: argparse.Namespace, until: float) -> None:
    """Run a step in processes until it ends or its time is up, and write the results after each row."""
    before = results["steps"].get(name, {"rows": {}})["rows"]
    rows = {key: row for key, row in before.items() if not page.lost(row) and not row.get("time_was_up")}
    step = results["steps"][name] = {"state": "running", "seconds": 0.0, "rows": rows}
    done, begun, state = set(rows), time.monotonic(), "running"
    while state == "running":
        current: str | None = None
        with Child(name, options, until - time.monotonic(), rows, done) as child:
            for said in child.lines(until):
                if "unavailable" in said:
                    step["why"] = said["unavailable"]
                    print(f"  not here: {step['why']}")
                    state = "unavailable"
                elif "begin" in said:
                    current = said["begin"]
                else:
                    current = None
                    _keep(said, step, done, begun)
                    step["seconds"] = round(time.monotonic() - begun, 1)
                    runner.write(options.output_dir / RESULTS, results)
            status = child.status
        if status is None:
            state = "the time was up"
            if current is not None:
                _keep({"name": current, "stopped": "the time of its step was up"}, step, done, begun)
        elif status == 0:
            state = "done" if state == "running" else state
        elif current is not None:  # a crash: the case is to blame, and the next process goes on behind it
            _keep({"name": current, "failed": child.last_words(status)}, step, done, begun)
        elif status != worker.DEVICE_LOST:
            step["why"], state = child.last_words(status), "failed"
            print(f"  failed: {step['why']}")
    step["state"], step["seconds"] = state, round(time.monotonic() - begun, 1)
    if state == "the time was up":
        print("  the time of this step is up; what is missing runs when the command is given again")
    runner.write(options.output_dir / RESULTS, results)


def _keep(row: dict, step: dict, done: set[str], begun: float) -> None:
    """Put a row into a step's results and print it."""
    step["rows"][row["name"]] = row
    done.add(row["name"])
    print(f"  {time.monotonic() - begun:5.0f} s  {row['name']}: {page.words(row)}", flush=True)


class Child:
    """The process of a step. It ends when its parent does, or at the end of the `with` block."""

    def __init__(self, name: str, options: argparse.Namespace, seconds: float, rows: dict, done: set[str]):
        settings = {
            "dry_run": options.dry_run, "output_dir": str(options.output_dir.resolve()), "seconds": seconds,
            "rows": rows, "done": sorted(done),
        }  # fmt: skip
        environment = dict(os.environ)
        if options.dry_run:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = (options.output_dir / LOG).open("ab")
        self.log.write(f"\n==== {name}\n".encode())
        self.log.flush()
        self.path, self.start = options.output_dir / LOG, self.log.tell()
        self.process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )
        with contextlib.suppress(BrokenPipeError):  # it ended before it read: its output says why
            self.process.stdin.write(json.dumps(settings))
            self.process.stdin.close()
        self.said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.status: int | None = None

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.said.put(line)
        self.said.put(None)

    def lines(self, until: float) -> Any:
        """Yield the process's messages until it ends; `status` is then its exit status, or None if the time is up."""
        while (left := until - time.monotonic()) > 0:
            try:
                line = self.said.get(timeout=left)
            except queue.Empty:
                return
            if line is None:
                self.status = self.process.wait()
                return
            yield json.loads(line)

    def last_words(self, status: int) -> str:
        """Return why the process ended: the signal, and the end of its output."""
        said = self.path.read_bytes()[self.start :].decode(errors="replace").strip().splitlines()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{how}: {' … '.join(said[-LAST_WORDS:])}"[:400]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
