"""TRL's trainers on the fused path: `patch_trl()` for the trainers you have, `ExoDPOTrainer` for K candidates.

    from exo_fast.integrations.trl import patch_trl
    patch_trl()                       # before DPOTrainer(...) is made; KTO, GRPO, RLOO and SFT too
    …
    unpatch_trl()

Trainers created after the call compute their per-token log-probs, and the numbers they log beside them, with
`exo_fast.logprobs`: for the labelled positions alone, and with rows of one prompt (a DPO pair, a GRPO group) in one
row that runs it once. Losses and gradients equal TRL's own up to rounding.

`ExoDPOTrainer` is DPOTrainer with the losses of this library beside TRL's, over K candidates:

    ExoDPOTrainer(model, args=ExoDPOConfig("out", loss_type="exo-rw"), train_dataset=data, processing_class=tokenizer)

with rows {"prompt", "completions": [K], "rewards": [K]}, texts or conversations, or TRL's {"prompt", "chosen",
"rejected"}. Reference log-probs are computed once before training, as TRL's `precompute_ref_log_probs` does.

TRL has no stable interface for any of this, so `patch` checks its version before anything else is imported.
"""

from exo_fast.integrations.trl.patch import patch_trl, unpatch_trl  # isort: skip  checks TRL's version
from exo_fast.integrations.trl.candidates import CandidateCollator, tokenize_candidates
from exo_fast.integrations.trl.trainer import ExoDPOConfig, ExoDPOTrainer

__all__ = ["CandidateCollator", "ExoDPOConfig", "ExoDPOTrainer", "patch_trl", "tokenize_candidates", "unpatch_trl"]
