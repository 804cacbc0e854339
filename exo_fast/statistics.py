"""Log-probs with the statistics that trainers log: entropy, mean logit, whether the target is the argmax, log Σ p².

A trainer that holds the logits computes these in one pass over (N, V) for each. Here they come from the walk over
the vocabulary that makes the log-probs: 2·N·D·V flops for all of it, and no logits kept. Beside the running maximum and
Σ exp(z − shift), a row keeps Σ exp(z − shift)·(z − shift), Σ exp(2(z − shift)), Σ z and the place of the maximum. Then

    entropy = log s − w/s        with s and w the first two sums,
    log Σ p² = log q − 2 log s   with q the third.

Only the log-probs have a gradient, by the second pass of `exo_fast.logprobs` (6·N·D·V, 4 with a frozen head). The
definitions with full logits: `exo_fast.reference.token_statistics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exo_fast import ops, reference
from exo_fast.backends import choose
from exo_fast.backends.checks import checked_targets
from exo_fast.logprobs import checked_operands, rounded

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each row's distribution p = softmax(z). Shape of the targets, no gradient, float32 (float64 for
    float64 inputs) except `is_top1`. None if not asked for; 0 (False) where the target is ignored."""

    entropy: Tensor | None = None  # −Σ p log p, nats
    log_sum_sq_probs: Tensor | None = None  # log Σ_v p_v²
    mean_logits: Tensor | None = None  # of z, after softcap and scale, over the vocabulary; −inf if one of them is
    is_top1: Tensor | None = None  # bool: the target's logit is the largest, the first of equal ones


def linear_logprobs_with_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    outputs: Sequence[str] = OUTPUTS,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str = "auto",
    process_group: Any = None,
) -> tuple[Tensor, TokenStatistics]:
    """Return the log-probs of `exo_fast.logprobs.linear_logprobs`, and the statistics of the same walk.

    Args:
        hidden: (N, D) or (B, T, D), the states that the model feeds its lm_head; float64, float32, bfloat16 or float16.
        weight: (V, D), of hidden's dtype (under torch.autocast both are cast to its dtype). All of the head: a slice of
            the vocabulary, as a sharded DTensor is, is an error.
        targets: (N,) or (B, T) int, the token each row predicts (already shifted).
        outputs: names of `TokenStatistics` to compute; omitted ones cost nothing (the triton backend saves nothing
            by omitting them).
        bias, scale, softcap, ignore_index, memory_budget, backend: as in `linear_logprobs`. If the budget is too small
            for one row of logits, the triton backend still holds one, 4·V bytes.
        process_group: None, as for a head in one piece (`exo_fast.head.Head.options`).

    Returns:
        Log-probs in float32 (float64 for float64 inputs) of the shape of `targets`, differentiable in hidden, weight
        and bias, equal to `linear_logprobs` up to rounding; and the statistics, which have no gradient. The same
        input gives the same bits.

    Raises:
        ValueError: as `linear_logprobs`; an unknown name in `outputs`; a weight that is a slice of the vocabulary, or a
            `process_group`, which means one.
    """
    if isinstance(outputs, str) or not all(name in OUTPUTS for name in outputs):
        raise ValueError(f"outputs must be some of {', '.join(OUTPUTS)}, in a sequence; got {outputs!r}")
    _check_whole(weight, process_group)
    hidden, weight, bias, _ = checked_operands(
        hidden, weight, targets, bias, scale, softcap, ignore_index, memory_budget, backend
    )
    chosen = choose(backend, hidden)
    flat = checked_targets(chosen, targets, weight.shape[0], ignore_index=ignore_index)
    if chosen == "reference":
        head: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap, "ignore_index": ignore_index}
        with torch.autocast(hidden.device.type, enabled=False):
            weight = rounded(weight, hidden.dtype)
            logps = reference.linear_logprobs(hidden, weight, targets, **head)
            every = reference.token_statistics(hidden, weight, targets, **head)
        return logps, TokenStatistics(**{name: every[name] for name in OUTPUTS if name in outputs})
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), [name in outputs for name in OUTPUTS]
    logps, _, *found = ops.linear_logprobs_with_statistics(
        rows, weight, bias, flat, scale, softcap, memory_budget, wanted, chosen
    )
    shaped = {name: f.view(targets.shape) for name, f, w in zip(OUTPUTS, found, wanted, strict=True) if w}
    return logps.view(targets.shape), TokenStatistics(**shaped)


def _check_whole(weight: Tensor, process_group: Any) -> None:
    """Raise ValueError for a slice of the vocabulary: its statistics would describe another distribution."""
    sharded = any(not placement.is_replicate() for placement in getattr(weight, "placements", ()))
    marked = getattr(weight, "tensor_model_parallel", False)
    if sharded or marked or process_group is not None:
        kind = "a sharded DTensor" if sharded else "marked tensor_model_parallel" if marked else "of a process_group"
        raise ValueError(
            f"weight is {kind}, a slice of the head, and statistics are of the whole vocabulary: pass the whole weight "
            "(of a DTensor: weight.full_tensor()), or call linear_logprobs, which takes slices"
        )
