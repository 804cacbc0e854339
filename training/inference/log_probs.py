"""Sequence log-probs of completions under a model, without training."""

from collections.abc import Sequence

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
from exo_fast.training.data.groups import EXAMPLES_PER_CALL, Cut, encoded
from exo_fast.training.errors import InputError, not_its_own

logger = logging.get_logger(__name__)

CHECKED_GROUPS = 4
MAX_TOGETHER = 8  # completions that share a prompt: the mask of a row grows with the square of its length


def can_share_prompts(model: nn.Module, groups: Sequence[Group]) -> bool:
    """Check whether a prompt can run once for all its completions: by the model's kind, and by numbers of some groups.

    Warns if they cannot.
    """
    plan = plan_mask(model.config)
    report = check_sharing(model, list(groups[:CHECKED_GROUPS]), plan)
    if not report.ok:
        logger.warning(f"Completions cannot share their prompt, which is run for each of them instead: {report.reason}")
    return report.ok


def need_own_numbers(model: nn.Module, groups: Sequence[Group], *, share_prompt: bool) -> None:
    """Raise InputError if the log-prob of the shortest sequence differs between a batch with the longest group and a
    run alone. Checks only models for which `neighbours_hint` says that it might."""
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
    if not difference <= allowed:  # also for NaN
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
    """Return for each group (K,) float32: the sum of log-probs of each completion's tokens, in nats.

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
    """Return examples of any number of completions as token ids (`exo_fast.data.tokens`), cut as in training
    (`exo_fast.training.data.groups.Cut`).

    Raises InputError for ids as `data.groups.tokenize` does, and for a completion if no token of its first
    `max_gen_len` counts.
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
