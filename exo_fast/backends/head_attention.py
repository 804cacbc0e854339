"""The vocabulary projection as attention: the schedule for bf16 products on a CPU, which forms no logits at all.

A softmax over the vocabulary is attention with the hidden states as queries and the head's rows as keys and values:

    attention(H, W, W)_t = Σ_v p_tv W_v               its log-sum-exp over v is the logits', lse_t
    ∂ℓ_t/∂h_t = scale · (W[y_t] − attention(H, W, W)_t)

and dW is attention with the roles exchanged and −lse_t added to the scores, since exp(z_tv − lse_t) = p_tv:

    Σ_t p_tv c_t h_t = exp(m_v) · attention(W, H, c ⊙ H)_v      m_v the log-sum-exp over t
    ∂L/∂W_v = scale · (Σ_{t: y_t = v} c_t h_t − Σ_t p_tv c_t h_t)

PyTorch's flash attention for CPUs does the work, in caches: 4·N·D·V flops for ℓ and dH, and as many for dW. The total
of 8 is more than the 6 of the schedule that keeps U, and still faster if bf16 products are fast (AMX):
docs/performance.md. Scratch is a slice of the vocabulary and some rows of hidden states, whatever N and V. A group may
be of any length, because c is needed only when all log-probs are known.

The first attention is computed in float32 with bf16 products. The exponential of PyTorch's bf16 kernel is good to 5e-5,
always in the same direction, which over 2,048 tokens is 0.1 nats. In dW that error is nothing beside the rounding of
the operands, so dW uses the bf16 kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exo_fast import precision
from exo_fast.backends import scratch_budget
from exo_fast.backends.rows import group_units, kept_chunks, kept_rows, row_chunks
from exo_fast.closed_form import losses_and_coefficients
from exo_fast.head import Head
from exo_fast.reference import LossOptions

COLUMNS = 8192  # of the vocabulary at a time, in each part that threads work on
ROWS = 4096  # of hidden states at a time; 8,192 are 2% faster and take twice the scratch
MAX_WIDTH = 960  # beyond it the kernel's blocks of 256 and 512 rows leave the cache, and keeping U is as fast
MIN_ROWS = 1024  # below it the kernel's blocks are too few and small, and keeping U is faster
QUERIES = 256  # the kernel's block of queries, the work of one thread

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def applies(rows: int, hidden: Tensor, head: Head) -> bool:
    """Return whether to use this schedule for so many rows: bf16 products on a CPU with AMX, logits h Wᵀ · scale."""
    return (
        rows >= MIN_ROWS
        and hidden.shape[-1] <= MAX_WIDTH
        and hidden.device.type == "cpu"
        and (hidden.dtype == torch.bfloat16 or (hidden.dtype == torch.float32 and precision.fp32_precision() == "bf16"))
        and head.bias is None
        and head.softcap is None
        and torch.cpu._is_amx_tile_supported()
    )


class Sizes:
    """The numbers of rows and columns that the budget holds at once, and of parts of a slice of the vocabulary."""

    def __init__(self, n: int, width: int, memory_budget: int | None, device: torch.device):
        half, threads = scratch_budget(memory_budget, device) // 2, torch.get_num_threads()
        # Bytes of a column: its float32 and bf16 copies, and its share of dW. Whole blocks, so that parts divide it.
        columns = min(COLUMNS, half // (12 * width)) // QUERIES
        # A chunk of few rows would leave threads idle, so threads share it by columns.
        self.parts = 1
        while 2 * self.parts * -(-min(n, ROWS) // QUERIES) <= threads and 2 * self.parts <= min(8, columns):
            self.parts *= 2
        self.columns = max(1, columns // self.parts) * self.parts * QUERIES
        # Bytes of a row, in float32: itself, its mean, this chunk's and the last one's gradient, each part's result;
        # and of the kernel, for each thread, its block of scores and results.
        kernel = 4 * threads * QUERIES * (2 * QUERIES + width)
        row = (16 + 4 * self.parts) * width
        self.rows = max(1, min(n, ROWS, max(QUERIES, (half - kernel) // row)))
        self.bytes = self.rows * row + kernel + self.columns * 12 * width


def softmax_mean(hidden: Tensor, head: Head, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return logsumexp_v z_tv (n,) and Σ_v p_tv W_v (n, D), both float32, of hidden (n, D)."""
    queries, parts = hidden.float().contiguous(), sizes.parts
    lse = mean = hidden.new_empty(0)  # over the columns done so far; the first part of the first slice replaces them
    for start in range(0, len(head.weight), sizes.columns):
        rows = head.weight[start : start + sizes.columns].float().contiguous()
        split = parts if len(rows) % parts == 0 else 1
        keys = rows.view(1, split, -1, rows.shape[1])
        with precision.bf16_products(torch.bfloat16):
            out, part_lse = flash(queries.expand(1, split, -1, -1), keys, keys, scale=head.scale)
        for part, value in zip(out[0], part_lse[0], strict=True):
            if not len(mean):
                lse, mean = value, part.contiguous()
            else:
                together = torch.logaddexp(lse, value)
                mean.lerp_(part, (value - together).exp_().unsqueeze(1))
                lse = together
    return lse, mean


def token_gradients(hidden: Tensor, head: Head, targets: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return logsumexp_v z_tv (n,), z[y] (n,) and W[y] − Σ_v p_tv W_v (n, D), float32, of hidden (n, D).

    z[y] and W[y] are of operands rounded as in the products, because for p_ty near 1 the differences are small.
    """
    lse, mean = softmax_mean(hidden, head, sizes)
    rows = head.weight[targets].bfloat16().float()
    target = torch.linalg.vecdot(hidden.bfloat16().float(), rows).mul_(head.scale)
    return lse, target, rows.sub_(mean)


def token_logps(target: Tensor, lse: Tensor) -> Tensor:
    """Return z[y] − lse, at most 0; the terms come from two summations, so rounding could make it positive."""
    return (target - lse).clamp_(max=0)


def add_to_weight(
    total: Tensor | None,  # (V, D) float32, is added to
    hidden: Tensor,  # (n, D)
    head: Head,
    targets: Tensor,  # (n,)
    lse: Tensor,  # (n,) float32
    coefficients: Tensor,  # (n,) float32, ∂L/∂ℓ
    sizes: Sizes,
) -> Tensor:
    """Return `total` plus ∂L/∂W of these rows, in place if there is a total."""
    # Both halves of ∂L/∂W take the rounded c ⊙ H: if p_ty is near 1 they nearly cancel.
    scaled = (hidden.float() * (coefficients * head.scale).unsqueeze(1)).bfloat16()
    keys, values = _one_head(hidden.bfloat16()), _one_head(scaled)
    bias = -lse.view(1, 1, 1, -1)
    first = total is None
    if total is None:
        total = _float32(head.weight, head.weight.shape)
    for start in range(0, len(total), sizes.columns):
        columns = slice(start, start + sizes.columns)
        queries = _one_head(head.weight[columns].bfloat16())
        mean, mass = flash(queries, keys, values, attn_mask=bias.expand(1, 1, queries.shape[2], -1), scale=head.scale)
        mass = -mass[0, 0].exp().unsqueeze(1)
        if first:
            torch.mul(mean[0, 0], mass, out=total[columns])
        else:
            total[columns].addcmul_(mean[0, 0], mass)
    return total.index_add_(0, targets, scaled.float())


def _one_head(rows: Tensor) -> Tensor:
    """Return (n, D) in the shape attention takes. The kernel reads contiguous rows, whatever the strides."""
    return rows.contiguous().view(1, 1, *rows.shape)


def _float32(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def logprobs_forward(
    hidden: Tensor, head: Head, targets: Tensor, memory_budget: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do `exo_fast.backends.torch.logprobs_forward` with ∂ℓ_t/∂h_t: 4·N·D·V flops. A row's sum is 1, its shift lse."""
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    sizes = Sizes(n, hidden.shape[1], memory_budget, hidden.device)
    stats = _float32(hidden, (3, len(hidden))).copy_(hidden.new_tensor([[0], [1], [0]]))  # log-prob 0 where ignored
    unit = hidden.new_zeros(hidden.shape)
    for rows in kept_chunks(kept, n, sizes.rows):
        stats[0, rows], stats[2, rows], part = token_gradients(hidden[rows], head, targets[rows], sizes)
        unit[rows] = part.mul_(head.scale).to(unit.dtype)
    return token_logps(stats[2], stats[0]), stats, unit


def logprobs_backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: Tensor,  # (3, N)
    grad: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor | None, Tensor | None, None]:
    """Do `exo_fast.backends.torch.logprobs_backward`: 4·N·D·V flops for each of dH and dW."""
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    sizes = Sizes(n, hidden.shape[1], memory_budget, hidden.device)
    lse = stats[0] + stats[1].log()
    grad_hidden = hidden.new_zeros(hidden.shape) if need[0] else None
    total = _float32(head.weight, head.weight.shape).zero_() if need[1] and n == 0 else None
    for rows in kept_chunks(kept, n, sizes.rows):
        h, y, c = hidden[rows], targets[rows], grad[rows].float()
        if grad_hidden is not None:
            part = token_gradients(h, head, y, sizes)[2]
            grad_hidden[rows] = part.mul_((c * head.scale).unsqueeze(1)).to(hidden.dtype)
        if need[1]:
            total = add_to_weight(total, h, head, y, lse[rows], c, sizes)
    return grad_hidden, total, None


def group_loss_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    loss: LossOptions,
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None, None]]:
    """Do `exo_fast.backends.torch.group_loss_forward` if hidden needs a gradient: 4·N·D·V flops, 8 with dW."""
    groups, candidates = ref_logps.shape
    bounds = cu_seqlens[::candidates].tolist()
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sizes = Sizes(len(hidden), hidden.shape[1], memory_budget, hidden.device)
    lse, policy_logps = _float32(hidden, (len(hidden),)), _float32(hidden, (groups * candidates,)).zero_()
    losses, coefficients = _float32(hidden, (groups,)), _float32(hidden, (groups * candidates,))
    grad_hidden = hidden.new_empty(hidden.shape)

    for first, last in group_units(bounds, sizes.rows):
        pieces = row_chunks(bounds[first], bounds[last], sizes.rows)
        for rows in pieces:
            lse[rows], target, unit = token_gradients(hidden[rows], head, targets[rows], sizes)
            policy_logps.index_add_(0, owner[rows], token_logps(target, lse[rows]))
            if len(pieces) > 1:
                grad_hidden[rows] = unit.to(hidden.dtype)
        sequences = slice(first * candidates, last * candidates)
        losses[first:last], c = losses_and_coefficients(
            policy_logps[sequences].view(last - first, candidates), ref_logps[first:last], rewards[first:last], loss
        )
        coefficients[sequences] = c.flatten() / groups
        for rows in pieces:
            part = unit if len(pieces) == 1 else grad_hidden[rows].float()
            grad_hidden[rows] = part.mul_((coefficients[owner[rows]] * head.scale).unsqueeze(1)).to(hidden.dtype)

    total = None
    if need[1]:
        for rows in row_chunks(0, len(hidden), sizes.rows):
            c = coefficients[owner[rows]]
            total = add_to_weight(total, hidden[rows], head, targets[rows], lse[rows], c, sizes)
    return losses, policy_logps.view(groups, candidates), (grad_hidden, total, None)
