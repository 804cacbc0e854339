"""The training step in the styles that `step.py` compares: the same batch, models and optimizer in each.

A step is forward, backward and an SGD update of the policy (SGD, so that no optimizer hides what is compared), with
the reference's forward where a style has it in its step. The loss is exo-pref (arXiv 2402.00856, eq. 16 for K = 2) with
beta_pi = 0.1 and a target of 1 − 1e-3 on the best candidate.

    original          as the EXO repository describes its step: every row padded to 512 tokens, the logits of all
                      positions of policy and reference, divided by the temperature, log-softmax over all of them
    full-logits       the same without the padding
    full-logits-cached   the same without padding and without the reference: its log-probs are known
    trl               TRL's DPOTrainer with loss exo_pair (K = 2), as it ships, with gradient checkpointing
    trl-plain         … without gradient checkpointing, so that nothing is computed twice
    trl-cached        … and with reference log-probs computed beforehand (precompute_ref_log_probs)
    exo_fast          AlignModule, which `exo-fast align` trains: shared prompts, fused loss, cached reference log-probs
    exo_fast-reference   the same with the reference in the step, by the same fused path
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exo_fast.layout import Group, Packed, pack, plan_mask
from exo_fast.training.module import AlignModule

BETA_PI = 0.1
LABEL_SMOOTHING = 1e-3
TEMPERATURE = 1.0
PADDED_LENGTH = 512
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Task:
    """G groups of K candidates, all prompts of one length and all completions of one length."""

    groups: list[Group]
    rewards: Tensor  # (G, K) float32, no ties

    @property
    def rows(self) -> list[list[int]]:
        """G·K sequences, prompt and completion joined."""
        return [group.prompt + completion for group in self.groups for completion in group.completions]


@dataclass
class Measured:
    """What a style's run gave. The first step is the untimed one that `loss` and `grad_norm` are from."""

    loss: float
    grad_norm: float
    seconds: list[float]


Forward = Callable[[], Tensor]  # () -> the loss of the task, with its graph


def original(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Padded to 512, full logits, reference in the step."""
    return _full_logits(policy, task, reference=reference, padded_length=PADDED_LENGTH)


def full_logits(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Unpadded, full logits, reference in the step."""
    return _full_logits(policy, task, reference=reference)


def full_logits_cached(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Unpadded, full logits, reference log-probs computed beforehand."""
    return _full_logits(policy, task, ref_logps=_known_logps(reference, task))


def exo_fast(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Shared prompts, fused loss, reference log-probs computed beforehand."""
    batch = _batch(task)
    with torch.no_grad():
        ref_logps = _module(reference).eval()(reference=True, **batch)[0]
    module = _module(policy).train()
    return lambda: module(**batch, ref_logps=ref_logps)[0]


def exo_fast_reference(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Shared prompts, fused loss, reference in the step."""
    batch = _batch(task)
    module, ref_module = _module(policy).train(), _module(reference).eval()

    def forward() -> Tensor:
        with torch.no_grad():
            ref_logps = ref_module(reference=True, **batch)[0]
        return module(**batch, ref_logps=ref_logps)[0]

    return forward


STYLES: dict[str, Callable[[PreTrainedModel, PreTrainedModel, Task], Forward]] = {
    "original": original,
    "full-logits": full_logits,
    "full-logits-cached": full_logits_cached,
    "exo_fast": exo_fast,
    "exo_fast-reference": exo_fast_reference,
}
TRL_STYLES = {
    "trl": {"gradient_checkpointing": True},
    "trl-plain": {"gradient_checkpointing": False},
    "trl-cached": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
WITHOUT_REFERENCE = ("full-logits-cached", "exo_fast", "trl-cached")  # its weights are freed before the steps


def _full_logits(
    policy: PreTrainedModel,
    task: Task,
    *,
    reference: PreTrainedModel | None = None,
    ref_logps: Tensor | None = None,
    padded_length: int | None = None,
) -> Forward:
    rows = task.rows
    length = padded_length or len(rows[0])
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    input_ids = torch.zeros_like(attention_mask)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    completion_mask = attention_mask.clone()
    completion_mask[:, : len(task.groups[0].prompt)] = 0
    # Without padding there is nothing to mask, and attention is faster unmasked.
    mask = attention_mask if padded_length else None

    def sequence_logps(model: PreTrainedModel) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits / TEMPERATURE
        token_logps = logits.log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2)
        return (token_logps * completion_mask[:, 1:]).sum(1).view_as(task.rewards)

    def forward() -> Tensor:
        policy_logps = sequence_logps(policy)
        known = ref_logps
        if known is None:
            with torch.no_grad():
                known = sequence_logps(reference)
        return exo_pref(policy_logps - known, task.rewards)

    policy.train()
    return forward


def exo_pref(log_ratios: Tensor, rewards: Tensor) -> Tensor:
    """Mean over groups of KL(q‖p), for (G, K) log-ratios and rewards."""
    candidates = rewards.shape[1]
    target = torch.full_like(rewards, LABEL_SMOOTHING / (candidates - 1))
    target.scatter_(1, rewards.argmax(1, keepdim=True), 1 - LABEL_SMOOTHING)
    log_q = (BETA_PI * log_ratios.float()).log_softmax(1)
    return (log_q.exp() * (log_q - target.log())).sum(1).mean()


@torch.no_grad()
def _known_logps(reference: PreTrainedModel, task: Task) -> Tensor:
    """(G, K) float32 reference log-probs, one sequence at a time so that the peak stays small."""
    prompt = len(task.groups[0].prompt)
    sums = []
    for row in task.rows:
        ids = torch.tensor([row])
        logps = reference(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        sums.append(logps[0, prompt - 1 : -1].gather(1, ids[0, prompt:, None]).sum())
    return torch.stack(sums).view_as(task.rewards)


def _module(model: PreTrainedModel) -> AlignModule:
    return AlignModule(
        model,
        plan_mask(model.config),
        loss_type="exo-pref",
        beta_pi=BETA_PI,
        beta_r=1.0,
        label_smoothing=LABEL_SMOOTHING,
        temperature=TEMPERATURE,
        memory_budget=None,
        backend="auto",
    )


def _batch(task: Task) -> dict[str, Tensor]:
    packed = pack(task.groups)
    return {**{field.name: getattr(packed, field.name) for field in fields(Packed)}, "rewards": task.rewards}


def run(
    forward: Forward,
    policy: nn.Module,
    steps: int,
    *,
    learning_rate: float = LEARNING_RATE,
    warmup: int = 1,
) -> Measured:
    """`warmup` untimed steps and `steps` timed ones of forward, backward and SGD."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate)
    losses, norms, seconds = [], [], []
    for step in range(warmup + steps):
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        if step == 0:  # a warm-up step: what is looked at here is not timed
            norms.append(grad_norm(policy))
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
    return Measured(losses[0], norms[0], seconds[warmup:])


def grad_norm(model: nn.Module) -> float:
    """Euclidean norm of all gradients, added up in float64."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def run_trl(
    style: str,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steps: int,
    folder: Path,
    *,
    warmup: int = 1,
    before_training: Callable[[], None] = lambda: None,
) -> Measured:
    """The same by TRL's DPOTrainer on a data set of exactly this batch, which it trains for one step an epoch.

    `reference` None means the policy as it is, which is what TRL then precomputes log-probs with. A step is timed from
    the trainer's step-begin to its step-end callback: forward, backward, update and schedule, no data loading.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if task.rewards.shape[1] != 2:
        raise ValueError(f"TRL's exo_pair compares 2 candidates; the task has {task.rewards.shape[1]}")
    best = task.rewards.argmax(1).tolist()
    rows = [
        {"prompt_ids": g.prompt, "chosen_ids": g.completions[b], "rejected_ids": g.completions[1 - b]}
        for g, b in zip(task.groups, best, strict=True)
    ]
    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # token ids already: every style must see the same ones

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 0:
                norms.append(grad_norm(model))

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.begun)

    config = DPOConfig(
        output_dir=str(folder),
        loss_type=["exo_pair"],
        beta=BETA_PI,
        label_smoothing=LABEL_SMOOTHING,
        max_length=None,
        disable_dropout=False,
        per_device_train_batch_size=len(rows),
        precompute_ref_batch_size=len(rows),
        num_train_epochs=warmup + steps,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # clipping is in no other style's step
        bf16=False,  # the models come in the precision that is measured
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **TRL_STYLES[style],
    )
    trainer = Trainer(
        policy,
        reference,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    before_training()
    trainer.train()
    return Measured(losses[0], norms[0], seconds[warmup:])
