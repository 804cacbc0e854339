"""A worker of `exo-fast gpu` whose steps crash, hang, fail or end well: `python -m gpu_steps STEP`."""

import os
import signal
import sys
import time
from collections.abc import Callable

from exo_fast.benchmarks.gpu import plan, worker
from exo_fast.benchmarks.gpu.plan import Cases, Run, Unavailable


def counted(run: Run, name: str) -> dict:
    """Leave a trace of each time that a case is run."""
    with (run.output_dir / "trace.txt").open("a") as file:
        file.write(f"{name}\n")
    return {"seconds": 0.5}


def crash(run: Run) -> dict:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hang(run: Run) -> dict:
    time.sleep(600)
    return {}


def fail(run: Run) -> dict:
    raise ValueError("first line\nlast line")


def fake(middle: Callable[[Run], dict] | None) -> Callable[[Run], Cases]:
    def cases(run: Run) -> Cases:
        if middle is None:
            raise Unavailable("there is no tool")
        yield "before", lambda: counted(run, "before")
        yield "middle", lambda: middle(run)
        yield "after", lambda: counted(run, "after")

    return cases


FAKES = {"machine": crash, "slope": fail, "tests": hang, "times": lambda run: counted(run, "middle"), "host": None}

if __name__ == "__main__":
    plan.Step.cases = lambda self, name, run: fake(FAKES[name])(run)
    worker.main(sys.argv[1:])
