"""DeepSpeed's configuration and its surroundings.

DeepSpeed's JSON is derived from a few fields, with "auto" where transformers fills in its own arguments. A JSON file
from the user replaces all of it. DeepSpeed also expects a launcher: started without one it looks for MPI, so a single
process gets the environment that a launcher would have set.
"""

import os
from typing import Any

CPU_BUCKET = 50_000_000  # gradients reduced at once: DeepSpeed's 500 million are 2 GB, and on a CPU no faster


def default_zero_stage(*, on_cpu: bool, bf16: bool, offload: bool) -> int:
    """Return 0 for a single process on CPU in float32 without offloading, else 2.

    With one process there is nothing to shard, and ZeRO would copy every gradient into a bucket and on into its
    partition, and every weight back. (In bf16 stage 0 would keep float32 gradients that stage 2 does not.)
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return 0 if alone and on_cpu and not bf16 and not offload else 2


def deepspeed_config(zero_stage: int, *, offload: bool, on_accelerator: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration for `zero_stage` 0–3.

    `offload` keeps the optimizer's state (and with stage 3 the parameters) in CPU memory, as the original's
    `--offload` does, and its Adam step runs there.
    """
    zero: dict[str, Any] = {"stage": zero_stage, "contiguous_gradients": True, "overlap_comm": on_accelerator}
    if zero_stage in (1, 2) and not on_accelerator:
        zero["reduce_bucket_size"] = CPU_BUCKET
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_accelerator}
    if zero_stage == 3:
        zero |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            # Without it the weights of a checkpoint stay in DeepSpeed's own shards, which from_pretrained
            # cannot read.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_accelerator}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto", "check_grad_overflow": True},  # exo_fast.training.trainer.non_finite relies on it
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # progress is reported by the Trainer
    }


def start_on_cpu() -> None:
    """Start DeepSpeed's communication on CPU: gloo, and nothing to compile.

    The Trainer starts it only for accelerators. Without it ZeRO-3 shards a model while it loads without knowing
    of the other processes. DeepSpeed would also compile its own shared-memory all-reduce. That takes half a minute
    the first time, even for a single process, which does not need it, and fails on a machine without ninja or a
    compiler.
    """
    import deepspeed
    import deepspeed.ops

    # DeepSpeed fills this dict by running the compiler when it is first read, only to answer this question.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def pickle_plainly() -> None:
    """Pickle DeepSpeed's enum of ZeRO stages as a value, as Python does from 3.11.4 on.

    Older Pythons pickle enums as a call of `getattr`, which readers of a checkpoint should not have to allow.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))


def undo_first_step(optimizer: Any) -> None:
    """Undo the step that DeepSpeed's optimizer of stage 0 in bf16 makes on zero gradients when it is created.

    That step leaves Adam's count at 1, so the first real step would move weights 0.73 times as far as it should. It
    also decays the weights once. Other optimizers are not changed.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        for copies, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for copy, weight in zip(copies, weights, strict=True):
                copy.data.copy_(weight.data)
