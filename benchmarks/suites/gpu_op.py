"""The operation alone on a GPU: hidden states and head to the loss, dH and dW, against the peers, and its ceilings.

    pytest benchmarks -m gpu                       everything, to benchmarks/results/gpu_op.json and a table
    pytest benchmarks -m gpu -k "exo_fast or cce"  some of it; other rows of the same device are kept

Every method (benchmarks/methods/peers.py) computes the exo-pref loss of pairs of completions of 256 tokens. Before it
is timed it has to show on a small problem that its loss and gradients are those of float64 (`errors`). Times are
medians of `triton.testing.do_bench`, which empties the L2 cache between calls; memory is PyTorch's own count.

Ceilings are measured in the same run: the three products of the same shape by the vendor's library, whose times added
up are the floor of a step (6·N·D·V flops), and a copy within device memory. `of_product` is that floor over the time,
`of_copy` the bytes that must move (operands read once, gradients written once; for a kernel alone, its chunk) over the
time, as a share of the copy's rate.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from exo_fast import reference
from exo_fast.backends.triton import launch
from exo_fast.benchmarks.methods import peers
from exo_fast.benchmarks.roofline.model import HEADS
from exo_fast.kernels import logits_to_grad, logsumexp_gather
from exo_fast.kernels.targets import of_device
from exo_fast.training import machine

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CANDIDATES, COMPLETION = 2, 256  # Liger has pairs only
LOSS = {"loss_type": "exo-pref", "label_smoothing": 1e-3, "beta_pi": 0.1}
# Relative errors of a method that computes the same: operands, or logits, are rounded to the dtype.
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 5e-3}
KERNEL_ROWS = 2048
COPY_BYTES = 2**30
OUTPUT = Path(__file__).parents[1] / "results" / "gpu_op.json"
KERNELS = ("logsumexp_gather", "logits_to_grad")
KERNEL_TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # absolute, of log-probs and of gradients in that dtype
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Case(NamedTuple):
    """One row of the table."""

    method: str
    model: str
    tokens: int
    precision: str
    work: str  # forward, without gradients, or step: forward and backward


def problem(
    width: int, vocab: int, tokens: int, precision: str, device: str = "cuda", completion: int = COMPLETION
) -> Inputs:
    """hidden, weight, targets, cu_seqlens (on the CPU), ref_logps, rewards: logits of a standard deviation of 1, the
    first candidate of each pair preferred."""
    g = torch.Generator(device).manual_seed(0)
    dtype, groups = PRECISIONS[precision], tokens // (CANDIDATES * completion)
    return (
        torch.randn(tokens, width, generator=g, device=device).to(dtype).requires_grad_(),
        (torch.randn(vocab, width, generator=g, device=device) * width**-0.5).to(dtype).requires_grad_(),
        torch.randint(vocab, (tokens,), generator=g, device=device),
        torch.arange(0, tokens + 1, completion),
        torch.zeros(groups, CANDIDATES, device=device),
        torch.tensor([1.0, 0.0], device=device).repeat(groups, 1),
    )


def errors(method: str, precision: str, device: str = "cuda") -> dict[str, float]:
    """Relative errors of a method's loss, dH and dW on a small problem, against float64 of the same inputs."""
    inputs = problem(64, 1024, 192, precision, device, completion=32)
    exact = [t.detach().double().requires_grad_() for t in inputs[:2]]
    wide = [t.double() if t.is_floating_point() else t.to(device) for t in inputs[2:]]
    found = []
    for call, leaves, rest in (
        (peers.operation(method), inputs[:2], inputs[2:]),
        (reference.linear_group_loss, exact, wide),
    ):
        loss, _ = call(*leaves, *rest, **LOSS)
        found.append([t.double() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    return {
        name: ((got - want).norm() / want.norm()).item()
        for name, got, want in zip(("loss", "dH", "dW"), *found, strict=True)
    }


@functools.cache
def proven(method: str, precision: str, device: str = "cuda") -> None:
    """Raises AssertionError when a method does not compute the loss and gradients it is compared by."""
    for name, error in errors(method, precision, device).items():
        assert error <= TOLERANCE[precision], f"{method} in {precision}: relative error {error:.1e} of {name}"


def milliseconds(call: Callable[[], object]) -> dict[str, float]:
    """Median, 10th and 90th percentile of one call."""
    median, low, high = do_bench(call, warmup=100, rep=1000, quantiles=[0.5, 0.1, 0.9])
    return {"ms": round(median, 4), "ms_p10": round(low, 4), "ms_p90": round(high, 4)}


def peak_mb(call: Callable[[], object]) -> float:
    """The most device memory a call adds to what is allocated before it, MB (1e6 bytes)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(method: str, inputs: Inputs, step: bool) -> dict[str, float]:
    """Time and memory of a forward pass without gradients, or of forward and backward."""
    run, leaves = peers.operation(method), inputs[:2]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        if step:
            run(*inputs, **LOSS)[0].backward()
        else:
            with torch.no_grad():
                run(*inputs, **LOSS)

    call()  # compiles
    times = milliseconds(call)
    for leaf in leaves:
        leaf.grad = None
    peak = peak_mb(call)
    gradients = (leaves[0].nbytes + 4 * leaves[1].numel()) / 1e6 if step else 0.0
    return {**times, "peak_mb": round(peak, 1), "scratch_mb": round(peak - gradients, 1)}


@functools.cache
def products(width: int, vocab: int, tokens: int, precision: str) -> dict[str, float]:
    """Milliseconds of the three products of a step by the vendor's library, on operands and results of one dtype."""
    dtype = PRECISIONS[precision]
    h, w = (torch.randn(rows, width, device="cuda").to(dtype) for rows in (tokens, vocab))
    z, dh, dw = (torch.zeros(shape, dtype=dtype, device="cuda") for shape in ((tokens, vocab), h.shape, w.shape))
    calls = {
        "logits": lambda: torch.mm(h, w.T, out=z),
        "dH": lambda: torch.mm(z, w, out=dh),
        "dW": lambda: torch.mm(z.T, h, out=dw),
    }
    return {name: milliseconds(call)["ms"] for name, call in calls.items()}


@functools.cache
def copy_rate() -> float:
    """Bytes/s of a copy within device memory, reads and writes counted."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (milliseconds(lambda: target.copy_(source))["ms"] * 1e-3)


def shares(seconds: float, floor: float, flops: float, moved: float) -> dict[str, float]:
    """Achieved rates, and what share of the ceilings they are."""
    return {
        "tflops": round(flops / seconds / 1e12, 2),
        "of_product": round(floor / seconds, 3),
        "gbps": round(moved / seconds / 1e9, 1),
        "of_copy": round(moved / seconds / copy_rate(), 3),
    }


def operation_row(case: Case) -> dict:
    """One row of the table. Raises torch.OutOfMemoryError where the method does not fit."""
    head = next(head for head in HEADS if head.model == case.model)
    torch.compiler.reset()  # every case is compiled for its own shape
    torch.cuda.empty_cache()
    inputs = problem(head.width, head.vocab, case.tokens, case.precision)
    step = case.work == "step"
    found = measure(case.method, inputs, step)
    operands = sum(t.nbytes for t in inputs[:2])
    del inputs
    torch.cuda.empty_cache()
    times = products(head.width, head.vocab, case.tokens, case.precision)
    floor = (sum(times.values()) if step else times["logits"]) * 1e-3
    flops = (6 if step else 2) * case.tokens * head.width * head.vocab
    return {
        **case._asdict(),
        "width": head.width,
        "vocab": head.vocab,
        **found,
        **shares(found["ms"] * 1e-3, floor, flops, (2 if step else 1) * operands),
    }


def kernel_call(kernel: str, rows: int, vocab: int, precision: str, device: str = "cuda") -> tuple[Callable, float]:
    """A launch of a memory-bound kernel alone, in its default configuration, and the bytes it must move."""
    g = torch.Generator(device).manual_seed(0)
    width = -(-vocab // 16) * 16  # rows as the backend lays them out
    logits = torch.randn(rows, width, generator=g, device=device).to(PRECISIONS[precision])
    targets = torch.randint(vocab, (rows,), generator=g, device=device)
    stats = torch.empty(3, rows, device=device)
    target = of_device(torch.device(device))
    head = {
        "bias": None, "start": 0, "stride_stats": rows, "scale": 1.0, "softcap": 1.0, "HAS_BIAS": False,
        "HAS_SOFTCAP": False,
    }  # fmt: skip

    def gather() -> Tensor:
        launch(
            logsumexp_gather.logsumexp_gather, logsumexp_gather.grid(rows),
            logsumexp_gather.configs(target, precision)[0],
            logits=logits, targets=targets, stats=stats, columns=vocab, width=width, stride=width, FIRST=True, **head,
        )  # fmt: skip
        return stats

    def to_grad() -> Tensor:
        config = logits_to_grad.configs(target, precision)[0]
        launch(
            logits_to_grad.logits_to_grad, logits_to_grad.grid(rows, width, config), config,
            logits=logits, out=logits, targets=targets, coefficients=coefficients, stats=stats, partial=None, n=rows,
            columns=vocab, width=width, stride=width, stride_out=width, stride_partial=0, HAS_BIAS_GRAD=False, **head,
        )  # fmt: skip
        return logits

    if kernel == "logsumexp_gather":
        return gather, logits.nbytes
    coefficients = torch.ones(rows, device=device)
    gather()
    return to_grad, 2 * logits.nbytes


def kernel_error(kernel: str, precision: str, device: str = "cuda") -> float:
    """Largest absolute error of a kernel's launch on a small chunk: log-probs, or a softmax less the target."""
    rows, vocab = 5, 1003
    call, _ = kernel_call(kernel, rows, vocab, precision, device)
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, -(-vocab // 16) * 16, generator=g, device=device).to(PRECISIONS[precision])
    targets = torch.randint(vocab, (rows,), generator=g, device=device)
    logps = torch.log_softmax(logits[:, :vocab].double(), dim=1)
    found = call().double()
    if kernel == "logsumexp_gather":
        want = logps.gather(1, targets.unsqueeze(1)).squeeze(1)
        return (found[2] - found[0] - found[1].log() - want).abs().max().item()
    want = torch.nn.functional.one_hot(targets, vocab) - logps.exp()
    return (found[:, :vocab] - want).abs().max().item()


def kernel_row(kernel: str, model: str, precision: str) -> dict:
    """One memory-bound kernel on a chunk of KERNEL_ROWS rows of a model's vocabulary."""
    vocab = next(head.vocab for head in HEADS if head.model == model)
    call, moved = kernel_call(kernel, KERNEL_ROWS, vocab, precision)
    times = milliseconds(call)
    seconds = times["ms"] * 1e-3
    return {
        "kernel": kernel,
        "model": model,
        "vocab": vocab,
        "rows": KERNEL_ROWS,
        "precision": precision,
        **times,
        "gbps": round(moved / seconds / 1e9, 1),
        "of_copy": round(moved / seconds / copy_rate(), 3),
    }


class Results:
    """What the tests of a run measure, kept as JSON beside what earlier runs on the same device measured."""

    def __init__(self, path: Path = OUTPUT):
        self.path = path
        self.rows: dict[tuple, dict] = {}
        self.kernels: dict[tuple, dict] = {}

    def add(self, row: dict) -> None:
        """Takes a row of `operation_row` or `kernel_row`, or one that says why it was skipped."""
        table = self.kernels if "kernel" in row else self.rows
        table[_key(row)] = row

    def save(self) -> dict:
        """Writes and returns everything: rows of this run in the place of earlier ones."""
        now = machine.describe()
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        if old.get("machine", {}).get("device") != now["machine"]["device"]:
            old = {}
        tables = {
            name: list({**{_key(row): row for row in old.get(name, [])}, **found}.values())
            for name, found in (("rows", self.rows), ("kernels", self.kernels))
        }
        results = {
            **now,
            "runtime": {"cuda": torch.version.cuda, "hip": torch.version.hip},
            "task": {"candidates": CANDIDATES, "completion": COMPLETION, **LOSS},
            "copy_gbps": round(copy_rate() / 1e9, 1),
            **tables,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(results, indent=1) + "\n")
        return results


def _key(row: dict) -> tuple:
    names = ("kernel", "method", "model", "tokens", "rows", "precision", "work")
    return tuple(row.get(name) for name in names)


def report(results: dict) -> str:
    """The results as aligned text."""
    lines = [
        f"{results['machine']['device']}, copy {results['copy_gbps']} GB/s (of_product, of_copy: shares of ceilings)"
    ]
    lines.append(
        f"{'model':<14}{'N':>6} {'dtype':<5} {'work':<8}{'method':<22}{'ms':>10}{'TFLOP/s':>9}{'product':>9}{'copy':>7}"
        f"{'scratch MB':>12}"
    )
    for row in results["rows"]:
        start = f"{row['model']:<14}{row['tokens']:>6} {row['precision']:<5} {row['work']:<8}{row['method']:<22}"
        if "skipped" in row:
            lines.append(f"{start}  {row['skipped']}")
            continue
        lines.append(
            f"{start}{row['ms']:>10.3f}{row['tflops']:>9.1f}{row['of_product']:>9.2f}{row['of_copy']:>7.2f}"
            f"{row['scratch_mb']:>12.0f}"
        )
    for row in results["kernels"]:
        lines.append(
            f"{row['model']:<14}{row['rows']:>6} {row['precision']:<5} {'kernel':<8}{row['kernel']:<22}"
            f"{row['ms']:>10.3f}{'':>18}{row['of_copy']:>7.2f}"
        )
    return "\n".join(lines)
