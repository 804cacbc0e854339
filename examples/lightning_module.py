"""exo-pref as a LightningModule: log-probs from the fused head, and the loss over K candidates on them.

python examples/lightning_module.py
python examples/lightning_module.py --model HuggingFaceTB/SmolLM2-135M --steps 10
"""

import copy

import lightning
import torch
from small import arguments, load, rated_groups

from exo_fast.head import final_hidden, read_head
from exo_fast.layout import Packed, model_inputs, pack, plan_mask
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss
from exo_fast.reference import sequence_logps


class Align(lightning.LightningModule):
    def __init__(self, policy, learning_rate):
        super().__init__()
        self.policy, self.learning_rate = policy, learning_rate
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.plan = plan_mask(policy.config)

    def sequence_logps(self, model, packed):
        """(G·K,): the log-prob of each candidate."""
        how = {"dtype": model.dtype, "device": self.device, "attn_implementation": model.config._attn_implementation}
        hidden = final_hidden(model, **model_inputs(packed, self.plan, **how)).flatten(0, 1)[packed.source]
        head = read_head(model)
        projection = head.options()
        return sequence_logps(linear_logprobs(hidden, head.weight, packed.targets, **projection), packed.cu_seqlens)

    def training_step(self, batch, _):
        packed, rewards = Packed(**batch["packed"]), batch["rewards"]
        policy_logps = self.sequence_logps(self.policy, packed).view_as(rewards)
        ref_logps = self.sequence_logps(self.reference, packed).view_as(rewards)
        loss = group_loss(policy_logps, ref_logps, rewards, loss_type="exo-pref", beta_pi=0.1)
        print(f"step {self.global_step + 1}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate)


args = arguments(__doc__)
policy, encode = load(args.model)
align = Align(policy, args.learning_rate)


def collate(rows):
    groups, rewards = zip(*rows, strict=True)
    return {"packed": vars(pack(list(groups), share_prompt=align.plan.share)), "rewards": torch.stack(rewards)}


data = torch.utils.data.DataLoader(list(zip(*rated_groups(encode), strict=True)), batch_size=4, collate_fn=collate)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
lightning.Trainer(max_steps=args.steps, max_epochs=-1, accelerator="cpu", **quiet).fit(align, data)
