"""From examples to tokenised groups, and from groups to a batch.

Prompt and completion are tokenised apart and their ids joined: what the model is trained on is exactly what
was generated, and no length drifts by decoding and encoding again (the original repository does both). The
ids live in flat arrays, so a large data set costs a few bytes a token and survives a fork of the data loader.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from exo_fast.layout import Group, Packed, pack
from exo_fast.positions import LengthRules
from exo_fast.training.data.examples import Example
from exo_fast.training.errors import InputError
from exo_fast.training.loading import need_eos

EXAMPLES_PER_CALL = 512  # enough to keep the tokenizer's own threads busy, small enough for a progress bar
CHECKED_EXAMPLES = 32  # of those that bring ids: another tokenizer's show at once


@dataclass(frozen=True)
class TokenCounts:
    """What tokenising did, for the table printed before training. Tokens are counted over all groups."""

    examples: int
    groups: int
    candidates: int  # K, per group
    prompt_tokens: int  # each group's prompt once
    completion_tokens: int
    cut_prompts: int  # groups whose prompt lost tokens on the left
    cut_completions: int  # completions that lost tokens (and their EOS) on the right
    longest_sequence: int  # prompt and its longest completion
    longest_group: int  # prompt and all its completions

    @property
    def shared_tokens(self) -> int:
        """Tokens of one epoch when candidates share their prompt."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def unshared_tokens(self) -> int:
        """Tokens of one epoch with one row per candidate, padding not counted."""
        return self.prompt_tokens * self.candidates + self.completion_tokens


class GroupDataset(torch.utils.data.Dataset):
    """G tokenised groups of K candidates, their rewards, and (once computed) their reference log-probs.

    Item i is a dict: `index` i, `group` (layout.Group), `rewards` (K,) float32, `ref_logps` (K,) float32.
    """

    def __init__(
        self,
        prompt_ids: np.ndarray,  # (prompt tokens,) int32, group after group
        prompt_offsets: np.ndarray,  # (G+1,) int64
        completion_ids: np.ndarray,  # (completion tokens,) int32, candidate after candidate
        completion_offsets: np.ndarray,  # (G*K+1,) int64
        rewards: Tensor,  # (G, K) float32
        counts: TokenCounts,
    ):
        self.prompt_ids, self.prompt_offsets = prompt_ids, prompt_offsets
        self.completion_ids, self.completion_offsets = completion_ids, completion_offsets
        self.rewards = rewards
        self.ref_logps: Tensor | None = None  # (G, K) float32
        self.counts = counts

    def __len__(self) -> int:
        return len(self.rewards)

    def group(self, index: int) -> Group:
        """The token ids of group `index`."""
        candidates = self.rewards.shape[1]
        bounds = self.completion_offsets[index * candidates : (index + 1) * candidates + 1]
        return Group(
            prompt=self.prompt_ids[self.prompt_offsets[index] : self.prompt_offsets[index + 1]].tolist(),
            completions=[self.completion_ids[a:b].tolist() for a, b in pairwise(bounds)],
        )

    def lengths(self) -> np.ndarray:
        """(G,) tokens of each group, its prompt counted once."""
        candidates = self.rewards.shape[1]
        return np.diff(self.prompt_offsets) + np.diff(self.completion_offsets[::candidates])

    def sequence_lengths(self) -> np.ndarray:
        """(G, K) tokens of each prompt with its candidate."""
        candidates = np.diff(self.completion_offsets).reshape(len(self), -1)
        return np.diff(self.prompt_offsets)[:, None] + candidates

    def __getitem__(self, index: int) -> dict[str, Any]:
        # The reference pass itself reads items before there are reference log-probs.
        ref_logps = torch.zeros_like(self.rewards[index]) if self.ref_logps is None else self.ref_logps[index]
        return {
            "index": index,
            "group": self.group(index),
            "rewards": self.rewards[index],
            "ref_logps": ref_logps,
        }


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_contrastive: int | None,
    max_seq_len: int,
    max_gen_len: int,
    description: str = "tokenising",
    progress: bool = True,
) -> GroupDataset:
    """Cut each example's candidates into consecutive groups of `num_contrastive` (None: one group) and
    tokenise them.

    A completion is its ids and EOS (or, where they are known, just the ids that were drawn: sampling that was cut
    short drew no EOS), cut on the right to `max_gen_len`. A prompt is what the tokenizer puts before a text (BOS),
    then its ids, cut on the left so that it and the group's longest completion fit `max_seq_len`. Raises InputError
    for a tokenizer without EOS, for a prompt of no tokens, and for ids that another tokenizer drew.
    """
    eos = need_eos(tokenizer)
    prefix = prefix_ids(tokenizer)
    check_drawn_ids(examples, tokenizer)
    candidates = num_contrastive or len(examples[0].completions)
    prompt_ids, completion_ids = array("i"), array("i")
    prompt_offsets, completion_offsets = array("q", [0]), array("q", [0])
    cut_prompts = cut_completions = longest_sequence = 0
    bar = tqdm(total=len(examples), desc=description, unit=" examples", disable=not progress)
    for start in range(0, len(examples), EXAMPLES_PER_CALL):
        chunk = examples[start : start + EXAMPLES_PER_CALL]
        prompts = encode(tokenizer, [example.prompt for example in chunk])
        written = iter(encode(tokenizer, [text for e in chunk if e.completion_ids is None for text in e.completions]))
        for example, body in zip(chunk, prompts, strict=True):
            if body[: len(prefix)] == prefix:  # a template may have written BOS already
                body = body[len(prefix) :]
            if not prefix and not body:
                raise InputError(
                    f"{example.place}, field `prompt`, value {example.prompt!r}: no tokens, and the "
                    "tokenizer adds no BOS; at least one is needed, to predict a completion's first token from."
                )
            drawn = iter(example.completion_ids or ())
            for _ in range(len(example.completions) // candidates):
                longest = 0
                for _ in range(candidates):
                    ids = next(written if example.completion_ids is None else drawn)
                    if example.completion_ids is None and ids[-1:] != [eos]:
                        ids.append(eos)
                    cut_completions += len(ids) > max_gen_len
                    completion_ids.extend(ids[:max_gen_len])
                    completion_offsets.append(len(completion_ids))
                    longest = max(longest, min(len(ids), max_gen_len))
                # Drawn completions are continued from the prompt that `generate` gave the model, cut for the longest.
                reserved = longest if example.completion_ids is None else max_gen_len
                room = max_seq_len - reserved - len(prefix)
                cut_prompts += len(body) > room
                prompt_ids.extend(prefix + body[max(len(body) - room, 0) :])
                longest_sequence = max(longest_sequence, len(prompt_ids) - prompt_offsets[-1] + longest)
                prompt_offsets.append(len(prompt_ids))
        bar.update(len(chunk))
    bar.close()
    rewards = np.concatenate([np.asarray(example.rewards, np.float32) for example in examples])
    prompt_lengths = np.diff(np.asarray(prompt_offsets))
    group_lengths = prompt_lengths + np.diff(np.asarray(completion_offsets)[::candidates])
    return GroupDataset(
        np.asarray(prompt_ids, np.int32),
        np.asarray(prompt_offsets, np.int64),
        np.asarray(completion_ids, np.int32),
        np.asarray(completion_offsets, np.int64),
        torch.from_numpy(rewards.reshape(-1, candidates)),
        TokenCounts(
            examples=len(examples),
            groups=len(prompt_lengths),
            candidates=candidates,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(completion_ids),
            cut_prompts=cut_prompts,
            cut_completions=cut_completions,
            longest_sequence=longest_sequence,
            longest_group=int(group_lengths.max()),
        ),
    )


def check_drawn_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where `completion_ids` are not what the tokenizer would have for the completion's text.

    Looks at the first CHECKED_EXAMPLES that have them.
    """
    for example in islice((e for e in examples if e.completion_ids is not None), CHECKED_EXAMPLES):
        for index, ids in enumerate(example.completion_ids):
            text = tokenizer.decode(ids, skip_special_tokens=True) if max(ids) < len(tokenizer) else None
            # Spaces apart, which decoding may tidy.
            if text is None or "".join(text.split()) != "".join(example.completions[index].split()):
                raise InputError(
                    f"{example.place}, field `completion_ids[{index}]`: the tokenizer {tokenizer.name_or_path!r} makes "
                    f"{text!r} of it, and the completion is {example.completions[index]!r}. Was it sampled with "
                    "another model? Name that one, or remove `completion_ids` to tokenise the text."
                )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text alone, with nothing put before or after."""
    if not texts:  # which tokenizers refuse
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (BOS, for those that do), found by comparing with and without."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


@dataclass
class GroupCollator:
    """Items of a GroupDataset -> one batch of tensors: the fields of layout.Packed and, for G groups of K,

    `ref_logps` (G, K) and `rewards` (G, K) float32, `index` (G,) long, `weights` (G,) float32 ones (each group counts
    once), `num_tokens` () long, the tokens put through the model (padding not counted, a shared prompt counted once).

    `cu_seqlens` is a NumPy array, which no trainer moves to a GPU: on the host it tells the loss where groups end
    without waiting for the device, and the one-pass schedule then works whatever the memory budget.
    """

    pad_token_id: int
    share_prompt: bool = True
    by_length: LengthRules = ()  # of the model's MaskPlan

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor | np.ndarray]:
        groups = [item["group"] for item in items]
        packed = pack(groups, share_prompt=self.share_prompt, pad_token_id=self.pad_token_id, by_length=self.by_length)
        return {
            **{field.name: getattr(packed, field.name) for field in fields(Packed)},
            "cu_seqlens": packed.cu_seqlens.numpy(),
            "ref_logps": torch.stack([item["ref_logps"] for item in items]),
            "rewards": torch.stack([item["rewards"] for item in items]),
            "index": torch.tensor([item["index"] for item in items]),
            "weights": torch.ones(len(items)),
            "num_tokens": (packed.group_ids >= 0).sum(),
        }


@dataclass
class SftCollator(GroupCollator):
    """As GroupCollator, for prompts with one completion each; `weights` (G,) float32 are the completions' tokens, so
    that a mean with these weights is one over tokens."""

    share_prompt: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor | np.ndarray]:
        tokens = [float(len(ids)) for item in items for ids in item["group"].completions]
        return {**super().__call__(items), "weights": torch.tensor(tokens)}
