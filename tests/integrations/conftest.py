"""The tiny Llama and tokenizer of the training tests, for trainers that are not ours."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState
from tiny_models import tiny_llama, tokenizer

from exo_fast.benchmarks.methods.step_styles import without_deepspeed

__all__ = ["tiny_llama", "tokenizer"]


@pytest.fixture(autouse=True)
def no_engine() -> Iterator[None]:
    """Whatever ran in this process before: these trainers find no launcher, and no accelerate set to DeepSpeed."""
    with without_deepspeed():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
