"""The command `exo-fast memory`: checks whether a training step fits, before it starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

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
# Measured steps on a CPU (benchmarks/results/memory.json) took up to 1.34 times the estimate, and with checkpointing up
# to 2.69 times: the largest ratio of each kind, rounded up. tests/benchmarks/test_memory.py holds them to the file.
MARGIN, CHECKPOINTED_MARGIN = 1.4, 2.8


def parser() -> argparse.ArgumentParser:
    """Return the options of `exo-fast memory`. They are named as in `exo-fast align`, if it has them."""
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
    """Run `exo-fast memory`; returns the exit status. Raises InputError for an invalid model or number."""
    options = parser().parse_args(argv)
    import torch

    from exo_fast.training.errors import InputError
    from exo_fast.training.memory import estimate as memory_model
    from exo_fast.training.options import parse_size
    from exo_fast.training.terminal import give_result

    prompt = options.prompt if options.prompt is not None else options.tokens // 2
    if not 0 < prompt < options.tokens:
        raise InputError(f"--prompt {prompt}: between 1 and --tokens - 1 = {options.tokens - 1} is needed")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(options.model, trust_remote_code=options.trust_remote_code)
    torch_engine = options.engine == "torch"
    alone = device == "cpu" and options.fp32 and options.processes == 1 and not options.offload
    memory = parse_size(options.memory) if options.memory else device_memory(device)
    default_stage = 0 if alone else 2  # the default of exo_fast.training.trainer.deepspeed
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
            memory_budget=parse_size(options.memory_budget)
            if options.memory_budget
            else default_budget(device, memory),
        )
        found = [memory_model.estimate(config, replace(setting, method=name)) for name in memory_model.METHODS]
    except ValueError as error:
        raise InputError(str(error)) from error
    print(text(options.model, found, memory))
    give_result({"memory": memory, "estimates": [as_json(estimate) for estimate in found]})
    return 0


def load_config(name_or_path: str, *, trust_remote_code: bool) -> Any:
    """Load a transformers configuration from a directory, a file or a Hub name. Raises InputError if it is not one."""
    from transformers import AutoConfig

    from exo_fast.training.models.loading import from_pretrained

    return from_pretrained(AutoConfig, name_or_path, trust_remote_code=trust_remote_code).get_text_config()


def default_budget(device: str, memory: int) -> int | None:
    """Return the scratch that the kernels take of a GPU with so much memory; None on the CPU: its own default."""
    if device == "cpu":
        return None
    from exo_fast.kernels.tuned import SCRATCH

    return SCRATCH.budget(memory)


def device_memory(device: str) -> int:
    """Return the bytes of this machine's GPU, or of its main memory. Raises InputError if there is no GPU."""
    import torch

    from exo_fast.training.errors import InputError

    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU; give its memory, such as --memory 80GB")
    return torch.cuda.get_device_properties(0).total_memory


def as_json(estimate: Any) -> dict:
    """Return an estimate as values that JSON can hold, in bytes."""
    setting = {**asdict(estimate.setting), "dtype": str(estimate.setting.dtype).removeprefix("torch.")}
    values = ("parts", "moment", "parameters", "rows", "shared", "host")
    return {"setting": setting, "total": estimate.total, **{name: getattr(estimate, name) for name in values}}


def text(name: str, found: list[Any], memory: int) -> str:
    """Return the table and the verdict."""
    from tabulate import tabulate

    from exo_fast.training.memory.estimate import PARTS

    ours = found[-1]
    setting = ours.setting
    lines = [
        f"{name}: {ours.parameters / 1e6:,.0f}M parameters, {setting.groups} group(s) of K = {setting.candidates}, "
        f"{setting.prompt} prompt and {setting.completion} completion tokens, GB per device:",
        "",
    ]
    parts = {part: [estimate.parts.get(part, 0) for estimate in found] for part in PARTS}
    parts["total"] = [estimate.total for estimate in found]
    rows = [[part, *(f"{size / 1e9:.2f}" for size in sizes)] for part, sizes in parts.items() if any(sizes)]
    rows.append(["rows", *("{} x {}".format(*estimate.rows) for estimate in found)])
    rows.append(["peak in", *(estimate.moment.split()[0] for estimate in found)])
    sides, head = ["left", *["right"] * len(found)], ["", *(estimate.setting.method for estimate in found)]
    lines += [tabulate(rows, head, tablefmt="plain", colalign=sides, disable_numparse=True), ""]
    lines += [verdict(estimate, memory) for estimate in found]
    if ours.host:
        lines.append(f"Offloading takes {ours.host / 1e9:.1f} GB of CPU memory a process.")
    if not ours.shared:
        lines.append("Candidates cannot share their prompt in this model: a row for each.")
    return "\n".join(lines)


def verdict(estimate: Any, memory: int) -> str:
    """Return one sentence: whether it fits, with a margin for the estimate's error."""
    margin = CHECKPOINTED_MARGIN if estimate.setting.gradient_checkpointing else MARGIN
    what, need = METHOD_TEXT[estimate.setting.method], estimate.total
    sizes = f"{need / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
    if need * margin <= memory:
        return f"{what}: fits, {sizes}."
    if need <= memory:
        return f"{what}: may fit, {sizes}, which is less than the estimate can be off."
    return f"{what}: does not fit, needs {sizes}."
