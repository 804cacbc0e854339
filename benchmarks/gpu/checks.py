"""The steps that say what the card is and whether the numbers are right: machine, slope, tests, sanitizer."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import importlib.util
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_fast import ops
from exo_fast.backends import products
from exo_fast.benchmarks.gpu.plan import GIB, Cases, Run, Unavailable
from exo_fast.benchmarks.methods import problems
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.statistics import linear_logprobs_with_statistics
from exo_fast.training import machine as here

PEERS = ("cut-cross-entropy", "liger_kernel", "quack-kernels", "nvidia-cutlass-dsl")
CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
HALF = ("bf16", "fp16")
LOGIT_STD = 2.0
PRODUCT_LIMIT = 1e-5  # relative, of a product with float32 sums; one that is rounded to half precision is 2e-3 off
ALONE = "llama or peak_memory or offsets_past"  # the 4,096-wide tests, and those that count or fill the memory
LAST_WORDS = 300
SCHEDULES = ("kept", "chunked", "two-pass", "fused", "statistics")
PARTS = ("exo_fast.integrations.transformers", "exo_fast.integrations.trl", "exo_fast.training.stages.align")
NOTHING_COLLECTED = 5  # pytest's exit status


# Step 1.


def machine(run: Run) -> Cases:
    """The versions and the clocks, and the rates that everything else is a share of."""
    yield "versions", functools.partial(versions, run)
    yield "copy", lambda: {"gbps": copy_gbps(run)}
    size = run.plan.square
    yield f"product/bf16/{size}", functools.partial(square_product, run, None)
    yield f"product/bf16 to float32/{size}", functools.partial(square_product, run, torch.float32)
    for precision in HALF:
        yield f"asked/{precision}", functools.partial(asked_products, run, precision)
    for part in PARTS:
        yield f"import/{part}", functools.partial(imported, part)
    yield "doctor", checked_by_doctor


def versions(run: Run) -> dict:
    """Return versions, the card's properties, and its clocks as nvidia-smi gives them."""
    found: dict[str, Any] = here.describe()
    found["versions"] |= {name: version for name in PEERS if (version := here.version(name))}
    found["target"] = run.target.name
    found["built_for"] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": card.name, "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count, "memory_gb": round(card.total_memory / 1e9, 1),
            "free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
        }  # fmt: skip
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "-i", "0"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            found["clocks"] = dict(zip(CLOCKS.split(","), (part.strip() for part in said.split(",")), strict=False))
        except (OSError, subprocess.SubprocessError) as error:
            found["clocks"] = f"nvidia-smi does not say: {error}"
    return found


def copy_gbps(run: Run) -> float:
    if run.dry:
        problems.COPY_BYTES = 2**20
    return problems.copy_gbps()


def square_product(run: Run, out_dtype: torch.dtype | None) -> dict:
    """Time the product of two square bf16 matrices, into bf16 or into float32: the rate that a floor is made of."""
    from exo_fast.benchmarks.gpu.times import timed

    size = run.plan.square
    a, b = (torch.randn(size, size, device=run.plan.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, device=run.plan.device, dtype=out_dtype or torch.bfloat16)
    found = timed(lambda: torch.mm(a, b, out=out) if out_dtype is None else products.matmul(a, b, out))
    return {**found, "tflops": round(2 * size**3 / found["seconds"] / 1e12, 3)}


def asked_products(run: Run, precision: str) -> dict:
    """Compare both products with float64, and say by which way each is made."""
    dtype, device = problems.PRECISIONS[precision], torch.device(run.plan.device)
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(*shape, generator=g, device=device).to(dtype) for shape in ((200, 384), (384, 328)))
    start = torch.randn(200, 328, generator=g, device=device)
    exact = a.double() @ b.double()
    made = products.matmul(a, b, torch.empty_like(start))
    added = products.add_matmul(start.clone(), a, b)
    errors = {"matmul": relative(made, exact), "add_matmul": relative(added, exact + start.double())}
    library = sorted(products.library_products(device, dtype))
    return {"errors": errors, "by_the_library": library, "wrong": max(errors.values()) > PRODUCT_LIMIT}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def imported(part: str) -> dict:
    """Import a part of exo_fast that needs other packages. A missing package or another version is reported, and is no
    fault of the kernels."""
    try:
        importlib.import_module(part)
    except ImportError as error:
        raise Unavailable(f"it does not load here: {error}") from error
    return {}


def checked_by_doctor() -> dict:
    """Return the largest errors of the live check of `exo-fast doctor`, by backend, device and dtype."""
    from exo_fast.training.cli import doctor

    rows = [doctor.check(*where) for where in doctor.runnable()]
    for row in rows:
        if "failed" in row:
            raise RuntimeError(f"{row['backend']} on {row['device']}, {row['dtype']}: {row['failed']}")
    errors = {f"{row['backend']} {row['dtype']}": max(row["errors"].values()) for row in rows}
    return {"errors": errors, "wrong": not all(row["ok"] for row in rows)}


# Step 2.


def slope(run: Run) -> Cases:
    """The error of a logit over D, by the kernel and by the library, and how it grows.

    Tensor cores cut their float32 sums off and do not round them, so errors grow with the length of a sum and have a
    mean. The tests' limits are made of these numbers, so they are measured before any test is read.
    """
    for precision in (*HALF, "fp32"):
        for width in run.plan.widths:
            yield f"{precision}/D{width}", functools.partial(logit_errors, run, precision, width)
        yield f"{precision}/slope", functools.partial(growth, run, precision)


def logit_errors(run: Run, precision: str, width: int) -> dict:
    """Return root mean square and mean of the errors of target logits and log-probs, in nats, against float64."""
    plan, dtype = run.plan, problems.PRECISIONS[precision]
    g = torch.Generator(plan.device).manual_seed(width)
    hidden = torch.randn(plan.rows, width, generator=g, device=plan.device).to(dtype)
    weight = torch.randn(plan.vocab, width, generator=g, device=plan.device)
    weight = (weight * (LOGIT_STD / math.sqrt(width))).to(dtype)
    targets = torch.randint(plan.vocab, (plan.rows,), generator=g, device=plan.device)
    logits = hidden.double() @ weight.double().T
    exact = logits.gather(1, targets[:, None]).squeeze(1)
    logps, stats, _ = ops.linear_logprobs(hidden, weight, None, targets, 1.0, None, None, False, "triton")
    found = {"D": width, "logit": moments(stats[2], exact), "log-prob": moments(logps, exact - logits.logsumexp(1))}
    library = products.matmul(hidden, weight.T, torch.empty(logits.shape, device=plan.device))
    return found | {"library": moments(library, logits)}


def moments(got: Tensor, want: Tensor) -> dict:
    difference = got.double() - want
    return {"rms": difference.square().mean().sqrt().item(), "mean": difference.mean().item()}


def growth(run: Run, precision: str) -> dict:
    """Return the exponent a of error ∝ D^a, by least squares over the widths, for each way that a logit is made."""
    rows = [row for name, row in run.rows.items() if name.startswith(f"{precision}/D") and "logit" in row]
    if len(rows) < 2:
        raise Unavailable("fewer than two widths were measured")
    found = {}
    for way in ("logit", "log-prob", "library"):
        points = [(math.log(row["D"]), math.log(max(row[way]["rms"], 1e-30))) for row in rows]
        x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
        found[way] = sum((p - x) * (q - y) for p, q in points) / sum((p - x) ** 2 for p, _ in points)
    return {"exponents": found, "largest": max(row["log-prob"]["rms"] for row in rows)}


# Step 3.


def tests(run: Run) -> Cases:
    """tests/gpu: compile kernels in processes, then run tests side by side, then those that need all of the card."""
    folder = here.REPOSITORY / "tests" / "gpu"
    if not folder.is_dir():
        raise Unavailable("tests/gpu is in a checkout only, and exo_fast is installed")
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed: pip install pytest pytest-xdist")
    begun = time.monotonic()

    def left(share: float) -> float:
        return share * run.seconds - (time.monotonic() - begun)

    yield "compile", lambda: compiled(run, left(0.4))
    yield "together", lambda: run_tests(run, folder, f"not ({ALONE})", "tests-together.xml", left(0.75), together=True)
    yield "alone", lambda: run_tests(run, folder, ALONE, "tests-alone.xml", left(0.95), together=False)


def compiled(run: Run, seconds: float) -> dict:
    """Compile the kernels' binaries of this target into Triton's cache, in as many processes as there are cores; in a
    dry run one binary."""
    from exo_fast.kernels.certification import certify

    todo, cores = certify.jobs(certify.discover(), [run.target.name]), len(os.sched_getaffinity(0))
    if run.dry:
        todo, cores = certify.jobs(["group_loss"], [run.target.name])[:1], 1
        os.environ.pop("TRITON_INTERPRET", None)  # for the new process: the interpreter compiles nothing
    todo.sort(key=lambda job: job.config)  # the defaults first, in case the time does not reach the others
    until, found = time.monotonic() + seconds, {"binaries": len(todo), "compiled": 0, "refused": 0}
    pool = concurrent.futures.ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))
    waiting = [pool.submit(compile_one, job) for job in todo]
    try:
        for done in concurrent.futures.as_completed(waiting, timeout=max(1.0, until - time.monotonic())):
            found["refused" if done.exception() else "compiled"] += 1
    except TimeoutError:
        pass
    for process in list((pool._processes or {}).values()):  # else they would be waited for
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    if run.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    return {**found, "processes": cores}


def compile_one(job: Any) -> None:
    """Compile one binary as its launch would; a launch then finds it in the cache."""
    import triton

    from exo_fast.kernels.certification import certify
    from exo_fast.kernels.certification.ahead_of_time import source_of
    from exo_fast.kernels.targets import TARGETS

    _, variant, config = certify.described(job)
    source, _ = source_of(variant, config, TARGETS[job.target], job.buffers)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    triton.compile(source, target=TARGETS[job.target].gpu, options=options)


class Watch:
    """A plugin of pytest: it counts, keeps the failures, and ends the session when the time is up, so that the JUnit
    file is still written."""

    def __init__(self, seconds: float):
        self.until = time.monotonic() + seconds
        counts = dict.fromkeys(("tests_passed", "tests_failed", "tests_skipped"), 0)
        self.found: dict[str, Any] = {**counts, "failures": [], "time_was_up": False}
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[f"tests_{report.outcome}"] += 1
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            words = " ".join(line[1:].strip() for line in lines[:3]) or str(report.longrepr)[-LAST_WORDS:]
            self.found["failures"].append({"test": report.nodeid, "words": words[:LAST_WORDS]})
            print(f"FAILED {report.nodeid}: {words[:LAST_WORDS]}", flush=True)
        if time.monotonic() > self.until:
            self.found["time_was_up"] = True
            for session in (self.session, self.session.config.pluginmanager.getplugin("dsession")):  # xdist's own
                if session is not None:
                    session.shouldstop = "the time of this step is up"


def run_tests(run: Run, folder: Path, chosen: str, junit: str, seconds: float, *, together: bool) -> dict:
    """Run a part of tests/gpu in this process, or with pytest-xdist in one for every core. No failure stops it."""
    import pytest

    if seconds <= 0:
        raise Unavailable("compilation took the time")
    if run.plan.tests:
        chosen = f"({chosen}) and ({run.plan.tests})"
    watch, root = Watch(seconds), folder.parents[1]
    arguments = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), str(folder), "-k", chosen, "-q"]
    arguments += ["-p", "no:cacheprovider", "--junitxml", str(run.output_dir / junit), "-W", "ignore"]
    if together and not run.dry and importlib.util.find_spec("xdist") is not None:
        # A test at a time: a process finishes the tests it has before it stops.
        arguments += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "load", "--maxschedchunk", "1"]
    status = int(pytest.main(arguments, plugins=[watch]))
    if status > 1 and status != NOTHING_COLLECTED and not watch.found["time_was_up"]:
        raise RuntimeError(f"pytest ended with status {status}; log.txt has its words")
    return {**watch.found, "junit": junit, "wrong": bool(watch.found["tests_failed"])}


# Step 6.


def sanitizer(run: Run) -> Cases:
    """compute-sanitizer on one tiny step of each schedule, and its search for races in the fused backward pass."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and (Path("/usr/local/cuda/bin") / "compute-sanitizer").exists():
        tool = "/usr/local/cuda/bin/compute-sanitizer"
    if tool is None and not run.dry:
        raise Unavailable("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    yield "memcheck", functools.partial(sanitized, run, tool, "memcheck", SCHEDULES)
    yield "racecheck", functools.partial(sanitized, run, tool, "racecheck", ("fused",))


def sanitized(run: Run, tool: str | None, check: str, schedules: tuple[str, ...]) -> dict:
    """Run schedules in one process under a tool of compute-sanitizer; in a dry run in this process and without it."""
    if run.dry:
        for schedule in schedules:
            tiny(schedule, run.plan.device)
        return {"summary": "not in a dry run"}
    code = f"from exo_fast.benchmarks.gpu.checks import tiny\nfor name in {schedules!r}: tiny(name, 'cuda')"
    command = [str(tool), "--tool", check, "--error-exitcode", "99", sys.executable, "-c", code]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = (done.stdout + done.stderr).strip().splitlines()
    print("\n".join(said[-200:]), flush=True)
    summary = next((line for line in reversed(said) if "SUMMARY" in line), said[-1] if said else "")
    return {"status": done.returncode, "summary": summary.strip("= "), "wrong": done.returncode != 0}


def tiny(schedule: str, device: str) -> None:
    """Run one step of a schedule on a few rows whose number is no multiple of a block."""
    print(f"schedule {schedule}", flush=True)  # so that a finding has its place
    dtype = torch.float32 if schedule == "chunked" else torch.bfloat16
    rows, width, vocab = (14, 32, 77) if device == "cpu" else (86, 64, 517)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=g).to(device, dtype).requires_grad_() for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,), generator=g).to(device)
    if schedule == "statistics":
        linear_logprobs_with_statistics(hidden.detach(), weight.detach(), targets, backend="triton")
    elif schedule == "two-pass":
        linear_logprobs(hidden, weight, targets, backend="triton").sum().backward()
    else:
        boundaries, rewards = torch.tensor([0, rows // 2, rows]), torch.tensor([[0.0, 1.0]], device=device)
        budget = 1 if schedule == "fused" else GIB
        loss, _ = linear_group_loss(
            hidden, weight, targets, boundaries, torch.zeros(1, 2, device=device), rewards, loss_type="exo-rw",
            memory_budget=budget, backend="triton",
        )  # fmt: skip
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
