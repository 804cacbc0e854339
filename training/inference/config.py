"""Settings, models and data of the stages that run models without training them.

They need no DeepSpeed engine: every process holds a whole model and takes its share of the batches
(`exo_fast.training.inference.resumable`), under torchrun, the deepspeed launcher, or alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from exo_fast.data.tokens import RowTokenizer
from exo_fast.training import processes
from exo_fast.training.data.groups import cut_left
from exo_fast.training.errors import InputError
from exo_fast.training.models.loading import adapter_base, from_pretrained, is_adapter, refuse_scalar_adapter
from exo_fast.training.models.merging import merge_adapter
from exo_fast.training.options import PRECISION_HELP, option, resolve
from exo_fast.training.processes import announce_cpu


@dataclass
class InferenceConfig:
    """Fields of every such stage. Raises InputError for a value that cannot work, naming it and the fix."""

    # Data
    data: str | None = option(
        None,
        "A .json, .jsonl or .parquet file, a directory with train.* and test.*, a dataset saved by save_to_disk, or a "
        "name of the registry (imdb/sft:PATH).",
    )
    split: Literal["train", "test", "all"] = option("all", "The split to read; all: each that there is.")
    prompt_num: int = option(-1, "Take the first so many rows (generate: prompts) of each split; -1: all.")
    output_dir: str | None = option(None, "Where train.json, test.json and summary.json are written.")

    # Model
    attn_implementation: str | None = option(
        None, "sdpa, eager, … Default: what is fastest for the stage, or transformers' choice for the model."
    )
    trust_remote_code: bool = option(False, "Run model code that comes with the model. Only for models you trust.")

    # Speed and memory
    batch_size: int = option(64, "Sequences that run together in a process.")
    bf16: bool = option(False, "Run the model in bfloat16. Default: float32.")
    matmul_precision: Literal["ieee", "tf32", "bf16", "fast"] = option("ieee", PRECISION_HELP)
    use_cpu: bool = option(False, "Run on the CPU also where there is an accelerator.")
    disable_tqdm: bool = option(False, "Show no progress bars.")

    # The names of these fields, for a stage's `field_groups`.
    data_fields: ClassVar[tuple[str, ...]] = ("data", "split", "prompt_num", "output_dir")
    model_fields: ClassVar[tuple[str, ...]] = ("attn_implementation", "trust_remote_code")
    speed_fields: ClassVar[tuple[str, ...]] = ("batch_size", "bf16", "matmul_precision", "use_cpu", "disable_tqdm")
    field_groups: ClassVar[dict[str, tuple[str, ...]]]
    description: ClassVar[str]
    examples: ClassVar[str]

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            announce_cpu()
        self._need(bool(self.data), "data", "name the data (a file or a directory).")
        self._need(bool(self.output_dir), "output_dir", "name the directory to write to.")
        self._need(self.prompt_num == -1 or self.prompt_num >= 1, "prompt_num", "-1 (all) or at least 1 is needed.")
        self._need(self.batch_size >= 1, "batch_size", "at least 1 is needed.")
        self.matmul_precision = resolve(self.matmul_precision, on_cpu=self.use_cpu)

    def _need(self, ok: bool, name: str, fix: str) -> None:
        if not ok:
            raise InputError(f"{name}={getattr(self, name)!r}: {fix}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def first(self, rows: list[Any]) -> list[Any]:
        """Return the first `prompt_num` of a split's rows."""
        return rows if self.prompt_num < 0 else rows[: self.prompt_num]

    def numerics(self) -> dict[str, Any]:
        """Return the settings that move results in their last digits, for a run's identity."""
        return {
            "bf16": self.bf16,
            "matmul_precision": self.matmul_precision,
            "attn_implementation": self.attn_implementation,
            "batch_size": self.batch_size,
        }


# Models


def load_model(config: InferenceConfig, name_or_path: str, *, sampling: bool = False) -> nn.Module:
    """Load a causal LM in `config.dtype` on this process's device, in eval mode. A LoRA adapter is merged into its base
    (`loading.merge_adapter`).

    For `sampling` on a CPU attention is eager unless the config names one: with bf16 products, PyTorch's fused
    attention is the slower one for single queries (15 against 24 sequences a second of a 135M model).
    Raises InputError if loading fails.
    """
    attention = config.attn_implementation or ("eager" if sampling and config.use_cpu else None)
    options = {"trust_remote_code": config.trust_remote_code, "dtype": config.dtype}
    options |= {} if attention is None else {"attn_implementation": attention}
    if not is_adapter(name_or_path):
        model = from_pretrained(AutoModelForCausalLM, name_or_path, **options)
    else:
        refuse_scalar_adapter(name_or_path)
        base = from_pretrained(AutoModelForCausalLM, adapter_base(name_or_path), **options)
        model = merge_adapter(base, name_or_path)
    return model.to(processes.start(on_cpu=config.use_cpu)).eval()


# Data


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_tokens: Sequence[int]
) -> list[tuple[list[int], int]]:
    """Return the ids of each prompt as in training (`exo_fast.data.tokens`), cut on the left after BOS to at most
    `max_tokens[i]`, and how many were cut off."""
    rows = RowTokenizer(tokenizer)
    found = rows.prompts(prompts)
    return [cut_left(ids, limit, len(rows.prefix)) for ids, limit in zip(found, max_tokens, strict=True)]
