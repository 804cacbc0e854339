"""The numbers that training and evaluation report, defined once.

All are computed per group from the sequence log-probs s_k of the policy and s_k^ref of the reference (nats)
and the given rewards, and then averaged over the groups of an interval or of the evaluation split, whatever
batches and processes they came in. r_k = beta_pi · (s_k − s_k^ref) is the policy's implicit reward. *chosen*
is the candidate of the highest given reward, *rejected* the one of the lowest (with two candidates, TRL's
meaning). If several share the highest or the lowest reward, their mean is used.

    loss                 EXO or DPO (exo_fast.reference), the mean over groups
    rewards/chosen       r of the chosen candidate
    rewards/rejected     r of the rejected candidate
    rewards/accuracies   1 if rewards/chosen > rewards/rejected, else 0
    rewards/margins      rewards/chosen − rewards/rejected
    logps/chosen         s of the chosen candidate
    logps/rejected       s of the rejected candidate
    group_accuracy       1 if the candidate of the highest r is the chosen one (or one of several), else 0; if n
                         candidates share the highest r, the share of them that are chosen (so it starts at chance)
    kl                   mean over the candidates of s^ref − s: the KL(π_ref ‖ π) per sequence in nats, if the
                         candidates were sampled from the reference (an unbiased estimate; else just a distance)
    entropy              −Σ_k q_k log q_k with q = softmax(r): log K at the start, 0 when the policy picks one candidate

Beside them the Trainer's log carries `tokens_per_second` (tokens put through the model by all processes since
the last log, padding not counted and a shared prompt counted once, over the time spent in training steps) and
`peak_memory_mb` (largest over processes: allocated device memory on an accelerator, resident memory on a
CPU).
"""

import torch
from torch import Tensor

GROUP_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "group_accuracy",
    "kl",
    "entropy",
)


def group_metrics(policy_logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta_pi: float) -> Tensor:
    """Compute the metrics: (G, K) each -> (G, len(GROUP_METRICS)) float32, one column per metric in that order."""
    policy_logps, ref_logps = policy_logps.float(), ref_logps.float()
    implicit = beta_pi * (policy_logps - ref_logps)
    best, worst = rewards == rewards.amax(-1, keepdim=True), rewards == rewards.amin(-1, keepdim=True)
    chosen, rejected = _mean(implicit, best), _mean(implicit, worst)
    highest = implicit == implicit.amax(-1, keepdim=True)
    log_q = torch.log_softmax(implicit, dim=-1)
    columns = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": _mean(policy_logps, best),
        "logps/rejected": _mean(policy_logps, worst),
        "group_accuracy": (highest & best).sum(-1) / highest.sum(-1),
        "kl": (ref_logps - policy_logps).mean(-1),
        "entropy": -(log_q.exp() * log_q).sum(-1),
    }
    return torch.stack([columns[name].float() for name in GROUP_METRICS], dim=-1)


def _mean(values: Tensor, of: Tensor) -> Tensor:
    """Return (G,): the mean of (G, K) values over the candidates that a mask (G, K) selects."""
    return values.where(of, torch.zeros_like(values)).sum(-1) / of.sum(-1)
