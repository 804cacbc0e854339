"""What is installed on this machine and what would run on it, as plain values: the findings of `exo-fast doctor`.

Versions come from metadata and nothing heavy is imported, so that it takes seconds and works where a package is missing
or broken. Of all packages only torch is needed, and its own absence is a finding.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from exo_fast.training.cli import installed as requirements
from exo_fast.version import __version__

OPTIONAL = ("trl", "liger-kernel", "cut-cross-entropy", "flash-attn")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MIN_CAPABILITY = (8, 0)  # of NVIDIA GPUs: the first with bf16 products, and the oldest that kernels are certified for
MIN_FREE_GB = 2.0  # the demo's downloads and model take about one
VARIABLES = (
    "EXO_FAST_AUTOTUNE",
    "EXO_FAST_CACHE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "CXX",
    "TORCH_EXTENSIONS_DIR",
)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be, and the command or the change that mends it."""

    what: str
    fix: str


# Packages


def packages() -> list[dict[str, Any]]:
    """name, version, needed range, the part of exo_fast that needs it, state (ok, missing, out of range), command."""
    asked = requirements.needs("exo_fast")
    rows = [(need.name, need.specifier, "core") for need in asked if need.extra is None]
    rows += [(need.name, need.specifier, "train") for need in asked if need.extra == "train"]
    optional = [requirements.own_need(name) for name in OPTIONAL]
    rows += [(need.name, need.specifier, need.extra or "core") for need in optional if need is not None]
    return [_package(name, specifier, part) for name, specifier, part in rows]


def _package(name: str, specifier: str, part: str) -> dict[str, Any]:
    version = requirements.version(name)
    state = "ok"
    if version is None:
        state = "missing"
    elif not requirements.fits(version, specifier):
        state = "out of range"
    command = None if state == "ok" else requirements.command_for(name)
    if state == "out of range":
        command = f"pip install '{name}{specifier}'"
    return {"name": name, "version": version, "needed": specifier, "for": part, "state": state, "command": command}


def package_problems(rows: list[dict[str, Any]]) -> list[Problem]:
    """Packages outside their ranges, exo_fast's or one another's; optional ones that are missing are none."""
    found = [
        Problem(f"{row['name']} {row['version']} is installed, and {row['needed']} is needed", row["command"])
        for row in rows
        if row["state"] == "out of range"
    ]
    found += [
        Problem(f"{row['name']} is not installed, and nothing runs without it", row["command"])
        for row in rows
        if row["state"] == "missing" and row["for"] == "core"
    ]
    installed = requirements.version("exo_fast")
    if installed != __version__:
        what = f"the code is exo_fast {__version__}, and what is installed says {installed}: ranges may be old"
        found.append(Problem(what, "pip install it again (in a checkout: pip install -e .)"))
    if not requirements.can_judge():
        found.append(Problem("ranges of versions were not checked: packaging is missing", "pip install packaging"))
    elif not requirements.python_fits(platform.python_version()):
        found.append(Problem(f"Python {platform.python_version()} is not one exo_fast is made for", "use a newer one"))
    for row in rows:
        for need in requirements.needs(row["name"]) if row["version"] else ():
            version = requirements.version(need.name)
            if need.extra is not None or (version is not None and requirements.fits(version, need.specifier)):
                continue
            there = f"{version} is installed" if version else "it is not installed"
            found.append(
                Problem(
                    f"{row['name']} {row['version']} needs {need.name}{need.specifier}, and {there}",
                    f"pip install '{need.name}{need.specifier}'",
                )
            )
    return found


# The machine


def machine() -> dict[str, Any]:
    """CPU, memory, threads and GPUs. Needs torch."""
    import torch

    from exo_fast.training.machine import describe

    found = describe()["machine"]
    gpus = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        gpu = {"name": about.name, "memory_gb": round(about.total_memory / 1e9, 1)}
        gpu["capability"] = getattr(about, "gcnArchName", None) if torch.version.hip else f"{about.major}.{about.minor}"
        gpus.append(gpu)
    return {
        "system": found["system"],
        "cpu": found["cpu"],
        "cores": found["cores"],
        "threads": found["threads"],
        "memory_gb": found["memory_gb"],
        "features": found["features"],
        "gpus": gpus,
        "torch_built_for": _built_for(torch),
    }


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def machine_problems(found: dict[str, Any]) -> list[Problem]:
    """GPUs that torch cannot use, or only in part."""
    built_for, problems = found["torch_built_for"], []
    driver = Path("/proc/driver/nvidia/version").exists()
    if built_for == "CPU" and driver:
        problems.append(
            Problem("there is an NVIDIA driver, but torch is a CPU build", "install a build of torch for CUDA")
        )
    if built_for.startswith("CUDA") and driver and not found["gpus"]:
        fix = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough (nvidia-smi)"
        problems.append(Problem(f"torch is built for {built_for}, and sees no GPU, but there is a driver", fix))
    for gpu in found["gpus"] if built_for.startswith("CUDA") else ():
        if tuple(map(int, gpu["capability"].split("."))) < MIN_CAPABILITY:
            what = f"{gpu['name']} has compute capability {gpu['capability']}; kernels are certified from 8.0 on"
            problems.append(Problem(what, "train in float32, or take a newer GPU"))
    if found["gpus"] and _interpreted():
        problems.append(Problem("TRITON_INTERPRET is set: kernels do not run on the GPU", "unset TRITON_INTERPRET"))
    return problems


def _interpreted() -> bool:
    from exo_fast.backends import interpreted

    return interpreted()


# What would run


def backends() -> dict[str, dict[str, str]]:
    """By dtype, the backend that `auto` takes here, why, and its schedule for a loss with gradients."""
    import torch

    from exo_fast.backends import TRITON_INSTALLED, choose, scratch_budget

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name in DTYPES:
        hidden = torch.empty(0, 1, dtype=getattr(torch, name), device=device)
        backend = choose("auto", hidden)
        if device.type == "cpu":
            why = "no GPU"
        elif name == "float64":
            why = "kernels compute in float32"
        else:
            why = "a GPU, and Triton" if TRITON_INSTALLED else "a GPU, but Triton is not installed"
        found[name] = {"backend": backend, "why": why, "schedule": _schedule(backend, hidden)}
    for entry in found.values():
        entry["memory_budget"] = f"{scratch_budget(None, device) >> 20} MiB"
    return found


def _schedule(backend: str, hidden: Any) -> str:
    import torch

    if backend == "triton":
        from exo_fast.backends import triton

        if hidden.dtype in triton.KEPT:
            return "kept: one pass, U written once in bf16"
        passes = "two passes" if hidden.dtype == torch.float16 else "one pass"
        return f"chunked: {passes}, float32 logits of a chunk at a time"
    from exo_fast.backends import head_attention
    from exo_fast.backends.torch import storage
    from exo_fast.head import Head

    rows, width = head_attention.MIN_ROWS, head_attention.MAX_WIDTH
    like = hidden.new_empty(rows, width)
    kept = f"one pass, U kept in {str(storage(hidden)).removeprefix('torch.')}"
    if head_attention.applies(rows, like, Head(like, None, 1.0, None)):
        return f"head as attention, no logits (D ≤ {width}, {rows:,} rows or more); else {kept}"
    return kept


def abilities() -> dict[str, dict[str, Any]]:
    """What else there is: each with `there` (true, false), and `about` in words."""
    import torch
    import torch.distributed as dist

    cxx, header = compiler(), Path(sysconfig.get_path("include"), "Python.h").exists()
    gpu, talks = torch.cuda.is_available(), dist.is_available()
    flash = requirements.version("flash-attn")
    flex = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None and cxx is not None
    why_compile = [] if cxx else ["no C++ compiler (CXX, c++, g++, clang++)"]
    why_compile += [] if header else ["no Python.h: install the headers of this Python (python3-dev)"]
    found = {
        "interpreter": (_interpreted(), "TRITON_INTERPRET=1 runs kernels on the CPU, to debug them"),
        "torch.compile": (not why_compile, "; ".join(why_compile) or f"compiles with {cxx}"),
        "attention: sdpa": (True, "PyTorch's; the default"),
        "attention: flex": (flex, "through torch.compile" if flex else "needs torch.compile"),
        "attention: flash": (
            bool(flash and gpu),
            f"flash-attn {flash}" if flash and gpu else "needs a GPU and flash-attn: pip install 'exo_fast[flash]'",
        ),
        "distributed: gloo": (talks and dist.is_gloo_available(), "processes on CPUs"),
        "distributed: nccl": (talks and dist.is_nccl_available() and gpu, "processes on GPUs"),
    }
    return {name: {"there": bool(there), "about": about} for name, (there, about) in found.items()}


def compiler() -> str | None:
    """The C++ compiler that torch.compile and DeepSpeed would take; None where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def deepspeed_ops() -> dict[str, Any] | None:
    """Which of DeepSpeed's compiled operators are there, without compiling one; None without DeepSpeed.

    Training needs none of them but `--offload`, whose Adam runs on the CPU (cpu_adam).
    """
    try:
        distribution = metadata.distribution("deepspeed")
    except metadata.PackageNotFoundError:
        return None
    prebuilt = _installed_ops(Path(str(distribution.locate_file("deepspeed"))))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    compiled = sorted({path.parent.name for path in root.glob("**/*.so")}) if root.is_dir() else []
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    missing = [what for what, there in (("ninja", ninja), ("a C++ compiler", compiler())) if not there]
    return {"prebuilt": prebuilt, "compiled": compiled, "cannot_compile_without": missing}


def _installed_ops(folder: Path) -> list[str]:
    """What DeepSpeed's own record of its build names, read and not imported: importing DeepSpeed takes seconds."""
    try:
        tree = ast.parse((folder / "git_version_info_installed.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "installed_ops":
                return sorted(name for name, there in ast.literal_eval(node.value).items() if there)
    except (OSError, ValueError, SyntaxError, AttributeError):
        pass  # a build of another form
    return []


def disks() -> list[dict[str, Any]]:
    """Free space where exo_fast and Hugging Face keep downloads, and in this directory."""
    from exo_fast.training.downloads import cache_dir

    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    found = []
    for what, path in (("cache", cache_dir()), ("Hugging Face cache", hub), ("here", Path.cwd())):
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        found.append({"for": what, "path": str(path), "free_gb": round(shutil.disk_usage(there).free / 1e9, 1)})
    return found


def disk_problems(found: list[dict[str, Any]]) -> list[Problem]:
    """Places that are nearly full."""
    return [
        Problem(f"{disk['free_gb']} GB are free in {disk['path']}", "make room, or set EXO_FAST_CACHE or HF_HOME")
        for disk in found
        if disk["free_gb"] < MIN_FREE_GB
    ]


def variables() -> dict[str, str]:
    """The environment variables that decide something here, as they are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
