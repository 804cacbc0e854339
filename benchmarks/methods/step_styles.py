"""The training step in the styles that the suite `step` compares: the same batch, models and optimizer in each.

A step is forward, backward and an SGD update of the policy (SGD, so that no optimizer hides the differences), with
the reference's forward if the style has it in its step. The loss is exo-pref (arXiv 2402.00856, eq. 16 for K = 2) with
beta_pi = 0.1 and a target of 1 − 1e-3 on the best candidate. Everything runs on the policy's device.

    original          the step that the EXO repository describes: every row padded to 512 tokens, the logits of all
                      positions of policy and reference, divided by the temperature, log-softmax over all of them
    full-logits       the same without the padding
    full-logits-cached   the same without padding and without the reference: its log-probs are known
    trl               TRL's DPOTrainer with loss exo_pair (K = 2), as it ships, with gradient checkpointing
    trl-plain         … without gradient checkpointing, so that nothing is computed twice
    trl-cached        … and with reference log-probs computed beforehand (precompute_ref_log_probs)
    exo_fast          AlignModule, which `exo-fast align` trains: shared prompts, fused loss, cached reference log-probs
    exo_fast-reference   the same with the reference in the step, by the same fused path
    exo_fast-unshared    exo_fast without prompt sharing: a row for every candidate
    exo_fast-unfused     exo_fast without the fused head: full logits of the completions' positions
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exo_fast.benchmarks.methods.problems import synchronize
from exo_fast.head import read_head
from exo_fast.layout import Group, Packed, pack, plan_mask
from exo_fast.reference import sequence_logps
from exo_fast.training.models.modules import AlignModule, packed_batch
from exo_fast.training.processes import LAUNCHER_ENVIRONMENT

BETA_PI = 0.1
LABEL_SMOOTHING = 1e-3
TEMPERATURE = 1.0
PADDED_LENGTH = 512
LEARNING_RATE = 1e-6
SAMPLES = 4096  # gradient entries of each parameter that are compared
STEPS = ((3.0, 3), (8.0, 2), (float("inf"), 1))  # (seconds, count): a step of less than these seconds is timed so often
SHORT = 8  # tokens of prompts and completions in the batch that warms up


@dataclass(frozen=True)
class Task:
    """G groups of K candidates, all prompts of one length and all completions of one length."""

    groups: list[Group]
    rewards: Tensor  # (G, K) float32, no ties

    @property
    def rows(self) -> list[list[int]]:
        """Return the G·K sequences, prompt and completion joined."""
        return [group.prompt + completion for group in self.groups for completion in group.completions]

    @property
    def completion_tokens(self) -> int:
        """Return N, the tokens that a step learns from."""
        return sum(len(completion) for group in self.groups for completion in group.completions)

    def shortened(self, tokens: int = SHORT) -> Task:
        """Return the task with prompts and completions cut to at most `tokens` tokens."""
        groups = [Group(g.prompt[:tokens], [ids[:tokens] for ids in g.completions]) for g in self.groups]
        return Task(groups, self.rewards)


@dataclass
class Gradient:
    """A summary of a gradient: its norm, and a sample of its entries with their weights."""

    norm: float
    entries: Tensor  # (E,) float64: up to SAMPLES of each parameter, seeded
    weights: Tensor  # (E,) float64: a parameter's entries over its drawn entries

    def error(self, truth: Gradient) -> float:
        """Return |self − truth| / |truth|, estimated on the entries."""
        off = (self.weights * (self.entries - truth.entries).square()).sum()
        return (off / (truth.weights * truth.entries.square()).sum()).sqrt().item()


@dataclass
class Measured:
    """The results of a style's run: loss and gradient of the first step, and the seconds of the timed steps."""

    loss: float
    gradient: Gradient
    seconds: list[float]


Forward = Callable[[], Tensor]  # () -> the task's loss, with its graph


def original(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the forward padded to 512, with full logits and the reference in the step."""
    return _full_logits(policy, task, reference=reference, padded_length=PADDED_LENGTH)


def full_logits(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the unpadded forward with full logits and the reference in the step."""
    return _full_logits(policy, task, reference=reference)


def full_logits_cached(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the unpadded forward with full logits and reference log-probs computed beforehand."""
    return _full_logits(policy, task, ref_logps=_known_logps(reference, task))


def exo_fast(policy: PreTrainedModel, reference: PreTrainedModel, task: Task, *, share_prompt: bool = True) -> Forward:
    """Make the forward with shared prompts, fused loss and reference log-probs computed beforehand."""
    batch = _batch(task, share_prompt, policy.device)
    with torch.no_grad():
        ref_logps = _module(reference).eval()(reference=True, **batch)[0]
    module = _module(policy).train()
    return lambda: module(**batch, ref_logps=ref_logps)[0]


def exo_fast_unshared(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the forward with a row for every candidate, fused loss and reference log-probs computed beforehand."""
    return exo_fast(policy, reference, task, share_prompt=False)


def exo_fast_unfused(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the forward with shared prompts, full logits at the positions that predict, and reference log-probs computed
    beforehand."""
    batch = packed_batch(_batch(task, True, policy.device))
    module, ref_logps = _module(policy).train(), _known_logps(reference, task)
    weight = read_head(policy).weight

    def forward() -> Tensor:
        logits = module.predicting_hidden(batch) @ weight.T / TEMPERATURE
        token_logps = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
        policy_logps = sequence_logps(token_logps, batch.cu_seqlens).view_as(ref_logps)
        return exo_pref(policy_logps - ref_logps, task.rewards.to(policy.device))

    return forward


def exo_fast_reference(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> Forward:
    """Make the forward with shared prompts, fused loss and the reference in the step."""
    batch = _batch(task, True, policy.device)
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
    "exo_fast-unshared": exo_fast_unshared,
    "exo_fast-unfused": exo_fast_unfused,
}
TRL_STYLES = {
    "trl": {"gradient_checkpointing": True},
    "trl-plain": {"gradient_checkpointing": False},
    "trl-cached": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
WITH_REFERENCE = ("original", "full-logits", "exo_fast-reference", "trl", "trl-plain")  # in the step; others free it


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
    input_ids, attention_mask, completion_mask = (
        tensor.to(policy.device) for tensor in (input_ids, attention_mask, completion_mask)
    )
    rewards = task.rewards.to(policy.device)
    # Without padding there is nothing to mask, and attention is faster unmasked.
    mask = attention_mask if padded_length else None

    def sequence_logps(model: PreTrainedModel) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits / TEMPERATURE
        token_logps = logits.log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2)
        return (token_logps * completion_mask[:, 1:]).sum(1).view_as(rewards)

    def forward() -> Tensor:
        policy_logps = sequence_logps(policy)
        known = ref_logps
        if known is None:
            with torch.no_grad():
                known = sequence_logps(reference)
        return exo_pref(policy_logps - known, rewards)

    policy.train()
    return forward


def exo_pref(log_ratios: Tensor, rewards: Tensor) -> Tensor:
    """Return the mean over groups of KL(q‖p), for (G, K) log-ratios and rewards."""
    wide = torch.promote_types(log_ratios.dtype, torch.float32)
    target = torch.full_like(rewards, LABEL_SMOOTHING / (rewards.shape[1] - 1), dtype=wide)
    target.scatter_(1, rewards.argmax(1, keepdim=True), 1 - LABEL_SMOOTHING)
    log_q = (BETA_PI * log_ratios.to(wide)).log_softmax(1)
    return (log_q.exp() * (log_q - target.log())).sum(1).mean()


@torch.no_grad()
def _known_logps(reference: PreTrainedModel, task: Task) -> Tensor:
    """Compute (G, K) reference log-probs in float32 or wider, one sequence at a time so that the peak stays small."""
    prompt = len(task.groups[0].prompt)
    sums = []
    for row in task.rows:
        ids = torch.tensor([row], device=reference.device)
        logits = reference(input_ids=ids, use_cache=False).logits
        logps = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
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


def _batch(task: Task, share_prompt: bool, device: torch.device) -> dict[str, Any]:
    packed = pack(task.groups, share_prompt=share_prompt)
    batch = {**{field.name: getattr(packed, field.name) for field in fields(Packed)}, "rewards": task.rewards}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def run(forward: Forward, policy: nn.Module, steps: int | None = None) -> Measured:
    """Time steps of forward, backward and SGD. STEPS decides how many if `steps` is None.

    The first step's gradient is sampled outside the timing.
    """
    optimizer = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE)
    seconds: list[float] = []
    while len(seconds) < (steps or _steps_for(seconds)):
        synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        synchronize()
        paused = time.perf_counter()
        if not seconds:
            first = loss.item(), gradient_of(policy)
        resumed = time.perf_counter()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - resumed + paused - begun)
    return Measured(*first, seconds)


def _steps_for(seconds: list[float]) -> int:
    return next(steps for limit, steps in STEPS if seconds[0] < limit) if seconds else 1


def gradient_of(model: nn.Module) -> Gradient:
    """Return the norm and a seeded sample of the gradients that `model` holds; every copy of a model gives the same
    entries."""
    generator = torch.Generator().manual_seed(0)
    squares, entries, weights = [], [], []
    for parameter in model.parameters():
        gradient = parameter.grad.flatten().cpu()
        drawn = min(SAMPLES, len(gradient))
        index = torch.randint(len(gradient), (drawn,), generator=generator)
        squares.append(gradient.double().square().sum())
        entries.append(gradient[index].double())
        weights.append(torch.full((drawn,), len(gradient) / drawn, dtype=torch.float64))
    return Gradient(torch.stack(squares).sum().sqrt().item(), torch.cat(entries), torch.cat(weights))


def run_trl(
    style: str,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steps: int,
    folder: Path,
    *,
    before_training: Callable[[], None] = lambda: None,
) -> Measured:
    """Time the same steps of TRL's DPOTrainer, which trains for one step an epoch.

    A step is timed from the trainer's step-begin to its step-end callback: forward, backward, update and schedule, no
    data loading. The first step warms up and is not timed.
    """
    trainer = trl_trainer(style, policy, reference, tokenizer, task, 1 + steps, folder)
    before_training()
    trainer.train()
    return Measured(trainer.losses[0], trainer.gradients[0], trainer.seconds[1:])


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Turn DeepSpeed off for TRL's trainer. In a process that has used it, accelerate is still set to DeepSpeed, and
    TRL would follow."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    for name in ("ACCELERATE_USE_DEEPSPEED", *LAUNCHER_ENVIRONMENT, "MASTER_PORT"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def trl_trainer(
    style: str,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    epochs: int,
    folder: Path,
) -> Any:
    """Make a DPOTrainer of this style on a data set of exactly this batch. It records the `losses` and `seconds` of its
    steps and the first of its `gradients`.

    If `reference` is None, TRL precomputes log-probs with the policy as it is.
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

    class Trainer(DPOTrainer):
        def __init__(self, *args, **kwargs):
            self.losses, self.gradients, self.seconds = [], [], []
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # token ids already: every style must see the same ones

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 0:
                trainer.gradients.append(gradient_of(model))

        def on_step_end(self, args, state, control, **kwargs):
            trainer.seconds.append(time.perf_counter() - self.begun)

    config = DPOConfig(
        output_dir=str(folder),
        loss_type=["exo_pair"],
        beta=BETA_PI,
        label_smoothing=LABEL_SMOOTHING,
        max_length=None,
        disable_dropout=False,
        per_device_train_batch_size=len(rows),
        precompute_ref_batch_size=len(rows),
        num_train_epochs=epochs,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # no other style clips in its step
        bf16=False,  # the models already have the measured precision
        use_cpu=True,
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
    return trainer
