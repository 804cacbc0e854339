"""Communication between the processes of a run. With one process nothing is sent."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

Value = TypeVar("Value")
PR_SET_PDEATHSIG = 1
LAUNCHER_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def start(*, on_cpu: bool) -> torch.device:
    """Join the processes that a launcher started, by gloo on a CPU; return this one's device. Calling it again is free.

    A process waits up to a day for the slowest: a batch takes as long as it takes.
    """
    from accelerate import PartialState

    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # an earlier training stage in this process may have set it
    return PartialState(cpu=on_cpu, timeout=timedelta(days=1)).device


def count() -> int:
    """Return how many processes run together."""
    return torch.distributed.get_world_size() if _together() else 1


def index() -> int:
    """Return the rank of this process. Rank 0 writes files that are written once."""
    return torch.distributed.get_rank() if _together() else 0


def gather(value: Value) -> list[Value]:
    """Return the values of all processes, in rank order. A collective call, for small values."""
    if count() == 1:
        return [value]
    values: list[Value] = [value] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """Return the first process's value; a collective call."""
    return gather(value if index() == 0 else None)[0]


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        torch.distributed.barrier()


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def announce_cpu() -> None:
    """Set for DeepSpeed that there is no accelerator, and for accelerate the number of threads, before each looks.

    Otherwise both warn. DeepSpeed warns as soon as it is imported, and transformers imports it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def ensure_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and a free MASTER_PORT, unless a launcher did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    for name, value in LAUNCHER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))


def end_with_parent(end: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Return a `preexec_fn` of subprocess: the child gets the signal `end` when this process is killed (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, end)
        if os.getppid() != parent:  # the parent was killed before the line above
            os.kill(os.getpid(), end)

    return arrange
