"""From records to examples: what a row must hold, and what is said when it does not.

Two forms, those of the original EXO repository:
    {"prompt": str, "completions": [str, …], "rewards": [number, …]}
    {"prompt": str, "chosen": str, "rejected": str}            (two candidates with rewards 1 and 0)
Other fields are ignored. All rows are read before any error is raised, so that one run shows the first ten
faults instead of one.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from exo_fast.training.data.records import Place, Source, read_records
from exo_fast.training.errors import InputError

MAX_SHOWN = 10
MAX_FLOAT32 = float(np.finfo(np.float32).max)
FIELDS = ("prompt", "completions", "rewards", "chosen", "rejected")


@dataclass(frozen=True)
class Example:
    """One prompt and its candidates; `rewards[k]` is the reward of `completions[k]`."""

    place: Place
    prompt: str
    completions: list[str]
    rewards: list[float]


class _Missing:
    def __repr__(self) -> str:
        return "missing"


class _BadField(Exception):
    """A fault in one field of one row, before its place is known."""

    def __init__(self, field: str, value: Any, fix: str):
        super().__init__(f"field `{field}`, value {_short(value)}: {fix}")


def load_examples(source: Source, *, loss_type: str, num_contrastive: int | None) -> list[Example]:
    """All examples of `source`, checked for use with `loss_type` and groups of `num_contrastive` candidates.

    `num_contrastive` None means one group per prompt, which needs the same number of candidates in every row.
    Raises InputError that lists the first ten faults with file, line, field, value and fix.
    """
    examples: list[Example] = []
    faults: list[str] = []
    group_size = num_contrastive
    for place, record in read_records(source):
        try:
            example = _to_example(place, record)
            if group_size is None and len(example.completions) > 1:
                group_size = len(example.completions)
            _check_candidates(example, group_size, num_contrastive)
            if loss_type.endswith("-pref"):
                _check_ties(example, group_size, loss_type)
        except _BadField as fault:
            faults.append(f"{place}, {fault}")
        else:
            examples.append(example)
    if faults:
        shown = "\n  ".join(faults[:MAX_SHOWN])
        more = f"\n  … and {len(faults) - MAX_SHOWN} more." if len(faults) > MAX_SHOWN else ""
        raise InputError(
            f"{source}: {len(faults)} of {len(faults) + len(examples)} rows cannot be used:\n  {shown}{more}"
        )
    if not examples:
        raise InputError(f"{source}: no rows; at least one is needed.")
    return examples


def _to_example(place: Place, record: Any) -> Example:
    if not isinstance(record, dict):
        raise _BadField("(the whole row)", record, "an object with the fields prompt, completions, rewards is needed.")
    if "messages" in record or "conversations" in record:
        name = "messages" if "messages" in record else "conversations"
        raise _conversation(name, record[name])
    prompt = _text(record, "prompt", may_be_empty=True)
    if "completions" not in record and ("chosen" in record or "rejected" in record):
        return Example(place, prompt, [_text(record, "chosen"), _text(record, "rejected")], [1.0, 0.0])
    completions = _field(record, "completions")
    if not isinstance(completions, list):
        raise _BadField("completions", completions, "a list of strings is needed.")
    for index, completion in enumerate(completions):
        _check_text(f"completions[{index}]", completion)
    rewards = _field(record, "rewards")
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        held = f"{len(rewards)} numbers" if isinstance(rewards, list) else "not a list"
        raise _BadField("rewards", rewards, f"one number per completion is needed: {len(completions)}, not {held}.")
    for index, reward in enumerate(rewards):
        _check_reward(f"rewards[{index}]", reward)
    return Example(place, prompt, completions, [float(reward) for reward in rewards])


def _field(record: dict[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    unknown = [key for key in record if key not in FIELDS]
    near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.7)
    hint = f" (rename `{near[0]}`?)" if near else ""
    raise _BadField(name, _Missing(), f"the row has {', '.join(map(str, record)) or 'no fields'}{hint}; add `{name}`.")


def _text(record: dict[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = _field(record, name)
    _check_text(name, value, may_be_empty)
    return value


def _check_text(name: str, value: Any, may_be_empty: bool = False) -> None:
    if isinstance(value, (list, dict)):
        raise _conversation(name, value)
    if not isinstance(value, str):
        raise _BadField(name, value, f"a string is needed, not {type(value).__name__}.")
    if not value and not may_be_empty:
        raise _BadField(name, value, "an empty completion has nothing to learn from; remove the row or give its text.")


def _conversation(name: str, value: Any) -> _BadField:
    return _BadField(
        name,
        value,
        "conversations are not supported, text is needed; turn them into text first with "
        "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).",
    )


def _check_reward(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadField(name, value, f"a number is needed, not {type(value).__name__}.")
    # Rewards are used in float32, where a finite double may not be finite.
    if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
        raise _BadField(name, value, "a finite float32 number is needed; remove the row or score it again.")


def _check_candidates(example: Example, group_size: int | None, num_contrastive: int | None) -> None:
    count = len(example.completions)
    if count < 2:
        raise _BadField("completions", example.completions, f"at least 2 candidates are needed, not {count}.")
    if num_contrastive is None and count != group_size:
        raise _BadField(
            "completions",
            example.completions,
            f"{count} candidates where the rows before have {group_size}; give every prompt the same, or "
            "set num_contrastive to a number that divides each.",
        )
    if count % group_size:
        fitting = [k for k in range(2, count + 1) if count % k == 0]
        raise _BadField(
            "completions",
            example.completions,
            f"num_contrastive={group_size} does not divide the {count} candidates of this prompt; "
            f"{' or '.join(map(str, fitting))} would fit.",
        )


def _check_ties(example: Example, group_size: int, loss_type: str) -> None:
    rewards = np.asarray(example.rewards, dtype=np.float32).reshape(-1, group_size)
    for group, row in enumerate(rewards):
        if (row == row.max()).sum() > 1:
            where = (
                "" if len(rewards) == 1 else f" among candidates {group * group_size} to {(group + 1) * group_size - 1}"
            )
            raise _BadField(
                "rewards",
                example.rewards,
                f"two candidates share the highest reward{where}, so {loss_type} has no preferred one; "
                f"remove the row, or use {loss_type.split('-')[0]}-rw.",
            )


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
