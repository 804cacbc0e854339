"""A suite that takes no time, for the tests of the runner. Its worker processes import it by PYTHONPATH."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

NAME = "tiny"
SECONDS = {"plain": 2.0, "ours": 0.5, "noisy": 3.0}


@dataclass(frozen=True)
class Case:
    method: str
    size: int

    def __str__(self) -> str:
        return f"tiny/{self.method}/{self.size}"


def cases(quick: bool = False) -> list[Case]:
    return [Case(method, size) for size in ((1,) if quick else (1, 2)) for method in SECONDS]


def impossible(case: Case) -> str | None:
    return "too noisy for two" if case == Case("noisy", 2) and "TINY_QUIET" not in os.environ else None


def prepare() -> None:
    if os.environ.get("TINY_FAILS") == "prepare":
        raise OSError("nothing to fetch")


def measure(case: Case, workdir: Path) -> dict:
    print("what a library says does not belong to the row")
    if os.environ.get("TINY_FAILS") == str(case):
        raise ValueError("of course it does")
    if os.environ.get("TINY_DIES") == str(case):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TINY_HANGS") == str(case):
        Path(os.environ["TINY_PID"]).write_text(str(os.getpid()))
        time.sleep(60)
    with (workdir / "seen").open("a") as seen:
        seen.write(f"{case}\n")
    seconds = SECONDS[case.method] * case.size
    return {
        "seconds": seconds,
        "all_seconds": [seconds, seconds * 1.1],
        "peak_mb": 100.0,
        "errors": {"loss": 1e-6},
        "seen": len((workdir / "seen").read_text().splitlines()),
    }


def baseline(case: Case) -> str | None:
    return None if case.method == "plain" else str(Case("plain", case.size))


def extras(workdir: Path) -> dict:
    if os.environ.get("TINY_FAILS") == "extras":
        raise ValueError("no bandwidth")
    return {"bandwidth_gbs": 20.0}


def summary(rows: list[dict]) -> dict:
    return {"total": sum(row.get("seconds", 0.0) for row in rows)}
