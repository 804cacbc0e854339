"""`exo-fast memory`: how much memory a training step needs with exo_fast and without, before it is tried.

And the suite that checks it: real steps of a 135M model, each in a process of its own, beside what was predicted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

NAME = "memory"
VOCABULARY = 49152
LEARNING_RATE = 1e-6
STEPS = 2
METHOD_TEXT = {
    "full-logits": "full logits, reference model in the step",
    "trl": "TRL's DPOTrainer (head in tiles, reference model)",
    "exo_fast": "exo_fast",
}
EXAMPLES = """examples:
  exo-fast memory --model models/base --tokens 512 --k 4
  exo-fast memory --model config.json --tokens 16384 --prompt 1024 --k 8 --device cuda --memory 80GB \\
      --gradient_checkpointing --processes 8 --zero_stage 3
  exo-fast memory --model models/base --tokens 512 --k 4 --json    # the parts of each estimate, in bytes
"""
# Measured steps took up to 1.2 times the estimate; one of long sequences with checkpointing, up to 2.1 times.
MARGIN, CHECKPOINTED_MARGIN = 1.25, 2.2


# The suite


@dataclass(frozen=True)
class Case:
    """A step of the 135M model: `sequences` of prompt and completion, AdamW where it says so, else SGD."""

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
    """With us and without, over K, precision, length, checkpointing and optimizer."""
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
    """Why a case cannot be measured here, None when it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "peaks of resident memory are read from /proc, which only Linux has"
    if case.method == "trl":
        from exo_fast.benchmarks import machine

        if machine.version("trl") is None:
            return "trl is not installed"
    return None


def measure(case: Case, workdir: Path) -> dict:
    """Peak resident memory of the last of STEPS steps, above that of a process that has run a small model's step."""
    import torch

    from exo_fast.benchmarks import machine, memory_model

    predicted = memory_model.estimate(demo_config(), setting_of(case))
    _prepare(replace(case, prompt=8, completion=8), demo_config(layers=1, vocabulary=128), workdir)()
    before = machine.resident_mb()
    seconds = []
    step = _prepare(case, demo_config(), workdir)
    for _ in range(1 if case.method == "trl" else STEPS):
        machine.reset_peak()
        seconds.append(round(step(), 4))
    peak = machine.peak_mb() - before
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
    """The largest and the mean relative error of the predictions."""
    errors = [row["errors"]["prediction"] for row in rows if "errors" in row]
    if not errors:
        return {}
    return {"largest_error": max(errors), "mean_error": round(sum(errors) / len(errors), 4), "cases": len(errors)}


def demo_config(layers: int = 30, vocabulary: int = VOCABULARY) -> Any:
    """The shape of SmolLM2-135M: its weights' values take no part in what is measured."""
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
    """The `memory_model.Setting` of a case."""
    import torch

    from exo_fast.benchmarks.memory_model import Setting

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
    """A function that runs one step (of TRL: a training of STEPS) of a model with random weights, and returns the
    seconds of its last step.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from exo_fast.benchmarks import step_styles
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
    """TRL asks for one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")


# The command line


def parser() -> argparse.ArgumentParser:
    """The options of `exo-fast memory`; names are those of `exo-fast align` where it has them."""
    made = argparse.ArgumentParser(
        prog="exo-fast memory",
        description="Estimate the memory of a training step, with exo_fast and without. Needs no weights and no data: "
        "a model's configuration is enough, and the step is run on tensors without values.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--model", required=True, help="a directory with a config.json, such a file, or a Hub name")
    add("--tokens", type=int, required=True, help="tokens of a sequence, prompt and completion (max_seq_len of align)")
    add("--prompt", type=int, help="of these, tokens of the prompt [half]")
    add("--k", type=int, required=True, help="candidates of a group")
    add("--groups", type=int, default=1, help="groups in a micro-batch of a device [1]")
    add("--fp32", action="store_true", help="float32 weights and activations [bf16]")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    add("--lora_r", type=int, default=0, help="rank of LoRA adapters; 0 trains the whole model [0]")
    add("--engine", choices=("deepspeed", "torch"), default="deepspeed", help="as in exo-fast align [deepspeed]")
    add("--zero_stage", type=int, choices=(0, 1, 2, 3), help="DeepSpeed ZeRO stage [as in exo-fast align]")
    add("--offload", action="store_true", help="the optimizer's state in CPU memory")
    add("--processes", type=int, default=1, help="processes that share the work, one a device [1]")
    add("--memory_budget", metavar="SIZE", help="scratch of the fused head, such as 512MB")
    add("--device", choices=("cpu", "cuda"), help="[cuda where there is one]")
    add("--memory", metavar="SIZE", help="memory of the device, such as 80GB [this machine's]")
    add("--trust_remote_code", action="store_true", help="run configuration code that comes with the model")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """`exo-fast memory`; returns the exit status. Raises InputError for a model or a number that cannot be."""
    options = parser().parse_args(argv)
    import torch

    from exo_fast.benchmarks import memory_model
    from exo_fast.training.config import parse_size
    from exo_fast.training.errors import InputError
    from exo_fast.training.terminal import give_result

    prompt = options.prompt if options.prompt is not None else options.tokens // 2
    if not 0 < prompt < options.tokens:
        raise InputError(f"--prompt {prompt}: between 1 and --tokens - 1 = {options.tokens - 1} is needed")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(options.model, trust_remote_code=options.trust_remote_code)
    torch_engine = options.engine == "torch"
    alone = device == "cpu" and options.fp32 and options.processes == 1 and not options.offload
    default_stage = 0 if alone else 2  # that of exo_fast.training.deepspeed
    try:
        setting = memory_model.Setting(
            "exo_fast",
            prompt,
            options.tokens - prompt,
            options.k,
            groups=options.groups,
            dtype=torch.float32 if options.fp32 or torch_engine else torch.bfloat16,
            autocast=torch_engine and not options.fp32,
            gradient_checkpointing=options.gradient_checkpointing,
            lora_r=options.lora_r,
            engine=options.engine,
            zero_stage=default_stage if options.zero_stage is None else options.zero_stage,
            offload=options.offload,
            processes=options.processes,
            device=device,
            memory_budget=None if options.memory_budget is None else parse_size(options.memory_budget),
        )
        found = [memory_model.estimate(config, replace(setting, method=name)) for name in memory_model.METHODS]
    except ValueError as error:
        raise InputError(str(error)) from error
    memory = parse_size(options.memory) if options.memory else device_memory(device)
    print(text(options.model, found, memory))
    give_result({"memory": memory, "estimates": [as_json(estimate) for estimate in found]})
    return 0


def load_config(name_or_path: str, *, trust_remote_code: bool) -> Any:
    """A transformers configuration, of a directory, a file or a Hub name. Raises InputError for what is none."""
    from transformers import AutoConfig

    from exo_fast.training.loading import from_pretrained

    return from_pretrained(AutoConfig, name_or_path, trust_remote_code=trust_remote_code).get_text_config()


def device_memory(device: str) -> int:
    """Bytes of this machine's GPU, or of its main memory. Raises InputError where there is no GPU."""
    import torch

    from exo_fast.training.errors import InputError

    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: there is none here to ask; say --memory, such as --memory 80GB")
    return torch.cuda.get_device_properties(0).total_memory


def as_json(estimate: Any) -> dict:
    """An estimate as JSON can hold it; bytes."""
    setting = {**asdict(estimate.setting), "dtype": str(estimate.setting.dtype).removeprefix("torch.")}
    values = ("parts", "moment", "parameters", "rows", "shared", "host")
    return {"setting": setting, "total": estimate.total, **{name: getattr(estimate, name) for name in values}}


def text(name: str, found: list[Any], memory: int) -> str:
    """Table and verdict."""
    from exo_fast.benchmarks.memory_model import PARTS

    ours = found[-1]
    setting = ours.setting
    lines = [
        f"{name}: {ours.parameters / 1e6:,.0f}M parameters, {setting.groups} group(s) of K = {setting.candidates}, "
        f"{setting.prompt} prompt and {setting.completion} completion tokens, GB per device:",
        "",
        f"{'':<14}" + "".join(f"{estimate.setting.method:>14}" for estimate in found),
    ]
    for part in (*PARTS, "total"):
        sizes = [estimate.total if part == "total" else estimate.parts.get(part, 0) for estimate in found]
        if any(sizes):
            lines.append(f"{part:<14}" + "".join(f"{size / 1e9:>14.2f}" for size in sizes))
    lines.append(f"{'rows':<14}" + "".join(f"{'{} x {}'.format(*estimate.rows):>14}" for estimate in found))
    lines.append(f"{'peak in':<14}" + "".join(f"{estimate.moment.split()[0]:>14}" for estimate in found))
    lines.append("")
    lines += [verdict(estimate, memory) for estimate in found]
    if ours.host:
        lines.append(f"Offloading takes {ours.host / 1e9:.1f} GB of CPU memory a process.")
    if not ours.shared:
        lines.append("Candidates cannot share their prompt in this model: a row for each.")
    return "\n".join(lines)


def verdict(estimate: Any, memory: int) -> str:
    """One sentence: whether it fits, with a margin for the estimate's error."""
    margin = CHECKPOINTED_MARGIN if estimate.setting.gradient_checkpointing else MARGIN
    what, need = METHOD_TEXT[estimate.setting.method], estimate.total
    sizes = f"{need / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
    if need * margin <= memory:
        return f"{what}: fits, {sizes}."
    if need <= memory:
        return f"{what}: may fit, {sizes}, which is less than the estimate can be off."
    return f"{what}: does not fit, needs {sizes}."
