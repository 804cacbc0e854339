"""Suite `memory`: real steps of a 135M model, each in its own process, beside the predictions of `exo-fast memory`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NAME = "memory"
VOCABULARY = 49152
LEARNING_RATE = 1e-6
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A step of the 135M model: `sequences` of prompt and completion, with AdamW if set, else SGD."""

    method: str
    precision: str  # fp32 or bf16, of weights and activations
    candidates: int
    prompt: int
    completion: int
    sequences: int = 8
    gradient_checkpointing: bool = False
    optimizer: str = "sgd"

    def __str__(self) -> str:
        extras = ["checkpointed"] * self.gradient_checkpointing + ["adamw"] * (self.optimizer == "adamw")
        name = f"{NAME}/{self.method}/{self.precision}/K{self.candidates}/{self.prompt}+{self.completion}"
        return "/".join([f"{name}/{self.sequences}", *extras])


def cases(quick: bool = False) -> list[Case]:
    """Return cases with and without exo_fast, over K, precision, length, checkpointing and optimizer."""
    first = [Case(method, "bf16", 4, 192, 64) for method in ("full-logits", "exo_fast")]
    if quick:
        return first
    return [
        *first,
        Case("exo_fast", "fp32", 2, 192, 64, 4),
        Case("trl", "bf16", 2, 192, 64, 4),
        Case("exo_fast", "bf16", 8, 205, 51, optimizer="adamw"),
        *(
            Case(method, "bf16", 2, 1024, 1024, 2, gradient_checkpointing=True)
            for method in ("full-logits", "exo_fast")
        ),
    ]


def impossible(case: Case) -> str | None:
    """Return why a case cannot be measured here; None if it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "peaks of resident memory are read from /proc, which only Linux has"
    if case.method == "trl":
        from exo_fast.training import machine

        if machine.version("trl") is None:
            return "trl is not installed"
    return None


def measure(case: Case, workdir: Path) -> dict:
    """Measure the peak resident memory of the last of STEPS steps, above the memory of a process that has run a small
    model's step."""
    import torch

    from exo_fast.benchmarks.harness import process_memory
    from exo_fast.training.memory import estimate

    predicted = estimate.estimate(demo_config(), setting_of(case))
    _prepare(replace(case, prompt=8, completion=8), demo_config(layers=1, vocabulary=128), workdir)()
    before = process_memory.resident_mb()
    seconds = []
    step = _prepare(case, demo_config(), workdir)
    for _ in range(1 if case.method == "trl" else STEPS):
        process_memory.reset_peak()
        seconds.append(round(step(), 4))
    peak = process_memory.peak_mb() - before
    torch.set_grad_enabled(True)
    return {
        "seconds": seconds[-1],
        "all_seconds": seconds,
        "peak_mb": round(peak, 1),
        "predicted_mb": round(predicted.total / 1e6, 1),
        "parts_mb": {name: round(size / 1e6, 1) for name, size in predicted.parts.items()},
        "errors": {"prediction": round(abs(predicted.total / 1e6 / peak - 1), 4)},
    }


def summary(rows: list[dict]) -> dict:
    """Return the largest and the mean relative error of the predictions."""
    errors = [row["errors"]["prediction"] for row in rows if "errors" in row]
    if not errors:
        return {}
    return {"largest_error": max(errors), "mean_error": round(sum(errors) / len(errors), 4), "cases": len(errors)}


def demo_config(layers: int = 30, vocabulary: int = VOCABULARY) -> Any:
    """Return the configuration of SmolLM2-135M. The values of its weights do not matter for memory."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def setting_of(case: Case) -> Any:
    """Return the `memory_model.Setting` of a case."""
    import torch

    from exo_fast.training.memory.estimate import Setting

    return Setting(
        case.method,
        case.prompt,
        case.completion,
        case.candidates,
        groups=case.sequences // case.candidates,
        dtype=torch.bfloat16 if case.precision == "bf16" else torch.float32,
        gradient_checkpointing=case.gradient_checkpointing,
        optimizer=case.optimizer,
        engine="torch",
    )


def _prepare(case: Case, config: Any, workdir: Path) -> Callable[[], float]:
    """Return a function that runs one step (for TRL: a training of STEPS) of a model with random weights, and returns
    the seconds of its last step.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from exo_fast.benchmarks.methods import step_styles
    from exo_fast.layout import Group

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (count,), generator=generator).tolist()

    groups = [
        Group(tokens(case.prompt), [tokens(case.completion) for _ in range(case.candidates)])
        for _ in range(case.sequences // case.candidates)
    ]
    rewards = torch.arange(case.sequences).view(-1, case.candidates).float()
    task = step_styles.Task(groups, rewards)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    policy, reference = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
    if case.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.method == "trl":
        style = "trl" if case.gradient_checkpointing else "trl-plain"
        run = step_styles.run_trl
        return lambda: run(style, policy, reference, _tokenizer(), task, STEPS - 1, workdir).seconds[-1]
    forward = step_styles.STYLES[case.method](policy, reference, task)
    if case.method not in step_styles.WITH_REFERENCE:
        del reference
    optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = optimizers[case.optimizer](policy.parameters(), lr=LEARNING_RATE, fused=case.optimizer == "adamw")

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()
        return time.perf_counter() - begun

    return step


def _tokenizer() -> Any:
    """Make a tokenizer, because TRL requires one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")


# The command line
