"""Sampling completions from a language model.

Every completion has a random stream of its own, keyed by (seed, prompt, candidate number): the same prompt
gets the same uniform numbers wherever it stands in the list and whichever process samples it, so a resumed or
re-sharded run repeats itself. One uniform number per token, turned into a token through the inverse of the
cumulative distribution, is also what makes it fast: `torch.multinomial` draws one exponential per vocabulary
entry, which took 30-40% of the sampling time of a 135M model on a CPU.

The model runs inside `transformers`' own `generate`: the draw is a logits processor that leaves a single
finite score, which greedy decoding then picks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
        chosen = torch.searchsorted(cumulative, draw, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _uniforms(seed: int, prompt: str, candidate: int, count: int) -> np.ndarray:
    """(count,) float32 in [0, 1): the stream of one candidate of one prompt."""
    key = hashlib.sha256(f"{seed}\x00{candidate}\x00{prompt}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count, np.float32)


def _batches(lengths: Sequence[int], num_return: int, batch_size: int) -> list[list[int]]:
    """Prompt indices, longest first, so that a batch pads little and the largest batch comes first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    step = max(1, batch_size // num_return)
    return [order[start : start + step] for start in range(0, len(order), step)]


def _check(prompts: Sequence[str], num_return: int, max_new_tokens: int, temperature: float, top_k: int,
           top_p: float, batch_size: int) -> None:  # fmt: skip
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; a list of strings is needed: put it in a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompts[{index}] is {prompt!r}; a non-empty string is needed")
    for name, value in (
        ("num_return", num_return),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; 0 (greedy) or a positive number is needed")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; 0 (the whole vocabulary) or a positive number is needed")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; a number above 0 and at most 1 is needed")


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_return: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Sample token ids: for each prompt, in the order given, `num_return` lists of 1 … max_new_tokens ids.

    A list that ended by itself ends with the end-of-sequence token it drew; one that was cut does not. The
    same prompt given twice gets the same completions twice: ask for more with `num_return`.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
        seed: of the random streams; the global random state is neither read nor changed.
        batch_size: sequences (not prompts) that run together.
        progress: words before the progress bar, None for no bar.

    Raises:
        ValueError: an argument out of range, named with its value.
    """
    _check(prompts, num_return, max_new_tokens, temperature, top_k, top_p, batch_size)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}] is {prompts[index]!r}, which gives no token; give it some text")
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    pad = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    # A bare configuration: defaults that a model ships with (top_k=50, say) must not join in unseen.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    warpers: list[LogitsProcessor] = []
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))

    was_training = model.training
    model.eval()
    found: list[list[list[int]]] = [[] for _ in prompts]
    with tqdm(total=len(prompts) * num_return, desc=progress, unit="seq", disable=progress is None) as bar:
        for batch in _batches([len(ids) for ids in encoded], num_return, batch_size):
            width = len(encoded[batch[0]])
            rows = [(index, candidate) for index in batch for candidate in range(num_return)]
            # Left padding: the next token of every row stands in the same column.
            input_ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i, _ in rows])
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i, _ in rows])
            processors = LogitsProcessorList()
            if temperature > 0:
                uniforms = np.stack([_uniforms(seed, prompts[i], k, max_new_tokens) for i, k in rows])
                processors.extend([*warpers, _Draw(torch.from_numpy(uniforms).to(model.device), width)])
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=processors,
            )
            for (index, _), ids in zip(rows, output[:, width:].tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
                found[index].append(ids[:stop])
            bar.update(len(rows))
    model.train(was_training)
    return found


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_return: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    progress: str | None = None,
) -> list[list[str]]:
    """`sample_tokens`, decoded without special tokens: for each prompt, `num_return` strings."""
    tokens = sample_tokens(
        model,
        tokenizer,
        prompts,
        num_return=num_return,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in tokens]
