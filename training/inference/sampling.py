"""Sample completions: random streams per prompt, warpers, batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exo_fast.data.tokens import RowTokenizer
from exo_fast.positions import length_rules, start_anew
from exo_fast.training.errors import RunError
from exo_fast.training.inference.resumable import plan_batches
from exo_fast.training.options import temperature_problem

SMALLEST_SHARE = 1e-6  # a smaller top_p keeps one token: the most likely one has more in every vocabulary there is
Sampler = Callable[[list[str], list[list[int]]], list[list[list[int]]]]  # prompts and their ids -> ids of completions


@dataclass(frozen=True)
class Sampling:
    """The settings of drawing completions. Raises ValueError for an argument out of range, named with its value."""

    return_num: int = 1  # completions of each prompt
    max_new_tokens: int = 64
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token (greedy)
    top_k: int = 0  # keep only the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all
    seed: int = 0  # of the random streams; the global random state is neither read nor changed

    def __post_init__(self) -> None:
        for name in ("return_num", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.temperature != 0 and (problem := temperature_problem(self.temperature)) is not None:
            raise ValueError(f"temperature is {self.temperature}; 0 (greedy), or {problem}")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; 0 (the whole vocabulary) or a positive number is needed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; a number above 0 and at most 1 is needed")
        if self.greedy and self.return_num > 1:
            raise ValueError(
                f"return_num is {self.return_num}; {self.greedy} takes the most likely token and so gives the same "
                "completion each time: it needs return_num=1"
            )

    @property
    def greedy(self) -> str:
        """The field, with its value, that makes decoding greedy; empty if tokens are drawn."""
        fields = {
            "temperature": self.temperature == 0,
            "top_k": self.top_k == 1,
            "top_p": self.top_p < SMALLEST_SHARE,
        }
        return next((f"{name}={getattr(self, name)}" for name, is_greedy in fields.items() if is_greedy), "")


class _TokensThatExist(LogitsProcessor):
    """Masks ids without a token, and notes whether the model's scores are finite."""

    def __init__(self, without_token: Tensor):
        self.without_token = without_token  # (n,) int64, ids
        self.finite: Tensor | bool = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = torch.isfinite(scores.amax(dim=-1)).all() & self.finite  # NaN if any is
        return scores.index_fill(-1, self.without_token, -torch.inf) if len(self.without_token) else scores


class _Draw(LogitsProcessor):
    """Sample from softmax(scores) with the uniform numbers given: a row per sequence, a column per step."""

    def __init__(self, uniforms: Tensor, prompt_length: int):
        self.uniforms = uniforms  # (B, max_new_tokens) float32 in [0, 1)
        self.prompt_length = prompt_length  # T of the padded prompts: the step is the length minus this

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # scores (B, V). The running sum is not normalised: the draw is scaled by its last column instead.
        cumulative = torch.softmax(scores, dim=-1, dtype=torch.float32).cumsum(dim=-1)
        total = cumulative[:, -1:]
        draw = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * total
        # Strictly below the total, so that the entry found is one where the sum grows: never a masked token.
        draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))
        # It finds no entry if scores are not finite. `sample_batch` reports that when the batch is done.
        chosen = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _uniforms(seed: int, prompt: str, candidate: int, count: int) -> np.ndarray:
    """Return (count,) float32 in [0, 1): the stream of one candidate of one prompt."""
    key = hashlib.sha256(f"{seed}\x00{candidate}\x00{prompt}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count, np.float32)


def end_tokens(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a completion: the ids the model names, and the ids that training puts at the end (the
    tokenizer's EOS, and the end of the assistant's turn in its chat template)."""
    end = generation_config.eos_token_id
    return {*([end] if isinstance(end, int) else end or ()), *RowTokenizer(tokenizer).ends}


def ids_without_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Return the ids below `vocab_size` (the model's) for which the tokenizer has no token, in order."""
    return sorted(set(range(vocab_size)).difference(tokenizer.get_vocab().values()))


@contextmanager
def _nothing_shipped(model: PreTrainedModel) -> Iterator[None]:
    """Remove the defaults that a model ships with (repetition_penalty, min_new_tokens). `generate` uses them for fields
    that a configuration leaves open, and would draw from another distribution than the model's."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped


@torch.no_grad()
def sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    without_token: Sequence[int],
) -> list[list[list[int]]]:
    """Sample one batch of `sample_tokens`: as many completions run together as `batch_size` allows.

    The model reads `encoded[i]`; the text `prompts[i]` only seeds its streams. The model is in eval mode.
    `without_token` are ids that are never drawn (`ids_without_token`). Returns for each prompt `return_num` lists
    of 1 … max_new_tokens ids. Raises RunError if the model's logits are not finite.

    If the model's rotary embedding depends on the longest text (`exo_fast.positions`), prompts of one length are
    needed. A completion then equals transformers' own generation for its prompt alone.
    """
    ends = end_tokens(model.generation_config, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    existing = _TokensThatExist(torch.tensor(without_token, dtype=torch.int64, device=model.device))
    warpers = [existing, *_warpers(sampling)]
    width = max(map(len, encoded))
    rows = [(index, candidate) for index in range(len(prompts)) for candidate in range(sampling.return_num)]
    found: list[list[list[int]]] = [[] for _ in prompts]
    for first in range(0, len(rows), batch_size):  # more than once if one prompt has more completions than that
        some = rows[first : first + batch_size]
        # Left padding: the next token of every row is in the same column.
        input_ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i, _ in some])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i, _ in some])
        processors = LogitsProcessorList(warpers)
        if sampling.temperature > 0:
            uniforms = np.stack([_uniforms(sampling.seed, prompts[i], k, sampling.max_new_tokens) for i, k in some])
            processors.append(_Draw(torch.from_numpy(uniforms).to(model.device), width))
        if length_rules(model.config):
            start_anew(model)
        with _nothing_shipped(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
            )
        if not bool(existing.finite):
            raise RunError(
                "the model's logits are not finite (NaN or infinite), so nothing can be sampled: its weights may be "
                "damaged, or overflow in the dtype that it runs in."
            )
        for (index, _), ids in zip(some, output[:, width:].tolist(), strict=True):
            stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
            found[index].append(ids[:stop])
    return found


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Return the processors that change the distribution before the draw. Greedy decoding needs no processor."""
    if sampling.temperature == 0:
        return []
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    return_num: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Sample token ids: for each prompt, in the order given, `return_num` lists of 1 … max_new_tokens ids.

    A list that ended by itself ends with the end-of-sequence token it drew; one that was cut does not. The
    same prompt given twice gets the same completions twice: ask for more with `return_num`. Ids that the tokenizer has
    no token for are never drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy), and needs return_num=1.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
        seed: of the random streams; the global random state is neither read nor changed.
        batch_size: sequences (not prompts) that run together.
        progress: words before the progress bar, None for no bar.

    Raises:
        ValueError: an argument out of range, named with its value; several greedy completions of a prompt.
        RunError: the model's logits are not finite.
    """
    sampling = Sampling(return_num, max_new_tokens, temperature, top_k, top_p, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; a list of strings is needed: put it in a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompts[{index}] is {prompt!r}; a non-empty string is needed")
    encoded = RowTokenizer(tokenizer).prompts(prompts)
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}] is {prompts[index]!r}, which gives no token; give it some text")
    without_token = ids_without_token(tokenizer, model.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    found: list[list[list[int]]] = [[] for _ in prompts]
    with tqdm(total=len(prompts) * return_num, desc=progress, unit="seq", disable=progress is None) as bar:
        of_one_length = bool(length_rules(model.config))
        numbers = list(map(len, encoded)), [return_num] * len(encoded)
        for batch in plan_batches(*numbers, batch_size, of_one_length=of_one_length):
            some = [prompts[i] for i in batch], [encoded[i] for i in batch]
            groups = sample_batch(model, tokenizer, *some, sampling, batch_size, without_token)
            for index, group in zip(batch, groups, strict=True):
                found[index] = group
            bar.update(len(batch) * return_num)
    model.train(was_training)
    return found
