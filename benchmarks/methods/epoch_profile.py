"""Measure where the time of an epoch of `exo-fast align` goes: a stopwatch on the functions that it calls.

Every watched function has a stage. Time inside it counts for that stage, less the time of functions watched within it.
All other time is the Trainer's. The backward of attention has no function of its own: two identities in the graph
around it mark its beginning and end. torch's profiler separates the model's own operations, in a forward and backward
of their own, because its bookkeeping would distort an epoch of small operations.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from exo_fast.training.stages.align import AlignConfig

STEP, ONCE = "every step", "once a run"
REST = "Trainer, and what is in no other line"
PRODUCTS, ELEMENTWISE = "model: matrix products", "model: norms, rotary, activations, sums"
ATTENTION, HEAD = "attention", "head and loss"
MODEL = (PRODUCTS, ELEMENTWISE, ATTENTION, HEAD)  # the useful work of a step
WHEN = {
    PRODUCTS: STEP,
    ELEMENTWISE: STEP,
    ATTENTION: STEP,
    HEAD: STEP,
    "collate": STEP,
    "mask and positions": STEP,
    "DeepSpeed: forward and gradients": STEP,
    "optimizer": STEP,
    "logging and metrics": STEP,
    REST: STEP,
    "read rows": ONCE,
    "tokenise": ONCE,
    "load model and tokenizer": ONCE,
    "start the engine": ONCE,
    "check of the layout": ONCE,
    "reference log-probs": ONCE,
    "checkpoint and model": ONCE,
    "samples for the report": ONCE,
    "outside the training loop": ONCE,
}
_BODY = "model"  # forward and backward of its layers less attention: split into PRODUCTS and ELEMENTWISE at the end
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Stage:
    """A line of the profile."""

    name: str
    when: str  # STEP or ONCE
    seconds: float
    calls: int


class Stopwatch:
    """A stopwatch of each stage's seconds, less the seconds of the stages entered inside it."""

    def __init__(self, outermost: str):
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open = [outermost]
        self._closed = 0  # stages that count whole, including the stages inside them
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """Count time for `name` from now on, until the matching `leave`."""
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        """Count time for the previous stage again."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def watch(self, function: Callable, name: str, *, whole: bool = False) -> Callable:
        """Wrap `function` as a stage called `name`; `whole`: with everything inside it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._closed:
                return function(*args, **kwargs)
            self.enter(name)
            self.calls[name] += 1
            self._closed += whole
            try:
                return function(*args, **kwargs)
            finally:
                self._closed -= whole
                self.leave()

        return watched

    def watch_attention(self, attention: Callable) -> Callable:
        """Wrap an attention function of transformers as the stage ATTENTION, with its backward."""
        forward = self.watch(attention, ATTENTION)

        def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._closed or not torch.is_grad_enabled():
                return forward(module, query, key, value, *args, **kwargs)
            query, key, value = _Mark.apply(self.leave, query, key, value)
            output, *rest = forward(module, query, key, value, *args, **kwargs)
            return (*_Mark.apply(lambda: self.enter(ATTENTION), output), *rest)

        return watched


class _Mark(torch.autograd.Function):
    """An identity on tensors that calls `signal` when their gradients pass."""

    @staticmethod
    def forward(ctx: Any, signal: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.signal = signal
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.signal()
        return None, *gradients


def profile(config: AlignConfig) -> list[Stage]:
    """Run `exo-fast align` (on DeepSpeed, one process) and return its stages, in the order of WHEN."""
    from exo_fast.training.stages import align

    batches: list[dict] = []
    watch = Stopwatch("outside the training loop")
    with _watched(watch, batches):
        align.align(config)
    watch.enter("")  # count the time of the last stage
    shares = operations(config, batches[-1])
    body, calls = watch.seconds[_BODY], watch.calls[_BODY]
    watch.seconds |= {PRODUCTS: body * shares[PRODUCTS], ELEMENTWISE: body * shares[ELEMENTWISE]}
    watch.calls |= {PRODUCTS: calls, ELEMENTWISE: calls}
    return [Stage(name, when, watch.seconds[name], watch.calls[name]) for name, when in WHEN.items()]


@contextmanager
def _watched(watch: Stopwatch, batches: list[dict]) -> Iterator[None]:
    """Put the stopwatch on the functions of a run. The training batches are added to `batches`."""
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from transformers.modeling_utils import AttentionInterface

    from exo_fast.training.data.groups import GroupCollator, GroupDataset
    from exo_fast.training.models import modules
    from exo_fast.training.reports import facts
    from exo_fast.training.stages import align
    from exo_fast.training.trainer import trainer

    gradients = "DeepSpeed: forward and gradients"
    stages: list[tuple[Any, str, str, bool]] = [
        (align, "read_data", "read rows", True),
        (align, "tokenize_splits", "tokenise", True),
        (align, "load_tokenizer", "load model and tokenizer", True),
        (align, "load_causal_lm", "load model and tokenizer", True),
        (align.AlignTrainer, "__init__", "start the engine", True),
        (trainer.StageTrainer, "_prepare_for_training", "start the engine", False),
        (align, "settle_layout", "check of the layout", True),
        (align, "fill_reference_logps", "reference log-probs", True),
        (trainer.StageTrainer, "train", REST, False),
        (GroupDataset, "__getitem__", "collate", True),
        (GroupCollator, "__call__", "collate", True),
        (modules, "model_inputs", "mask and positions", True),
        (modules, "final_hidden", _BODY, False),
        (modules, "linear_group_loss", HEAD, True),
        (modules, "group_metrics", "logging and metrics", True),
        (deepspeed.DeepSpeedEngine, "forward", gradients, False),
        (deepspeed.DeepSpeedEngine, "backward", gradients, False),
        (DeepSpeedZeroOptimizer, "process_gradients", gradients, True),
        (deepspeed.DeepSpeedEngine, "_backward_epilogue", gradients, True),
        (deepspeed.DeepSpeedEngine, "step", "optimizer", True),
        (Tensor, "backward", _BODY, False),
        (trainer.StageTrainer, "log", "logging and metrics", True),
        (trainer.StageTrainer, "_save_checkpoint", "checkpoint and model", True),
        (trainer.StageTrainer, "save_model", "checkpoint and model", True),
        (facts, "take_samples", "samples for the report", True),
    ]
    collate = GroupCollator.__call__

    def kept(self: GroupCollator, items: list) -> dict:
        batches[:] = [collate(self, items)]
        return batches[0]

    interface = AttentionInterface.get_interface

    def attention(self: AttentionInterface, *args: Any) -> Callable:
        return watch.watch_attention(interface(self, *args))

    with ExitStack() as patches:
        patches.enter_context(patch.object(GroupCollator, "__call__", kept))
        patches.enter_context(patch.object(AttentionInterface, "get_interface", attention))
        for owner, name, stage, whole in stages:
            patches.enter_context(patch.object(owner, name, watch.watch(getattr(owner, name), stage, whole=whole)))
        yield


def operations(config: AlignConfig, batch: dict) -> dict[str, float]:
    """Return the shares of PRODUCTS and ELEMENTWISE in the work of the model's layers without attention, forward and
    backward.

    torch's profiler measures them on one batch, for the model before training, in the run's precision.
    """
    from torch.autograd.profiler import record_function
    from torch.profiler import ProfilerActivity

    from exo_fast.precision import matmul_precision
    from exo_fast.training.models.modules import packed_batch
    from exo_fast.training.stages import align

    module = align.make_module(config, align.load_causal_lm(config, config.model_name_or_path)).train()
    packed = packed_batch(batch)

    def step() -> None:
        hidden = module.predicting_hidden(packed)
        hidden.backward(torch.ones_like(hidden))

    with matmul_precision(config.matmul_precision):
        step()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as found, record_function("step"):
            step()
    seconds: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        if event.key.startswith("aten::") and "attention" not in event.key:
            seconds[PRODUCTS if event.key in _PRODUCTS else ELEMENTWISE] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {name: seconds[name] / total for name in (PRODUCTS, ELEMENTWISE)}
