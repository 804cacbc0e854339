"""From records to examples: what a row must hold, and what is said when it does not.

The forms are those of the original EXO repository, and of TRL where it has another name for the same:
    load_examples  {"prompt": str, "completions": [str, …], "rewards": [number, …]}   candidates and their rewards
    load_pairs     {"prompt": str, "chosen": str, "rejected": str}                    a preference
    load_sft       {"prompt": str, "chosen": str}                                     (or "completion"; or "text")
    load_samples   {"prompt": str, "completions": [str, …]}                           what a model wrote
    load_texts     {"text": str, "label": "pos" | "neg"}                              (or 1 | 0, or true | false)
    load_prompts   any of these but the last
Candidates may bring `completion_ids`, the token ids that were drawn, which are then used in place of their text. With
a tokenizer, conversations become text through its chat template (conversations.py). Other fields are ignored. All rows
are read before any error is raised, so that one run shows the first ten faults instead of one.
"""

import difflib
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from exo_fast.training.data.conversations import conversation_field, render
from exo_fast.training.data.faults import BadField, Missing, collect, field_names
from exo_fast.training.data.records import Place, Source, read_records
from exo_fast.training.errors import InputError

MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_ID = 2**31 - 1  # ids are kept in 32 bits
MAX_CANDIDATES = 4096  # of a group, which is one row of a batch
FIELDS = ("prompt", "completions", "rewards", "chosen", "rejected", "completion_ids", "text", "label")
LABELS = {"pos": 1, "neg": 0, 1: 1, 0: 0}  # True and False equal 1 and 0
Tokenizer = PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Example:
    """One prompt and its candidates; `rewards[k]` is the reward of `completions[k]`, and `completion_ids[k]` the ids
    that were drawn for it (with EOS if that was drawn), where they are known."""

    place: Place
    prompt: str
    completions: list[str]
    rewards: list[float]
    completion_ids: list[list[int]] | None = None


class Text(NamedTuple):
    """A text and its class, 1 for positive and 0 for negative."""

    place: Place
    text: str
    label: int


def load_examples(
    source: Source, *, loss_type: str, num_contrastive: int | None, tokenizer: Tokenizer = None
) -> list[Example]:
    """All examples of `source`, checked for use with `loss_type` and groups of `num_contrastive` candidates. A
    preference becomes two candidates with rewards 1 and 0.

    `num_contrastive` None means one group per prompt, which needs the same number of candidates in every row.
    Raises InputError that lists the first ten faults with file, line, field, value and fix.
    """
    group_size = num_contrastive

    def convert(place: Place, record: Any) -> Example:
        nonlocal group_size
        example = _to_candidates(place, _as_text(record, tokenizer))
        if group_size is None and len(example.completions) > 1:
            group_size = len(example.completions)
        _check_candidates(example, group_size, num_contrastive)
        if loss_type.endswith("-pref"):
            _check_ties(example, group_size, loss_type)
        return example

    return collect(source, read_records(source, tokenizer), convert)


def load_pairs(source: Source, *, tokenizer: Tokenizer = None) -> list[Example]:
    """Preferences: two candidates each, the better one first, with rewards 1 and 0.

    Of more candidates with rewards the best and the worst are taken (of equals the first). Rows whose rewards are all
    equal tell nothing and are left out, and how many is printed. Raises InputError as load_examples does.
    """
    ties = 0

    def convert(place: Place, record: Any) -> Example | None:
        nonlocal ties
        example = _to_candidates(place, _as_text(record, tokenizer))
        _check_count(example)
        best, worst = int(np.argmax(example.rewards)), int(np.argmin(example.rewards))
        if example.rewards[best] == example.rewards[worst]:
            ties += 1
            return None
        ids = example.completion_ids
        return Example(
            place,
            example.prompt,
            [example.completions[best], example.completions[worst]],
            [1.0, 0.0],
            None if ids is None else [ids[best], ids[worst]],
        )

    pairs = collect(source, read_records(source, tokenizer), convert)
    if not pairs:
        raise InputError(f"{source}: the candidates of every row have equal rewards; there is nothing to prefer.")
    if ties and os.environ.get("RANK", "0") == "0":
        print(f"{source}: {ties} of {ties + len(pairs)} rows have equal rewards and are left out", flush=True)
    return pairs


def load_sft(source: Source, *, tokenizer: Tokenizer = None) -> list[Example]:
    """Prompts with the one completion to learn, and reward 0. `text` alone is a completion of an empty prompt.

    Raises InputError as load_examples does.
    """

    def convert(place: Place, raw: Any) -> Example:
        record = _as_text(raw, tokenizer)
        if "messages" in raw and "completion" not in record:
            raise BadField("messages", raw["messages"], "the last message must be the assistant's: it is learned.")
        if "completions" in record and "chosen" not in record:
            raise BadField(
                "completions",
                record["completions"],
                "fine-tuning learns one completion of each prompt; give it as `chosen`.",
            )
        if "text" in record and "prompt" not in record:
            return Example(place, "", [_text(record, "text")], [0.0])
        prompt = _text(record, "prompt", may_be_empty=True)
        name = "completion" if "completion" in record and "chosen" not in record else "chosen"
        return Example(place, prompt, [_text(record, name)], [0.0])

    return collect(source, read_records(source, tokenizer), convert)


def load_samples(source: Source, *, tokenizer: Tokenizer = None) -> list[Example]:
    """Prompts with any number of completions, to be scored. `rewards` is empty where the row has none.

    `chosen` and `rejected`, or `chosen` alone, count as completions too. A completion may be empty: a model may have
    ended at once. Raises InputError as load_examples does.
    """

    def convert(place: Place, record: Any) -> Example:
        record = _as_text(record, tokenizer)
        prompt = _text(record, "prompt", may_be_empty=True)
        names = [name for name in ("chosen", "rejected", "completion") if name in record]
        if "completions" not in record and names:
            return Example(place, prompt, [_text(record, name, may_be_empty=True) for name in names], [])
        completions, ids = _completions(record, may_be_empty=True)
        if not completions:
            raise BadField("completions", completions, "at least one completion is needed.")
        rewards = _rewards(record, completions) if "rewards" in record else []
        return Example(place, prompt, completions, rewards, ids)

    return collect(source, read_records(source, tokenizer), convert)


def load_texts(source: Source, *, tokenizer: Tokenizer = None) -> list[Text]:
    """Texts with their class. Raises InputError as load_examples does."""

    def convert(place: Place, record: Any) -> Text:
        record = _as_text(record, tokenizer)
        text, label = _text(record, "text"), _field(record, "label")
        if not isinstance(label, (str, int)) or label not in LABELS:
            raise BadField("label", label, '"pos" or "neg" is needed (or 1 or 0, or true or false).')
        return Text(place, text, LABELS[label])

    return collect(source, read_records(source, tokenizer), convert)


def load_prompts(source: Source, *, tokenizer: Tokenizer = None) -> list[str]:
    """The prompts, each once, in the order in which they come first. Raises InputError as load_examples does."""

    def convert(place: Place, record: Any) -> str:
        return _text(_as_text(record, tokenizer), "prompt", may_be_empty=True)

    return list(dict.fromkeys(collect(source, read_records(source, tokenizer), convert)))


def _as_text(record: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadField("(the whole row)", record, "an object with the fields prompt, completions, rewards is needed.")
    if "conversations" in record:
        raise BadField("conversations", record["conversations"], "rename it `messages`, each with `role`, `content`.")
    name = conversation_field(record)
    if name is None:
        return record
    if tokenizer is None:
        raise _conversation(name, record[name])
    return render(record, tokenizer)


def _to_candidates(place: Place, record: dict[str, Any]) -> Example:
    prompt = _text(record, "prompt", may_be_empty=True)
    if "completions" not in record and ("chosen" in record or "rejected" in record):
        pair = [_text(record, "chosen"), _text(record, "rejected")]
        return Example(place, prompt, pair, [1.0, 0.0], _completions({**record, "completions": pair})[1])
    completions, ids = _completions(record)
    return Example(place, prompt, completions, _rewards(record, completions), ids)


def _completions(record: dict[str, Any], may_be_empty: bool = False) -> tuple[list[str], list[list[int]] | None]:
    """The completions and, if the row has them, the ids that were drawn. With ids a text may be empty: EOS is left."""
    completions, ids = _field(record, "completions"), record.get("completion_ids")
    if not isinstance(completions, list):
        raise BadField("completions", completions, "a list of strings is needed.")
    for index, completion in enumerate(completions):
        _check_text(f"completions[{index}]", completion, may_be_empty or ids is not None)
    if ids is not None:
        if not isinstance(ids, list) or len(ids) != len(completions):
            raise BadField("completion_ids", ids, f"a list of token ids per completion is needed: {len(completions)}.")
        for index, drawn in enumerate(ids):
            if not isinstance(drawn, list) or not drawn or not all(type(i) is int and 0 <= i <= MAX_ID for i in drawn):
                raise BadField(f"completion_ids[{index}]", drawn, "a list of token ids is needed, one at least.")
    return completions, ids


def _rewards(record: dict[str, Any], completions: list[str]) -> list[float]:
    rewards = _field(record, "rewards")
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        held = f"{len(rewards)} numbers" if isinstance(rewards, list) else "not a list"
        raise BadField("rewards", rewards, f"one number per completion is needed: {len(completions)}, not {held}.")
    for index, reward in enumerate(rewards):
        _check_reward(f"rewards[{index}]", reward)
    return [float(reward) for reward in rewards]


def _field(record: dict[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    unknown = [key for key in record if key not in FIELDS]
    near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.7)
    hint = f" (rename `{near[0]}`?)" if near else ""
    raise BadField(name, Missing(), f"the row has {field_names(record)}{hint}; add `{name}`.")


def _text(record: dict[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = _field(record, name)
    _check_text(name, value, may_be_empty)
    return value


def _check_text(name: str, value: Any, may_be_empty: bool = False) -> None:
    if isinstance(value, (list, dict)):
        raise _conversation(name, value)
    if not isinstance(value, str):
        raise BadField(name, value, f"a string is needed, not {type(value).__name__}.")
    if not value and not may_be_empty:
        raise BadField(name, value, "an empty completion has nothing to learn from; remove the row or give its text.")


def _conversation(name: str, value: Any) -> BadField:
    return BadField(
        name,
        value,
        "a conversation becomes text through a chat template; name the model (or tokenizer) that has one, or turn it "
        "into text first with tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).",
    )


def _check_reward(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadField(name, value, f"a number is needed, not {type(value).__name__}.")
    # Rewards are used in float32, where a finite double may not be finite.
    if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
        raise BadField(name, value, "a finite float32 number is needed; remove the row or score it again.")


def _check_count(example: Example) -> None:
    if (count := len(example.completions)) < 2:
        raise BadField("completions", example.completions, f"at least 2 candidates are needed, not {count}.")


def _check_candidates(example: Example, group_size: int | None, num_contrastive: int | None) -> None:
    _check_count(example)
    count = len(example.completions)
    if num_contrastive is None and count != group_size:
        raise BadField(
            "completions",
            example.completions,
            f"{count} candidates where the rows before have {group_size}; give every prompt the same, or "
            "set num_contrastive to a number that divides each.",
        )
    if group_size > MAX_CANDIDATES:
        raise BadField(
            "completions",
            example.completions,
            f"groups of {group_size} candidates are too large, at most {MAX_CANDIDATES} can be compared at once; set "
            "num_contrastive to a smaller number that divides them.",
        )
    if count % group_size:
        fitting = [k for k in range(2, count + 1) if count % k == 0]
        raise BadField(
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
            raise BadField(
                "rewards",
                example.rewards,
                f"two candidates share the highest reward{where}, so {loss_type} has no preferred one; "
                f"remove the row, or use {loss_type.split('-')[0]}-rw.",
            )
