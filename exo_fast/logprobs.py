"""Per-token log-probs of given targets straight from hidden states: the logits of all N tokens never exist at once.

The base of any loss that is a function of log-probs. Two-pass schedule: log-probs now (2·N·D·V flops), logits again
in the backward pass (6·N·D·V). A frozen head needs no second pass: ∂ℓ_t/∂h_t is formed beside the log-probs and only
scaled later (4·N·D·V in all).
"""

from typing import Any

import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.backends import choose
from exo_fast.backends import torch as chunked
from exo_fast.head import Head
from exo_fast.validate import check_budget, check_projection, check_targets


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast the operands of the projection are cast as those of any linear layer would be."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float,
        softcap: float | None, memory_budget: int | None,
    ) -> Tensor:  # fmt: skip
        head = Head(weight, bias, scale, softcap)
        ctx.need = ctx.needs_input_grad[:3]
        unit_only = ctx.need == (True, False, False)
        logps, stats, unit = chunked.logprobs_forward(hidden, head, targets, memory_budget, unit_hidden=unit_only)
        if any(ctx.need):
            kept = (unit,) if unit_only else (hidden, weight, bias, targets, stats.shift, stats.sum, stats.target)
            ctx.save_for_backward(*kept)
            ctx.facts = (unit_only, scale, softcap, memory_budget)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit_only, scale, softcap, memory_budget = ctx.facts
        if unit_only:
            (unit,) = ctx.saved_tensors
            return (unit * grad.unsqueeze(1)).to(unit.dtype), *[None] * 6
        hidden, weight, bias, targets, *stats = ctx.saved_tensors
        grads = chunked.logprobs_backward(
            hidden,
            Head(weight, bias, scale, softcap),
            targets,
            chunked.Statistics(*stats),
            grad,
            ctx.need,
            memory_budget,
        )
        return *chunked.as_inputs(grads, weight, bias), *[None] * 4


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str = "auto",
    process_group: Any = None,
) -> Tensor:
    """ℓ_t = z[y_t] − logsumexp(z) with z = softcap(h Wᵀ + b) · scale, differentiable in hidden, weight and bias.

    Args:
        hidden: (N, D) or (B, T, D), what the model feeds its lm_head; float64, float32, bfloat16 or float16.
        weight: (V, D), of hidden's dtype (under torch.autocast both are cast to its dtype).
        targets: (N,) or (B, T) int, the token each row predicts (already shifted).
        bias: (V,) or None.
        scale: factor on the logits: the model's own logit scale divided by the sampling temperature.
        softcap: c of c·tanh(a/c), or None.
        ignore_index: rows with this target get log-prob 0, no gradient, and no work.
        memory_budget: bytes of vocabulary-sized scratch (default 640 MiB); less costs time, never correctness.
        backend: auto, reference, torch or triton.
        process_group: vocabulary parallelism; None.

    Returns:
        Log-probs in float32 (float64 for float64 inputs), of the shape of `targets`. Logits are float32 whatever the
        inputs, and the same input gives the same bits.

    Raises:
        ValueError: a wrong shape, dtype, device, target or number; the message names it.
    """
    check_budget(memory_budget, process_group)
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        hidden, weight = autocast_operands(hidden, weight)
    check_projection(hidden, weight, targets, bias, scale, softcap)
    check_targets(targets, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        if choose(backend, hidden) == "reference":
            return reference.linear_logprobs(
                hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, ignore_index=ignore_index
            )
        rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
        keep = wanted != ignore_index
        if bool(keep.all()):
            return _LinearLogprobs.apply(rows, weight, bias, wanted, scale, softcap, memory_budget).view(targets.shape)
        index = keep.nonzero().squeeze(1)
        logps = _LinearLogprobs.apply(rows[index], weight, bias, wanted[index], scale, softcap, memory_budget)
        return logps.new_zeros(len(wanted)).index_copy(0, index, logps).view(targets.shape)
