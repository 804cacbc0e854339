"""Running a stage in processes of its own, for tests that kill it or run two of it."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(script: Path, *, processes: int = 1) -> subprocess.Popen:
    """Python on `script`, alone or as two processes under torchrun, one thread each."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, *(TORCHRUN if processes == 2 else ()), str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def run(script: Path, *, processes: int = 1) -> str:
    """Run `script` to its end, which must be a good one; returns what it printed."""
    process = start(script, processes=processes)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        kill(process)
    assert process.returncode == 0, output[-4000:]
    return output


def kill_halfway(script: Path, output_dir: Path, *, processes: int = 1) -> None:
    """SIGKILL `script` as soon as it has stored another batch below `output_dir`; it must not have finished."""
    before = stored_bytes(output_dir)
    process = start(script, processes=processes)
    try:
        deadline = time.monotonic() + 240
        while stored_bytes(output_dir) <= before:
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        kill(process)
    assert not (output_dir / "summary.json").exists()


def stored_bytes(output_dir: Path) -> int:
    """Return the size of finished batches."""
    return sum(path.stat().st_size for path in output_dir.glob(".partial/*.jsonl"))


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and its children, whom torchrun puts in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for victim in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.communicate()
