"""Per-token log-probs of given targets straight from hidden states: the logits of all N tokens never exist at once.

The base of any loss that is a function of log-probs. Two-pass schedule: log-probs now (2·N·D·V flops), logits again
in the backward pass (6·N·D·V). A frozen head needs no second pass: ∂ℓ_t/∂h_t is formed beside the log-probs and only
scaled later (4·N·D·V in all). A head in slices of the vocabulary: `exo_fast.vocab_parallel`.
"""

from typing import Any

import torch
from torch import Tensor

from exo_fast import ops, reference, vocab_parallel
from exo_fast.backends import choose, head_attention
from exo_fast.backends.checks import checked_targets
from exo_fast.head import Head
from exo_fast.validate import (
    check_budget,
    check_ignore_index,
    check_projection,
    check_tensor,
    traced,
)


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return hidden, and the dtype in which weight is multiplied: autocast's, as for any linear layer, if it is on.

    The operators cast weight themselves, so its gradient is their float32 dW. A cast before them would have a backward
    pass of its own, which would round dW to the dtype of the products.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), dtype
    return hidden, weight.dtype


class _Rounded(torch.autograd.Function):
    """A weight rounded to another dtype's numbers, in float32. Its gradient is not rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weight with the numbers it has in `dtype`, for the reference, which computes in float32."""
    return weight if weight.dtype == dtype else _Rounded.apply(weight, dtype)


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Return for each tensor whether autograd will ask for its gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def checked_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int | None,
    backend: str,
    process_group: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None, vocab_parallel.Slice | None]:
    """Check the arguments of every function of log-probs, but for the targets' values. Return hidden, weight and bias
    as they are computed with, and the slice of the vocabulary that weight is, or None. Raises ValueError."""
    check_budget(memory_budget)
    check_ignore_index(ignore_index)
    hidden, weight, bias, group = vocab_parallel.operands(hidden, weight, bias, process_group, backend)
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    hidden, dtype = autocast_operands(hidden, weight)
    part = None if group is None else vocab_parallel.Slice.of(hidden, weight, targets, group)
    check_projection(hidden, weight, dtype, targets, bias, scale, softcap, fewest_rows=1 if part is None else 0)
    return hidden, weight, bias, part


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
    """Return ℓ_t = z[y_t] − logsumexp(z), z = softcap(h Wᵀ + b) · scale, differentiable in hidden, weight and bias.

    Args:
        hidden: (N, D) or (B, T, D), the states that the model feeds its lm_head; float64, float32, bfloat16 or float16.
        weight: (V, D), of hidden's dtype (under torch.autocast both are cast to its dtype).
        targets: (N,) or (B, T) int, the token each row predicts (already shifted).
        bias: (V,) or None.
        scale: factor on the logits: the model's own logit scale divided by the sampling temperature.
        softcap: c of c·tanh(a/c), or None.
        ignore_index: rows with this target get log-prob 0, no gradient, and no work.
        memory_budget: bytes of vocabulary-sized scratch (default 640 MiB on the CPU; on a GPU a power of two up to a
            sixteenth of its memory, at most 4 GiB); less costs time, never correctness.
        backend: reference (full logits), torch (chunked), triton (fused kernels), or auto: triton on a GPU (torch for
            float64), torch elsewhere.
        process_group: the torch.distributed group whose ranks hold the head, a slice of the vocabulary each, in the
            order of the ranks. `weight` and `bias` are then this rank's V_r rows (any number, also 0), hidden
            and targets (ids in the whole vocabulary) are the same on all ranks, and so must be the loss made of the
            log-probs. All ranks get the whole gradient of hidden. A weight that is a DTensor sharded on
            dim 0 of a 1-D mesh (the tensor parallelism of PyTorch and transformers) is used directly, with None here.
            Costs and communication: `exo_fast.vocab_parallel`. Not for torch.compile(fullgraph=True).

    Returns:
        Log-probs in float32 (float64 for float64 inputs), of the shape of `targets`. Logits are float32 whatever the
        inputs, and the same input gives the same bits.

    Raises:
        ValueError: a wrong shape, dtype, device, target or number, or ranks that do not agree; the message names it.
            On a GPU, and in a compiled graph, nothing waits for values: a target out of range, or a disagreement of
            the ranks, is a failed assertion (RuntimeError) on the device.
    """
    hidden, weight, bias, part = checked_operands(
        hidden, weight, targets, bias, scale, softcap, ignore_index, memory_budget, backend, process_group
    )
    chosen = choose(backend, hidden)
    vocab = weight.shape[0] if part is None else part.vocab
    wanted = checked_targets(chosen, targets, vocab, ignore_index=ignore_index)
    if chosen == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            weight = rounded(weight, hidden.dtype)
            return reference.linear_logprobs(
                hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, ignore_index=ignore_index
            )
    need, rows = needs_gradient(hidden, weight, bias), hidden.reshape(-1, hidden.shape[-1])
    if part is not None:
        logps = vocab_parallel.linear_logprobs(rows, weight, bias, wanted, scale, softcap, memory_budget, chosen, part)
        return logps.view(targets.shape)
    # ∂ℓ/∂h beside the log-probs: all the work for a frozen head, and if attention gives both at once.
    unit_hidden = need == (True, False, False) or (
        need[0]
        and chosen == "torch"
        and not traced(hidden)
        and head_attention.applies(len(rows), rows, Head(weight, bias, scale, softcap))
    )
    logps, _, _ = ops.linear_logprobs(rows, weight, bias, wanted, scale, softcap, memory_budget, unit_hidden, chosen)
    return logps.view(targets.shape)
