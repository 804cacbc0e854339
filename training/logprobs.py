"""`exo-fast logprobs`: log-probs of given completions under a model, through the fused head.

No logits of the whole vocabulary are kept, and a prompt is run once for its completions where the model can share it.
The token ids that were drawn are scored where the data has them, so that with the settings of `exo-fast generate` the
result is the log-prob under the distribution that they were drawn from: the model's own softmax, over its whole
vocabulary. (Where that has ids without a token, `exo-fast generate` never draws them, and what it draws from is that
softmax renormalised over the others.)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data.examples import Example
from exo_fast.data.selection import UNLEARNED
from exo_fast.data.tokens import RowTokenizer
from exo_fast.head import final_hidden, read_head
from exo_fast.layout import Group, check_sharing, model_inputs, pack, plan_mask
from exo_fast.logprobs import linear_logprobs
from exo_fast.masks import neighbours_hint
from exo_fast.reference import sequence_logps
from exo_fast.training.config import _field, temperature_problem
from exo_fast.training.data.examples import load_samples
from exo_fast.training.data.groups import EXAMPLES_PER_CALL, Cut, encoded
from exo_fast.training.errors import InputError, not_its_own
from exo_fast.training.inference import (
    InferenceConfig,
    check_model_name,
    digest,
    find_splits,
    from_main,
    json_digest,
    load_model,
    load_tokenizer,
    start_processes,
)
from exo_fast.training.loading import check_fits_model
from exo_fast.training.precision import matmul_precision
from exo_fast.training.resumable import ResumableRun

logger = logging.get_logger(__name__)
CHECKED_GROUPS = 4
MAX_TOGETHER = 8  # completions that share a prompt: the mask of a row grows with the square of its length


def can_share_prompts(model: nn.Module, groups: Sequence[Group]) -> bool:
    """Whether prompts can be run once for all their completions: by the model's kind, and by numbers on some groups.

    Warns where they cannot.
    """
    plan = plan_mask(model.config)
    report = check_sharing(model, list(groups[:CHECKED_GROUPS]), plan)
    if not report.ok:
        logger.warning(f"Completions cannot share their prompt, which is run for each of them instead: {report.reason}")
    return report.ok


def need_own_numbers(model: nn.Module, groups: Sequence[Group], *, share_prompt: bool) -> None:
    """Raises InputError where the log-prob of the shortest sequence is another beside the longest group than alone;
    looks where `neighbours_hint` says that it might be."""
    hint = neighbours_hint(model.config)
    if not hint:
        return
    shortest = min(
        (Group(group.prompt, [min(group.completions, key=len)]) for group in groups), key=lambda group: group.tokens()
    )
    longest = max(groups, key=lambda group: len(group.prompt) + max(map(len, group.completions)))
    options = {"temperature": 1.0, "batch_size": 2, "share_prompt": share_prompt}
    alone, beside = (sequence_log_probs(model, some, **options)[0][0] for some in ([shortest], [shortest, longest]))
    allowed = 1e-4 if model.dtype == torch.float32 else 0.15  # nats a token, as `check_sharing` allows
    difference = float(abs(beside - alone)) / len(shortest.completions[0])
    if not difference <= allowed:  # also where it is not a number
        found = f"{difference:.1e} nats a token beside a longer one, where {allowed} is allowed"
        raise not_its_own(model.config, hint, found)


@torch.no_grad()
def sequence_log_probs(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    temperature: float,
    progress: str | None = None,
    batch_size: int = 16,
    share_prompt: bool | None = None,
) -> list[np.ndarray]:
    """For each group, (K,) float32: the sum of log-probs of each completion's tokens, in nats.

    Args:
        model: a causal LM in eval mode.
        temperature: divides the logits; a positive number.
        progress: words before the progress bar, None for no bar.
        batch_size: groups that run together.
        share_prompt: None asks `can_share_prompts`.

    Raises:
        InputError: a model whose lm_head is not known.
    """
    plan = plan_mask(model.config)
    try:
        head = read_head(model)
    except ValueError as error:
        raise InputError(str(error)) from error
    if share_prompt is None:
        share_prompt = bool(groups) and can_share_prompts(model, groups)
    values = []
    with tqdm(total=len(groups), desc=progress, unit="prompt", disable=progress is None) as bar:
        for first in range(0, len(groups), batch_size):
            batch = list(groups[first : first + batch_size])
            packed = pack(batch, share_prompt=share_prompt, by_length=plan.by_length)
            implementation = model.config._attn_implementation
            inputs = model_inputs(
                packed, plan, dtype=model.dtype, device=model.device, attn_implementation=implementation
            )
            hidden = final_hidden(model, **inputs).flatten(0, 1)[packed.source.to(model.device)]
            targets = packed.targets.to(model.device)
            token_logps = linear_logprobs(head.multiplied(hidden), head.weight, targets, **head.options(temperature))
            sums = sequence_logps(token_logps, packed.cu_seqlens.to(model.device)).float().cpu().numpy()
            values += np.split(sums, np.cumsum([len(group.completions) for group in batch])[:-1])
            bar.update(len(batch))
    return values


def tokenize_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, max_gen_len: int
) -> list[Cut]:
    """Examples of any number of completions as token ids (`exo_fast.data.tokens`), cut as in training
    (`exo_fast.training.data.groups.Cut`).

    Raises InputError as `data.groups.tokenize` does of ids, and for a completion none of whose first `max_gen_len`
    tokens count.
    """
    tokenized = RowTokenizer(tokenizer)
    lengths = {"max_seq_len": max_seq_len, "max_gen_len": max_gen_len, "prefix": len(tokenized.prefix)}
    rows = []
    for start in range(0, len(examples), EXAMPLES_PER_CALL):
        chunk = examples[start : start + EXAMPLES_PER_CALL]
        for example, tokens in zip(chunk, encoded(tokenized, chunk), strict=True):
            row = Cut.of(example, tokens, range(len(tokens.candidates)), **lengths)
            if row.learned is not None and not all(map(any, row.learned)):
                raise InputError(f"{example.place}: {UNLEARNED}; set max_gen_len={max_gen_len} to a larger number.")
            rows.append(row)
    return rows


@dataclass
class LogprobsConfig(InferenceConfig):
    """`exo-fast logprobs`: fields of every inference stage, the model, and how to cut."""

    model_name_or_path: str | None = _field(
        None, "The model to score with: a directory (a LoRA adapter's too) or a Hub name."
    )
    temperature: float = _field(1.0, "Divides the logits: the temperature that the completions were sampled at.")
    max_seq_len: int = _field(512, "Longest prompt plus completion, in tokens; prompts are cut on the left to fit.")
    max_gen_len: int = _field(256, "Longest completion, in tokens with EOS; cut on the right.")

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
    state = start_processes(config)
    tokenizer = load_tokenizer(config, config.model_name_or_path)
    examples = {
        split: config.first(load_samples(source, tokenizer=tokenizer)) for split, source in find_splits(config).items()
    }
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
        "model": from_main(digest(config.model_name_or_path) if state.is_main_process else None, state),
        "rows": {
            split: json_digest([(e.prompt, e.completions, e.extras()) for e in found])
            for split, found in examples.items()
        },
        "temperature": config.temperature,
        "max_seq_len": config.max_seq_len,
        "max_gen_len": config.max_gen_len,
        **config.numerics(),
    }
    run = ResumableRun(config.output_dir, identity, state)
    if (summary := run.finished([f"{split}.json" for split in rows])) is not None:
        return summary

    @functools.cache  # loaded with the first batch: not at all when nothing is left to do
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
    if state.is_main_process:
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
    """The log-probs of each group's completions."""
    # Groups of many completions are cut up, and each part has its prompt.
    together = min(MAX_TOGETHER, config.batch_size)
    parts = [
        (index, group.some(range(first, min(first + together, len(group.completions)))))
        for index, group in enumerate(groups)
        for first in range(0, len(group.completions), together)
    ]
    order = sorted(range(len(parts)), key=lambda place: (-parts[place][1].tokens(), place))
    batches: list[list[int]] = []
    room = 0
    for place in order:
        count = len(parts[place][1].completions)
        if count > room:
            batches.append([])
            room = config.batch_size
        batches[-1].append(place)
        room -= count

    def compute(index: int) -> list[list[float]]:
        loaded, share_prompt = model()
        batch = [parts[place][1] for place in batches[index]]
        with matmul_precision(config.matmul_precision, loaded.device.type):
            values = sequence_log_probs(
                loaded, batch, temperature=config.temperature, batch_size=len(batch), share_prompt=share_prompt
            )
        # The shortest decimals that are these float32 numbers, not these as doubles.
        return [[float(str(value)) for value in row] for row in values]

    values = run.compute(
        split,
        [sum(len(parts[place][1].completions) for place in batch) for batch in batches],
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
