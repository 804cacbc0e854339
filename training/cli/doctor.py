"""`exo-fast doctor`: the installed packages, the backends of this machine, and whether its numbers are right.

Versions come from metadata, so it works even if a package is missing or broken. The numbers are a small fused loss and
its gradients on every backend that runs here, compared with the definition (`exo_fast.reference`) in float64.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from exo_fast.training import machine
from exo_fast.training.cli import installed
from exo_fast.training.terminal import give_result, paint
from exo_fast.version import __version__

DESCRIPTION = """\
Say what is installed, what would run on this machine and why, and what is missing with the command that adds it; then
compute a small loss and its gradients on every backend that runs here and hold them to the definition in float64.

Exit status 0 when what the core needs is there and right, 1 otherwise. Nothing is downloaded, compiled or changed."""

EXAMPLES = """\
examples:
  exo-fast doctor
  exo-fast doctor --json | jq .backends          # the same as one JSON object
  TRITON_INTERPRET=1 exo-fast doctor             # without a GPU: the Triton kernels too, in the interpreter
"""

OPTIONAL = ("trl", "liger-kernel", "cut-cross-entropy", "flash-attn")
# Largest ‖error‖/‖truth‖ of loss and gradients that counts as rounding: at least 5 times the measured one.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}
MIN_CAPABILITY = (8, 0)  # of NVIDIA GPUs: the first with bf16 products, and the oldest that kernels are certified for
COLOURS = {"ok": "green", "missing": "yellow", "out of range": "red", "failed": "red"}


def parser() -> argparse.ArgumentParser:
    """Return the options of `exo-fast doctor`: only the common ones of every command."""
    return argparse.ArgumentParser(
        prog="exo-fast doctor",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def main(argv: Sequence[str]) -> int:
    """Print the findings, and give them as the result. Returns 0, or 1 if the core cannot work or is wrong."""
    parser().parse_args(argv)
    found = examine()
    print(text(found), flush=True)
    give_result(found)
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Return all findings, as JSON can hold them. `ok`: torch can be imported and every check is within its limit."""
    found: dict[str, Any] = {"exo_fast": __version__, "python": platform.python_version(), "packages": packages()}
    problems = package_problems(found["packages"])
    checks: list[dict[str, Any]] = []
    try:
        found["machine"] = hardware()
        problems += hardware_problems(found["machine"])
        found["backends"] = backends()
        checks = [check(backend, device, dtype) for backend, device, dtype in runnable()]
    except Exception as error:  # such as an ImportError of torch, or of a library that it needs
        what = f"{type(error).__name__}: {error}"
        problems.append(_problem(what.rstrip("."), "exo-fast doctor --debug shows where; reinstall what it names"))
    return found | {
        "checks": checks,
        "problems": problems,
        "ok": bool(checks) and all(entry["ok"] for entry in checks),
    }


def _problem(what: str, fix: str) -> dict[str, str]:
    """Return a problem, and the command or the change that fixes it."""
    return {"what": what, "fix": fix}


# Packages


def packages() -> list[dict[str, Any]]:
    """Return each package's name, version, needed range, who needs it (core, or an extra), state and pip command."""
    needs = [need for need in installed.needs("exo_fast") if need.extra in (None, "train")]
    needs += [need for need in map(installed.own_need, OPTIONAL) if need is not None]
    return [_package(need) for need in needs]


def _package(need: installed.Need) -> dict[str, Any]:
    version, command = machine.version(need.name), None
    state = "missing" if version is None else "ok" if installed.fits(version, need.specifier) else "out of range"
    if state == "missing":
        command = installed.command_for(need.name)
    elif state == "out of range":
        command = f"pip install '{need.name}{need.specifier}'"
    about = {"name": need.name, "version": version, "needed": need.specifier, "for": need.extra or "core"}
    return about | {"state": state, "command": command}


def package_problems(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the packages outside the ranges of exo_fast or of one another, and the core's missing packages."""
    found = []
    for row in rows:
        name, version = row["name"], row["version"]
        if row["state"] == "out of range":
            found.append(_problem(f"{name} {version} is installed, and {row['needed']} is needed", row["command"]))
        if row["state"] == "missing" and row["for"] == "core":
            found.append(_problem(f"{name} is not installed, and nothing runs without it", row["command"]))
        for need in installed.needs(name) if version else ():
            there = machine.version(need.name)
            if need.extra is None and (there is None or not installed.fits(there, need.specifier)):
                wanted = f"{need.name}{need.specifier}"
                what = f"{there} is installed" if there else "it is not installed"
                found.append(_problem(f"{name} {version} needs {wanted}, and {what}", f"pip install '{wanted}'"))
    own = machine.version("exo_fast")
    if own != __version__:
        what = f"the code is exo_fast {__version__}, and what is installed says {own}: ranges may be old"
        found.append(_problem(what, "pip install it again (in a checkout: pip install -e .)"))
    elif not installed.fits(platform.python_version(), metadata.metadata("exo_fast").get("Requires-Python") or ""):
        what = f"Python {platform.python_version()} is not one exo_fast is made for"
        found.append(_problem(what, "use a newer one"))
    return found


# The machine, and the backends that would run on it


def hardware() -> dict[str, Any]:
    """Return CPU, memory, threads, GPUs and the targets of torch's build. Needs torch."""
    import torch

    about = machine.describe()["machine"]
    found = {name: about[name] for name in ("system", "cpu", "cores", "threads", "memory_gb")}
    found["gpus"] = []
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        capability = getattr(gpu, "gcnArchName", None) if torch.version.hip else f"{gpu.major}.{gpu.minor}"
        memory = round(gpu.total_memory / 1e9, 1)
        found["gpus"].append({"name": gpu.name, "memory_gb": memory, "capability": capability})
    cuda, rocm = torch.version.cuda, torch.version.hip
    found["torch_built_for"] = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"
    return found


def hardware_problems(found: dict[str, Any]) -> list[dict[str, str]]:
    """Return the GPUs that torch cannot use, or only in part."""
    from exo_fast.backends import interpreted

    built_for, problems = found["torch_built_for"], []
    driver = Path("/proc/driver/nvidia/version").exists()
    if built_for == "CPU" and driver:
        what = "there is an NVIDIA driver, but torch is a CPU build"
        problems.append(_problem(what, "install a build of torch for CUDA"))
    if built_for.startswith("CUDA") and driver and not found["gpus"]:
        what = f"torch is built for {built_for}, and sees no GPU, but there is a driver"
        problems.append(_problem(what, "check CUDA_VISIBLE_DEVICES, and that the driver is new enough (nvidia-smi)"))
    for gpu in found["gpus"] if built_for.startswith("CUDA") else ():
        if tuple(map(int, gpu["capability"].split("."))) < MIN_CAPABILITY:
            what = f"{gpu['name']} has compute capability {gpu['capability']}; kernels are certified from 8.0 on"
            problems.append(_problem(what, "train in float32, or take a newer GPU"))
    if found["gpus"] and interpreted():
        problems.append(_problem("TRITON_INTERPRET is set: kernels do not run on the GPU", "unset TRITON_INTERPRET"))
    return problems


def backends() -> dict[str, dict[str, str]]:
    """Return for each dtype the backend that `auto` takes here, and why."""
    import torch

    from exo_fast.backends import TRITON_INSTALLED, choose

    gpu = torch.cuda.is_available()
    found = {}
    for name in LIMITS:
        why = "a GPU, and Triton" if TRITON_INSTALLED else "a GPU, but Triton is not installed"
        why = "no GPU" if not gpu else "kernels compute in float32" if name == "float64" else why
        like = torch.empty(0, 1, dtype=getattr(torch, name), device="cuda" if gpu else "cpu")
        found[name] = {"backend": choose("auto", like), "why": why}
    return found


# The live check


def runnable() -> list[tuple[str, str, str]]:
    """Return (backend, device, dtype) of all that can be checked here: torch on the CPU, what `auto` takes on a GPU,
    and the Triton kernels in the interpreter if it is on."""
    import torch

    from exo_fast.backends import TRITON_INSTALLED, interpreted

    found = [("torch", "cpu", dtype) for dtype in LIMITS]
    if torch.cuda.is_available():
        found += [(row["backend"], "cuda", dtype) for dtype, row in backends().items()]
    elif TRITON_INSTALLED and interpreted():
        found += [("triton", "cpu", dtype) for dtype in LIMITS if dtype != "float64"]
    return found


def check(backend: str, device: str, dtype: str) -> dict[str, Any]:
    """Compare a fused exo-rw loss and its gradients with the definition: relative errors, their limit, seconds, and ok.

    An exception is a finding too: then there are no errors, and `failed` names it.
    """
    import torch

    from exo_fast import reference
    from exo_fast.loss import linear_group_loss

    begun = time.perf_counter()
    row: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "limit": LIMITS[dtype]}
    # Enough rows for every schedule. The interpreter is slow and gets only a few.
    interpreted = backend == "triton" and device == "cpu"
    groups, candidates, tokens, width, vocab = (1, 2, 12, 32, 160) if interpreted else (8, 4, 32, 64, 640)
    generator = torch.Generator().manual_seed(0)
    rows = groups * candidates * tokens
    hidden = torch.randn(rows, width, generator=generator).to(getattr(torch, dtype))
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(getattr(torch, dtype))
    targets = torch.randint(vocab, (rows,), generator=generator)
    boundaries = torch.arange(0, rows + 1, tokens)
    rewards = torch.rand(groups, candidates, generator=generator)
    truth = [tensor.double().clone().requires_grad_() for tensor in (hidden, weight)]
    with torch.no_grad():  # a reference near the policy, as it is in training
        logps = reference.sequence_logps(reference.linear_logprobs(*truth, targets), boundaries)
        ref_logps = (logps.view(groups, candidates) + torch.randn(groups, candidates, generator=generator)).float()
    given = (targets, boundaries, ref_logps, rewards)
    loss = {"loss_type": "exo-rw", "beta_pi": 0.1, "beta_r": 0.1}
    expected, _ = reference.linear_group_loss(*truth, *given, **loss)
    expected.backward()
    try:
        ours = [tensor.to(device).clone().requires_grad_() for tensor in (hidden, weight)]
        here = (targets.to(device), boundaries, ref_logps.to(device), rewards.to(device))
        with warnings.catch_warnings():  # the interpreter's numpy warns of intended infinities
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
            value, _ = linear_group_loss(*ours, *here, backend=backend, **loss)
        value.backward()
        pairs = {"loss": (value, expected), "dH": (ours[0].grad, truth[0].grad), "dW": (ours[1].grad, truth[1].grad)}
        row["errors"] = {name: _error(got, want) for name, (got, want) in pairs.items()}
        row["ok"] = all(error <= row["limit"] for error in row["errors"].values())  # False for NaN
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
        row["ok"] = False
    row["seconds"] = round(time.perf_counter() - begun, 3)
    return row


def _error(got: Any, want: Any) -> float:
    difference = got.detach().double().cpu() - want.detach()
    return float(difference.norm() / want.detach().norm())


# In words


def text(found: dict[str, Any]) -> str:
    """Return the findings for people, in colour if stdout is a terminal."""
    lines = [f"exo_fast {found['exo_fast']}, Python {found['python']}", "", "packages"]
    for row in found["packages"]:
        columns = f"  {row['name']:<20}{row['version'] or '–':<16}{row['needed']:<16}{row['for']:<8}"
        lines.append(columns + _painted(row["state"], COLOURS[row["state"]]))
    about = found.get("machine", {"gpus": []})
    if "backends" in found:
        lines += ["", "machine", f"  {about['system']}; torch is built for {about['torch_built_for']}"]
        lines.append(f"  {about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['memory_gb']} GB")
        gpus = [f"  {gpu['name']}, {gpu['memory_gb']} GB, {gpu['capability']}" for gpu in about["gpus"]]
        lines += [*(gpus or ["  no GPU"]), "", "what runs (backend='auto')"]
        lines += [f"  {dtype:<10}{row['backend']:<8}{row['why']}" for dtype, row in found["backends"].items()]
    if found["checks"]:
        lines += ["", "live check: ‖error‖/‖truth‖ of an exo-rw loss and its gradients, against float64"]
    for row in found["checks"]:
        numbers = row.get("failed") or ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        state = "ok" if row["ok"] else "failed"
        where = f"  {row['backend'] + ' on ' + row['device']:<16}{row['dtype']:<10}"
        lines.append(f"{where}{_painted(state, COLOURS[state])}  {numbers} (limit {row['limit']:.0e})")
    lines += ["", "problems"] if found["problems"] else []
    for problem in found["problems"]:
        lines += [f"  {_painted('!', 'red')} {problem['what']}", f"      {problem['fix']}"]
    commands: dict[str, list[str]] = {}
    for row in found["packages"]:
        if row["state"] == "missing" and (about["gpus"] or row["name"] != "flash-attn"):  # which needs a GPU to build
            commands.setdefault(row["command"], []).append(row["name"])
    lines += ["", "to add what is missing"] if commands else []
    lines += [f"  {command}  # {', '.join(names)}" for command, names in commands.items()]
    verdict = "the core works here" if found["ok"] else "the core does not work here"
    return "\n".join([*lines, "", _painted(verdict, "green" if found["ok"] else "red")])


def _painted(text: str, colour: str) -> str:
    return paint(text, colour, sys.stdout)
