"""`exo-fast logprobs`: log-probs of given completions under a model, through the fused head.

No logits of the whole vocabulary are kept, and a prompt is run once for all its completions if the model can share it.
If the data has the token ids that were drawn, these are scored. So with the settings of `exo-fast generate` the result
is the log-prob under the distribution that they were drawn from: the model's own softmax, over its whole vocabulary.
(If the vocabulary has ids without a token, `exo-fast generate` never draws them; it draws from that softmax
renormalised over the other ids.)
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers.utils import logging

from exo_fast.layout import Group
from exo_fast.precision import matmul_precision
from exo_fast.training import processes
from exo_fast.training.data.examples import load_samples
from exo_fast.training.data.groups import Cut
from exo_fast.training.data.sources import find_splits
from exo_fast.training.inference.config import InferenceConfig, load_model
from exo_fast.training.inference.log_probs import (
    MAX_TOGETHER,
    can_share_prompts,
    need_own_numbers,
    sequence_log_probs,
    tokenize_rows,
)
from exo_fast.training.inference.resumable import ResumableRun, plan_batches
from exo_fast.training.models.digests import digest, json_digest
from exo_fast.training.models.loading import check_fits_model, load_tokenizer
from exo_fast.training.options import check_model_name, option, temperature_problem

logger = logging.get_logger(__name__)


@dataclass
class LogprobsConfig(InferenceConfig):
    """The fields of `exo-fast logprobs`: the fields of every inference stage, the model, and how to cut."""

    model_name_or_path: str | None = option(
        None, "The model to score with: a directory (a LoRA adapter's too) or a Hub name."
    )
    temperature: float = option(1.0, "Divides the logits: the temperature that the completions were sampled at.")
    max_seq_len: int = option(512, "Longest prompt plus completion, in tokens; prompts are cut on the left to fit.")
    max_gen_len: int = option(256, "Longest completion, in tokens with EOS; cut on the right.")

    field_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": ("model_name_or_path", *InferenceConfig.model_fields),
        "data": (*InferenceConfig.data_fields, "max_seq_len", "max_gen_len", "temperature"),
        "speed and memory": InferenceConfig.speed_fields,
    }
    description: ClassVar[str] = """\
Log-probs of completions under a model, in nats, summed over their tokens.

Reads rows of prompt and completions (as `exo-fast generate` or `score` write them), or of prompt, chosen and rejected,
and writes them with a list `logprobs`. Where there are completion_ids they are scored, else the text and EOS. Give
temperature, max_seq_len and (as max_gen_len) max_new_tokens of the sampling to get log-probs under its distribution. An
interrupted run continues when the same command is given again."""
    examples: ClassVar[str] = """\
examples:
  exo-fast logprobs --model_name_or_path models/sft --data data/samples --output_dir data/logprobs
  exo-fast logprobs --model_name_or_path runs/align --data data/samples --temperature 0.8 --output_dir data/logprobs-t08
  torchrun --nproc-per-node 2 -m exo_fast.training.cli logprobs --config logprobs.yaml
"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_name(self)
        problem = temperature_problem(self.temperature)
        self._need(problem is None, "temperature", f"{problem}.")
        self._need(self.max_gen_len >= 1, "max_gen_len", "at least 1 token is needed.")
        self._need(
            self.max_seq_len > self.max_gen_len,
            "max_seq_len",
            f"must be larger than max_gen_len={self.max_gen_len}, so that some of the prompt fits.",
        )


def logprobs(config: LogprobsConfig) -> dict[str, Any]:
    """Write the rows of `config.data`, in their order, with the log-probs of their completions to `config.output_dir`.

    Returns the summary, which is written there too. Raises InputError for settings, data or models that cannot work.
    """
    processes.start(on_cpu=config.use_cpu)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    sources = find_splits(config.data, config.split)
    examples = {split: config.first(load_samples(source, tokenizer=tokenizer)) for split, source in sources.items()}
    rows = {
        split: tokenize_rows(found, tokenizer, max_seq_len=config.max_seq_len, max_gen_len=config.max_gen_len)
        for split, found in examples.items()
    }
    groups = [row.group for found in rows.values() for row in found]
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(len(group.prompt) + max(map(len, group.completions)) for group in groups),
        largest_id=max(max(max(group.prompt), *map(max, group.completions)) for group in groups),
    )
    identity = {
        "stage": "logprobs",
        "model": processes.from_first(digest(config.model_name_or_path) if processes.index() == 0 else None),
        "rows": {
            split: json_digest([(e.prompt, e.completions, e.extras()) for e in found])
            for split, found in examples.items()
        },
        "temperature": config.temperature,
        "max_seq_len": config.max_seq_len,
        "max_gen_len": config.max_gen_len,
        **config.numerics(),
    }
    run = ResumableRun(config.output_dir, identity)
    if (summary := run.finished([f"{split}.json" for split in rows])) is not None:
        return summary

    @functools.cache  # loaded with the first batch, so not at all if no work is left
    def model() -> tuple[nn.Module, bool]:
        loaded = load_model(config, config.model_name_or_path)
        share_prompt = can_share_prompts(loaded, groups)
        need_own_numbers(loaded, groups, share_prompt=share_prompt)
        return loaded, share_prompt

    files, counts = {}, {}
    for split, found in rows.items():
        values = _split_logprobs(config, model, run, split, [row.group for row in found])
        files[f"{split}.json"] = [
            {
                "prompt": example.prompt,
                "completions": example.completions,
                **example.extras(),
                "logprobs": row,
            }
            for example, row in zip(examples[split], values, strict=True)
        ]
        counts[split] = _count(found, values)
    summary = run.finish(files, {"model": config.model_name_or_path, "data": config.data, "counts": counts})
    if processes.index() == 0:
        for split, count in counts.items():
            print(
                f"{split}: mean log-prob {count['mean']:.4f} nats over {count['completions']:,} completions, "
                f"{count['mean_per_token']:.4f} over {count['tokens']:,} tokens"
            )
        print(f"the rows are in {config.output_dir}", flush=True)
    return summary


def _split_logprobs(
    config: LogprobsConfig, model: Any, run: ResumableRun, split: str, groups: list[Group]
) -> list[list[float]]:
    """Return the log-probs of each group's completions."""
    # Groups with many completions are split, and each part has the prompt.
    together = min(MAX_TOGETHER, config.batch_size)
    parts = [
        (index, group.some(range(first, min(first + together, len(group.completions)))))
        for index, group in enumerate(groups)
        for first in range(0, len(group.completions), together)
    ]
    sizes = [len(group.completions) for _, group in parts]
    batches = plan_batches([group.tokens() for _, group in parts], sizes, config.batch_size)

    def compute(index: int) -> list[list[float]]:
        loaded, share_prompt = model()
        batch = [parts[place][1] for place in batches[index]]
        with matmul_precision(config.matmul_precision, loaded.device.type):
            values = sequence_log_probs(
                loaded, batch, temperature=config.temperature, batch_size=len(batch), share_prompt=share_prompt
            )
        # Write the shortest decimals that give these float32 numbers, not the longer ones of the doubles.
        return [[float(str(value)) for value in row] for row in values]

    values = run.compute(
        split,
        [sum(sizes[place] for place in batch) for batch in batches],
        compute,
        description=f"log-probs ({split})",
        unit="seq",
        progress=not config.disable_tqdm,
        prepare=model,
    )
    by_place = {
        place: row for batch, rows in zip(batches, values, strict=True) for place, row in zip(batch, rows, strict=True)
    }
    found: list[list[float]] = [[] for _ in groups]
    for place, (index, _) in enumerate(parts):
        found[index] += by_place[place]
    return found


def _count(rows: list[Cut], values: list[list[float]]) -> dict[str, Any]:
    marked = [row.learned or [[True] * len(ids) for ids in row.candidates] for row in rows]
    tokens = sum(sum(map(sum, marks)) for marks in marked)
    flat = [value for row in values for value in row]
    return {
        "prompts": len(rows),
        "completions": len(flat),
        "tokens": tokens,
        "mean": float(np.mean(flat)),
        "mean_per_token": float(np.sum(flat) / tokens),
        "cut_prompts": sum(row.cut_prompt for row in rows),
        "cut_completions": sum(row.cut_completions for row in rows),
    }
