"""The problems of the operation's benchmarks, their errors against float64, floors and timing.

A problem is hidden states and a head of Gaussian numbers. Their logits resemble SmolLM2-135M's on text (a standard
deviation of 3.5 within a row, a largest logit of about 16, targets of about 13), because rounding hurts large logits.
There are G groups of K candidates of one length, the first of each preferred, and reference log-probs of 0 (Liger's
chunked loss takes no others). Two operations are defined on a problem:

    group_loss  the exo-pref loss of the groups (arXiv 2402.00856)
    logprobs    Σ_t a_t ℓ_t of the per-token log-probs with fixed Gaussian a_t

and three kinds of work: `forward`, without gradients, `frozen`, dH alone, and `both`, dH and dW.

Errors are against float64 of the same numbers on the first rows of the same head (1,024, or all of them), with the
vocabulary in blocks, so that no float64 copy of the head and no (N, V) matrix is ever made. There are enough rows that
a method takes the same path as when it is timed.

The floor of a case is the time of its products alone at the rates of the machine's own matrix product on operands of
the same dtype: 2·N·D·V flops for the logits, as many for dH, as many for dW, on 1,024 rows. Rates are measured in the
process of the case just before and just after it, because machines are shared and rates drift; the best counts. On a
GPU more rows do make a product faster, so the floor uses the case's own rows.

Times are wall-clock times on a CPU. On a GPU `triton.testing.do_bench` measures them, which empties the L2 cache
between calls.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.benchmarks.harness import process_memory
from exo_fast.benchmarks.methods import peers
from exo_fast.loss import linear_group_loss

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORK = ("forward", "frozen", "both")
PRODUCTS = {"forward": ("logits",), "frozen": ("logits", "dH"), "both": ("logits", "dH", "dW")}
# A small beta_pi: with 0.1 two sequences of thousands of tokens of random log-probs would have no gradient.
LOSS = {"loss_type": "exo-pref", "beta_pi": 0.01, "label_smoothing": 1e-3}
LOGIT_STD, TARGET_LOGIT = 3.5, 13.0
ERROR_ROWS, FEW_ROWS = 1024, 256  # FEW_ROWS for heads of more than LARGE numbers, which take minutes in float64
LARGE = 3e8
# Largest errors of the same computation: relative for the loss, dH and dW; nats a token for log-probs. In bf16
# operands are rounded to 8 bits, and most peers also round logits of up to 10. In fp32 the rounding of a sum over
# 262,144 words can be 1e-4 nats.
TOLERANCE = {"fp32": 5e-4, "fp16": 1e-2, "bf16": 5e-2}
FLOOR_ROWS = 1024  # more rows make no product faster
COPY_BYTES = 2**29
SECONDS, CALLS = 10.0, 3  # after a first call that does not count, a case is called until one of them is used up
LONG = 20.0  # seconds; a first call that takes longer counts, because the next would take about as long


@dataclass(frozen=True)
class Problem:
    """The shape of a problem. `tokens` is a multiple of candidates · completion."""

    width: int
    vocab: int
    precision: str
    candidates: int
    completion: int  # tokens of each candidate
    tokens: int


@dataclass(frozen=True)
class Inputs:
    """A problem's tensors, on one device except the boundaries, which stay on the CPU."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (G·K + 1,)
    ref_logps: Tensor  # (G, K) zeros
    rewards: Tensor  # (G, K) 1, 0, 0, …
    coefficients: Tensor  # (N,) for the operation logprobs

    def require(self, work: str) -> Inputs:
        """Return the same inputs, requiring the gradients that `work` needs."""
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_(work != "forward"),
            weight=self.weight.detach().requires_grad_(work == "both"),
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


def device() -> str:
    """Return the device of the suites: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(problem: Problem, on: str = "cpu") -> Inputs:
    """Make the tensors of a problem, the same every time."""
    groups, rest = divmod(problem.tokens, problem.candidates * problem.completion)
    if rest:
        raise ValueError(f"{problem}: tokens are no multiple of candidates · completion")
    g = torch.Generator(on).manual_seed(0)
    dtype = PRECISIONS[problem.precision]

    def normal(rows: int, std: float) -> Tensor:
        # In pieces, so that no float32 copy of a large head is held.
        out = torch.empty(rows, problem.width, dtype=dtype, device=on)
        for part in out.split(16384):
            part.copy_(torch.randn(part.shape, generator=g, device=on).mul_(std))
        return out

    hidden, weight = normal(problem.tokens, 1.0), normal(problem.vocab, LOGIT_STD * problem.width**-0.5)
    targets = torch.randint(problem.vocab, (problem.tokens,), generator=g, device=on)
    for rows, chosen in zip(hidden.split(16384), targets.split(16384), strict=True):
        rows.add_(weight[chosen], alpha=TARGET_LOGIT / LOGIT_STD**2)  # a head's row times itself is about LOGIT_STD²
    return Inputs(
        hidden=hidden,
        weight=weight,
        targets=targets,
        cu_seqlens=torch.arange(0, problem.tokens + 1, problem.completion),
        ref_logps=torch.zeros(groups, problem.candidates, device=on),
        rewards=torch.eye(problem.candidates, device=on)[0].repeat(groups, 1),
        coefficients=torch.randn(problem.tokens, generator=g, device=on),
    )


def few_rows(inputs: Inputs, rows: int | None = None, groups: int = 2) -> Inputs:
    """Return the first rows of a problem as `groups` groups, to measure errors on: the same head, dtype and K."""
    candidates = inputs.ref_logps.shape[1]
    rows = rows or (FEW_ROWS if inputs.weight.numel() > LARGE else ERROR_ROWS)
    completion = max(1, min(rows, len(inputs.hidden)) // (groups * candidates))
    rows = groups * candidates * completion
    return replace(
        inputs,
        hidden=inputs.hidden[:rows],
        targets=inputs.targets[:rows],
        cu_seqlens=torch.arange(0, rows + 1, completion),
        ref_logps=inputs.ref_logps[:1].repeat(groups, 1),
        rewards=inputs.rewards[:1].repeat(groups, 1),
        coefficients=inputs.coefficients[:rows],
    )


def run(
    method: str | peers.Operation, operation: str, inputs: Inputs, memory_budget: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run a forward pass of a method, or of a function of the same arguments. Return the loss and its detached
    log-probs: (N,) of tokens or (G, K) of sequences."""
    if operation == "logprobs":
        logps = peers.token_logps_of(method)(inputs.hidden, inputs.weight, inputs.targets)
        return (logps * inputs.coefficients).sum(), logps.detach()
    options = dict(LOSS)
    call = method if callable(method) else peers.operation(method)
    if memory_budget is not None:
        call = functools.partial(linear_group_loss, memory_budget=memory_budget)
    return call(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.cu_seqlens,
        inputs.ref_logps,
        inputs.rewards,
        **options,
    )


def errors(
    method: str | peers.Operation, operation: str, work: str, inputs: Inputs, memory_budget: int | None = None
) -> dict:
    """Measure the errors of a method on (few rows of) a problem against float64 of the same numbers.

    loss, dH and dW: relative (Euclidean norm). logps: root mean square in nats, over tokens for `logprobs`; over
    sequences for `group_loss`, divided by the square root of their length.
    """
    inputs = inputs.require(work)
    loss, logps = run(method, operation, inputs, memory_budget)
    grads = dict(zip(("dH", "dW"), torch.autograd.grad(loss, inputs.leaves) if inputs.leaves else (), strict=False))
    hidden, targets = inputs.hidden.detach().double(), inputs.targets
    weights = inputs.weight.detach().split(8192)
    logits = [hidden @ w.double().T for w in weights]
    shift = torch.stack([z.logsumexp(1) for z in logits]).logsumexp(0)
    exact = (hidden * inputs.weight.detach()[targets].double()).sum(1) - shift
    exact.requires_grad_()
    if operation == "logprobs":
        exact_loss, exact_logps, scale = (exact * inputs.coefficients).sum(), exact, 1.0
    else:
        exact_logps = reference.sequence_logps(exact, inputs.cu_seqlens.to(exact.device)).view_as(inputs.ref_logps)
        exact_loss = reference.group_loss(exact_logps, inputs.ref_logps, inputs.rewards, **LOSS).mean()
        scale = (len(exact) / exact_logps.numel()) ** 0.5
    found = {
        "loss": ((loss.detach().double() - exact_loss) / exact_loss).abs().item(),
        "logps": ((logps.double() - exact_logps.detach()).square().mean().sqrt() / scale).item(),
    }
    if not grads:
        return found
    (c,) = torch.autograd.grad(exact_loss, exact)
    exact_hidden = torch.zeros_like(hidden)
    squares = torch.zeros(2, dtype=torch.float64, device=hidden.device)  # for dW: difference and truth
    start = 0
    for w, z in zip(weights, logits, strict=True):
        u = z.sub_(shift.unsqueeze(1)).exp_().mul_(-c.unsqueeze(1))  # ∂L/∂z, except at the targets
        inside = ((targets >= start) & (targets < start + len(w))).nonzero().squeeze(1)
        u[inside, targets[inside] - start] += c[inside]
        exact_hidden += u @ w.double()
        if "dW" in grads:
            exact_weight = u.T @ hidden
            difference = grads["dW"][start : start + len(w)].double() - exact_weight
            squares += torch.stack([difference.square().sum(), exact_weight.square().sum()])
        start += len(w)
    found["dH"] = ((grads["dH"].double() - exact_hidden).norm() / exact_hidden.norm()).item()
    if "dW" in grads:
        found["dW"] = (squares[0] / squares[1]).sqrt().item()
    return found


def prove(method: str, precision: str, found: dict[str, float]) -> None:
    """Raises AssertionError if errors are too large for rounding, so the method computes something else."""
    for name, error in found.items():
        limit = TOLERANCE[precision]
        assert error <= limit, f"{method} in {precision}: error {error:.1e} of {name}, more than {limit:.0e}"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Measure the wall-clock seconds of one call."""
    synchronize()
    begun = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begun


def all_seconds(call: Callable[[], object], clear: Callable[[], object]) -> tuple[list[float], float]:
    """Time calls until `SECONDS` would be passed or `CALLS` are made, at least one; return the times and the peak
    memory in MB.

    A first call compiles and warms up, and counts only if it takes longer than `LONG`. `clear` frees a call's results,
    so that they do not count as memory held before. On a GPU `bench` measures the times.
    """
    if torch.cuda.is_available():
        call()
        clear()
        peak = Peak()
        call()
        return bench(call), peak.mb()
    peak = Peak()
    found = [seconds_of(call)]
    if found[0] > LONG:
        return found, peak.mb()
    clear()
    peak, found = Peak(), [seconds_of(call)]
    while len(found) < CALLS and sum(found) + found[-1] <= SECONDS:
        found.append(seconds_of(call))
    return found, peak.mb()


def bench(call: Callable[[], object]) -> list[float]:
    """Return the 10th, 50th and 90th percentile of a call's seconds on a GPU."""
    from triton.testing import do_bench

    return [ms * 1e-3 for ms in do_bench(call, warmup=100, rep=500, quantiles=[0.1, 0.5, 0.9])]


class Peak:
    """The peak memory above the memory held at the start, MB (1e6 bytes): resident, or PyTorch's count on CUDA."""

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 1e6
        else:
            self.before = process_memory.resident_mb()
            process_memory.reset_peak()

    def mb(self) -> float:
        now = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else process_memory.peak_mb()
        return now - self.before


def gradient_mb(problem: Problem, work: str) -> float:
    """Return the MB that any method has to return: dH in the operands' dtype and dW in float32."""
    hidden = problem.tokens * problem.width * PRECISIONS[problem.precision].itemsize
    return {"forward": 0.0, "frozen": hidden / 1e6, "both": (hidden + problem.vocab * problem.width * 4) / 1e6}[work]


class Floor:
    """Rates of a head's three products over all measurements so far: on `FLOOR_ROWS` rows, on a GPU on all rows."""

    def __init__(self, inputs: Inputs):
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.rows = len(self.hidden) if self.weight.is_cuda else FLOOR_ROWS
        self.times: dict[str, list[float]] = {name: [] for name in PRODUCTS["both"]}

    def measure(self, work: str) -> None:
        """Time each product that `work` needs, several times if it is short."""
        weight = self.weight
        if weight.is_cuda:  # a GPU multiplies ones faster than other numbers
            hidden, logits = self.hidden, self.hidden @ weight.T
        else:
            hidden = torch.ones(self.rows, weight.shape[1], dtype=weight.dtype)
            logits = hidden.new_ones(self.rows, len(weight))
        grads = torch.ones_like(hidden), torch.ones_like(weight) if work == "both" else None
        products = {
            "logits": lambda: torch.mm(hidden, weight.T, out=logits),
            "dH": lambda: torch.mm(logits, weight, out=grads[0]),
            "dW": lambda: torch.mm(logits.T, hidden, out=grads[1]),
        }
        for name in PRODUCTS[work]:
            if weight.is_cuda:
                self.times[name].append(bench(products[name])[1])
                continue
            first = seconds_of(products[name])  # prepares the product for its shape
            again = 4 if first < 0.2 else 2 if first < 1 else 1
            self.times[name] += [seconds_of(products[name]) for _ in range(again)]

    @property
    def gflops(self) -> dict[str, float]:
        flops = 2 * self.rows * self.weight.numel()
        return {name: round(flops / min(times) / 1e9, 1) for name, times in self.times.items() if times}

    def seconds(self, tokens: int, work: str) -> float:
        """Return the time of a case's products at these rates."""
        return sum(min(self.times[name]) for name in PRODUCTS[work]) * tokens / self.rows


def copy_gbps() -> float:
    """Measure the GB/s of a large copy, reads and writes counted: the machine's memory bandwidth."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device())
    target = torch.ones_like(source)

    def copy() -> None:
        target.copy_(source)

    times = bench(copy) if torch.cuda.is_available() else [seconds_of(copy) for _ in range(5)]
    return round(2 * COPY_BYTES / statistics.median(times) / 1e9, 1)


def free_bytes() -> float:
    """Return the memory that a case may take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
