"""Rows of a `datasets` data set as groups of token ids, for `exo_fast.integrations.trl.trainer.ExoDPOTrainer`.

The ids are the same as everywhere (`exo_fast.data.tokens`). Groups are formed and left out as in the pipeline
(`exo_fast.data.selection`); the lengths are TRL's: `max_length` and `truncation_mode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data import examples
from exo_fast.data.examples import Example
from exo_fast.data.fields import BadField
from exo_fast.data.forms import ACCEPTED, standard
from exo_fast.data.selection import FEW, FIX, TIE, Duplicates, LeftOut, Ties, enough, faults, groups_of, verdict
from exo_fast.data.tokens import RowTokenizer, need_prompts

logger = logging.get_logger(__name__)
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's columns, for the first candidate and for the others
ROWS = ("input_ids", "attention_mask", "completion_mask")  # of a batch, (G·K, T)


def host_rows(batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the `ROWS` of a collator's batch on the host. They are read from the device, in one wait, if the batch has
    no copy of them, or a copy of other rows: accelerate divides tensors among processes, and nothing else."""
    copy = batch.get("host_rows")
    if copy is None or copy.shape != (len(batch["input_ids"]), len(ROWS), batch["input_ids"].shape[1]):
        return torch.stack([batch[name].long() for name in ROWS]).cpu().unbind()
    return torch.from_numpy(copy).unbind(1)


def tokenize_candidates(
    row: dict[str, Any], processing_class: PreTrainedTokenizerBase | RowTokenizer, *, scored_pairs: bool = False
) -> dict[str, Any]:
    """Return the token ids of a row of any form that `exo_fast.data.forms` accepts, for `datasets.map`.

    Args:
        row: K candidates and their rewards, or a preference.
        processing_class: a tokenizer, or its `RowTokenizer`, made once for all rows.
        scored_pairs: the rewards of a preference are its `score_chosen` and `score_rejected` if it has both, instead
            of 1 and 0: for a `*-rw` loss.

    Returns:
        `prompt_ids`, a list of ints; `candidate_ids`, K lists of ints; `candidate_masks`, K lists of bools, True for
        tokens that count; `rewards`, K floats.

    Raises:
        BadField, a ValueError: a field that is missing or wrong, a prompt of no tokens, ids of another tokenizer.
        ValueError: a tokenizer without EOS.
    """
    rows = processing_class if isinstance(processing_class, RowTokenizer) else RowTokenizer(processing_class)
    return _tokens(examples.candidates(None, rows.text_of(row), scored_pairs=scored_pairs), rows)


def _tokens(example: Example, rows: RowTokenizer) -> dict[str, Any]:
    (tokens,) = found = rows.tokens([example])
    need_prompts([example], found)
    marks = tokens.learned or [[True] * len(ids) for ids in tokens.candidates]
    return {
        "prompt_ids": tokens.prompt,
        "candidate_ids": tokens.candidates,
        "candidate_masks": marks,
        "rewards": example.rewards,
    }


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """Return the token columns of a row, as `_tokens` makes them, and `ref_logps`, K numbers, if it has them."""
    examples.check_ids("prompt_ids", prompt := examples.field_of(row, "prompt_ids"))
    if not _lists(candidates := row["candidate_ids"]):
        raise BadField("candidate_ids", candidates, "a list of token ids for each candidate is needed.")
    for index, ids in enumerate(candidates):
        examples.check_ids(f"candidate_ids[{index}]", ids)
    marks = row.get("candidate_masks")
    if marks is None:
        marks = [[True] * len(ids) for ids in candidates]
    elif not _lists(marks) or [len(marked) for marked in marks] != [len(ids) for ids in candidates]:
        raise BadField("candidate_masks", marks, "a list for each candidate is needed, with a mark for each token.")
    tokens = {
        "prompt_ids": prompt,
        "candidate_ids": candidates,
        "candidate_masks": [[bool(mark) for mark in marked] for marked in marks],
        "rewards": examples.rewards_of(row, len(candidates)),
    }
    if any(name in row for name in REFERENCE):
        first, others = (row.get(name) for name in REFERENCE)
        if first is None or not isinstance(others, list) or len(others) != len(candidates) - 1:
            fix = f"a number for each candidate is needed, the first one's in `{REFERENCE[0]}`."
            raise BadField(REFERENCE[1], others, fix)
        tokens["ref_logps"] = [first, *others]
    return tokens


def _lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) for item in value)


def first_row(dataset: Any, split: str) -> dict[str, Any]:
    """Return the first row of a data set or stream. Raises ValueError if it has no rows."""
    for row in dataset:
        return row
    raise ValueError(f"{split} dataset: no rows; at least one is needed.")


@dataclass
class CandidateRows:
    """The function of `Dataset.map`: rows to groups. A group's `left_out` says why it is left out.

    Rows are text, or token ids as `tokenize_candidates` and this class make them. Token ids are checked as well, and
    a second check changes nothing.

    Raises ValueError that names the data set's row, the field, its value and the fix.
    """

    tokenizer: PreTrainedTokenizerBase
    split: str
    loss_type: str
    num_contrastive: int | None = None
    duplicates: Duplicates = "drop"
    ties: Ties = "error"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    size: int | None = field(init=False, default=None)  # candidates of a group
    scored: bool | None = field(init=False, default=None)  # whether pairs have scores: decided by the first one
    rows: RowTokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.rows = RowTokenizer(self.tokenizer)

    @property
    def by_rewards(self) -> bool:
        return self.loss_type.endswith("-rw")

    def prepared(self, dataset: Any, **how: Any) -> Any:
        """Return the data set of groups. Reports how many groups were left out and why (unknown for a stream). Raises
        ValueError for no rows, and if no group is left."""
        first = first_row(dataset, self.split)
        columns = dataset.column_names or list(first)
        with self._named(0):
            self.size = self.num_contrastive or self._count(first)
        if self.by_rewards and examples.SCORES[0] in columns:
            self.scored = next(filter(lambda found: found is not None, map(examples.scored, dataset)), None)
        if hasattr(dataset, "__len__"):
            how["desc"] = f"Tokenizing {self.split} dataset"
        else:
            how.pop("num_proc", None)  # IterableDataset does not take it
        groups = dataset.map(self, batched=True, with_indices=True, remove_columns=columns, **how)
        if hasattr(groups, "__len__"):
            self._report(groups)
        groups = groups.filter(lambda reason: not reason, input_columns="left_out")
        return groups.remove_columns(["left_out", "row"])

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: list[dict[str, Any]] = []
        for place, index in enumerate(indices):
            row = {name: values[place] for name, values in batch.items()}
            with self._named(index):
                found += [{**group, "row": index} for group in self._groups(row, index)]
        return {name: [group[name] for group in found] for name in found[0]}

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """Add the row's place to faults raised inside."""
        try:
            yield
        except ValueError as error:
            forms = f" {ACCEPTED}" if getattr(error, "missing", False) else ""
            raise ValueError(f"{self.split} dataset, row {index}: {error}{forms}") from error

    def _count(self, row: dict[str, Any]) -> int:
        candidates = row.get("candidate_ids") or standard(row).get("completions")
        return len(candidates) if isinstance(candidates, list) else 2

    def _groups(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        assert self.size is not None
        if row.get("candidate_ids") is not None:
            tokens = _given(row)
            several = enough(tokens["candidate_ids"], self.size, self.num_contrastive, field="candidate_ids")
        else:
            example = examples.candidates(None, self.rows.text_of(row), scored_pairs=self.by_rewards)
            self._check_scores(row)
            several = enough(example.completions, self.size, self.num_contrastive)
            tokens = _tokens(example, self.rows)
        prompt, count = tokens.pop("prompt_ids"), len(tokens["rewards"])
        groups = []
        for places in groups_of(count, self.size, index) if several else [list(range(count))]:
            group = {"prompt_ids": prompt, **{name: [values[k] for k in places] for name, values in tokens.items()}}
            group["left_out"] = self._reason(group) if several else FEW
            if "ref_logps" in group:
                first, *others = group.pop("ref_logps")
                group |= dict(zip(REFERENCE, (first, others), strict=True))
            groups.append(group)
        return groups

    def _check_scores(self, row: dict[str, Any]) -> None:
        """Raise BadField if the loss weighs by rewards and a pair's are of another scale than the first's."""
        scored = examples.scored(row) if self.by_rewards else None
        if scored is None:
            return
        self.scored = scored if self.scored is None else self.scored
        if scored != self.scored:
            raise BadField(examples.SCORES[0], row.get(examples.SCORES[0]), examples.ALL_OR_NONE)

    def _reason(self, group: dict[str, Any]) -> str:
        """Return why the group is left out, at its lengths in training; empty if it is not."""
        prompt, candidates, marks = (group[name] for name in ("prompt_ids", "candidate_ids", "candidate_masks"))
        if self.max_length is not None:
            room = slice(-self.max_length, None)
            if self.truncation_mode == "keep_start":
                if len(prompt) >= self.max_length:
                    return f"the prompt alone fills max_length={self.max_length}; raise it, or shorten the prompt"
                room = slice(self.max_length - len(prompt))
            candidates, marks = [ids[room] for ids in candidates], [marked[room] for marked in marks]
        reasons = faults(candidates, group["rewards"], loss_type=self.loss_type, learned=marks)
        fate, reason = verdict(reasons, self.duplicates, self.ties)
        if fate == "keep" or reason is None:
            return ""
        if fate == "error":
            field = "rewards" if reason == TIE else "candidate_ids"
            raise BadField(field, group[field], f"{reason}. {FIX[reason]}.")
        return reason

    def _report(self, groups: Any) -> None:
        left_out = LeftOut()
        for reason, row in zip(groups["left_out"], groups["row"], strict=True):
            if reason:
                left_out.add(reason, f"row {row}")
        lines = left_out.lines(f"{self.split} dataset")
        if left_out.total == len(groups):
            raise ValueError("no group is left to learn from: " + "; ".join(lines))
        for line in lines:
            logger.warning(line)


@dataclass
class CandidateCollator:
    """Rows of `prompt_ids`, `candidate_ids` (K lists), `candidate_masks` (without them all tokens count) and `rewards`
    -> a batch of G groups, whose candidates are consecutive rows, cut to `max_length`:

    `input_ids`, `attention_mask` and `completion_mask` (1 on the tokens that count), (G·K, T) long and padded on the
    right; `host_rows` (G·K, 3, T), the same three as a NumPy array, which no trainer moves to a GPU: there the forward
    reads them without waiting; `rewards` (G, K) float32; `ref_chosen_logps` (G,) and `ref_rejected_logps` (G, K − 1)
    float32 if the first row has them. Raises KeyError for a row without one of these columns, and ValueError for
    different numbers of candidates and marks, and for groups of different K: `exo_fast.integrations.trl.candidates`
    names such rows.
    """

    pad_token_id: int = 0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    host_copy: bool = True  # without it the batch has no `host_rows`

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, masks = [], []
        kept = slice(None)
        if self.max_length is not None:
            kept = (
                slice(None, self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
            )
        for example in examples:
            marked = example.get("candidate_masks") or [[True] * len(ids) for ids in example["candidate_ids"]]
            for ids, marks in zip(example["candidate_ids"], marked, strict=True):
                rows.append(torch.tensor((example["prompt_ids"] + ids)[kept]))
                masks.append(torch.tensor(([False] * len(example["prompt_ids"]) + marks)[kept]).long())
        batch: dict[str, Any] = {
            "input_ids": self._padded(rows, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(row) for row in rows], 0),
            "completion_mask": self._padded(masks, 0),
            "rewards": torch.tensor([example["rewards"] for example in examples], dtype=torch.float32),
        }
        if self.host_copy:
            batch["host_rows"] = torch.stack([batch[name] for name in ROWS], dim=1).numpy()
        for name in REFERENCE:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        extra = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, extra), value=value)
