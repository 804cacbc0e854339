"""Tokenised texts with one number each, for reward models and classifiers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
)

from exo_fast.data.examples import Example
from exo_fast.data.selection import LeftOut
from exo_fast.data.tokens import RowTokenizer
from exo_fast.layout import Group, Packed, pack
from exo_fast.positions import LengthRules, length_class
from exo_fast.training.errors import InputError

ROWS_PER_CALL = 1000  # one call of the tokenizer, and one step of the progress bar


@dataclass(frozen=True)
class RowCounts:
    """Sizes of a data set."""

    rows: int
    tokens: int  # of all texts, after cutting
    cut_texts: int  # that lost tokens on the left
    longest_sequence: int
    largest_id: int
    left_out: dict[str, int] = field(default_factory=dict)  # rows, by reason
    left_out_rows: dict[str, list[str]] = field(default_factory=dict)  # the first of each


class RowDataset(torch.utils.data.Dataset):
    """Rows of tokenised texts. Item i: `index` i, `ids` (the texts' token ids, one list each), `label` float."""

    def __init__(self, ids: list[tuple[np.ndarray, ...]], labels: Tensor, counts: RowCounts):
        self.ids = ids  # int32 each
        self.labels = labels  # (rows,) float32; reward models do not read them
        self.counts = counts

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> np.ndarray:
        """Return (rows,) tokens of each row's longest text."""
        return np.array([max(map(len, row)) for row in self.ids])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "ids": [ids.tolist() for ids in self.ids[index]], "label": float(self.labels[index])}


def tokenize_rows(
    rows: list[tuple[str, ...]],
    labels: list[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    left_out: LeftOut | None = None,
    description: str = "tokenising",
    progress: bool = True,
) -> RowDataset:
    """Tokenise the texts of each row as `encode` does; `left_out` are the rows left out before. Raises InputError for a
    text of no tokens."""
    ids: list[tuple[np.ndarray, ...]] = []
    cut_texts = 0
    bar = tqdm(total=len(rows), desc=description, unit=" rows", disable=not progress)
    for start in range(0, len(rows), ROWS_PER_CALL):
        chunk = rows[start : start + ROWS_PER_CALL]
        whole = encode_whole(tokenizer, [text for row in chunk for text in row])
        cut_texts += sum(len(text) > max_seq_len for text in whole)
        texts = (np.asarray(truncate(text, max_seq_len, tokenizer.bos_token_id), np.int32) for text in whole)
        ids += [tuple(next(texts) for _ in row) for row in chunk]
        bar.update(len(chunk))
    bar.close()
    lengths = [len(text) for row in ids for text in row]
    largest = max(int(text.max()) for row in ids for text in row)
    left_out = left_out or LeftOut()
    largest = max(largest, tokenizer.eos_token_id)
    counts = RowCounts(len(ids), sum(lengths), cut_texts, max(lengths), largest, left_out.counts, left_out.places)
    return RowDataset(ids, torch.tensor(labels, dtype=torch.float32), counts)


@dataclass
class RowCollator:
    """Collates items of a RowDataset: `input_ids` and `attention_mask` (texts, T) long, `labels` (R,) and `weights`
    (R,) float32 (ones), `index` (R,) and `num_tokens` () long."""

    pad_token_id: int

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = zip(*(item["ids"] for item in items), strict=True)
        texts = pad([ids for column in columns for ids in column], self.pad_token_id)
        return {
            **texts,
            "labels": torch.tensor([item["label"] for item in items], dtype=torch.float32),
            "weights": torch.ones(len(items)),
            "index": torch.tensor([item["index"] for item in items]),
            "num_tokens": texts["attention_mask"].sum(),
        }


@dataclass
class PairCollator(RowCollator):
    """A RowCollator for pairs; with `share_prompt` the texts may come as packed rows (the fields of layout.Packed)."""

    share_prompt: bool = False
    by_length: LengthRules = ()  # of the model's MaskPlan

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        packed = self.packed(items) if self.share_prompt else None
        if packed is None or packed["input_ids"].numel() >= batch["input_ids"].numel():
            return batch
        del batch["input_ids"], batch["attention_mask"]
        return batch | packed

    def packed(self, items: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """Return the texts in packed rows: the shared beginning of each pair, then the rest of both. None if a pair
        shares nothing, or if the model's positions depend on which of the texts it is, or on its EOS."""
        groups = []
        for item in items:
            chosen, rejected = item["ids"]
            pairs = enumerate(zip(chosen, rejected, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
            lengths = {length for text in (chosen, rejected) for length in (len(text), len(text) + 1)}
            if shared == 0 or len({length_class(self.by_length, length) for length in lengths}) > 1:
                return None
            # The layout marks the state that predicts each token. The head reads the state that predicts this EOS.
            rest = [[*text[shared:], self.pad_token_id] for text in (chosen, rejected)]
            groups.append(Group(chosen[:shared], rest))
        rows = pack(groups, pad_token_id=self.pad_token_id)
        tensors = {field.name: getattr(rows, field.name) for field in fields(Packed)}
        return {**tensors, "num_tokens": (rows.group_ids >= 0).sum()}


def pad_with_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set the tokenizer to pad with EOS on the right and cut on the left, as scalar models need, and return it.

    Saved beside a model, it makes `tokenizer(texts, padding=True, truncation=True, max_length=n)` give the model its
    inputs of training. Raises InputError for a tokenizer without EOS.
    """
    need_eos(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    sides = {"padding_side": "right", "truncation_side": "left"}
    for name, side in sides.items():
        setattr(tokenizer, name, side)
    tokenizer.init_kwargs |= sides  # save_pretrained writes these
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_seq_len: int, *, at_end: bool = False
) -> list[list[int]]:
    """Return the token ids of each whole text (prompt and completion together), without EOS or end of turn. With
    `at_end`, a conversation keeps all that the tokenizer's template ends it with, and any other text gets EOS.

    Longer ones lose tokens on the left to fit `max_seq_len`, but keep BOS. Raises InputError for a text of no
    tokens.
    """
    return [truncate(ids, max_seq_len, tokenizer.bos_token_id) for ids in encode_whole(tokenizer, texts, at_end=at_end)]


def encode_whole(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, at_end: bool = False) -> list[list[int]]:
    """Return the token ids of `encode` before it cuts them."""
    need_eos(tokenizer)
    rows = RowTokenizer(tokenizer)
    turns = [rows.chat.completed(text) if at_end and tokenizer.chat_template else None for text in texts]
    read = [text if turn is None else turn for text, turn in zip(texts, turns, strict=True)]
    found = rows.tokens([Example(None, "", [text], [0.0]) for text in read])
    ended = []
    for text, turn, tokens in zip(texts, turns, found, strict=True):
        ids = tokens.prompt + tokens.candidates[0]
        if not at_end:
            while ids and ids[-1] in rows.ends:
                ids.pop()
        elif turn is not None and not turn.endswith(rows.chat.ends):
            ids.pop()  # EOS, which the template does not write
        if not ids:
            raise InputError(f"text {text!r}: no tokens; at least one is needed.")
        ended.append(ids)
    return ended


def truncate(ids: list[int], max_seq_len: int, bos_token_id: int | None) -> list[int]:
    """Return at most `max_seq_len` of the tokens: the last ones, after BOS if `ids` begins with it."""
    if len(ids) <= max_seq_len:
        return ids
    kept = 1 if bos_token_id is not None and ids[0] == bos_token_id and max_seq_len > 1 else 0
    return ids[:kept] + ids[len(ids) - max_seq_len + kept :]


def pad(ids: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, (rows, longest row) long each, padded on the right."""
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


def need_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of EOS. Raises InputError for a tokenizer without one."""
    try:
        return RowTokenizer(tokenizer).eos
    except ValueError as error:
        raise InputError(str(error)) from error
