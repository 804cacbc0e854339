"""`pytest benchmarks --benchmark-only -k step`: a training step in every style, on a small random model.

Each style first shows, in float64, that its loss and gradient are those of one sequence a row with full logits; then
its steps are timed in float32. Nothing is downloaded: the demo model's numbers are those of `exo-fast bench step`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from exo_fast.benchmarks.harness import process_memory
from exo_fast.benchmarks.methods import step_styles, step_truth
from exo_fast.benchmarks.suites import step

ROUNDS = 3
WORDS = 4096
CASES = [
    step.Case(style, "fp32", k, 96, 32) for k in (2, 4) for style in step_styles.STYLES if (k, style) != (4, "original")
]
TRL_CASES = [step.Case(style, "fp32", 2, 96, 32) for style in step_styles.TRL_STYLES]


def make_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random Llama of 3 layers, and a slightly different one as its reference."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    reference = AutoModelForCausalLM.from_config(config)
    policy = copy.deepcopy(reference)
    step.add_noise(policy)
    return policy, reference


def make_task(case: step.Case) -> step_styles.Task:
    """Random tokens of the case's lengths."""
    tokens = torch.randint(3, WORDS, (step.SEQUENCES * step.LENGTH,), generator=torch.Generator().manual_seed(0))
    return step.make_task(tokens.tolist(), case)


def prove(measured: step_styles.Measured, loss: float, gradient: step_styles.Gradient, tolerance: float) -> dict:
    """The errors of a step, which must be below `tolerance`."""
    errors = {"loss": abs(measured.loss - loss) / abs(loss), "gradient": measured.gradient.error(gradient)}
    assert max(errors.values()) < tolerance, errors
    return errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: step.Case, benchmark) -> None:
    policy, reference = make_models()
    task, build = make_task(case), step_styles.STYLES[case.style]
    doubles = [copy.deepcopy(model).double() for model in (policy, reference)]
    loss, gradient = step_truth.truth(*doubles, task)
    with step_truth.true_float64():
        prove(step_styles.run(build(*doubles, task), doubles[0], steps=1), loss, gradient, 1e-10)
    del doubles
    forward = build(policy, reference, task)
    held = process_memory.resident_mb()
    process_memory.reset_peak()
    errors = prove(step_styles.run(forward, policy, steps=1), loss, gradient, 1e-3)
    peak = process_memory.peak_mb() - held
    benchmark.group = f"step/{case.problem}"
    benchmark.extra_info.update(errors=errors, peak_mb=round(peak, 1), tokens=task.completion_tokens)
    benchmark.pedantic(lambda: step_styles.run(forward, policy, steps=1), rounds=ROUNDS)


@pytest.fixture
def without_deepspeed() -> Iterator[None]:
    with step_styles.without_deepspeed():
        yield


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize("case", TRL_CASES, ids=str)
def test_step_of_trl(case: step.Case, benchmark, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")
    policy, reference = make_models()
    task = make_task(case)
    loss, gradient = step_truth.truth(*(copy.deepcopy(model).double() for model in (policy, reference)), task)
    weights = copy.deepcopy(policy.state_dict())
    if case.style not in step_styles.WITH_REFERENCE:  # TRL takes log-probs from the model that it is given
        policy.load_state_dict(reference.state_dict())
        reference = None
    trainer = step_styles.trl_trainer(case.style, policy, reference, tokenizer, task, 1, tmp_path)
    policy.load_state_dict(weights)
    trainer.train()
    errors = prove(step_styles.Measured(trainer.losses[0], trainer.gradients[0], []), loss, gradient, 1e-3)
    batch = next(iter(trainer.get_train_dataloader()))

    def call() -> None:
        trainer.training_step(trainer.model_wrapped, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    benchmark.group = f"step/{case.problem}"
    benchmark.extra_info.update(errors=errors, tokens=task.completion_tokens)
    benchmark.pedantic(call, rounds=ROUNDS)
