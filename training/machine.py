"""The machine, the versions and the command of this run, as reports and result files state them."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = (
    "exo_fast",
    "torch",
    "triton",
    "transformers",
    "trl",
    "deepspeed",
    "cut-cross-entropy",
    "liger_kernel",
)
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def describe() -> dict:
    """Return machine, versions, date and command of this run, as values that JSON can hold."""
    import torch  # imported here, so that `version` works without torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_command(sys.argv)),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "features": _cpu_features(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _command(arguments: list[str]) -> list[str]:
    """Return the words that start this process again in a checkout, without paths of this machine."""
    started_as = getattr(sys.modules["__main__"], "__spec__", None)
    if started_as is not None and started_as.name.startswith("exo_fast."):
        return ["python", "-m", started_as.name.removesuffix(".__main__"), *arguments[1:]]
    script = Path(arguments[0]).resolve()
    if script.suffix != ".py":
        return [script.name, *arguments[1:]]
    inside = script.is_relative_to(REPOSITORY)
    return ["python", str(script.relative_to(REPOSITORY)) if inside else script.name, *arguments[1:]]


def _cpu_name() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    """Return the CPU features that decide how fast bf16 products are."""
    flags = set((_cpuinfo("flags") or [""])[0].split())
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def _cpuinfo(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == field]


def _commit() -> str | None:
    """Return the commit of the checkout, with a + if code differs from it; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():  # installed: a repository around it is not ours
        return None
    written = (":!benchmarks/results", ":!docs")  # benchmarks write these themselves
    try:
        git = ["git", "-C", str(REPOSITORY)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", *written], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory_mb() -> float:
    """Return megabytes (1e6): the process's peak allocated device memory, or peak resident memory without a device."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # Linux counts in KiB


def give_back_freed_memory() -> None:
    """Make glibc on a CPU map every block of a MB and more by itself, so that freeing it returns it to the system.

    By default glibc keeps blocks of up to 32 MB in its heap, where the activations of long rows leave holes that later
    ones do not fit: the peak of two processes on one row of 16,320 tokens was 7 GB with less than half in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
