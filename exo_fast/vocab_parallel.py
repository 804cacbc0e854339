"""Vocabulary parallelism: a head whose rows lie on the ranks of a process group, a slice of the vocabulary on each.

Every rank has the same hidden states and targets, and V_r rows of the head, slices in the order of the ranks. A
softmax over the whole vocabulary needs only three numbers a row from each slice: shift, Σ exp(z − shift) and, if the
target is in the slice, its logit. They are gathered, and added in the order of the ranks, so all ranks hold the
same bits. The results are the statistics of the whole vocabulary. With them a backend forms the gradients of a
slice as for a whole head: dW and db are the slice's own, dH is one share of a sum over the ranks. Shares
are float32 until they have been added, whatever the dtype of hidden.

A rank's flops for N rows: 2·N·D·V_r for log-probs, and with gradients 8·N·D·V_r (6 with a frozen head): two passes, as
one would need the other ranks' sums after every chunk of rows that the budget holds. Communication: 7 integers of each
rank for the checks, 12·N bytes of each gathered, and 4·N·D bytes reduced for dH.

The ranks must make the same calls in the same order, and compute the same loss: they wait for each other in
forward, and in backward if hidden needs a gradient (whether weight and bias need one may differ). The autograd
function is eager, since operators of torch.library take no process group.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from exo_fast import reference
from exo_fast.backends import implementation
from exo_fast.backends.rows import ELSEWHERE
from exo_fast.head import Head
from exo_fast.reference import LossOptions
from exo_fast.validate import check_tensor, require


@dataclass(frozen=True)
class Slice:
    """The rows of the head on this rank: [start, start + V_r) of `vocab`, two tensors () on the device of hidden."""

    group: dist.ProcessGroup
    start: Tensor
    vocab: Tensor

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Slice:
        """Gather all ranks' parts of the vocabulary, and check that they agree on everything else. Ranks that disagree
        would wait for each other for ever, or add up numbers of different rows."""
        for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
            check_tensor(name, value)
        facts = {
            "the rows of weight": math.prod(weight.shape[:1]),
            "the size of a row of weight": math.prod(weight.shape[1:]),
            "the number of values in hidden": hidden.numel(),
            "the bytes of a value of hidden": hidden.itemsize,
            "whether hidden needs a gradient": int(torch.is_grad_enabled() and hidden.requires_grad),
            "the number of targets": targets.numel(),
        }
        ids = targets.flatten().long()
        checksum = (ids * torch.arange(1, len(ids) + 1, device=ids.device)).sum()
        own = torch.tensor([*facts.values(), 0]).to(hidden.device, non_blocking=True)
        own[-1] = checksum
        table = gathered(own, group)

        def error() -> str:
            names, columns = [*facts, "the targets (a checksum of them)"][1:], table[:, 1:].T.tolist()
            name, values = next((n, c) for n, c in zip(names, columns, strict=True) if len(set(c)) > 1)
            return (
                f"process_group: its ranks differ in {name}: {values} by rank. Each rank needs its own rows of weight "
                "(and bias), and the same hidden and targets"
            )

        message = "process_group: its ranks differ in more than their rows of weight; all need one hidden and targets"
        require((table[:, 1:] == table[:1, 1:]).all(), message, error)
        rows = table[:, 0]
        return cls(group, rows[: dist.get_rank(group)].sum(), rows.sum())

    def local(self, targets: Tensor, rows: int) -> Tensor:
        """Return targets, −1 where ignored, as the backends number them in a slice of so many rows."""
        column = targets - self.start
        inside = (column >= 0) & (column < rows)
        return torch.where(inside, column, ELSEWHERE).where(targets >= 0, -1)


def gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather each rank's `value`, in the order of the ranks, along a new first dimension."""
    out = value.new_empty(dist.get_world_size(group), *value.shape)
    dist.all_gather(list(out.unbind()), value.contiguous(), group=group)
    return out


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any, backend: str
) -> tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | None]:
    """Return the operands of the losses: plain tensors, and the vocabulary's process group if it is in slices.

    A DTensor weight sharded on dim 0, as tensor parallelism of PyTorch and of transformers leaves it, gives
    its local rows and its mesh's group; a replicated one gives itself and no group. Gradients come back as DTensors of
    the same placements. Raises ValueError for another placement, for a group that is not this rank's, for a slice
    whose group is missing, and for the reference backend, which needs the logits of a whole head.
    """
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(
            "process_group must be a torch.distributed.ProcessGroup, in which this rank is, or None, "
            f"got {type(process_group).__name__}"
        )
    hidden = _replicated("hidden", hidden)
    placements = _placements(weight)
    if _placements(bias) != placements and bias is not None:
        raise ValueError(f"bias must be placed as weight is, {_words(weight)}, got {_words(bias)}")
    if placements is not None:
        if process_group is not None:
            raise ValueError("weight is a DTensor, which has its own process group: leave process_group=None")
        process_group = _group(weight)
        weight, bias = _local(weight), None if bias is None else _local(bias)
    elif process_group is None and getattr(weight, "tensor_model_parallel", False):
        raise ValueError(
            "weight is marked tensor_model_parallel, as DeepSpeed and Megatron mark a slice: pass the process_group of "
            "the ranks that hold the others (exo_fast.head.read_head finds DeepSpeed's)"
        )
    if process_group is not None and backend == "reference":
        raise ValueError("backend='reference' needs the whole weight, not a slice: use backend='torch' or 'triton'")
    return hidden, weight, bias, process_group


def _local(value: Any) -> Tensor:
    """Return this rank's rows of a DTensor."""
    return value.to_local()


def _group(weight: Any) -> dist.ProcessGroup | None:
    """Return the process group that a DTensor (V, D) is cut over; None if every rank has all of it."""
    placements, mesh = weight.placements, weight.device_mesh
    if all(placement.is_replicate() for placement in placements):
        return None
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "weight must be a plain tensor, or a DTensor that is replicated, or sharded on dim 0 (the vocabulary) over "
            f"a 1-D mesh, got {_words(weight)}; redistribute it, or pass weight.full_tensor()"
        )
    ranks = mesh.mesh.tolist()
    if ranks != sorted(ranks):
        raise ValueError(f"weight is sharded over a mesh of the ranks {ranks}; they must ascend, as in a process group")
    return mesh.get_group()


def _placements(value: Any) -> tuple | None:
    """Return the placements of a DTensor, or None for a plain tensor. Imports DTensor only if one is used."""
    return getattr(value, "placements", None)


def _words(value: Any) -> str:
    placements = _placements(value)
    return "a plain tensor" if placements is None else f"{placements} on a {value.device_mesh.ndim}-D mesh"


def _replicated(name: str, value: Any) -> Any:
    placements = _placements(value)
    if placements is None:
        return value
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(f"{name} must be a plain tensor or a replicated DTensor, got {_words(value)}; redistribute it")
    return value.to_local()


def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    targets: Tensor,  # (N,) int64 in the whole vocabulary, −1 where ignored
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    backend: str,
    part: Slice,
) -> Tensor:
    """Return per-token log-probs (N,), the same bits on all ranks; differentiable in hidden, weight and bias."""
    local = part.local(targets, len(weight))
    return _LinearLogprobs.apply(hidden, weight, bias, local, scale, softcap, memory_budget, backend, part.group)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float,
        softcap: float | None, memory_budget: int | None, backend: str, group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        head = Head(weight.to(hidden.dtype), bias, scale, softcap)  # under autocast it comes in its own dtype
        stats, own = _statistics(hidden, head, targets, memory_budget, backend, group)
        ctx.save_for_backward(hidden, weight, bias, targets, stats, own)
        ctx.options = (scale, softcap, memory_budget, backend, group)
        ctx.set_materialize_grads(False)
        shift, total, target = stats
        # Target and sum may come from two ranks, with different rounding: keep the log-prob at most 0.
        return (target - shift - total.log()).clamp_(max=0).masked_fill_(targets < 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        hidden, weight, bias, targets, stats, own = ctx.saved_tensors
        scale, softcap, memory_budget, backend, group = ctx.options
        need, head = ctx.needs_input_grad[:3], Head(weight.to(hidden.dtype), bias, scale, softcap)
        gradients = _gradients(hidden, head, targets, stats, own, grad.contiguous(), need, memory_budget, backend)
        if need[0]:
            dist.all_reduce(gradients[0], group=group)
        rounded = [None if g is None else g.to(p.dtype) for g, p in zip(gradients, (hidden, weight, bias), strict=True)]
        return *rounded, *[None] * 6


def _statistics(
    hidden: Tensor, head: Head, targets: Tensor, memory_budget: int | None, backend: str, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return (3, N) of the whole vocabulary and of this slice, in the backends' order: shift, Σ exp(z − shift), target
    logit."""
    if len(head.weight):
        with torch.autocast(hidden.device.type, enabled=False):
            _, own, _ = implementation(backend).logprobs_forward(hidden, head, targets, memory_budget, False)
    else:
        own = hidden.new_zeros(3, len(hidden), dtype=reference.compute_dtype(hidden))
        own[0] = torch.finfo(own.dtype).min
    shifts, sums, target = gathered(own, group).unbind(1)
    shift = shifts.amax(0)
    return torch.stack([shift, (sums * (shifts - shift).exp()).sum(0), target.sum(0)]), own


def _gradients(
    hidden: Tensor, head: Head, targets: Tensor, stats: Tensor, own: Tensor, grad: Tensor,
    need: tuple[bool, bool, bool], memory_budget: int | None, backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return this slice's share of dH, and its dW and db, in the dtype of the statistics."""
    if len(head.weight):
        with torch.autocast(hidden.device.type, enabled=False):
            return implementation(backend).logprobs_backward(
                hidden, head, targets, stats, grad, need, memory_budget, own
            )
    parameters = (hidden, head.weight, head.bias)
    grad_hidden, grad_weight, grad_bias = (
        torch.zeros_like(p, dtype=stats.dtype) if n and p is not None else None
        for p, n in zip(parameters, need, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


def group_loss(
    token_logps: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (G·K + 1,), on the host or on token_logps' device
    ref_logps: Tensor,  # (G, K)
    rewards: Tensor,  # (G, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss over groups and the detached sequence log-probs (G, K), differentiable in token_logps.

    In float64, which for so few numbers costs nothing. Sequences are summed as segments, in one order on a GPU too.
    """
    offsets = cu_seqlens.to(token_logps.device, torch.int64, non_blocking=True)
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=offsets, unsafe=True).view_as(ref_logps)
    losses = reference.group_loss(sums, ref_logps, rewards, **asdict(options))
    return losses.mean().to(token_logps.dtype), sums.detach().to(token_logps.dtype)
