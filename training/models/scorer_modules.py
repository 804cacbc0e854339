"""Modules that train reward models and classifiers: their forward is the loss of rows of tokenised texts.

A row is two texts for a reward model (prompt with the chosen and with the rejected completion) and one, with its
label, for a classifier. A batch of R rows has all first texts and then all second ones, padded on the right to the
longest. The two texts of a pair begin alike, so a model that can share prompts (exo_fast.layout) runs their common
part once, in batches in which that is less work.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers.utils import logging

from exo_fast.head import unwrap
from exo_fast.layout import plan_mask
from exo_fast.masks import MASKED_ATTENTION
from exo_fast.training.data.texts import PairCollator, RowDataset
from exo_fast.training.models.modules import TrainedModule, packed_batch
from exo_fast.training.models.scorer import HEAD, ROUNDED_TOLERANCE, TOLERANCE, scalars

logger = logging.get_logger(__name__)
CHECKED_PAIRS = 4


class RewardModule(TrainedModule):
    """A one-logit classifier whose forward is the Bradley-Terry loss of pairs: −log σ(r_chosen − r_rejected).

    Metrics of a pair: `accuracy` is 1 if the chosen completion has the higher reward and ½ in a tie.
    """

    metric_names = ("accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.plan = plan_mask(model.config)

    def forward(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """Run on R pairs as PairCollator makes them: (the weighted mean loss, (R, 4)); in evaluation ((R,), (R, 4))."""
        chosen, rejected = self._packed_rewards(batch) if "source" in batch else scalars(self.model, batch).chunk(2)
        margins = chosen - rejected
        accuracy = (1 + margins.sign()) / 2
        metrics = torch.stack([accuracy, chosen, rejected, margins], dim=-1).detach()
        return _reduce(-logsigmoid(margins), batch["weights"], self.training), metrics

    def _packed_rewards(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        packed = packed_batch(batch)
        read = packed.source[packed.cu_seqlens[1:].long() - 1]
        rewards = getattr(unwrap(self.model), HEAD)(self.packed_hidden(packed, self.plan)[read])
        return rewards.float().view(-1, 2).unbind(1)


@torch.no_grad()
def settle_layout(
    module: RewardModule, dataset: RowDataset, collate: PairCollator, *, share_prompt: bool, rounded: bool
) -> dict[str, Any]:
    """Set `collate.share_prompt`: by the caller's wish, by the model's plan, and by numbers on the first pairs.

    `rounded` says that products are in less than float32. Warns if prompts should be shared and cannot. Returns
    the decision, its reason, and the largest difference of a reward over the rewards' root mean square.
    """
    attention = module.config._attn_implementation
    reason, measured = "", {}
    collate.by_length = module.plan.by_length
    if not share_prompt:
        reason = "switched off"
    elif not module.plan.share:
        reason = module.plan.reason
    elif attention not in MASKED_ATTENTION:
        reason = f"attn_implementation={attention!r} reads no ready-made mask"
    else:
        items = [dataset[index] for index in range(min(CHECKED_PAIRS, len(dataset)))]
        apart = PairCollator(collate.pad_token_id)(items)
        if (together := collate.packed(items)) is None:
            reason = "the first pairs have no token in common, or lengths to which the model gives other positions"
        else:
            rewards = [_rewards(module, {**apart, **batch}) for batch in ({}, together)]
            difference = ((rewards[1] - rewards[0]).abs().max() / rewards[0].square().mean().sqrt()).item()
            measured = {"reward_difference": difference}
            allowed = ROUNDED_TOLERANCE if rounded and module.plan.known else TOLERANCE
            if not difference <= allowed:  # also for NaN
                reason = (
                    f"rewards of shared and of unshared prompts differ by {difference:.1e} of their size, where "
                    f"{allowed} is allowed"
                )
    collate.share_prompt = not reason
    if share_prompt and reason:
        logger.warning(f"Pairs cannot share their prompt, which is run twice instead: {reason}")
    return {"share_prompt": not reason, "reason": reason, "mask": module.plan.kind, **measured}


def _rewards(module: RewardModule, batch: dict[str, Any]) -> Tensor:
    device = module.model.device
    tensors = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return module.eval()(**tensors)[1][:, 1:3].double()


class ClassifierModule(TrainedModule):
    """A one-logit classifier whose forward is the binary cross-entropy of its logit, the log-odds of label 1.

    Metrics of a text: `accuracy` is 1 if the sign of the log-odds fits the label and ½ at 0; `log_odds`;
    `margins`, the log-odds of the text's own label.
    """

    metric_names = ("accuracy", "log_odds", "margins")

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """Run on R texts as RowCollator makes them: (the weighted mean loss, (R, 3)); in evaluation ((R,), (R, 3))."""
        log_odds, labels = scalars(self.model, batch), batch["labels"]
        losses = binary_cross_entropy_with_logits(log_odds, labels, reduction="none")
        margins = log_odds * (2 * labels - 1)
        metrics = torch.stack([(1 + margins.sign()) / 2, log_odds, margins], dim=-1).detach()
        return _reduce(losses, batch["weights"], self.training), metrics


def _reduce(losses: Tensor, weights: Tensor, training: bool) -> Tensor:
    return (losses * weights).sum() / weights.sum() if training else losses
