"""The operation alone: hidden states and head to the loss, dH and dW, against full logits and Apple CCE.

    python -m exo_fast.benchmarks.op                       all cases, to benchmarks/results/op.json and a table
    python -m exo_fast.benchmarks.op --only exo_fast/576x49152/fp32 --repeats 5
    python -m exo_fast.benchmarks.op --accuracy            only the errors against float64

Every method computes the same: the EXO loss of groups of K = 4 completions of 64 tokens, forward and backward (and
one group of two long completions, `exo_fast-long`, whose rows do not fit the memory budget together). CCE
(`cut_cross_entropy`, impl="torch_compile", its implementation for machines without a GPU) and full logits give
per-token log-probs, from which `group_loss` makes the same loss.

Each case runs in a process of its own, which reports the median time and the peak of its resident memory above what it
held before the call, less dH and a float32 dW. The floor is 6·N·D·V flops at the rates of the three products alone,
measured in the same run on operands of the same dtype. Errors are against float64 of the same inputs, on the real
hidden states of the demo model (135M) over movie reviews.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.benchmarks import machine
from exo_fast.benchmarks.peers import operation, token_logps_of
from exo_fast.loss import group_loss

SHAPES = ((576, 49152), (640, 262144))  # D, V of SmolLM2-135M and Gemma-3-270m
TOKENS = (2048, 8192, 32768)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = ("full-logits", "cce", "exo_fast", "exo_fast-long")
CANDIDATES, COMPLETION = 4, 64
FLOOR_ROWS = 1024
LONGEST_PEER = 30e12  # flops of the largest case that the peers are given time for
OUTPUT = Path(__file__).parent / "results" / "op.json"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    width: int
    vocab: int
    precision: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.method}/{self.width}x{self.vocab}/{self.precision}/N{self.tokens}"


def all_cases() -> list[Case]:
    """Every case, methods of the same problem one after another."""
    return [
        Case(method, width, vocab, precision, tokens)
        for width, vocab in SHAPES
        for precision in PRECISIONS
        for tokens in TOKENS
        for method in METHODS
    ]


def impossible(case: Case) -> str | None:
    """Why a case cannot run on this machine, None when it can."""
    if case.method.startswith("exo_fast"):
        return None
    copies = 2.2 * case.tokens * case.vocab * 4
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if copies > 0.9 * free:
        return f"needs about {copies / 1e9:.0f} GB of logits, {free / 1e9:.0f} GB free"
    if 6 * case.tokens * case.width * case.vocab > LONGEST_PEER:
        return "left out: minutes a call"
    return None


def long_groups(case: Case) -> tuple[int, int]:
    """(candidates, tokens of each) of a case."""
    return (2, case.tokens // 2) if case.method == "exo_fast-long" else (CANDIDATES, COMPLETION)


def synthetic(case: Case) -> tuple[Tensor, ...]:
    """Inputs of a timed case: Gaussian hidden states, logits of a standard deviation of about 1.2."""
    g = torch.Generator().manual_seed(0)
    dtype = PRECISIONS[case.precision]
    candidates, length = long_groups(case)
    groups = case.tokens // (candidates * length)
    return (
        torch.randn(case.tokens, case.width, generator=g).to(dtype).requires_grad_(),
        (torch.randn(case.vocab, case.width, generator=g) * 0.05).to(dtype).requires_grad_(),
        torch.randint(case.vocab, (case.tokens,), generator=g),
        torch.arange(0, case.tokens + 1, length),
        torch.randn(groups, candidates, generator=g) - 11.5 * length,
        torch.randn(groups, candidates, generator=g),
    )


def measure(case: Case, repeats: int) -> dict:
    """Time and peak memory of one case in this process."""
    inputs, run = synthetic(case), operation(case.method)
    hidden, weight = inputs[:2]

    def step() -> float:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        run(*inputs, loss_type="exo-rw")[0].backward()
        return time.perf_counter() - start

    # Compile and warm up on a small problem of the same shape, so that a long case is not run twice for that.
    small = synthetic(Case(case.method, case.width, case.vocab, case.precision, 2 * CANDIDATES * COMPLETION))
    for _ in range(2):
        run(*small, loss_type="exo-rw")[0].backward()
    del small
    before = machine.resident_mb()
    machine.reset_peak()
    seconds = [step() for _ in range(repeats)]
    gradients = (hidden.numel() * hidden.element_size() + weight.numel() * 4) / 1e6
    return {
        **asdict(case),
        "seconds": round(statistics.median(seconds), 4),
        "all_seconds": [round(value, 4) for value in seconds],
        "scratch_mb": round(machine.peak_mb() - before - gradients, 1),
    }


def measure_floor(width: int, vocab: int, precision: str) -> dict:
    """Rates of the three products on FLOOR_ROWS rows (GF/s), and the seconds 6·N·D·V takes at them for each N."""
    dtype = PRECISIONS[precision]
    h, w = torch.randn(FLOOR_ROWS, width).to(dtype), torch.randn(vocab, width).to(dtype)
    z, dh, dw = torch.zeros(FLOOR_ROWS, vocab, dtype=dtype), torch.zeros_like(h), torch.zeros_like(w)
    products = {
        "logits": lambda: torch.mm(h, w.T, out=z),
        "dH": lambda: torch.mm(z, w, out=dh),
        "dW": lambda: torch.mm(z.T, h, out=dw),
    }
    flops, rates = 2 * FLOOR_ROWS * width * vocab, {}
    for name, product in products.items():
        product()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        rates[name] = flops / statistics.median(times)
    seconds = {str(n): sum(2 * n * width * vocab / rate for rate in rates.values()) for n in TOKENS}
    return {
        "width": width,
        "vocab": vocab,
        "precision": precision,
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "seconds": seconds,
    }


def measure_accuracy(tokens: int = 2048) -> list[dict]:
    """Errors of each method against float64 of the same inputs, on the demo model's hidden states over reviews."""
    hidden, weight, targets = real_inputs(tokens)
    length = tokens // 8
    cu_seqlens, rows = torch.arange(0, tokens + 1, length), []
    g = torch.Generator().manual_seed(0)
    noise, rewards = torch.randn(2, 2, 4, generator=g, dtype=torch.float64).unbind(0)
    for precision, dtype in PRECISIONS.items():
        h, w = hidden.to(dtype), weight.to(dtype)
        exact = [h.double().requires_grad_(), w.double().requires_grad_()]
        logps = reference.linear_logprobs(*exact, targets)
        sums = reference.sequence_logps(logps, cu_seqlens).view(2, 4)
        ref_logps = sums.detach() + noise
        options = {"loss_type": "exo-rw", "beta_r": 1.0}
        group_loss(sums, ref_logps, rewards, **options).backward()
        for method in ("full-logits", "cce", "exo_fast"):
            inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            operation(method)(*inputs, targets, cu_seqlens, ref_logps, rewards, **options)[0].backward()
            with torch.no_grad():
                error = token_logps_of(method)(*inputs, targets).double() - logps.detach()
            relative = [
                ((a.grad.double() - b.grad).norm() / b.grad.norm()).item() for a, b in zip(inputs, exact, strict=False)
            ]
            rows.append(
                {
                    "method": method,
                    "precision": precision,
                    "logprob_rms": error.square().mean().sqrt().item(),
                    "logprob_sum": error.sum().abs().item(),
                    "dH": relative[0],
                    "dW": relative[1],
                }
            )
    return rows


@torch.no_grad()
def real_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), head weight (V, D) and next tokens (N,) of the demo model over reviews laid end to end, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from exo_fast.head import final_hidden, read_head
    from exo_fast.training import assets

    logging.disable_progress_bar()
    cache = assets.cache_dir()
    path = assets.get_model(cache, lambda _: None)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    text = "\n".join(review.text for review in assets.get_reviews(cache, lambda _: None)[:400])
    ids = torch.tensor(tokenizer(text)["input_ids"][: tokens + 1])
    hidden = [final_hidden(model, input_ids=part.unsqueeze(0))[0] for part in ids[:-1].split(256)]
    return torch.cat(hidden), read_head(model).weight.detach(), ids[1:]


def report(results: dict) -> str:
    """The results as aligned text."""
    floors = {(f["width"], f["vocab"], f["precision"]): f["seconds"] for f in results["floors"]}
    rows = results["rows"]
    cce = {_problem(row): row["seconds"] for row in rows if row["method"] == "cce" and "seconds" in row}
    head = f"{'D x V':<13}{'dtype':<6}{'N':>6}  {'method':<15}{'seconds':>9}{'floor':>8}{'/CCE':>7}{'scratch MB':>12}"
    lines = [head, "-" * len(head)]
    for row in rows:
        start = f"{row['width']}x{row['vocab']:<9}{row['precision']:<6}{row['tokens']:>6}  {row['method']:<15}"
        if "seconds" not in row:
            lines.append(f"{start}  {row['skipped']}")
            continue
        floor = floors.get((row["width"], row["vocab"], row["precision"]))
        share = f"{floor[str(row['tokens'])] / row['seconds']:.2f}" if floor else ""
        ratio = f"{row['seconds'] / cce[_problem(row)]:.2f}" if _problem(row) in cce else ""
        lines.append(f"{start}{row['seconds']:>9.3f}{share:>8}{ratio:>7}{row['scratch_mb']:>12.0f}")
    lines += ["", f"{'error against float64':<24}{'log-prob rms':>14}{'sum, nats':>12}{'dH':>10}{'dW':>10}"]
    for row in results["accuracy"]:
        lines.append(
            f"{row['method']:<18}{row['precision']:<6}{row['logprob_rms']:>14.1e}{row['logprob_sum']:>12.1e}"
            f"{row['dH']:>10.1e}{row['dW']:>10.1e}"
        )
    return "\n".join(lines)


def _problem(row: dict) -> tuple:
    return row["width"], row["vocab"], row["precision"], row["tokens"]


def apart(name: str, argument: dict, repeats: int = 1) -> dict | list[dict]:
    """One measurement in a process of its own. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, "-m", "exo_fast.benchmarks.op", "--worker", json.dumps([name, argument, repeats])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{name} {argument} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cases whose name (method/DxV/dtype/N) begins so"
    )
    parser.add_argument(
        "--repeats", type=int, help="timed calls of each case [3 for the shortest N, 1 for the longest]"
    )
    parser.add_argument("--accuracy", action="store_true", help="only the errors against float64")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"JSON to write; other rows are kept [{OUTPUT.name}]"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        name, argument, repeats = json.loads(options.worker)
        work = {
            "case": lambda: measure(Case(**argument), repeats),
            "floor": lambda: measure_floor(**argument),
            "accuracy": measure_accuracy,
        }
        print(json.dumps(work[name]()))
        return 0
    cases = [c for c in all_cases() if not options.only or any(str(c).startswith(text) for text in options.only)]
    if not cases:
        parser.error(f"--only {options.only}: no case begins so, such as {all_cases()[0]}")

    from tqdm import tqdm

    from exo_fast.training import assets

    assets.get_model(assets.cache_dir())
    old = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = {str(_case(row)): row for row in old.get("rows", [])}
    floors = {str(_floor_key(floor)): floor for floor in old.get("floors", [])}
    accuracy = old.get("accuracy", [])

    def save() -> dict:
        ordered = [rows[str(case)] for case in all_cases() if str(case) in rows]
        results = {
            **machine.describe(),
            "task": {"candidates": CANDIDATES, "completion": COMPLETION, "loss_type": "exo-rw"},
            "floors": list(floors.values()),
            "accuracy": accuracy,
            "rows": ordered,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        return results

    if options.accuracy or not options.only:
        accuracy = apart("accuracy", {})
        save()
    with tqdm([] if options.accuracy else cases, unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(str(case))
            key = {"width": case.width, "vocab": case.vocab, "precision": case.precision}
            if (case.method == "full-logits" and case.tokens == TOKENS[0]) or str(_floor_key(key)) not in floors:
                floors[str(_floor_key(key))] = apart("floor", key)
            repeats = options.repeats or (5 if case.tokens == TOKENS[0] else 3 if case.tokens == TOKENS[1] else 1)
            why = impossible(case)
            rows[str(case)] = {**asdict(case), "skipped": why} if why else apart("case", asdict(case), repeats)
            save()
    print(report(save()))
    print(f"\nwritten to {options.output}")
    return 0


def _case(row: dict) -> Case:
    return Case(**{name: row[name] for name in ("method", "width", "vocab", "precision", "tokens")})


def _floor_key(row: dict) -> tuple:
    return row["width"], row["vocab"], row["precision"]


if __name__ == "__main__":
    sys.exit(main())
