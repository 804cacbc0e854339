"""The steps of the run, their shares of its time, and the sizes that they work on: a card's, and tiny ones for a run on
a CPU in Triton's interpreter, which shows that the script works.

A step is a function of a `Run`. It yields (name, function) pairs, and each function returns one row of results, so that
a row is written as soon as it is known, a failure costs one row, and the next run continues with the rows that are
missing. It may raise `Unavailable` before its first pair, if nothing of it can run here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo_fast.kernels.targets import Target, of_device

MIB, GIB = 2**20, 2**30
Cases = Iterator[tuple[str, Callable[[], dict]]]


class Unavailable(Exception):
    """A step that cannot run here at all. The message says why."""


@dataclass(frozen=True)
class Shape:
    """The head of a model and the rows of a step."""

    name: str
    tokens: int
    width: int
    vocab: int

    @property
    def flops(self) -> float:
        """Return the flops of the three products that a loss with both gradients cannot do without."""
        return 6.0 * self.tokens * self.width * self.vocab


@dataclass(frozen=True)
class Plan:
    """The sizes of all steps."""

    device: str
    shapes: tuple[Shape, ...]
    few: Shape  # so few rows that the host may be slower than the device
    completion: int  # tokens of each completion
    square: int  # of the product that gives the card's rate
    widths: tuple[int, ...]  # of the heads whose logits' errors are measured
    rows: int  # of these
    vocab: int
    budgets: tuple[int, ...]  # bytes of scratch that the schedules are timed with
    products: tuple[int, ...]  # rows of the products
    model: dict[str, int]  # of the LlamaConfig that is trained
    prompt: int  # tokens, of which a third to all are taken
    steps: int
    longest: int  # completion tokens at which the search for the longest row stops
    tests: str = ""  # pytest's -k


CARD = Plan(
    device="cuda",
    shapes=(Shape("D4096", 8192, 4096, 128256), Shape("D1024", 16384, 1024, 151936)),
    few=Shape("N512", 512, 1024, 151936),
    completion=64,
    square=8192,
    widths=(256, 512, 1024, 2048, 4096, 8192),
    rows=512,
    vocab=4096,
    budgets=(GIB, 4 * GIB, 16 * GIB),
    products=(512, 1024, 2048, 2816, 4096),
    model={
        "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 262144,
    },
    prompt=512,
    steps=10,
    longest=131072,
)  # fmt: skip
DRY = Plan(
    device="cpu",
    shapes=(Shape("tiny", 32, 32, 160),),
    few=Shape("few", 16, 32, 160),
    completion=8,
    square=128,
    widths=(32, 64),
    rows=32,
    vocab=96,
    budgets=(GIB,),
    products=(16,),
    model={
        "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    prompt=12,
    steps=2,
    longest=16,
    tests="one-token and plain and bf16",
)  # fmt: skip


@dataclass
class Run:
    """All that a step needs to know."""

    plan: Plan
    output_dir: Path
    seconds: float  # that are left to the step
    rows: dict[str, dict] = field(default_factory=dict)  # its rows of an earlier run, by name

    @property
    def dry(self) -> bool:
        return self.plan is DRY

    @property
    def target(self) -> Target:
        import torch

        return of_device(torch.device(self.plan.device))


@dataclass(frozen=True)
class Step:
    """A step: the question that it answers, its function, and its share of the time."""

    question: str
    module: str  # below exo_fast.benchmarks.gpu
    share: float  # seconds of a run of ten minutes

    def cases(self, name: str, run: Run) -> Cases:
        found: Any = getattr(importlib.import_module(f"exo_fast.benchmarks.gpu.{self.module}"), name)
        return found(run)


STEPS = {
    "machine": Step("what the card is, and how fast it copies and multiplies", "checks", 20),
    "slope": Step("how far a logit is from float64, and how that grows with D", "checks", 40),
    "tests": Step("whether tests/gpu passes", "checks", 170),
    "times": Step("how fast every kernel, schedule and peer is", "times", 180),
    "host": Step("whether the host keeps up where rows are few", "times", 50),
    "sanitizer": Step("whether a kernel reads or writes where it must not", "checks", 60),
    "align": Step("whether a model trains, how fast, and how long its rows may be", "align", 60),
}
