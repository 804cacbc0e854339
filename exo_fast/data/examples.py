"""Conversion of a row of text to a checked example: the fields that a row must hold, and the errors if it does not.

The forms come from the original EXO repository, and from TRL if it has another name for the same:
    candidates  {"prompt": str, "completions": [str, …], "rewards": [number, …]}   candidates and their rewards
                {"prompt": str, "chosen": str, "rejected": str}                    a preference
    sft         {"prompt": str, "chosen": str}                                     (or "completion"; or "text")
    samples     {"prompt": str, "completions": [str, …]}                           texts that a model wrote
    text        {"text": str, "label": "pos" | "neg"}                              (or 1 | 0, or true | false)
Candidates may bring `completion_ids`, the token ids that were drawn, which are then used in place of their text, or
`completion_spans`, the parts of each that count. Other fields are ignored.
"""

import difflib
from dataclasses import dataclass
from typing import Any, NamedTuple

from exo_fast.data.fields import BadField, Missing, field_names, is_unicode
from exo_fast.data.forms import Row

MAX_FLOAT32 = 3.4028234663852886e38
MAX_ID = 2**31 - 1  # ids are kept in 32 bits
FIELDS = ("prompt", "completions", "rewards", "chosen", "rejected", "completion_ids", "text", "label")
LABELS = {"pos": 1, "neg": 0, 1: 1, 0: 0}  # True and False equal 1 and 0
PAIR = ("chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")  # of UltraFeedback's pairs
ALL_OR_NONE = (
    f"some pairs have {' and '.join(SCORES)} and others have not, whose rewards of 1 and 0 are of another scale; give "
    "all of them scores, or none."
)


@dataclass(frozen=True)
class Example:
    """One prompt and its candidates; `rewards[k]` is the reward of `completions[k]`, `completion_ids[k]` the ids that
    were drawn for it (with EOS if that was drawn), and `spans[k]` its [begin, end) characters that count, if known.
    `place` names the row."""

    place: Any
    prompt: str
    completions: list[str]
    rewards: list[float]
    completion_ids: list[list[int]] | None = None
    spans: list[list[tuple[int, int]]] | None = None

    def extras(self) -> dict[str, Any]:
        """Return the fields of a row beside texts and rewards, to be written with them."""
        known = {"completion_ids": self.completion_ids, "completion_spans": self.spans}
        return {name: value for name, value in known.items() if value is not None}


class Text(NamedTuple):
    """A text and its class, 1 for positive and 0 for negative."""

    place: Any
    text: str
    label: int


def scored(row: Row) -> bool | None:
    """Return whether a preference has the scores of both its answers; None for candidates, which have rewards."""
    return None if row.get("completions") is not None else all(row.get(name) is not None for name in SCORES)


def candidates(place: Any, row: Row, *, scored_pairs: bool = False) -> Example:
    """Read a prompt, its candidates and their rewards. A preference has the rewards 1 and 0, or with `scored_pairs`
    its `score_chosen` and `score_rejected` if it has them. Raises BadField."""
    prompt = _text(row, "prompt", may_be_empty=True)
    if "completions" not in row and any(name in row for name in PAIR):
        pair = [_text(row, name) for name in PAIR]
        rewards = [1.0, 0.0]
        if scored_pairs and all(row.get(name) is not None for name in SCORES):
            rewards = [_reward(name, row[name]) for name in SCORES]
        ids = _completions({**row, "completions": pair})[1]
        return Example(place, prompt, pair, rewards, ids, _spans(row, pair, ids))
    completions, ids = _completions(row)
    rewards = rewards_of(row, len(completions))
    return Example(place, prompt, completions, rewards, ids, _spans(row, completions, ids))


def sft(place: Any, row: Row) -> Example:
    """Read a prompt and the one completion to learn, with reward 0; `text` alone is a completion of an empty prompt.
    Raises BadField."""
    if "completions" in row and "chosen" not in row:
        raise BadField(
            "completions", row["completions"], "fine-tuning learns one completion of each prompt; give it as `chosen`."
        )
    if "text" in row and "prompt" not in row:
        return Example(place, "", [_text(row, "text")], [0.0])
    prompt = _text(row, "prompt", may_be_empty=True)
    name = "completion" if "completion" in row and "chosen" not in row else "chosen"
    completion = [_text(row, name)]
    spans = _spans(row, [row[key] for key in (*PAIR, "completion") if key in row])
    if spans is not None:  # the spans of the learned field, among the fields of the row
        spans = spans[[key for key in (*PAIR, "completion") if key in row].index(name) :][:1]
    return Example(place, prompt, completion, [0.0], spans=spans)


def samples(place: Any, row: Row) -> Example:
    """Read a prompt with any number of completions, to be scored; `rewards` is empty if the row has no rewards.

    `chosen` and `rejected`, or one of them, or `completion`, count as completions too. A completion may be empty: a
    model may have ended at once. Raises BadField.
    """
    prompt = _text(row, "prompt", may_be_empty=True)
    names = [name for name in (*PAIR, "completion") if name in row]
    if "completions" not in row and names:
        texts = [_text(row, name, may_be_empty=True) for name in names]
        ids = _completions({**row, "completions": texts}, may_be_empty=True)[1]
        return Example(place, prompt, texts, [], ids, _spans(row, texts, ids))
    completions, ids = _completions(row, may_be_empty=True)
    if not completions:
        raise BadField("completions", completions, "at least one completion is needed.")
    rewards = rewards_of(row, len(completions)) if "rewards" in row else []
    return Example(place, prompt, completions, rewards, ids, _spans(row, completions, ids))


def text(place: Any, row: Row) -> Text:
    """Read a text with its class. Raises BadField."""
    words, label = _text(row, "text"), field_of(row, "label")
    if not isinstance(label, (str, int)) or label not in LABELS:
        raise BadField("label", label, '"pos" or "neg" is needed (or 1 or 0, or true or false).')
    return Text(place, words, LABELS[label])


def prompt(row: Row) -> str:
    """Return the prompt of a row. Raises BadField."""
    return _text(row, "prompt", may_be_empty=True)


def _completions(row: Row, may_be_empty: bool = False) -> tuple[list[str], list[list[int]] | None]:
    """Return the completions and, if given, the ids that were drawn. With ids a text may be empty: EOS is left."""
    completions, ids = field_of(row, "completions"), row.get("completion_ids")
    if not isinstance(completions, list):
        raise BadField("completions", completions, "a list of strings is needed.")
    for index, completion in enumerate(completions):
        _check_text(f"completions[{index}]", completion, may_be_empty or ids is not None)
    if ids is not None:
        if not isinstance(ids, list) or len(ids) != len(completions):
            raise BadField("completion_ids", ids, f"a list of token ids per completion is needed: {len(completions)}.")
        for index, drawn in enumerate(ids):
            check_ids(f"completion_ids[{index}]", drawn)
    return completions, ids


def check_ids(name: str, value: Any) -> None:
    """Raise BadField if the value is not a list of token ids."""
    if not isinstance(value, list) or not value or not all(type(i) is int and 0 <= i <= MAX_ID for i in value):
        raise BadField(name, value, "a list of token ids is needed, one at least.")


def _spans(row: Row, completions: list[str], ids: list[list[int]] | None = None) -> list[list[tuple[int, int]]] | None:
    """Return the parts of each completion that count, or None if the row gives no spans. Raises BadField if `ids` are
    to be used: characters do not say which ids count."""
    spans = row.get("completion_spans")
    if spans is None:
        return None
    if ids is not None:
        raise BadField(
            "completion_ids",
            ids,
            "only parts of these completions count (completion_spans, or the assistant's turns in a conversation of "
            "several), and which of the ids those are is not known; remove `completion_ids` to tokenise the text.",
        )
    if not isinstance(spans, list) or len(spans) != len(completions):
        raise BadField("completion_spans", spans, f"a list of spans per completion is needed: {len(completions)}.")
    for index, (text, found) in enumerate(zip(completions, spans, strict=True)):
        pairs: list[Any] = found if isinstance(found, list) else [None]
        whole = all(isinstance(p, list) and len(p) == 2 and all(type(edge) is int for edge in p) for p in pairs)
        edges = [edge for pair in pairs for edge in pair] if whole else []
        ordered = edges == sorted(edges) and edges[:1] >= [0] and edges[-1:] <= [len(text)]
        if not ordered or edges[::2] == edges[1::2]:  # all of them empty
            raise BadField(
                f"completion_spans[{index}]",
                found,
                f"pairs of begin and end, in order, inside the {len(text)} characters of the completion, are needed, "
                "one at least that is not empty.",
            )
    return [[(begin, end) for begin, end in found] for found in spans]


def rewards_of(row: Row, count: int) -> list[float]:
    """Return the rewards of `count` candidates. Raises BadField."""
    rewards = field_of(row, "rewards")
    if not isinstance(rewards, list) or len(rewards) != count:
        held = f"{len(rewards)} numbers" if isinstance(rewards, list) else "not a list"
        raise BadField("rewards", rewards, f"one number per completion is needed: {count}, not {held}.")
    return [_reward(f"rewards[{index}]", reward) for index, reward in enumerate(rewards)]


def _reward(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)):  # a bool is an int: 1 for true, 0 for false
        raise BadField(name, value, f"a number is needed, not {type(value).__name__}.")
    # Rewards are used in float32, in which a finite double may overflow.
    if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
        raise BadField(name, value, "a finite float32 number is needed; remove the row or score it again.")
    return float(value)


def field_of(row: Row, name: str) -> Any:
    """Return the value of a field. Raises BadField if the row lacks it, with the nearest name that the row has."""
    if name in row:
        return row[name]
    unknown = [key for key in row if key not in FIELDS]
    near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.7)
    hint = f" (rename `{near[0]}`?)" if near else ""
    raise BadField(name, Missing(), f"the row has {field_names(row)}{hint}; add `{name}`.")


def _text(row: Row, name: str, may_be_empty: bool = False) -> str:
    value = field_of(row, name)
    _check_text(name, value, may_be_empty)
    return value


def _check_text(name: str, value: Any, may_be_empty: bool = False) -> None:
    if isinstance(value, (list, dict)):
        raise conversation_without_template(name, value)
    if not isinstance(value, str):
        raise BadField(name, value, f"a string is needed, not {type(value).__name__}.")
    if not is_unicode(value):
        raise BadField(name, value, "half a surrogate pair, which is no character; mend or remove the row.")
    if not value and not may_be_empty:
        raise BadField(name, value, "an empty completion has nothing to learn from; remove the row or give its text.")


def conversation_without_template(name: str, value: Any) -> BadField:
    """Return the fault of messages without a tokenizer that could make text of them."""
    return BadField(
        name,
        value,
        "a conversation becomes text through a chat template; name the model (or tokenizer) that has one, or turn it "
        "into text first with tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).",
    )
