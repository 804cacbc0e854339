"""The operation alone: hidden states and head to the loss, dH and dW, ours against the methods of `peers`.

    exo-fast bench op                               all cases
    exo-fast bench op --only op/exo_fast/576x49152  some of them

A case is a method on a problem (`problems`): a head of a real model, a dtype, N rows in groups of K completions of 64
tokens, and the work: forward only, with a frozen head (dH), or both gradients. `exo_fast` in a case of per-token
log-probs is `linear_logprobs`, in a case of the group loss `linear_group_loss`. In the cases of two completions of
thousands of tokens, a group's rows do not fit the memory budget together.

Each row has the time and, from the same process, the errors against float64 and the floor, the time of the products
alone (`baseline_seconds`). `share` is floor over time. `peak_mb` is the peak memory above the memory held before the
call; `scratch_mb` is `peak_mb` less the results of any method, dH and a float32 dW.

On a GPU the cases are different (`gpu_cases`): every method that exo_fast is compared with there, at more rows; and
the memory-bound kernels alone (operation `kernel`), whose floor is a copy of the bytes that they must move.

A CPU does not run all cases. It runs every method on the most important problem (8,192 rows of SmolLM2's head, in
pairs, because Liger takes only pairs), and the strongest on the rest. Full logits of larger problems take tens of
gigabytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_fast.benchmarks.methods import peers, problems

NAME = "op"
HEADS = {  # D, V
    "SmolLM2-135M": (576, 49152),
    "Qwen3-0.6B": (1024, 151936),
    "Gemma-3-270m": (640, 262144),
    "Llama-3-8B": (4096, 128256),
}
COMPLETION = 64
OURS = "exo_fast"
STRONG = (OURS, "cce", "full-logits")  # for problems on which not every method is timed, the strongest first
ALL = (
    OURS, "cce", "cce-fp32", "torch-chunked", "liger-compiled", "liger", "checkpoint", "full-logits-compiled",
    "full-logits", "full-logits-fp32", "trl", "original",
)  # fmt: skip
GPU_ALL = tuple(method for method in peers.METHODS if method != "cce-fp32")  # on a GPU its operands are bf16
GPU_QUICK = (
    OURS,
    "exo_fast-chunked",
    "exo_fast-two-pass",
    "cce",
    "liger-ce",
    "liger-cute",
    "torch-chunked",
    "full-logits",
    "full-logits-compiled",
)
GPU_TOKENS, KERNEL_ROWS = (8192, 2048, 32768), 2048
PEER_ROWS = 256  # rows for the errors of a method that takes the same path for any number of rows
FULL_LOGITS_TOO = ("trl", "original")  # in fp32 they equal full-logits, so they are timed in bf16, where they round
# Float32 copies of the (N, V) logits that a method holds at its peak.
COPIES = {
    "full-logits-compiled": 2.0,
    "cce": 1.2,
    "cce-fp32": 2.2,
    "cce-compiled": 1.2,
    "cce-exact": 0.0,
    "exo_fast": 0.0,
    "exo_fast-chunked": 0.0,
    "exo_fast-two-pass": 0.0,
    "checkpoint": 0.6,
    "liger": 0.6,
    "liger-compiled": 0.6,
    "liger-ce": 0.6,
    "liger-cute": 0.6,
    "torch-chunked": 0.6,
}


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    method: str
    operation: str  # group_loss, logprobs, or kernel: the method is a kernel alone, `tokens` the rows of its chunk
    width: int
    vocab: int
    precision: str
    candidates: int
    completion: int
    tokens: int
    work: str  # forward, frozen or both

    def __str__(self) -> str:
        groups = f"K{self.candidates}" if self.operation == "group_loss" else self.operation
        if self.completion != COMPLETION:
            groups += f"x{self.completion}"
        return f"op/{self.method}/{self.width}x{self.vocab}/{self.precision}/{groups}/N{self.tokens}/{self.work}"

    @property
    def problem(self) -> problems.Problem:
        return problems.Problem(self.width, self.vocab, self.precision, self.candidates, self.completion, self.tokens)


def cases(quick: bool = False) -> list[Case]:
    """Return every case, methods of the same problem one after another."""
    if problems.device() == "cuda":
        return gpu_cases(quick)
    found: list[Case] = []

    def add(methods, model, precisions, tokens, candidates=2, work="both", completion=COMPLETION, operation=None):
        width, vocab = HEADS[model]
        for precision in precisions:
            for method in methods:
                if precision == "fp32" and (method.endswith("-fp32") or method in FULL_LOGITS_TOO):
                    continue
                found.append(
                    Case(
                        method, operation or "group_loss", width, vocab, precision, candidates, completion, tokens, work
                    )
                )

    both = ("fp32", "bf16")
    if quick:
        add(ALL, "SmolLM2-135M", both, 1024)
        for work in ("forward", "frozen"):
            add((OURS, "cce"), "SmolLM2-135M", ("bf16",), 1024, work=work)
        add((OURS,), "SmolLM2-135M", ("bf16",), 1024, candidates=8)
        add((OURS, "full-logits"), "SmolLM2-135M", ("bf16",), 1024, operation="logprobs")
        return found
    ours_and_best = STRONG[:2]
    add(ALL, "SmolLM2-135M", both, 8192)
    add((OURS,), "Gemma-3-270m", ("bf16",), 32768, completion=16384)
    for work in ("forward", "frozen"):
        add(ours_and_best, "SmolLM2-135M", both, 8192, work=work)
    add((*ours_and_best, "cce-fp32"), "SmolLM2-135M", both, 2048, candidates=4)
    add((OURS,), "SmolLM2-135M", ("bf16",), 2048, candidates=8)
    add(ours_and_best, "SmolLM2-135M", ("bf16",), 32768, candidates=4)
    add((OURS,), "SmolLM2-135M", both, 8192, completion=4096)
    add(ours_and_best, "SmolLM2-135M", ("fp32",), 2048, operation="logprobs")
    add(STRONG, "SmolLM2-135M", ("bf16",), 8192, operation="logprobs")
    add((*ours_and_best, "cce-fp32"), "Qwen3-0.6B", both, 2048, candidates=4)
    add(ours_and_best, "Gemma-3-270m", ("bf16",), 8192, candidates=4)
    add(ours_and_best, "Llama-3-8B", ("bf16",), 1024, candidates=4)
    return found


def gpu_cases(quick: bool = False) -> list[Case]:
    """Return the cases on a GPU; quick: the heads of Qwen and Llama, many rows and few, in some minutes."""

    from exo_fast.benchmarks.methods.kernels import KERNELS  # needs Triton

    def add(methods: Sequence[str], model: str, precision: str, tokens: int, work: str, operation: str = "group_loss"):
        shape = (*HEADS[model], precision, 2, COMPLETION, tokens, work)
        needed = (m for m in methods if not (precision == "fp32" and m.endswith("-fp32")))
        return [Case(method, operation, *shape) for method in needed]

    found: list[Case] = []
    for model in ("Qwen3-0.6B", "Llama-3-8B", *([] if quick else ["Gemma-3-270m"])):
        for precision in ("bf16",) if quick else ("bf16", "fp16", "fp32"):
            found += add(KERNELS, model, precision, KERNEL_ROWS, "forward", "kernel")
        for tokens in (512, 8192) if quick else GPU_TOKENS:
            found += add(GPU_QUICK if quick else GPU_ALL, model, "bf16", tokens, "both")
            if not quick:
                found += add(GPU_ALL, model, "bf16", tokens, "forward")
        if not quick:
            found += add(GPU_ALL, model, "fp32", 2048, "both") + add(GPU_ALL, model, "fp32", 2048, "forward")
    return found


def impossible(case: Case) -> str | None:
    """Return why a case cannot run on this machine; None if it can."""
    if case.operation == "kernel":
        return None if problems.device() == "cuda" else "Triton compiles for a GPU only"
    if why := peers.unavailable(case.method, case.precision, problems.device()):
        return why
    copies = COPIES.get(case.method, 3.2)
    if case.method == "cce" and problems.device() == "cuda":  # its kernels, which keep no logits
        copies = 0.0
    if case.work == "forward":
        copies = min(copies, 2.2)
    needed = copies * case.tokens * case.vocab * 4 + 3 * case.vocab * case.width * 4
    free = problems.free_bytes()
    if needed > 0.9 * free:
        return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return None


def few_errors(case: Case, inputs: problems.Inputs) -> dict[str, float]:
    """Measure the errors against float64 on few rows of the case's inputs.

    Ours takes another path for few rows than for many, so it gets many. If a group is too long for the memory budget,
    it must be too long here too: the budget is cut to the size of U for half its rows.
    """
    long = case.completion != COMPLETION
    rows = None if case.method.startswith(OURS) else PEER_ROWS
    few = problems.few_rows(inputs, rows, groups=1 if long else 2)
    budget = len(few.hidden) // 2 * case.vocab * inputs.weight.itemsize if long and case.method == OURS else None
    return problems.errors(case.method, case.operation, case.work, few, budget)


def step(case: Case, inputs: problems.Inputs) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one runs the case once, backward included; the other drops its gradients."""
    inputs = inputs.require(case.work)
    device = problems.device()

    def clear() -> None:
        for leaf in inputs.leaves:
            leaf.grad = None

    def call() -> None:
        clear()
        with peers.settings(case.method, case.precision, device):
            loss, _ = problems.run(case.method, case.operation, inputs)
            if inputs.leaves:
                loss.backward()

    return call, clear


def proven(case: Case) -> tuple[problems.Inputs, dict[str, float]]:
    """Return the inputs of a case and its errors. Raises AssertionError if the errors are too large for rounding."""
    inputs = problems.make(case.problem, problems.device())
    with peers.settings(case.method, case.precision, problems.device()):
        found = few_errors(case, inputs)
    problems.prove(case.method, case.precision, found)
    return inputs, found


def trial(case: Case, workdir: Path) -> tuple[Callable[[], object], dict]:
    """Make the contract's trial: return the work of a case, after measuring its errors, floor and memory."""
    if case.operation == "kernel":
        call, row = _kernel(case)
        return lambda: (call(), problems.synchronize()), row
    inputs, found = proven(case)
    floor = problems.Floor(inputs)
    floor.measure(case.work)
    call, clear = step(case, inputs)
    call()
    clear()
    peak = problems.Peak()
    call()
    scratch = peak.mb() - problems.gradient_mb(case.problem, case.work)
    baseline = floor.seconds(case.tokens, case.work)
    row = {"errors": found, "scratch_mb": round(scratch, 1), "baseline_seconds": baseline}
    return lambda: (call(), problems.synchronize()), row


def measure(case: Case, workdir: Path) -> dict:
    """Measure errors, times, floor and memory of one case in this process."""
    if case.operation == "kernel":
        call, row = _kernel(case)
        return {**row, **_times(*problems.all_seconds(call, lambda: None), row["baseline_seconds"])}
    inputs, found = proven(case)
    floor = problems.Floor(inputs)
    floor.measure(case.work)
    times, peak_mb = problems.all_seconds(*step(case, inputs))
    floor.measure(case.work)
    return {
        **_times(times, peak_mb, floor.seconds(case.tokens, case.work)),
        "scratch_mb": round(peak_mb - problems.gradient_mb(case.problem, case.work), 1),
        "errors": found,
        "gflops": floor.gflops,
        "float32_logits": peers.float32_logits(case.method, case.precision),
    }


def _times(times: list[float], peak_mb: float, baseline: float) -> dict:
    """Return the times of a row, to 0.1 ms on a CPU and to 0.1 µs on a GPU, and its peak memory."""
    digits, seconds = 7 if problems.device() == "cuda" else 4, statistics.median(times)
    return {
        "seconds": round(seconds, digits),
        "all_seconds": [round(value, digits) for value in times],
        "peak_mb": round(peak_mb, 1),
        "baseline_seconds": round(baseline, digits),
        "share": round(baseline / seconds, 3),
    }


def _kernel(case: Case) -> tuple[Callable[[], object], dict]:
    """Return the launch of a kernel alone, and its row without times. Raises AssertionError like `kernels.prove`."""
    from exo_fast.benchmarks.methods import kernels

    found = kernels.prove(case.method, case.precision, problems.device())
    call, moved = kernels.prepare(case.method, case.tokens, case.vocab, case.precision, problems.device())
    baseline = moved / (problems.copy_gbps() * 1e9)
    row = {"errors": found, "baseline_seconds": baseline, "scratch_mb": 0.0, "gflops": {}, "float32_logits": True}
    return call, row


def extras(workdir: Path) -> dict:
    """Return facts of the run that its rows are read with."""
    return {"copy_gbps": problems.copy_gbps(), "loss": problems.LOSS, "floor_rows": problems.FLOOR_ROWS}


PROBLEM = ("operation", "width", "vocab", "precision", "candidates", "completion", "tokens", "work")


def summary(rows: list[dict]) -> dict:
    """Return product rates of each head and dtype (medians over the cases), and ours against the fastest peer by
    problem.

    `over_fastest` is our time over the fastest peer's time, `over_equal` over the fastest peer with float32 logits.
    Both compare shares of the floor that each process measured, so that a drift of the machine's speed cancels.
    """
    timed = [row for row in rows if "seconds" in row]
    rates: dict[tuple, list[dict]] = {}
    by_problem: dict[tuple, list[dict]] = {}
    for row in timed:
        rates.setdefault((row["width"], row["vocab"], row["precision"]), []).append(row["gflops"])
        by_problem.setdefault(problem_of(row), []).append(row)
    floors = [
        {
            "width": width,
            "vocab": vocab,
            "precision": precision,
            "gflops": {
                name: round(statistics.median(values), 1)
                for name in problems.PRODUCTS["both"]
                if (values := [r[name] for r in measured if name in r])
            },
        }
        for (width, vocab, precision), measured in rates.items()
    ]
    return {"floors": floors, "comparisons": [_compare(p, same) for p, same in by_problem.items() if _ours(same)]}


def problem_of(row: dict) -> tuple:
    """Return the key that rows must share to be compared."""
    return tuple(row[name] for name in PROBLEM)


def _ours(rows: list[dict]) -> dict | None:
    return next((row for row in rows if row["method"] == OURS), None)


def _compare(problem: tuple, rows: list[dict]) -> dict:
    ours = _ours(rows)
    found = {**dict(zip(PROBLEM, problem, strict=True)), "seconds": ours["seconds"], "share": ours["share"]}
    others = [row for row in rows if row is not ours]
    for name, peers_of in (("fastest", others), ("equal", [row for row in others if row["float32_logits"]])):
        if peers_of:
            best = max(peers_of, key=lambda row: row["share"])
            found |= {name: best["method"], f"over_{name}": round(best["share"] / ours["share"], 3)}
    return found
