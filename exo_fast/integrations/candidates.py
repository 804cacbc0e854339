"""Rows of a `datasets` data set as groups of token ids, for `exo_fast.integrations.trl.ExoDPOTrainer`.

The ids are those of every other door (`exo_fast.data.tokens`). What a group is, and which groups are left out, the
pipeline says too (`exo_fast.data.selection`); the lengths are TRL's: `max_length` and `truncation_mode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from exo_fast.data import examples
from exo_fast.data.examples import Example
from exo_fast.data.fields import BadField
from exo_fast.data.forms import ACCEPTED, standard
from exo_fast.data.selection import FEW, FIX, TIE, Duplicates, LeftOut, Ties, enough, faults, groups_of, verdict
from exo_fast.data.tokens import RowTokenizer, need_prompts

logger = logging.get_logger(__name__)
OF_CANDIDATES = ("candidate_ids", "candidate_masks", "rewards")


def tokenize_candidates(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`prompt_ids`, `candidate_ids` (K lists), `candidate_masks` (which of their tokens count) and `rewards` of a row
    of any form that `exo_fast.data.forms` accepts. Raises BadField, a ValueError."""
    rows = RowTokenizer(processing_class)
    return _tokens(examples.candidates(None, rows.text_of(row)), rows)


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


def first_row(dataset: Any, split: str) -> dict[str, Any]:
    """The first row of a data set or stream. Raises ValueError for one without rows."""
    for row in dataset:
        return row
    raise ValueError(f"{split} dataset: no rows; at least one is needed.")


@dataclass
class CandidateRows:
    """The function of `Dataset.map`: rows to groups, one of which says in `left_out` why it is none.

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
    scored: bool | None = field(init=False, default=None)  # whether pairs have scores: as the first one
    rows: RowTokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.rows = RowTokenizer(self.tokenizer)

    @property
    def by_rewards(self) -> bool:
        return self.loss_type.endswith("-rw")

    def prepared(self, dataset: Any, **how: Any) -> Any:
        """The data set of groups. Says how many were left out and why (of a stream nobody knows); raises ValueError for
        no rows, and where no group is left."""
        first = first_row(dataset, self.split)
        columns = dataset.column_names or list(first)
        with self._named(0):
            self.size = self.num_contrastive or self._count(first)
        if self.by_rewards and examples.SCORES[0] in columns:
            self.scored = next(filter(lambda found: found is not None, map(examples.scored, dataset)), None)
        if hasattr(dataset, "__len__"):
            how["desc"] = f"Tokenizing {self.split} dataset"
        else:
            how.pop("num_proc", None)  # IterableDataset takes none
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
        """Faults inside say which row they are of."""
        try:
            yield
        except ValueError as error:
            forms = f" {ACCEPTED}" if getattr(error, "missing", False) else ""
            raise ValueError(f"{self.split} dataset, row {index}: {error}{forms}") from error

    def _count(self, row: dict[str, Any]) -> int:
        candidates = standard(row).get("completions")
        return len(candidates) if isinstance(candidates, list) else 2

    def _groups(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        example = examples.candidates(None, self.rows.text_of(row), scored_pairs=self.by_rewards)
        if self.by_rewards and (scored := examples.scored(row)) is not None:
            self.scored = scored if self.scored is None else self.scored
            if scored != self.scored:
                raise BadField(examples.SCORES[0], row.get(examples.SCORES[0]), examples.ALL_OR_NONE)
        assert self.size is not None
        several = enough(example.completions, self.size, self.num_contrastive)
        tokens, count = _tokens(example, self.rows), len(example.completions)
        if not several:
            return [{**tokens, "left_out": FEW}]
        groups = []
        for places in groups_of(count, self.size, index):
            group = {name: [tokens[name][k] for k in places] for name in OF_CANDIDATES}
            group["prompt_ids"] = tokens["prompt_ids"]
            groups.append({**group, "left_out": self._reason(group)})
        return groups

    def _reason(self, group: dict[str, Any]) -> str:
        """Why the group is left out, at the lengths at which it would be trained on; empty if it is not."""
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
