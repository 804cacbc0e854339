"""`python -m exo_fast.benchmarks.harness.worker MODULE CASE WORKDIR`: run one case, print its row as JSON.

Standard output carries only the row: the output of the suite and of libraries goes to standard error. CASE is the
case's fields as JSON, or EXTRAS for the suite's measurements once a run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

EXTRAS = "extras"


def main(argv: list[str]) -> None:
    """Measure the case, write the row, and end the process."""
    module, case, workdir = argv
    answer = os.dup(1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # else output printed before an error appears after it
    suite = importlib.import_module(module)
    if case == EXTRAS:
        found = suite.extras(Path(workdir))
    else:
        found = suite.measure(suite.Case(**json.loads(case)), Path(workdir))
    with os.fdopen(answer, "w") as stream:
        json.dump(found, stream)
    sys.stderr.flush()
    os._exit(0)  # the row is written; a library's threads must not matter while the interpreter ends


if __name__ == "__main__":
    main(sys.argv[1:])
