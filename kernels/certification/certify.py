"""Certification without a GPU: compiles every kernel for every target, dtype and configuration, reads the machine code,
and checks the documentation's claims about it.

A kernel module exports `configs` and `variants` (see `launch.py`); the module found here is the module the backend
launches. Claims, for each binary:

  compiles     the configuration compiles
  launch       Triton gives the arguments of a launch the same types and hints
  fits         shared memory (and tensor memory) of one program are within the target's limit
  spills       no register is spilled to memory and no thread has local memory, in any configuration; with the Tritons
               of SPILLED at most as many bytes
  products     every product of a variant with `products` uses the target's tensor-core instruction
  wide         in a `memory_bound` variant at least WIDE_SHARE of the bytes moved to and from device memory go in
               accesses of 128 bits or more, counted as width × instructions over its loops, or over all its code if
               no loop touches device memory, scalars (a row's target and statistics: one address) left out
  descriptors  a variant with `descriptors` loads through TMA if the target has it
  flattened    a variant with `flattened` has one loop: no barrier is initialised in it, and copies begin before it
  atomics      no atomic operation on device memory: the same input gives the same bits
  ordered      no loop loads from device memory what another thread of the program has stored

Each failure is one line: the binary, the finding, the requirement. The exit code is then 1.
"""

import argparse
import datetime
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# The default of launches today; Triton warns that it will change and asks for an explicit value.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from tqdm import tqdm
from triton import knobs

from exo_fast.kernels.certification import disassembly
from exo_fast.kernels.certification.ahead_of_time import source_of
from exo_fast.kernels.certification.occupancy import TENSOR_MEMORY, occupancy
from exo_fast.kernels.launch import Config, Variant
from exo_fast.kernels.targets import TARGETS, Target

DTYPES = ("bf16", "fp16", "fp32")
WIDE_SHARE = 0.9
TENSOR_CORES = {  # target -> the name of its products, in PTX or assembly and in the disassembly
    "sm_80": ("mma.sync", "HMMA"),
    "sm_90": ("wgmma", "HGMMA"),
    "sm_100": ("tcgen05", "UTC"),
    "sm_120": ("mma.sync", "HMMA"),
    "gfx942": ("MFMA", "v_mfma"),
    "gfx1100": ("WMMA", "v_wmma"),
}
OWN_OPERATION = {"sm_90": "warp_group_dot", "sm_100": "tc_gen5_mma"}  # names of products that replace Triton's `tt.dot`
# Older Tritons spill in some binaries: the bytes of local memory a thread that one may have, by target.
SPILLED = {
    "3.6": {"sm_80": 32, "sm_90": 8, "sm_100": 64, "sm_120": 24, "gfx942": 364, "gfx1100": 80},
    "3.8": {"sm_80": 16, "sm_100": 16, "sm_120": 16, "gfx1100": 160},
}
VERSION = ".".join(triton.__version__.split(".")[:2])
MARKERS = (f"<!-- written with Triton {VERSION} -->", f"<!-- end of what was written with Triton {VERSION} -->")
EXAMPLES = """examples:
  python -m exo_fast.kernels.certification                                    everything, into build/certification.json
  python -m exo_fast.kernels.certification --target sm_90 --kernel group_loss one kernel for one target
  python -m exo_fast.kernels.certification --kernel path/to/new_kernel.py     a kernel that is not in the package
  python -m exo_fast.kernels.certification --markdown docs/certification.md   also rewrite this Triton's table there
"""


class Job(NamedTuple):
    """One binary to make. It holds plain values, by which a worker process finds the kernel."""

    kernel: str  # name of a module of exo_fast.kernels, or the path of a Python file
    target: str
    dtype: str
    variant: int
    config: int
    buffers: bool  # AMD: tensors under 2 GiB, which Triton addresses with buffer instructions


@dataclass
class Row:
    """One binary: its identity, its measurements, its claims and the failed ones."""

    kernel: str
    variant: str
    target: str
    dtype: str
    config: str
    default: bool
    buffers: bool
    claims: list[str]
    failures: list[dict[str, str]] = field(default_factory=list)  # claim, found, needed
    num_warps: int = 0
    shared_memory: int = 0  # bytes of a program
    tensor_memory: int = 0  # columns of a program, sm_100
    code: disassembly.Code | None = None  # None if it did not compile
    programs: int = 0  # resident on one multiprocessor
    occupancy: float = 0.0
    occupancy_limit: str = ""

    def fail(self, claim: str, found: str, needed: str) -> None:
        self.failures.append({"claim": claim, "found": found, "needed": needed})

    def __str__(self) -> str:
        default = " (default)" if self.default else ""
        buffers = ", tensors under 2 GiB" if self.buffers else ""
        return f"{self.kernel}/{self.variant} {self.target} {self.dtype} {self.config}{default}{buffers}"


@functools.cache
def load(kernel: str) -> ModuleType:
    """Load a module of exo_fast.kernels by name, or any Python file by path."""
    if not kernel.endswith(".py"):
        return importlib.import_module(f"exo_fast.kernels.{kernel}")
    path = Path(kernel).resolve()
    spec = importlib.util.spec_from_file_location(f"exo_fast_certified_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def exports(module: ModuleType) -> bool:
    return hasattr(module, "configs") and hasattr(module, "variants")


def discover() -> list[str]:
    """Return the names of the kernel modules of exo_fast.kernels: they export `configs` and `variants`."""
    return [p.stem for p in sorted(Path(__file__).parents[1].glob("*.py")) if exports(load(p.stem))]


def space(module: ModuleType, variant: Variant, target: Target, dtype: str) -> list[Config]:
    """Return the configurations a variant may be launched with, default first."""
    return [variant.config] if variant.config else module.configs(target, dtype)


def jobs(kernels: Iterable[str], targets: Iterable[str]) -> list[Job]:
    """The binaries of these kernels: on AMD with tensors under 2 GiB, the default also with tensors of any size."""
    return [
        Job(kernel, target, dtype, variant, config, buffers)
        for kernel in kernels
        for target in targets
        for dtype in DTYPES
        for variant, launched in enumerate(load(kernel).variants(TARGETS[target], dtype))
        for config in range(len(space(load(kernel), launched, TARGETS[target], dtype)))
        for buffers in ((False,) if TARGETS[target].backend == "cuda" else (True,) if config else (True, False))
    ]


def described(job: Job) -> tuple[Row, Variant, Config]:
    """Return the row of a job, not yet measured, and the variant and configuration to compile."""
    module, target = load(job.kernel), TARGETS[job.target]
    variant = module.variants(target, job.dtype)[job.variant]
    config = space(module, variant, target, job.dtype)[job.config]
    claims = ["compiles", "launch", "fits", "spills", "atomics", "ordered"]
    claims += ["products"] * variant.products + ["wide"] * variant.memory_bound
    claims += ["descriptors"] * (variant.descriptors and target.descriptors)
    name, default = Path(job.kernel).stem, job.config == 0
    claims += ["flattened"] * variant.flattened
    row = Row(name, variant.name, job.target, job.dtype, str(config), default, job.buffers, claims)
    return row, variant, config


def measure(job: Job) -> Row:
    """Compile one binary and check it."""
    row, variant, config = described(job)
    target = TARGETS[job.target]
    try:
        source, differing = source_of(variant, config, target, job.buffers)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        compiled = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:  # any compiler error is the finding
        while error.__cause__:  # each function the kernel calls wraps the error once more
            error = error.__cause__
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
        message = " … ".join(dict.fromkeys((lines[0], lines[-1])))
        row.fail("compiles", f"{type(error).__name__}: {message}"[:400], "a binary")
        return row
    if differing:
        row.fail("launch", "; ".join(differing), "what a launch gives: change variants(), or annotate the argument")
    row.num_warps = compiled.metadata.num_warps
    row.shared_memory = compiled.metadata.shared
    row.tensor_memory = getattr(compiled.metadata, "tmem_size", 0)  # NVIDIA only
    if target.backend == "cuda":
        row.code = disassembly.nvidia(compiled.asm["cubin"], compiled.asm["ttgir"])
    else:
        row.code = disassembly.amd(compiled.asm["amdgcn"], compiled.asm["ttgir"])
    fill = occupancy(target, row.code.registers, row.shared_memory, row.num_warps, row.tensor_memory)
    row.programs, row.occupancy, row.occupancy_limit = fill.programs, fill.fraction, fill.limit
    for argument in disassembly.unordered(compiled.asm["ttgir"]):
        row.fail("ordered", f"{argument} is loaded in another layout than it is stored in", "one layout")
    check(row, disassembly.products_off_tensor_cores(compiled.asm["ttgir"], OWN_OPERATION.get(job.target)))
    return row


def check(row: Row, off_tensor_cores: int) -> None:
    """Record the failed claims of a compiled row."""
    code, target = row.code, TARGETS[row.target]
    if row.shared_memory > target.shared_memory:
        needed = f"at most {target.shared_memory}: prune it in configs()"
        row.fail("fits", f"{row.shared_memory} bytes of shared memory", needed)
    if row.tensor_memory > TENSOR_MEMORY:
        needed = f"at most {TENSOR_MEMORY}: prune it in configs()"
        row.fail("fits", f"{row.tensor_memory} columns of tensor memory", needed)
    allowed = SPILLED.get(VERSION, {}).get(row.target, 0)
    if code.local_memory > allowed or (not allowed and (code.local_accesses or code.spilled)):
        found = f"{code.local_memory} bytes of local memory a thread, {code.local_accesses} accesses to it"
        row.fail("spills", found, f"{allowed or 'none'}: a smaller tile or more warps")
    if code.atomics:
        row.fail("atomics", f"{code.atomics} atomic operations", "none: results must not depend on order")
    if "products" in row.claims:
        instruction, mnemonic = TENSOR_CORES[row.target]
        names = sorted(code.tensor_cores)
        if not names or not all(name.startswith(mnemonic) for name in names):
            row.fail("products", " ".join(names) or "no tensor-core instruction", f"{instruction} ({mnemonic})")
        elif off_tensor_cores:
            row.fail("products", f"{off_tensor_cores} products not by {instruction}", "none")
    if "wide" in row.claims and code.wide_share < WIDE_SHARE:
        widths = f"loads {code.loads}, stores {code.stores} (bits: instructions)"
        row.fail("wide", f"{code.wide_share:.0%} of bytes in 128-bit accesses, {widths}", f"{WIDE_SHARE:.0%}")
    if "descriptors" in row.claims and not code.tma:
        row.fail("descriptors", "no TMA load", "cp.async.bulk.tensor (UTMALDG)")
    if "flattened" in row.claims and (code.barriers_in_loops or not code.tma_ahead):
        found = f"{code.barriers_in_loops} barriers initialised in loops, {code.tma_ahead} copies before them"
        row.fail("flattened", found, "no barrier, and copies: a pipeline that is filled once")


def run(todo: list[Job], workers: int) -> list[Row]:
    """Return the rows of all jobs, in order. A job whose compiler ends its process becomes a row that says so."""
    rows: dict[Job, Row] = {}
    new_pool = functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    with tqdm(total=len(todo), unit=" binaries", smoothing=0.02, disable=None) as bar:
        with new_pool(workers) as pool:
            futures = {pool.submit(measure, job): job for job in todo}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    rows[futures[future]] = future.result()
                    bar.update()
        left = [job for job in todo if job not in rows]
        while left:  # the pool broke: one job at a time, in a new process after each crash, finds the culprit
            with new_pool(1) as pool:
                for job in left:
                    bar.update()
                    try:
                        rows[job] = pool.submit(measure, job).result()
                    except BrokenProcessPool:
                        rows[job], _, _ = described(job)
                        rows[job].fail("compiles", "the compiler ended its process", "a binary")
                        break
            left = [job for job in left if job not in rows]
    return [rows[job] for job in todo]


def table(rows: list[Row]) -> str:
    """Return Markdown: for each kernel and target the default configuration, worst over variants and dtypes."""
    lines = [
        "| kernel | target | binaries | registers | local memory | scalars in lanes "
        "| shared memory | tensor memory | occupancy | products | bytes in 128-bit accesses | TMA |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    for kernel, target in dict.fromkeys((row.kernel, row.target) for row in rows):
        every = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
        default = [row for row in every if row.default and row.code]
        tensor_memory = max((row.tensor_memory for row in default), default=0)
        shares = [row.code.wide_share for row in default if "wide" in row.claims]
        loading = [bool(row.code.tma) for row in default if "descriptors" in row.claims]
        cells = [
            kernel,
            target,
            str(len(every)),
            str(max((row.code.registers for row in default), default="")),
            str(max((row.code.local_memory for row in default), default="")),
            str(max((row.code.spilled_scalars for row in default), default="")) if target.startswith("gfx") else "",
            f"{max((row.shared_memory for row in default), default=0) / 1024:.1f} KiB",
            f"{tensor_memory} columns" if tensor_memory else "",
            f"{min((row.occupancy for row in default), default=0):.0%}",
            TENSOR_CORES[target][0] if any("products" in row.claims for row in default) else "",
            f"{min(shares):.0%}" if shares else "",
            ("yes" if all(loading) else "no") if loading else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Return Markdown: Triton's version, what was compiled, and every failed claim."""
    failures = [(row, failed) for row in rows for failed in row.failures]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"Triton {triton.__version__}, {today}: {len(rows):,} binaries, {len(failures)} claims failed."]
    if failures:
        lines.append("")
        lines += [f"- {failed['claim']}: {row}: {failed['found']}" for row, failed in failures]
    return "\n".join(lines)


def write_table(page: Path, text: str) -> None:
    """Put the text between the page's two markers of this Triton."""
    before, _, rest = page.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    page.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m exo_fast.kernels.certification",
        description="Compile every kernel for every target without a GPU, and check the machine code.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    several = {"action": "extend", "nargs": "+", "metavar": "NAME"}
    parser.add_argument("--target", choices=TARGETS, help=f"of {', '.join(TARGETS)} (default: all)", **several)
    parser.add_argument("--kernel", help="kernels of the package (default: all), or paths of Python files", **several)
    parser.add_argument("--jobs", type=int, default=cores, help="compilers side by side (default: %(default)s cores)")
    parser.add_argument("--output", type=Path, default=Path("build/certification.json"), help="default: %(default)s")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="rewrite the table between the page's markers")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1 is needed")
    if options.markdown and not all(marker in options.markdown.read_text() for marker in MARKERS):
        parser.error(f"--markdown {options.markdown}: the page needs the lines {MARKERS[0]} and {MARKERS[1]}")
    options.target = options.target or list(TARGETS)
    options.kernel = options.kernel or discover()
    for kernel in options.kernel:
        try:
            module = load(kernel)
        except (ModuleNotFoundError, FileNotFoundError):
            parser.error(f"--kernel {kernel}: there are {', '.join(discover())}; or give the path of a .py file")
        if not exports(module):
            parser.error(f"--kernel {kernel}: the module must export configs and variants (see kernels/launch.py)")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.time()
    rows = run(jobs(options.kernel, options.target), options.jobs)
    failures = [(row, failed) for row in rows for failed in row.failures]
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "triton": triton.__version__,
        "fp_fusion": os.environ["TRITON_DEFAULT_FP_FUSION"],
        "binaries": len(rows),
        "failures": len(failures),
        "rows": [asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1))
    text = table(rows)
    if options.markdown:
        write_table(options.markdown, f"{summary(rows)}\n\n{text}")
    print(text)
    for row, failed in failures:
        print(f"FAILED {failed['claim']}: {row}: found {failed['found']}; needed {failed['needed']}")
    print(
        f"{len(rows)} binaries of {len(options.kernel)} kernels for {len(options.target)} targets in "
        f"{time.time() - start:.0f} s: {len(failures)} claims failed. Rows: {options.output}"
    )
    return 1 if failures else 0
