"""What reward models and classifiers are trained on and by: rows of tokenised texts, and modules whose forward is
the loss.

A row is two texts for a reward model (prompt with the chosen and with the rejected completion) and one, with its
label, for a classifier. The batch of R rows has all first texts and then all second ones, padded on the right to
the longest.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from exo_fast.training.module import TrainedModule
from exo_fast.training.scalar_model import cut, encode_whole, pad, scalars

ROWS_PER_CALL = 1000  # of the tokenizer, between two steps of the progress bar


@dataclass(frozen=True)
class RowCounts:
    """Sizes of a data set."""

    rows: int
    tokens: int  # of all texts, after cutting
    cut_texts: int  # that lost tokens on the left
    longest_sequence: int
    largest_id: int


class RowDataset(torch.utils.data.Dataset):
    """Rows of tokenised texts. Item i: `index` i, `ids` (the texts' token ids, one list each), `label` float."""

    def __init__(self, ids: list[tuple[np.ndarray, ...]], labels: Tensor, counts: RowCounts):
        self.ids = ids  # int32 each
        self.labels = labels  # (rows,) float32; what rows of a reward model hold is not read
        self.counts = counts

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "ids": [ids.tolist() for ids in self.ids[index]], "label": float(self.labels[index])}


def tokenize_rows(
    rows: list[tuple[str, ...]],
    labels: list[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    description: str = "tokenising",
    progress: bool = True,
) -> RowDataset:
    """The texts of each row by `scalar_model.encode`. Raises InputError for a text of no tokens."""
    ids: list[tuple[np.ndarray, ...]] = []
    cut_texts = 0
    bar = tqdm(total=len(rows), desc=description, unit=" rows", disable=not progress)
    for start in range(0, len(rows), ROWS_PER_CALL):
        chunk = rows[start : start + ROWS_PER_CALL]
        whole = encode_whole(tokenizer, [text for row in chunk for text in row])
        cut_texts += sum(len(text) > max_seq_len for text in whole)
        texts = (np.asarray(cut(text, max_seq_len, tokenizer.bos_token_id), np.int32) for text in whole)
        ids += [tuple(next(texts) for _ in row) for row in chunk]
        bar.update(len(chunk))
    bar.close()
    lengths = [len(text) for row in ids for text in row]
    largest = max(int(text.max()) for row in ids for text in row)
    counts = RowCounts(len(ids), sum(lengths), cut_texts, max(lengths), max(largest, tokenizer.eos_token_id))
    return RowDataset(ids, torch.tensor(labels, dtype=torch.float32), counts)


@dataclass
class RowCollator:
    """Items of a RowDataset -> `input_ids` and `attention_mask` (texts, T) long, `labels` (R,) and `weights` (R,)
    float32 (ones), `index` (R,) and `num_tokens` () long."""

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


class RewardModule(TrainedModule):
    """A one-logit classifier whose forward is the Bradley-Terry loss of pairs: −log σ(r_chosen − r_rejected).

    Metrics of a pair: `accuracy` is 1 where the chosen completion has the higher reward and ½ in a tie.
    """

    metric_names = ("accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins")

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """R pairs as RowCollator makes them: (the weighted mean loss, (R, 4)); in evaluation ((R,), (R, 4))."""
        chosen, rejected = scalars(self.model, batch).chunk(2)
        margins = chosen - rejected
        accuracy = (1 + margins.sign()) / 2
        metrics = torch.stack([accuracy, chosen, rejected, margins], dim=-1).detach()
        return _reduce(-logsigmoid(margins), batch["weights"], self.training), metrics


class ClassifierModule(TrainedModule):
    """A one-logit classifier whose forward is the binary cross-entropy of its logit, the log-odds of label 1.

    Metrics of a text: `accuracy` is 1 where the sign of the log-odds is that of the label and ½ at 0; `log_odds`;
    `margins`, the log-odds of the label that the text has.
    """

    metric_names = ("accuracy", "log_odds", "margins")

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """R texts as RowCollator makes them: (the weighted mean loss, (R, 3)); in evaluation ((R,), (R, 3))."""
        log_odds, labels = scalars(self.model, batch), batch["labels"]
        losses = binary_cross_entropy_with_logits(log_odds, labels, reduction="none")
        margins = log_odds * (2 * labels - 1)
        metrics = torch.stack([(1 + margins.sign()) / 2, log_odds, margins], dim=-1).detach()
        return _reduce(losses, batch["weights"], self.training), metrics


def _reduce(losses: Tensor, weights: Tensor, training: bool) -> Tensor:
    return (losses * weights).sum() / weights.sum() if training else losses
