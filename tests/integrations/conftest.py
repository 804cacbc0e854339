"""The tiny Llama and tokenizer of the training tests, for trainers that are not ours."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from exo_fast.benchmarks.methods.step_styles import without_deepspeed

sys.path.insert(0, str(Path(__file__).parent))  # for what tests here share: the data and runs of test_trl.py

_spec = importlib.util.spec_from_file_location(
    "exo_fast_training_conftest", Path(__file__).parents[1] / "training" / "conftest.py"
)
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)


@pytest.fixture(autouse=True)
def no_engine() -> Iterator[None]:
    """Whatever ran in this process before: these trainers find no launcher, and no accelerate set to DeepSpeed."""
    with without_deepspeed():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


tokenizer = _training.tokenizer
tiny_llama = _training.tiny_llama
make_tokenizer = _training.make_tokenizer
