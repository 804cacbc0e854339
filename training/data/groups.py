"""Make tokenised groups of examples, and a batch of groups.

`exo_fast.data.tokens` defines the ids. Here they are cut to length, grouped, and judged: a group that teaches nothing,
or contradicts itself, is left out and counted (`exo_fast.data.selection`). The ids are kept in flat arrays, so
a large data set costs a few bytes a token and survives a fork of the data loader.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from exo_fast.data.examples import Example
from exo_fast.data.selection import FIX, Duplicates, LeftOut, Ties, faults, groups_of, verdict
from exo_fast.data.tokens import RowTokenizer, Tokens, need_prompts
from exo_fast.layout import Group, Packed, pack
from exo_fast.positions import LengthRules
from exo_fast.training.data.faults import MAX_SHOWN, listed
from exo_fast.training.errors import InputError

EXAMPLES_PER_CALL = 512  # enough to keep the tokenizer's own threads busy, small enough for a progress bar


@dataclass(frozen=True)
class TokenCounts:
    """The counts of tokenising, for the table printed before training. Tokens are counted over all groups."""

    examples: int
    groups: int
    candidates: int  # K, per group
    prompt_tokens: int  # each group's prompt once
    completion_tokens: int
    cut_prompts: int  # groups whose prompt lost tokens on the left
    cut_completions: int  # completions that lost tokens (and their EOS) on the right
    longest_sequence: int  # prompt and its longest completion
    longest_group: int  # prompt and all its completions
    left_out: dict[str, int] = field(default_factory=dict)  # groups, by reason
    left_out_rows: dict[str, list[str]] = field(default_factory=dict)  # the first rows of each

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
        learned: np.ndarray | None = None,  # (completion tokens,) bool, which count; None: all
    ):
        self.prompt_ids, self.prompt_offsets = prompt_ids, prompt_offsets
        self.completion_ids, self.completion_offsets = completion_ids, completion_offsets
        self.rewards = rewards
        self.ref_logps: Tensor | None = None  # (G, K) float32
        self.counts = counts
        self.learned = learned

    def __len__(self) -> int:
        return len(self.rewards)

    def group(self, index: int) -> Group:
        """Return the token ids of group `index`."""
        candidates = self.rewards.shape[1]
        bounds = self.completion_offsets[index * candidates : (index + 1) * candidates + 1]
        return Group(
            prompt=self.prompt_ids[self.prompt_offsets[index] : self.prompt_offsets[index + 1]].tolist(),
            completions=[self.completion_ids[a:b].tolist() for a, b in pairwise(bounds)],
            learned=None if self.learned is None else [self.learned[a:b].tolist() for a, b in pairwise(bounds)],
        )

    def lengths(self) -> np.ndarray:
        """Return (G,) tokens of each group, its prompt counted once."""
        candidates = self.rewards.shape[1]
        return np.diff(self.prompt_offsets) + np.diff(self.completion_offsets[::candidates])

    def sequence_lengths(self) -> np.ndarray:
        """Return (G, K) tokens of each prompt with its candidate."""
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
    loss_type: str | None = None,
    duplicates: Duplicates = "drop",
    ties: Ties = "error",
    left_out: LeftOut | None = None,
    description: str = "tokenising",
    progress: bool = True,
) -> GroupDataset:
    """Cut each example's candidates into groups of `num_contrastive` (None: one group) and tokenise them.

    A completion is cut on the right to `max_gen_len`. A prompt is cut on the left, after the tokenizer's prefix of a
    text (BOS), so that it and the group's longest completion fit `max_seq_len`. With a `loss_type` groups are judged
    by `duplicates` and `ties`; groups left out join `left_out` (rows that had too few candidates) in the counts.
    Raises InputError for a tokenizer without EOS, for a prompt of no tokens, for ids that another tokenizer drew, for
    groups that are an error by the options, and if no group is left.
    """
    rows = RowTokenizer(tokenizer)
    size = num_contrastive or len(examples[0].completions)
    kept = _Kept(size, left_out or LeftOut())
    lengths = {"max_seq_len": max_seq_len, "max_gen_len": max_gen_len, "prefix": len(rows.prefix)}
    refused: list[str] = []
    bar = tqdm(total=len(examples), desc=description, unit=" examples", disable=not progress)
    for start in range(0, len(examples), EXAMPLES_PER_CALL):
        chunk = examples[start : start + EXAMPLES_PER_CALL]
        for row, (example, tokens) in enumerate(zip(chunk, encoded(rows, chunk), strict=True), start):
            for places in groups_of(len(example.completions), size, row):
                group = Cut.of(example, tokens, places, **lengths)
                rewards = [example.rewards[place] for place in places]
                reasons = faults(group.candidates, rewards, loss_type=loss_type, learned=group.learned)
                fate, reason = verdict(reasons, duplicates, ties)
                match fate:
                    case "keep":
                        kept.add(group, rewards)
                    case "drop":
                        kept.left_out.add(reason, example.place)
                    case "error":
                        refused.append(f"{example.place}, candidates {_few(places)}: {reason}. {FIX[reason]}.")
        bar.update(len(chunk))
    bar.close()
    if refused:
        raise InputError(f"{len(refused)} groups cannot be learned from:{listed(refused)}")
    if not kept.rewards:
        lines = kept.left_out.lines(str(getattr(examples[0].place, "file", "the data")))
        raise InputError("no group is left to learn from:\n  " + "\n  ".join(lines))
    return kept.dataset(examples=len(examples))


def encoded(rows: RowTokenizer, examples: Sequence[Example]) -> list[Tokens]:
    """Return the ids of each example. Raises InputError for ids as `tokenize` does."""
    try:
        found = rows.tokens(examples)
        need_prompts(examples, found)
    except ValueError as error:
        raise InputError(str(error)) from error
    return found


def _few(places: list[int]) -> str:
    return ", ".join(map(str, places[:MAX_SHOWN])) + (", …" if len(places) > MAX_SHOWN else "")


@dataclass(frozen=True)
class Cut:
    """Candidates of one prompt at the length at which they are read; `learned` may mark no token of one."""

    prompt: list[int]
    candidates: list[list[int]]
    learned: list[list[bool]] | None
    cut_prompt: bool  # lost tokens on the left
    cut_completions: int  # how many lost tokens (and their EOS) on the right

    @classmethod
    def of(
        cls, example: Example, tokens: Tokens, places: Sequence[int], *, max_seq_len: int, max_gen_len: int, prefix: int
    ) -> "Cut":
        """Cut the candidates at `places` on the right to `max_gen_len`, and their prompt on the left, after its first
        `prefix` tokens (BOS). The prompt and the longest candidate then fit `max_seq_len`. If the candidates were drawn
        as ids, the prompt fits max_seq_len - max_gen_len, as `exo-fast generate` cut it for the model."""
        whole = [tokens.candidates[place] for place in places]
        candidates = [ids[:max_gen_len] for ids in whole]
        reserved = max(map(len, candidates)) if example.completion_ids is None else max_gen_len
        prompt, lost = cut_left(tokens.prompt, max_seq_len - reserved, prefix)
        learned = None if tokens.learned is None else [tokens.learned[place][:max_gen_len] for place in places]
        return cls(prompt, candidates, learned, lost > 0, sum(len(ids) > max_gen_len for ids in whole))

    @property
    def group(self) -> Group:
        """The ids as the layout takes them. Raises ValueError for a candidate without a token that counts."""
        return Group(self.prompt, self.candidates, self.learned)


class _Kept:
    """The groups to learn from, in flat arrays, and the counts so far."""

    def __init__(self, size: int, left_out: LeftOut):
        self.size = size
        self.prompt_ids, self.completion_ids, self.learned = array("i"), array("i"), array("b")
        self.prompt_offsets, self.completion_offsets = array("q", [0]), array("q", [0])
        self.rewards: list[list[float]] = []
        self.cut_prompts = self.cut_completions = self.longest_sequence = 0
        self.left_out = left_out

    def add(self, group: Cut, rewards: list[float]) -> None:
        self.prompt_ids.extend(group.prompt)
        self.prompt_offsets.append(len(self.prompt_ids))
        for ids, marks in zip(group.candidates, group.learned or [None] * self.size, strict=True):
            self.completion_ids.extend(ids)
            self.completion_offsets.append(len(self.completion_ids))
            self.learned.extend([True] * len(ids) if marks is None else marks)
        self.rewards.append(rewards)
        self.cut_prompts += group.cut_prompt
        self.cut_completions += group.cut_completions
        longest = len(group.prompt) + max(map(len, group.candidates))
        self.longest_sequence = max(self.longest_sequence, longest)

    def dataset(self, *, examples: int) -> GroupDataset:
        prompt_lengths = np.diff(np.asarray(self.prompt_offsets))
        group_lengths = prompt_lengths + np.diff(np.asarray(self.completion_offsets)[:: self.size])
        learned = np.asarray(self.learned, bool)
        return GroupDataset(
            np.asarray(self.prompt_ids, np.int32),
            np.asarray(self.prompt_offsets, np.int64),
            np.asarray(self.completion_ids, np.int32),
            np.asarray(self.completion_offsets, np.int64),
            torch.from_numpy(np.asarray(self.rewards, np.float32)),
            TokenCounts(
                examples=examples,
                groups=len(self.rewards),
                candidates=self.size,
                prompt_tokens=len(self.prompt_ids),
                completion_tokens=len(self.completion_ids),
                cut_prompts=self.cut_prompts,
                cut_completions=self.cut_completions,
                longest_sequence=self.longest_sequence,
                longest_group=int(group_lengths.max()),
                left_out=self.left_out.counts,
                left_out_rows=self.left_out.places,
            ),
            None if learned.all() else learned,
        )


def cut_left(ids: list[int], limit: int, prefix: int) -> tuple[list[int], int]:
    """Return at most `limit` tokens of a prompt, its first `prefix` (BOS) kept, and how many were cut off after it."""
    lost = max(len(ids) - max(limit, prefix), 0)
    return ids[:prefix] + ids[prefix + lost :], lost


@dataclass
class GroupCollator:
    """Collates items of a GroupDataset into a batch of tensors: the fields of layout.Packed and, for G groups of K,

    `ref_logps` (G, K) and `rewards` (G, K) float32, `index` (G,) long, `weights` (G,) float32 ones (each group counts
    once), `num_tokens` () long, the tokens put through the model (padding not counted, a shared prompt counted once).

    `cu_seqlens` is a NumPy array, which no trainer moves to a GPU: on the host it shows the loss where groups end
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
    """A GroupCollator for prompts with one completion each. `weights` (G,) float32 are the completions' tokens that
    count, so that a mean with these weights is a mean over tokens."""

    share_prompt: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor | np.ndarray]:
        batch = super().__call__(items)
        return {**batch, "weights": torch.from_numpy(np.diff(batch["cu_seqlens"])).float()}
