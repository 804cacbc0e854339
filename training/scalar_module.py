"""What reward models and classifiers are trained on and by: rows of tokenised texts, and modules whose forward is
the loss.

A row is two texts for a reward model (prompt with the chosen and with the rejected completion) and one, with its
label, for a classifier. A batch of R rows has all first texts and then all second ones, padded on the right to the
longest. The two texts of a pair begin alike, so a model that can share prompts (exo_fast.layout) runs what they have
in common once, in batches where that leaves less to run.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data.selection import LeftOut
from exo_fast.head import unwrap
from exo_fast.layout import Group, Packed, pack, plan_mask
from exo_fast.masks import MASKED_ATTENTION
from exo_fast.positions import LengthRules, length_class
from exo_fast.training.module import TrainedModule, packed_batch
from exo_fast.training.scalar_model import (
    HEAD,
    ROUNDED_TOLERANCE,
    TOLERANCE,
    cut,
    encode_whole,
    pad,
    scalars,
)

logger = logging.get_logger(__name__)
ROWS_PER_CALL = 1000  # of the tokenizer, between two steps of the progress bar
CHECKED_PAIRS = 4


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
        self.labels = labels  # (rows,) float32; what rows of a reward model hold is not read
        self.counts = counts

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row's longest text."""
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
    """The texts of each row by `scalar_model.encode`; `left_out` is what was left out before. Raises InputError for a
    text of no tokens."""
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
    left_out = left_out or LeftOut()
    largest = max(largest, tokenizer.eos_token_id)
    counts = RowCounts(len(ids), sum(lengths), cut_texts, max(lengths), largest, left_out.counts, left_out.places)
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


@dataclass
class PairCollator(RowCollator):
    """The same for pairs; with `share_prompt` the texts may come as packed rows (the fields of layout.Packed)."""

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
        """The texts in packed rows: what a pair begins with, then the rest of each. None where one shares nothing, or
        where the model gives other positions to one of the texts than to another, or than to it with EOS."""
        groups = []
        for item in items:
            chosen, rejected = item["ids"]
            pairs = enumerate(zip(chosen, rejected, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
            lengths = {length for text in (chosen, rejected) for length in (len(text), len(text) + 1)}
            if shared == 0 or len({length_class(self.by_length, length) for length in lengths}) > 1:
                return None
            # The layout names the state that predicts a token; the one that predicts this EOS is read by the head.
            rest = [[*text[shared:], self.pad_token_id] for text in (chosen, rejected)]
            groups.append(Group(chosen[:shared], rest))
        rows = pack(groups, pad_token_id=self.pad_token_id)
        tensors = {field.name: getattr(rows, field.name) for field in fields(Packed)}
        return {**tensors, "num_tokens": (rows.group_ids >= 0).sum()}


class RewardModule(TrainedModule):
    """A one-logit classifier whose forward is the Bradley-Terry loss of pairs: −log σ(r_chosen − r_rejected).

    Metrics of a pair: `accuracy` is 1 where the chosen completion has the higher reward and ½ in a tie.
    """

    metric_names = ("accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins")

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.plan = plan_mask(model.config)

    def forward(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """R pairs as PairCollator makes them: (the weighted mean loss, (R, 4)); in evaluation ((R,), (R, 4))."""
        chosen, rejected = self._packed_rewards(batch) if "source" in batch else scalars(self.model, batch).chunk(2)
        margins = chosen - rejected
        accuracy = (1 + margins.sign()) / 2
        metrics = torch.stack([accuracy, chosen, rejected, margins], dim=-1).detach()
        return _reduce(-logsigmoid(margins), batch["weights"], self.training), metrics

    def _packed_rewards(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        packed = packed_batch(batch)
        read = packed.source[packed.cu_seqlens[1:].long() - 1]
        rewards = getattr(unwrap(self.model), HEAD)(self.packed_hidden(packed, self.plan)[read])
        return rewards.float().view(-1, 2).unbind(1)


@torch.no_grad()
def settle_layout(
    module: RewardModule, dataset: RowDataset, collate: PairCollator, *, share_prompt: bool, rounded: bool
) -> dict[str, Any]:
    """Set `collate.share_prompt`: by the caller's wish, by the model's plan, and by numbers on the first pairs.

    `rounded` says that products are in less than float32. Warns where prompts are to be shared and cannot. Returns
    the decision, its reason, and the largest difference of a reward over the rewards' root mean square.
    """
    attention = module.config._attn_implementation
    reason, measured = "", {}
    collate.by_length = module.plan.by_length
    if not share_prompt:
        reason = "switched off"
    elif not module.plan.share:
        reason = module.plan.reason
    elif attention not in MASKED_ATTENTION:
        reason = f"attn_implementation={attention!r} reads no ready-made mask"
    else:
        items = [dataset[index] for index in range(min(CHECKED_PAIRS, len(dataset)))]
        apart = PairCollator(collate.pad_token_id)(items)
        if (together := collate.packed(items)) is None:
            reason = "the first pairs have no token in common, or lengths to which the model gives other positions"
        else:
            rewards = [_rewards(module, {**apart, **batch}) for batch in ({}, together)]
            difference = ((rewards[1] - rewards[0]).abs().max() / rewards[0].square().mean().sqrt()).item()
            measured = {"reward_difference": difference}
            allowed = ROUNDED_TOLERANCE if rounded and module.plan.known else TOLERANCE
            if not difference <= allowed:  # also where it is not a number
                reason = (
                    f"rewards of shared and of unshared prompts differ by {difference:.1e} of their size, where "
                    f"{allowed} is allowed"
                )
    collate.share_prompt = not reason
    if share_prompt and reason:
        logger.warning(f"Pairs cannot share their prompt, which is run twice instead: {reason}")
    return {"share_prompt": not reason, "reason": reason, "mask": module.plan.kind, **measured}


def _rewards(module: RewardModule, batch: dict[str, Any]) -> Tensor:
    device = module.model.device
    tensors = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return module.eval()(**tensors)[1][:, 1:3].double()


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
