"""Runs trainings in groups of processes on this machine, over gloo and on the CPU.

    python -m exo_fast.benchmarks.reliability.trainings PLAN    what each process of a group is started as

A process takes ten seconds to import what it needs and a tiny model less than one to train, so that a group is started
once and runs its trainings one after another. PLAN is a JSON file of them: a list of the fields of an AlignConfig.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 300  # without a training that ends, after which a group is taken to hang
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(processes: int, trainings: Sequence[dict], folder: Path, ended: Callable[[int], Any]) -> dict[str, str]:
    """Run `trainings`, fields of an AlignConfig each. Returns {output_dir: why} of those that failed.

    One that fails or hangs takes its processes with it, because the others wait for a collective that never comes; what
    is left goes on in new ones. Logs are written to `folder`; `ended` is told how many more trainings have ended.
    """
    failed, left = {}, list(trainings)
    while left:
        why = _run_group(processes, left, folder, ended)
        while left and _has_ended(left[0]):
            left.pop(0)
        if left:
            failed[left.pop(0)["output_dir"]] = why
            ended(1)
    return failed


def _run_group(processes: int, trainings: list[dict], folder: Path, ended: Callable[[int], Any]) -> str:
    """Start processes on `trainings` and wait for them to end or one to fail. Returns why, "" when all went well."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(trainings))
    logs = [folder / f"process{rank}.log" for rank in range(processes)]
    members: list[subprocess.Popen] = []
    try:
        for environment, log in zip(environments(processes), logs, strict=True):
            command = [sys.executable, "-m", "exo_fast.benchmarks.reliability.trainings", str(plan)]
            with log.open("w") as file:
                members.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        why, rank = _wait(members, trainings, ended)
    finally:
        for member in members:
            member.kill()
            member.wait()
    if not why:
        return ""
    words = logs[rank].read_text(errors="replace").strip().splitlines()
    return f"process {rank} {why}: {words[-1][:300] if words else 'it said nothing'}"


def _wait(members: list[subprocess.Popen], trainings: list[dict], ended: Callable[[int], Any]) -> tuple[str, int]:
    """What went wrong in which process, as a verb; "" when all ended well."""
    done, since = 0, time.monotonic()
    while True:
        statuses = [member.poll() for member in members]
        now = sum(map(_has_ended, trainings))
        if now > done:
            ended(now - done)
            done, since = now, time.monotonic()
        if not any(statuses) and None not in statuses:
            return "", 0
        broken = next((rank for rank, status in enumerate(statuses) if status), None)
        if broken is not None:
            return f"ended with status {statuses[broken]}", broken
        if time.monotonic() - since > LIMIT_SECONDS:
            return f"ended no training for {LIMIT_SECONDS} s", 0
        time.sleep(0.1)


def _has_ended(training: dict) -> bool:
    return Path(training["output_dir"], "summary.json").exists()  # the last thing that `align` writes


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher would set, for each process, and one thread; nothing of a launcher for one that is alone."""
    common = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def main(argv: Sequence[str]) -> None:
    """Run the trainings of a plan, and end the process before the interpreter is taken apart under gloo's threads."""
    status = 0
    try:
        from exo_fast.training.stages.align import AlignConfig, align

        for training in json.loads(Path(argv[0]).read_text()):
            align(AlignConfig(**training))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
