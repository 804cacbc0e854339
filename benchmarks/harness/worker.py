"""`python -m exo_fast.benchmarks.harness.worker MODULE CASE WORKDIR`: run one case, print its row as JSON.

Standard output carries the row and nothing else: what the suite prints, and what libraries below it print, goes to
standard error. CASE is the case's fields as JSON, or EXTRAS for what the suite measures once a run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

EXTRAS = "extras"


def main(argv: list[str]) -> None:
    """Measure, write the row, end the process."""
    module, case, workdir = argv
    answer = os.dup(1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # or what is said before an error comes after it
    suite = importlib.import_module(module)
    if case == EXTRAS:
        found = suite.extras(Path(workdir))
    else:
        found = suite.measure(suite.Case(**json.loads(case)), Path(workdir))
    with os.fdopen(answer, "w") as stream:
        json.dump(found, stream)
    sys.stderr.flush()
    os._exit(0)  # the row is out: what a library's threads do while the interpreter ends is no part of it


if __name__ == "__main__":
    main(sys.argv[1:])
