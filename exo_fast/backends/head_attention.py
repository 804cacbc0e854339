"""The vocabulary projection as attention: the schedule for bf16 products on a CPU, which forms no logits at all.

A softmax over the vocabulary is attention with the hidden states as queries and the head's rows as keys and values:

    attention(H, W, W)_t = Σ_v p_tv W_v               its log-sum-exp over v is that of the logits, lse_t
    ∂ℓ_t/∂h_t = scale · (W[y_t] − attention(H, W, W)_t)

and dW is attention with the roles exchanged and −lse_t added to the scores, since exp(z_tv − lse_t) = p_tv:

    Σ_t p_tv c_t h_t = exp(m_v) · attention(W, H, c ⊙ H)_v      m_v the log-sum-exp over t
    ∂L/∂W_v = scale · (Σ_{t: y_t = v} c_t h_t − Σ_t p_tv c_t h_t)

So PyTorch's flash attention for CPUs does the work, in caches: 4·N·D·V flops for ℓ and dH, as much for dW, 8 where the
schedule that keeps U has 6, and faster in all where bf16 products are fast (AMX): docs/performance.md. Scratch is a
slice of the vocabulary and some rows of hidden states, whatever N and V, and a group may be of any length, because c
is needed only when all log-probs are known.

The first attention is computed in float32 with bf16 products: PyTorch's bf16 kernel has an exponential that is good to
5e-5, always in the same direction, which over 2,048 tokens is 0.1 nats. In dW that is nothing beside the rounding of
its operands, and there the bf16 kernel is used.
"""

import torch
from torch import Tensor

from exo_fast.backends import scratch_budget
from exo_fast.backends.products import bf16_products
from exo_fast.backends.rows import group_units, kept_chunks, kept_rows, row_chunks
from exo_fast.groups import losses_and_coefficients
from exo_fast.head import Head

COLUMNS = 8192  # of the vocabulary at a time, for each of the parts that threads work on
ROWS = 8192  # of hidden states at a time
MIN_ROWS = 1024  # for fewer the kernel's blocks are too few and small, and keeping U is faster
QUERIES = 256  # the kernel's block of queries, and so what one thread does

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def applies(rows: int, hidden: Tensor, head: Head) -> bool:
    """Whether this schedule is the one for so many rows: bf16 products on a CPU with AMX, logits h Wᵀ · scale."""
    return (
        rows >= MIN_ROWS
        and hidden.device.type == "cpu"
        and (hidden.dtype == torch.bfloat16 or (hidden.dtype == torch.float32 and fp32_products() == "bf16"))
        and head.bias is None
        and head.softcap is None
        and torch.cpu._is_amx_tile_supported()
    )


def fp32_products() -> str:
    """How oneDNN multiplies float32 operands on this CPU: "bf16" where the user allows it, else "ieee" or "none"."""
    return torch.backends.mkldnn.matmul.fp32_precision


class Sizes:
    """How many rows and columns the budget holds at once, and in how many parts a slice of the vocabulary is run."""

    def __init__(self, n: int, width: int, memory_budget: int | None, device: torch.device):
        budget = scratch_budget(memory_budget, device)
        # Bytes of a row: in float32 itself, its mean, and a part's result. Of a column: float32 and bf16 copies.
        self.rows = min(n, ROWS, max(QUERIES, budget // 2 // (12 * width)))
        self.columns = min(COLUMNS, max(QUERIES, budget // 2 // (12 * width)))
        # A chunk of few rows leaves threads idle: they share it by columns.
        self.parts = max(1, min(8, torch.get_num_threads() // max(1, self.rows // QUERIES), self.columns // QUERIES))


def softmax_mean(hidden: Tensor, head: Head, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """logsumexp_v z_tv (n,) and Σ_v p_tv W_v (n, D), both float32, of hidden (n, D)."""
    queries, parts, lse, mean = hidden.float(), sizes.parts, None, None
    for start in range(0, len(head.weight), sizes.columns):
        rows = head.weight[start : start + sizes.columns].float()
        split = parts if len(rows) % parts == 0 else 1
        keys = rows.view(1, split, -1, rows.shape[1])
        with bf16_products(torch.bfloat16):
            out, part_lse = flash(queries.expand(1, split, -1, -1), keys, keys, scale=head.scale)
        for part, value in zip(out[0], part_lse[0], strict=True):
            if lse is None:
                lse, mean = value, part.contiguous()
            else:
                together = torch.logaddexp(lse, value)
                mean.lerp_(part, (value - together).exp_().unsqueeze(1))
                lse = together
    return lse, mean


def target_logits(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """z[y] (n,), of operands rounded as the products round them, and W[y] (n, D), float32."""
    rows = head.weight[targets]
    product = torch.linalg.vecdot(hidden.bfloat16().float(), rows.bfloat16().float())
    return product.mul_(head.scale), rows.float()


def add_to_weight(
    total: Tensor | None,  # (V, D) float32, is added to
    hidden: Tensor,  # (n, D)
    head: Head,
    targets: Tensor,  # (n,)
    lse: Tensor,  # (n,) float32
    coefficients: Tensor,  # (n,) float32, ∂L/∂ℓ
    sizes: Sizes,
) -> Tensor:
    """`total` and ∂L/∂W of these rows, in place where there is a total."""
    # Both halves of ∂L/∂W take the rounded c ⊙ H: where p_ty is near 1 they nearly cancel.
    scaled = (hidden.float() * (coefficients * head.scale).unsqueeze(1)).bfloat16()
    keys, values = _one_head(hidden.bfloat16()), _one_head(scaled)
    bias = -lse.view(1, 1, 1, -1)
    first, total = total is None, torch.empty(head.weight.shape) if total is None else total
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
    return rows.view(1, 1, *rows.shape)


def logprobs_forward(
    hidden: Tensor, head: Head, targets: Tensor, memory_budget: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`exo_fast.backends.torch.logprobs_forward` with ∂ℓ_t/∂h_t: 4·N·D·V flops. A row's sum is 1, its shift lse."""
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    sizes = Sizes(n, hidden.shape[1], memory_budget, hidden.device)
    stats = torch.zeros(3, len(hidden))
    stats[1] = 1
    unit = torch.zeros_like(hidden)
    for rows in kept_chunks(kept, n, sizes.rows):
        h, y = hidden[rows], targets[rows]
        stats[0, rows], mean = softmax_mean(h, head, sizes)
        stats[2, rows], target = target_logits(h, head, y)
        unit[rows] = target.sub_(mean).mul_(head.scale).to(unit.dtype)
    return stats[2] - stats[0], stats, unit


def logprobs_backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: Tensor,  # (3, N)
    grad: Tensor,  # (N,)
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor | None, Tensor | None, None]:
    """`exo_fast.backends.torch.logprobs_backward`: 4·N·D·V flops for each of dH and dW."""
    kept = kept_rows(targets)
    n = len(hidden) if kept is None else len(kept)
    sizes = Sizes(n, hidden.shape[1], memory_budget, hidden.device)
    lse = stats[0] + stats[1].log()
    grad_hidden = torch.zeros_like(hidden) if need[0] else None
    total = torch.zeros(head.weight.shape) if need[1] and n == 0 else None
    for rows in kept_chunks(kept, n, sizes.rows):
        h, y, c = hidden[rows], targets[rows], grad[rows].float()
        if need[0]:
            _, mean = softmax_mean(h, head, sizes)
            unit = head.weight[y].float().sub_(mean)
            grad_hidden[rows] = unit.mul_((c * head.scale).unsqueeze(1)).to(hidden.dtype)
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
    loss: dict,
    need: tuple[bool, bool, bool],
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None, None]]:
    """`exo_fast.backends.torch.group_loss_forward` where hidden needs a gradient: 4·N·D·V flops, 8 with dW."""
    groups, candidates = ref_logps.shape
    bounds = cu_seqlens[::candidates].tolist()
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sizes = Sizes(len(hidden), hidden.shape[1], memory_budget, hidden.device)
    lse, policy_logps = torch.empty(len(hidden)), torch.zeros(groups * candidates)
    losses, coefficients = torch.empty(groups), torch.empty(groups * candidates)
    grad_hidden = torch.empty_like(hidden)

    for first, last in group_units(bounds, sizes.rows):
        whole, unit = slice(bounds[first], bounds[last]), None
        pieces = row_chunks(whole.start, whole.stop, sizes.rows)
        for rows in pieces:
            lse[rows], mean = softmax_mean(hidden[rows], head, sizes)
            target, unit = target_logits(hidden[rows], head, targets[rows])
            policy_logps.index_add_(0, owner[rows], target - lse[rows])
            unit.sub_(mean)
            if len(pieces) > 1:
                grad_hidden[rows] = unit.to(hidden.dtype)
        sequences = slice(first * candidates, last * candidates)
        losses[first:last], c = losses_and_coefficients(
            policy_logps[sequences].view(last - first, candidates), ref_logps[first:last], rewards[first:last], **loss
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
