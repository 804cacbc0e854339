"""`python -m exo_fast.benchmarks.gpu.worker STEP`: the rows of one step, one JSON object a line on stdout.

Its settings are a JSON object on stdin.
Before a row comes {"begin": name}, so that the parent knows which row a crash or the end of the time belongs to. The
step and its libraries print to stderr. A failed row does not end the step, unless the device can no longer be
used: then the process ends, and the parent starts another one for the rows that are left.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from exo_fast.benchmarks.gpu.plan import CARD, DRY, STEPS, Run, Unavailable

DEVICE_LOST = 3  # exit status


def work(name: str, run: Run, done: set[str], say: Callable[[dict], None]) -> bool:
    """Run the cases of a step that are not `done`, and `say` each row. Return False if the device cannot be used any
    more."""
    try:
        for case, measure in STEPS[name].cases(name, run):
            if case in done:
                continue
            say({"begin": case})
            begun = time.perf_counter()
            try:
                row = measure()
            except Unavailable as why:
                row = {"skipped": str(why)}
            except ModuleNotFoundError as error:  # of another package: exo_fast's own are here
                row = {"skipped": f"{error.name} is not installed"}
            except Exception as error:
                traceback.print_exc()
                row = {"failed": words(error)}
                if not usable():
                    say({"name": case, **row})
                    return False
            row = {"name": case, **row, "took": round(time.perf_counter() - begun, 2)}
            run.rows[case] = row
            say(row)
    except Unavailable as why:
        say({"unavailable": str(why)})
    return True


def words(error: Exception) -> str:
    """Return an error in one line of at most 400 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return f"{type(error).__name__}: {text}"[:400]


def usable() -> bool:
    """Check whether the device still computes after an error, and give back the memory that the error left behind."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device="cuda").item())
    except Exception:
        return False


def main(argv: list[str]) -> None:
    """Run a step, and end the process."""
    name, settings = argv[0], json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)

    def say(row: dict) -> None:
        answer.write(json.dumps(row, default=str) + "\n")
        answer.flush()

    plan = DRY if settings["dry_run"] else CARD
    if settings["dry_run"]:
        import torch

        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")
    run = Run(plan, Path(settings["output_dir"]), settings["seconds"], settings["rows"])
    lost = not work(name, run, set(settings["done"]), say)
    sys.stderr.flush()
    os._exit(DEVICE_LOST if lost else 0)  # a library's threads must not matter while the interpreter ends


if __name__ == "__main__":
    main(sys.argv[1:])
