"""Losses and the coefficients of their gradient from sequence log-probs, in closed form.

The one-pass schedule needs ∂L/∂s_k at the moment a group's last logits are done, before any backward pass, so the
derivative is written out here. `exo_fast.reference.group_loss` is the definition; tests compare the two.
"""

import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.reference import LossOptions


def losses_and_coefficients(
    policy_logps: Tensor,  # (G, K)
    ref_logps: Tensor,  # (G, K)
    rewards: Tensor,  # (G, K)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each group (G,) and ∂(loss of the group)/∂(sequence log-prob), (G, K).

    EXO: ∂L/∂r_j = q_j (log q_j − log p_j − L).  DPO: ∂L/∂r_j = q_j − p_j.  Then ∂L/∂s_j = beta_pi · ∂L/∂r_j.
    """
    dtype = reference.compute_dtype(policy_logps, ref_logps, rewards)
    log_q = torch.log_softmax(options.beta_pi * (policy_logps.to(dtype) - ref_logps.to(dtype)), dim=-1)
    log_p = reference.target_logps(rewards.to(dtype), options.loss_type, options.beta_r, options.label_smoothing)
    q = log_q.exp()
    if options.loss_type.startswith("exo"):
        losses = (q * (log_q - log_p)).sum(-1)
        return losses, options.beta_pi * q * (log_q - log_p - losses.unsqueeze(-1))
    p = log_p.exp()
    return -(p * log_q).sum(-1), options.beta_pi * (q - p)
