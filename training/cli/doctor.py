"""`exo-fast doctor`: what is installed, what would run on this machine, and whether its numbers are right.

The numbers: a small fused loss and its gradients on every backend that runs here, against the definition
(`exo_fast.reference`) in float64 on the CPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from exo_fast.training.cli import inspection
from exo_fast.training.cli.inspection import Problem
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

# ‖error‖/‖truth‖ of loss and gradients that is rounding: 5 times what was measured, or more.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}
COLOURS = {"ok": "green", "missing": "yellow", "out of range": "red", "failed": "red"}


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast doctor`: only those of every command."""
    return argparse.ArgumentParser(
        prog="exo-fast doctor",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def main(argv: Sequence[str]) -> int:
    """Print the findings, and give them as the result; returns 0, or 1 where the core cannot work or is wrong."""
    parser().parse_args(argv)
    found = examine()
    print(text(found), flush=True)
    give_result(found)
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """All findings, as JSON can hold them. `ok`: torch can be imported and every check is within its limit."""
    packages = inspection.packages()
    problems = inspection.package_problems(packages)
    found: dict[str, Any] = {
        "exo_fast": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "variables": inspection.variables(),
        "deepspeed_ops": inspection.deepspeed_ops(),
        "disks": inspection.disks(),
    }
    problems += inspection.disk_problems(found["disks"])
    checks: list[dict[str, Any]] = []
    try:
        import torch  # noqa: F401  everything below needs it

        found["machine"] = inspection.machine()
        problems += inspection.machine_problems(found["machine"])
        found["abilities"] = inspection.abilities()
        found["backends"] = inspection.backends()
        checks = [check(backend, device, dtype) for backend, device, dtype in runnable()]
    except Exception as error:  # such as an ImportError of torch, or of a library that it needs
        what = f"{type(error).__name__}: {error}"
        problems.append(Problem(what.rstrip("."), "exo-fast doctor --debug shows where; reinstall what it names"))
    found["checks"] = checks
    found["problems"] = [asdict(problem) for problem in problems]
    found["ok"] = bool(checks) and all(entry["ok"] for entry in checks)
    return found


# The live check


def runnable() -> list[tuple[str, str, str]]:
    """(backend, device, dtype) of what can be checked here: what `auto` takes, and Triton's interpreter if it is on."""
    import torch

    from exo_fast.backends import TRITON_INSTALLED, choose, interpreted

    found = [("torch", "cpu", dtype) for dtype in LIMITS]
    if torch.cuda.is_available():
        like = {dtype: torch.empty(0, 1, dtype=getattr(torch, dtype), device="cuda") for dtype in LIMITS}
        found += [(choose("auto", hidden), "cuda", dtype) for dtype, hidden in like.items()]
    elif TRITON_INSTALLED and interpreted():
        found += [("triton", "cpu", dtype) for dtype in LIMITS if dtype != "float64"]
    return found


def check(backend: str, device: str, dtype: str) -> dict[str, Any]:
    """A fused exo-rw loss and its gradients beside the definition: relative errors, their limit, seconds, and ok.

    An exception is a finding too: then there are no errors, and `failed` says what it was.
    """
    import torch

    from exo_fast import reference
    from exo_fast.loss import linear_group_loss

    begun = time.perf_counter()
    row: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "limit": LIMITS[dtype]}
    # Enough rows for every schedule, and in the interpreter, which is slow, a few.
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
        with warnings.catch_warnings():  # the interpreter's numpy, of infinities that are meant
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime")
            value, _ = linear_group_loss(*ours, *here, backend=backend, **loss)
        value.backward()
        pairs = {"loss": (value, expected), "dH": (ours[0].grad, truth[0].grad), "dW": (ours[1].grad, truth[1].grad)}
        row["errors"] = {name: _error(got, want) for name, (got, want) in pairs.items()}
        row["ok"] = all(error <= row["limit"] for error in row["errors"].values())  # not so of one that is not a number
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
    """The findings for people, painted where stdout is a terminal."""
    lines = [f"exo_fast {found['exo_fast']}, Python {found['python']}", *_package_lines(found["packages"])]
    if "machine" in found:
        lines += [*_machine_lines(found), *_backend_lines(found["backends"]), *_ability_lines(found)]
    lines += ["", "disk"]
    lines += [f"  {disk['for']:<20}{disk['free_gb']:>8,.1f} GB free in {disk['path']}" for disk in found["disks"]]
    if found["variables"]:
        lines += ["", "environment", *(f"  {name}={value}" for name, value in found["variables"].items())]
    lines += _check_lines(found["checks"])
    if found["problems"]:
        lines += ["", "problems"]
        for problem in found["problems"]:
            lines += [f"  {_painted('!', 'red')} {problem['what']}", f"      {problem['fix']}"]
    commands = _commands(found["packages"], gpu=bool(found.get("machine", {}).get("gpus")))
    if commands:
        lines += ["", "to add what is missing", *(f"  {command}  # {what}" for command, what in commands.items())]
    verdict = "the core works here" if found["ok"] else "the core does not work here"
    return "\n".join([*lines, "", _painted(verdict, "green" if found["ok"] else "red")])


def _package_lines(packages: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "packages"]
    for row in packages:
        state = _painted(row["state"], COLOURS[row["state"]])
        lines.append(f"  {row['name']:<20}{row['version'] or '–':<16}{row['needed']:<16}{row['for']:<8}{state}")
    return lines


def _machine_lines(found: dict[str, Any]) -> list[str]:
    about = found["machine"]
    fast = ", ".join(about["features"]) or "no AVX2"
    lines = ["", "machine", f"  {about['system']}; torch is built for {about['torch_built_for']}"]
    cores = f"{about['cores']} cores, {about['threads']} threads"
    lines.append(f"  {about['cpu']}, {cores}, {about['memory_gb']} GB; {fast}")
    lines += [f"  {gpu['name']}, {gpu['memory_gb']} GB, {gpu['capability']}" for gpu in about["gpus"]] or ["  no GPU"]
    return lines


def _backend_lines(backends: dict[str, dict[str, str]]) -> list[str]:
    lines = ["", "what runs (backend='auto')"]
    lines += [f"  {name:<10}{row['backend']:<8}{row['why']}; {row['schedule']}" for name, row in backends.items()]
    return [*lines, f"  scratch: {next(iter(backends.values()))['memory_budget']}"]


def _ability_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "what else there is"]
    for name, row in found["abilities"].items():
        lines.append(f"  {name:<20}{'yes' if row['there'] else 'no':<5}{row['about']}")
    ops = found["deepspeed_ops"]
    if ops is not None:
        there = [*ops["prebuilt"], *(f"{name} (compiled before)" for name in ops["compiled"])]
        needs = ops["cannot_compile_without"]
        more = f"; no other compiles without {' and '.join(needs)}" if needs else "; others compile at first use"
        lines.append(f"  {'DeepSpeed ops':<25}{', '.join(there) or 'none is compiled'}{more}; --offload needs cpu_adam")
    return lines


def _check_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "live check: ‖error‖/‖truth‖ of an exo-rw loss and its gradients, against float64"]
    for row in checks:
        numbers = row.get("failed") or ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        state = "ok" if row["ok"] else "failed"
        where = f"{row['backend']} on {row['device']}"
        limit = f"(limit {row['limit']:.0e})"
        lines.append(f"  {where:<16}{row['dtype']:<10}{_painted(state, COLOURS[state])}  {numbers} {limit}")
    return lines if checks else []


def _commands(packages: Sequence[dict[str, Any]], *, gpu: bool) -> dict[str, str]:
    """What each command adds; flash-attn is for a GPU, and cannot be built without one."""
    found: dict[str, list[str]] = {}
    for row in packages:
        if row["state"] == "missing" and (gpu or row["name"] != "flash-attn"):
            found.setdefault(row["command"], []).append(row["name"])
    return {command: ", ".join(names) for command, names in found.items()}


def _painted(text: str, colour: str) -> str:
    return paint(text, colour, sys.stdout)
