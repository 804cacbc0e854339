"""Resident memory of this process, read from /proc."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path


def resident_mb() -> float:
    """Return this process's memory in MB (1e6 bytes), after the allocator has released its unused memory."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Make `peak_mb` count from now on. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the peak memory of this process since `reset_peak`, MB (1e6 bytes): the kernel's own high-water mark."""
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))
