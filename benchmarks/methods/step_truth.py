"""The correct result of a training step: its loss and gradient in float64, from the same weights that a style gets.

It uses no code that is measured: one sequence a row, the model's own attention, full logits, autograd. transformers'
models use float32 in their norms, rotary angles and softmax whatever the dtype of the weights, so inside
`true_float64` these are float64 too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from exo_fast.benchmarks.methods.step_styles import TEMPERATURE, Gradient, Task, exo_pref, gradient_of


class true_float64(TorchFunctionMode):
    """Replace float32 by float64 inside the context."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


def truth(policy: PreTrainedModel, reference: PreTrainedModel, task: Task) -> tuple[float, Gradient]:
    """Compute loss and gradient of the task for float64 models. `policy` keeps its gradient. Raises TypeError for other
    dtypes."""
    for model in (policy, reference):
        if model.dtype != torch.float64:
            raise TypeError(f"weights are {model.dtype}: torch.float64 is needed")
    policy.zero_grad(set_to_none=True)
    with true_float64():
        with torch.no_grad():
            ref_logps = sequence_logps(reference, task)
        # Row by row, so that only one row's graph is held at a time: the loss depends on a row only by its log-prob.
        with torch.no_grad():
            policy_logps = sequence_logps(policy, task)
        leaf = policy_logps.requires_grad_()
        loss = exo_pref(leaf - ref_logps, task.rewards)
        loss.backward()
        prompt = len(task.groups[0].prompt)
        for row, coefficient in zip(task.rows, leaf.grad.flatten(), strict=True):
            (coefficient * _row_logp(policy, row, prompt)).backward()
    return loss.item(), gradient_of(policy)


def sequence_logps(model: PreTrainedModel, task: Task) -> Tensor:
    """Return (G, K) float64 log-probs of the completions."""
    prompt = len(task.groups[0].prompt)
    return torch.stack([_row_logp(model, row, prompt) for row in task.rows]).view_as(task.rewards)


def _row_logp(model: PreTrainedModel, row: list[int], prompt: int) -> Tensor:
    ids = torch.tensor([row])
    completion = len(row) - prompt
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=completion + 1).logits[0, :-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, ids[0, prompt:, None]).sum()
