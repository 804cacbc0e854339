"""exo-rw in a plain PyTorch loop: candidates share their prompt, and no logits are formed.

python examples/plain_pytorch.py
python examples/plain_pytorch.py --model HuggingFaceTB/SmolLM2-135M --steps 10
"""

import torch
from small import arguments, load, rated_groups

from exo_fast.head import final_hidden, read_head
from exo_fast.layout import model_inputs, pack, plan_mask
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.reference import sequence_logps

args = arguments(__doc__)
policy, encode = load(args.model)
groups, rewards = rated_groups(encode)  # G groups of K candidates; (G, K)

plan = plan_mask(policy.config)  # whether candidates of this model can share their prompt, and how
packed = pack(groups, share_prompt=plan.share)
inputs = model_inputs(
    packed, plan, dtype=policy.dtype, device=policy.device, attn_implementation=policy.config._attn_implementation
)
head = read_head(policy)
projection = head.options()


def predicting_hidden():
    """(N, D): the state that predicts each of the N completion tokens."""
    return final_hidden(policy, **inputs).flatten(0, 1)[packed.source]


with torch.no_grad():  # the reference is the policy before training
    token_logps = linear_logprobs(predicting_hidden(), head.weight, packed.targets, **projection)
    ref_logps = sequence_logps(token_logps, packed.cu_seqlens).view_as(rewards)

optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)
for step in range(args.steps):
    loss, policy_logps = linear_group_loss(
        predicting_hidden(),
        head.weight,
        packed.targets,
        packed.cu_seqlens,
        ref_logps,
        rewards,
        loss_type="exo-rw",
        beta_pi=0.1,
        beta_r=0.5,
        **projection,
    )
    loss.backward()  # the gradients of the head and the states were formed already
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}  loss {loss.item():.4f}")
