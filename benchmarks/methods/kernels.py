"""The memory-bound kernels, each launched alone on a chunk of logits, and their errors against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from exo_fast.backends.triton import launch
from exo_fast.benchmarks.methods.problems import PRECISIONS
from exo_fast.kernels import logits_to_grad, logsumexp_gather
from exo_fast.kernels.targets import of_device

KERNELS = ("logsumexp_gather", "logits_to_grad")
TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # absolute, for log-probs and for gradients in that dtype


def prepare(kernel: str, rows: int, vocab: int, precision: str, device: str) -> tuple[Callable[[], Tensor], int]:
    """Return a launch of the kernel in its default configuration, and the bytes that it must move."""
    logits, targets = _inputs(rows, vocab, precision, device)
    width = logits.shape[1]
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


def prove(kernel: str, precision: str, device: str) -> dict[str, float]:
    """Return the largest absolute error on a small chunk: of log-probs, or of a softmax less the target.

    Raises AssertionError for an error that is more than rounding.
    """
    rows, vocab = 5, 1003
    logits, targets = _inputs(rows, vocab, precision, device)
    logps = torch.log_softmax(logits[:, :vocab].double(), dim=1)
    call, _ = prepare(kernel, rows, vocab, precision, device)
    found = call().double()
    if kernel == "logsumexp_gather":
        name, want = "logps", logps.gather(1, targets.unsqueeze(1)).squeeze(1)
        error = (found[2] - found[0] - found[1].log() - want).abs().max().item()
    else:
        name, want = "dlogits", torch.nn.functional.one_hot(targets, vocab) - logps.exp()
        error = (found[:, :vocab] - want).abs().max().item()
    assert error <= TOLERANCE[precision], f"{kernel} in {precision}: error {error:.1e} of {name}"
    return {name: error}


def _inputs(rows: int, vocab: int, precision: str, device: str) -> tuple[Tensor, Tensor]:
    """Make logits in rows as wide as the backend lays them out, and targets; the same every time."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, -(-vocab // 16) * 16, generator=g, device=device).to(PRECISIONS[precision])
    return logits, torch.randint(vocab, (rows,), generator=g, device=device)
