"""The definitions: EXO and DPO over K candidates, with full logits and no tricks.

Read this file beside the paper (Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment",
ICML 2024, arXiv 2402.00856). Every fast path in the library is tested against it.

Shapes: N completion tokens, D hidden size, V vocabulary, G groups (prompts) of K candidates each.
All arithmetic is in float32 at least, and in float64 when an input is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw")


@dataclass(frozen=True)
class LossOptions:
    """The options of the loss of a group, as passed inside the library (public functions take them by name)."""

    loss_type: str  # one of LOSS_TYPES
    beta_pi: float = 0.1  # coefficient of the log-ratio
    beta_r: float = 0.1  # temperature of the rewards in *-rw
    label_smoothing: float = 1e-3  # ε of the *-pref targets


def default_label_smoothing(loss_type: str) -> float:
    """Return the default ε: 0 for dpo-pref (plain DPO), 1e-3 for EXO, which needs every log p finite."""
    return 0.0 if loss_type == "dpo-pref" else 1e-3


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return z = softcap(h Wᵀ + b) · scale with softcap(a) = c·tanh(a/c); (N, V) in the compute dtype.

    `scale` is the model's own logit scale divided by the sampling temperature (the original divides the logits
    of both models by it).
    """
    dtype = compute_dtype(hidden, weight, bias)
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z * scale


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return log-probs ℓ_t = z[y_t] − logsumexp(z); shape of `targets`, 0 where the target is `ignore_index`."""
    keep = targets != ignore_index
    logps = torch.log_softmax(logits(hidden, weight, bias, scale, softcap), dim=-1)
    chosen = logps.gather(-1, targets.where(keep, torch.zeros_like(targets)).unsqueeze(-1)).squeeze(-1)
    return chosen.where(keep, torch.zeros_like(chosen))


def token_statistics(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Return statistics of each row's distribution p = softmax(z), without a gradient; 0 (False) where the target is
    `ignore_index`. Shape of `targets`, in the compute dtype.

    entropy: −Σ p log p in nats. log_sum_sq_probs: log Σ p². mean_logits: the mean of z over the vocabulary. is_top1
    (bool): z[y] is the largest logit, the first of equal ones.
    """
    keep = targets != ignore_index
    z = logits(hidden, weight, bias, scale, softcap).detach()
    log_p = torch.log_softmax(z, dim=-1)
    found = {
        "entropy": torch.special.entr(log_p.exp()).sum(-1),  # 0·log 0 = 0
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }
    return {name: value.where(keep, torch.zeros_like(value)) for name, value in found.items()}


def sequence_logps(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return s_k = Σ_t ℓ_t over each sequence's tokens: (N,) and (S+1,) boundaries -> (S,)."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequences = torch.arange(len(lengths), device=token_logps.device)
    owner = torch.repeat_interleave(sequences, lengths, output_size=len(token_logps))  # or a GPU is asked for the size
    return torch.zeros(len(lengths), dtype=token_logps.dtype, device=token_logps.device).index_add(
        0, owner, token_logps
    )


def target_logps(rewards: Tensor, loss_type: str, beta_r: float, label_smoothing: float) -> Tensor:
    """Return log p over the K candidates of each group: (G, K) rewards -> (G, K).

    `*-rw`: p = softmax(reward / beta_r), the reward's own distribution over the candidates (paper, eq. 14).
    `*-pref`: the candidate of the highest reward gets 1 − ε, each other ε / (K − 1) (the paper's preference case,
    for any K). If m share the highest reward, each of them gets (1 − ε) / m, and each other ε / (K − m); if all K share
    it, 1 / K. log p is −inf if ε = 0, which only DPO may ask for.
    """
    if loss_type.endswith("-rw"):
        return torch.log_softmax(rewards / beta_r, dim=-1)
    best = rewards == rewards.amax(-1, keepdim=True)
    tied, candidates = best.sum(-1, keepdim=True), rewards.shape[-1]
    mass = torch.full_like(rewards, label_smoothing, dtype=torch.float64).masked_fill(best, 1 - label_smoothing)
    p = mass.masked_fill(tied == candidates, 1.0) / torch.where(best, tied, candidates - tied)
    return p.to(rewards.dtype).log()


def group_loss(
    policy_logps: Tensor,  # (G, K) sequence log-probs
    ref_logps: Tensor,  # (G, K)
    rewards: Tensor,  # (G, K)
    *,
    loss_type: str,
    beta_pi: float = 0.1,
    beta_r: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """Return the loss of each group, (G,).

    r_k = beta_pi · (s_k − s_k^ref) and log q = log_softmax_k(r): the policy's distribution over the candidates
    relative to the reference (paper, eq. 12).
    EXO, reverse KL(q ‖ p): Σ_k q_k (log q_k − log p_k)   (paper, eq. 13 with the empirical distributions).
    DPO, forward cross-entropy: −Σ_k p_k log q_k          (paper, section 3: DPO minimises the forward KL).
    """
    dtype = compute_dtype(policy_logps, ref_logps, rewards)
    log_q = torch.log_softmax(beta_pi * (policy_logps.to(dtype) - ref_logps.to(dtype)), dim=-1)
    log_p = target_logps(rewards.to(dtype), loss_type, beta_r, label_smoothing)
    if loss_type.startswith("exo"):
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return -(log_p.exp() * log_q).sum(-1)


def linear_group_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (G*K + 1,)
    ref_logps: Tensor,  # (G, K)
    rewards: Tensor,  # (G, K)
    *,
    loss_type: str,
    beta_pi: float = 0.1,
    beta_r: float = 0.1,
    label_smoothing: float = 1e-3,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss over groups (scalar) and the detached policy sequence log-probs (G, K), by autograd."""
    token_logps = linear_logprobs(hidden, weight, targets, bias=bias, scale=scale, softcap=softcap)
    policy_logps = sequence_logps(token_logps, cu_seqlens).view_as(ref_logps)
    losses = group_loss(
        policy_logps,
        ref_logps,
        rewards,
        loss_type=loss_type,
        beta_pi=beta_pi,
        beta_r=beta_r,
        label_smoothing=label_smoothing,
    )
    return losses.mean(), policy_logps.detach()
