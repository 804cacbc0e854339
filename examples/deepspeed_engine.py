"""exo-rw on a DeepSpeed engine of your own: with ZeRO-3, the loss belongs inside the module's forward.

python examples/deepspeed_engine.py
torchrun --nproc-per-node 2 examples/deepspeed_engine.py --model HuggingFaceTB/SmolLM2-135M --steps 10
"""

import os

import deepspeed
import torch
from small import arguments, load, rated_groups

from exo_fast.head import final_hidden, read_head
from exo_fast.layout import model_inputs, pack, plan_mask
from exo_fast.loss import linear_group_loss


class Align(torch.nn.Module):
    """A policy whose forward is its loss. Only in there does ZeRO-3 hold the head in one piece."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.plan = policy, plan_mask(policy.config)

    def forward(self, packed, rewards, ref_logps=None):
        device, attention = self.policy.device, self.policy.config._attn_implementation
        inputs = model_inputs(packed, self.plan, dtype=torch.float32, device=device, attn_implementation=attention)
        hidden = final_hidden(self.policy, **inputs).flatten(0, 1)[packed.source.to(device)]
        head = read_head(self.policy)
        projection = head.options()
        targets, rewards = packed.targets.to(device), rewards.to(device)
        ref_logps = torch.zeros_like(rewards) if ref_logps is None else ref_logps  # (G, K)
        options = {"loss_type": "exo-rw", "beta_pi": 0.1, "beta_r": 0.5, **projection}
        return linear_group_loss(hidden, head.weight, targets, packed.cu_seqlens, ref_logps, rewards, **options)


if "RANK" not in os.environ:  # started without a launcher: one process
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

args = arguments(__doc__)
policy, encode = load(args.model)
settings = {
    "train_micro_batch_size_per_gpu": 4 // processes,  # groups
    "optimizer": {"type": "AdamW", "params": {"lr": args.learning_rate, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
engine, *_ = deepspeed.initialize(model=Align(policy), config=settings)

groups, rewards = rated_groups(encode)
packed, rewards = pack(groups[rank::processes], share_prompt=engine.module.plan.share), rewards[rank::processes]
with torch.no_grad():  # the reference is the policy before training
    _, ref_logps = engine(packed, rewards)
for step in range(args.steps):
    loss, _ = engine(packed, rewards, ref_logps)
    engine.backward(loss)
    engine.step()
    if rank == 0:
        print(f"step {step + 1}  loss {loss.item():.4f}")
