"""The EXO and DPO losses over K candidates per prompt: on log-probs, or straight from hidden states in one pass.

Definitions and sources: `exo_fast.reference`. Gradient: `exo_fast.closed_form`. Schedules: `exo_fast.backends`.
"""

from dataclasses import asdict, astuple
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exo_fast import ops, reference, vocab_parallel
from exo_fast.backends import choose
from exo_fast.backends.checks import Groups, checked_targets
from exo_fast.logprobs import autocast_operands, needs_gradient, rounded
from exo_fast.validate import (
    check_boundaries,
    check_budget,
    check_devices,
    check_floating,
    check_group_values,
    check_groups,
    check_projection,
    check_tensor,
)


def group_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    loss_type: str,
    beta_pi: float = 0.1,
    beta_r: float = 0.1,
    label_smoothing: float | None = None,
    ties: Literal["error", "share"] = "error",
    reduction: str = "mean",
) -> Tensor:
    """Return the EXO or DPO loss of groups of K candidates from their sequence log-probs (arXiv 2402.00856).

    Args:
        policy_logps: (G, K) sequence log-probs under the policy, in nats; differentiable.
        ref_logps: (G, K) the same under the reference.
        rewards: (G, K) a finite number for each candidate, in a floating dtype (of integers or booleans pass
            `rewards.float()`). `*-pref` uses only which one is highest.
        loss_type: exo-pref, exo-rw, dpo-pref or dpo-rw.
        beta_pi: coefficient of the log-ratio, r = beta_pi · (policy − reference).
        beta_r: temperature of the rewards in `*-rw` targets, softmax(reward / beta_r).
        label_smoothing: ε of the `*-pref` targets, 1 − ε for the best candidate and ε / (K − 1) for each other.
            Default 1e-3 for EXO, which needs ε > 0, and 0 for dpo-pref.
        ties: the rule of `*-pref` if m candidates share the highest reward. "error" refuses the group; "share" gives
            (1 − ε) / m to each of them and ε / (K − m) to each other, and 1 / K to each if all K are tied. For
            `*-rw` a tie is nothing special.
        reduction: mean over groups, sum, or none for (G,).

    Raises:
        ValueError: a wrong shape, dtype or number, a non-finite reward, or with ties="error" a tie for the highest in
            `*-pref`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not known; choose mean, sum or none")
    check_tensor("policy_logps", policy_logps)
    check_floating("policy_logps", policy_logps)
    options = check_groups(
        tuple(policy_logps.shape), ref_logps, rewards, loss_type, beta_pi, beta_r, label_smoothing, ties
    )
    check_devices("policy_logps", policy_logps.device, ref_logps=ref_logps, rewards=rewards)
    check_group_values(ref_logps, rewards, options, ties)
    losses = reference.group_loss(policy_logps, ref_logps, rewards, **asdict(options))
    return losses if reduction == "none" else getattr(losses, reduction)()


def linear_group_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    loss_type: str,
    beta_pi: float = 0.1,
    beta_r: float = 0.1,
    label_smoothing: float | None = None,
    ties: Literal["error", "share"] = "error",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Compute `group_loss` straight from hidden states, with its gradients formed in the same pass over the vocabulary.

    Args:
        hidden: (N, D), one row for each completion token, group by group and candidate by candidate: the hidden state
            that predicts it (for the first token of a completion, the state of the last prompt token).
        weight: (V, D), of hidden's dtype (under torch.autocast both are cast to its dtype).
        targets: (N,) int, the completion tokens.
        cu_seqlens: (G*K + 1,) int, boundaries of the candidates in N, on hidden's device or on the CPU. From the CPU
            (pinned, if a CUDA graph is captured) chunks are cut at group boundaries without a wait for the GPU. The
            host does not know values on the GPU: then one pass is made if all N rows fit the memory budget, else
            two.
        ref_logps, rewards: (G, K) float; see `group_loss`, also for loss_type, beta_pi, beta_r, label_smoothing
            and ties.
        bias: (V,) or None. scale, softcap: see `exo_fast.logprobs.linear_logprobs`.
        memory_budget: bytes of vocabulary-sized scratch : see `exo_fast.logprobs.linear_logprobs`. If a group does
            not fit, its remaining rows are recomputed; less memory costs time, never correctness.
        backend: see `exo_fast.logprobs.linear_logprobs`.
        process_group: see there. The ranks of a head in slices of the vocabulary get the same loss and policy_logps,
            from the same ref_logps and rewards. Their gradients are formed in the backward pass, in a second pass over
            the slice: 8·N·D·V_r flops instead of 6·N·D·V_r.

    Returns:
        The mean loss over groups (scalar; differentiable in hidden, weight and bias, not twice) and the detached policy
        sequence log-probs (G, K), both float32 (float64 for float64 inputs).

    Raises:
        ValueError: before any work, naming the argument, the value and the requirement. On a GPU, and in a compiled
            graph, nothing waits for values: a wrong value in a tensor is a failed assertion (RuntimeError) there.
    """
    check_budget(memory_budget)
    hidden, weight, bias, group = vocab_parallel.operands(hidden, weight, bias, process_group, backend)
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    hidden, dtype = autocast_operands(hidden, weight)
    part = None if group is None else vocab_parallel.Slice.of(hidden, weight, targets, group)
    options = check_groups(None, ref_logps, rewards, loss_type, beta_pi, beta_r, label_smoothing, ties)
    check_projection(hidden, weight, dtype, targets, bias, scale, softcap, fewest_rows=1 if part is None else 0)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (N, D), the rows that predict completion tokens, got {tuple(hidden.shape)}")
    check_boundaries(cu_seqlens, ref_logps.shape[0], ref_logps.shape[1], hidden.device)
    check_devices("hidden", hidden.device, ref_logps=ref_logps, rewards=rewards)
    chosen = choose(backend, hidden)
    vocab, groups = weight.shape[0] if part is None else part.vocab, Groups(ref_logps, rewards, options, ties)
    targets = checked_targets(chosen, targets, vocab, cu_seqlens=cu_seqlens, groups=groups)
    if chosen == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_group_loss(
                hidden,
                rounded(weight, hidden.dtype),
                targets,
                cu_seqlens.to(hidden.device),
                ref_logps,
                rewards,
                **asdict(options),
                bias=bias,
                scale=scale,
                softcap=softcap,
            )
    if part is not None:
        token_logps = vocab_parallel.linear_logprobs(
            hidden, weight, bias, targets, scale, softcap, memory_budget, chosen, part
        )
        return vocab_parallel.group_loss(token_logps, cu_seqlens, ref_logps, rewards, options)
    if cu_seqlens.device == hidden.device:
        cu_seqlens = cu_seqlens.long()  # on the host it stays uncopied: a copy of pinned memory would not be pinned
    loss, policy_logps, *_ = ops.linear_group_loss(
        hidden, weight, bias, targets, cu_seqlens, ref_logps, rewards, *astuple(options),
        scale, softcap, memory_budget, needs_gradient(hidden, weight, bias), chosen,
    )  # fmt: skip
    return loss, policy_logps


class GroupLoss(nn.Module):
    """`group_loss` with its options held: GroupLoss(loss_type="exo-rw")(policy_logps, ref_logps, rewards)."""

    def __init__(
        self,
        loss_type: str,
        beta_pi: float = 0.1,
        beta_r: float = 0.1,
        label_smoothing: float | None = None,
        reduction: str = "mean",
        ties: Literal["error", "share"] = "error",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "loss_type": loss_type,
            "beta_pi": beta_pi,
            "beta_r": beta_r,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "ties": ties,
        }

    def forward(self, policy_logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Tensor:
        return group_loss(policy_logps, ref_logps, rewards, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearGroupLoss(nn.Module):
    """`linear_group_loss` with its options held; the head's weight and bias come with each call."""

    def __init__(
        self,
        loss_type: str,
        beta_pi: float = 0.1,
        beta_r: float = 0.1,
        label_smoothing: float | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        backend: str = "auto",
        process_group: Any = None,
        ties: Literal["error", "share"] = "error",
    ):
        super().__init__()
        self.options = {
            "loss_type": loss_type,
            "beta_pi": beta_pi,
            "beta_r": beta_r,
            "label_smoothing": label_smoothing,
            "scale": scale,
            "softcap": softcap,
            "memory_budget": memory_budget,
            "backend": backend,
            "process_group": process_group,
            "ties": ties,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        ref_logps: Tensor,
        rewards: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return linear_group_loss(hidden, weight, targets, cu_seqlens, ref_logps, rewards, bias=bias, **self.options)

    extra_repr = GroupLoss.extra_repr
