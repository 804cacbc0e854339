"""Make examples (`exo_fast.data`) of a source of rows. All rows are read and judged before any error is raised.

    load_examples  candidates and their rewards, or preferences, to align on
    load_pairs     preferences
    load_sft       a prompt and the completion to learn
    load_samples   a model's completions, to be scored
    load_texts     texts with a label
    load_prompts   the prompts of any of these except texts with a label

With a tokenizer, conversations become text through its chat template.
"""

import os
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from exo_fast.data import examples, forms
from exo_fast.data.conversations import Learn, conversation_field
from exo_fast.data.examples import Example, Text
from exo_fast.data.fields import BadField
from exo_fast.data.selection import ALIKE, EQUAL, FEW, LeftOut, enough, need_two
from exo_fast.data.tokens import RowTokenizer
from exo_fast.training.data.faults import collect
from exo_fast.training.data.places import Place, Source
from exo_fast.training.data.sources import read_records
from exo_fast.training.errors import InputError

Tokenizer = PreTrainedTokenizerBase | None


def load_examples(
    source: Source,
    *,
    loss_type: str,
    num_contrastive: int | None,
    tokenizer: Tokenizer = None,
    left_out: LeftOut | None = None,
) -> list[Example]:
    """Return all examples of `source`, for `loss_type` and groups of `num_contrastive` candidates. A preference
    becomes two candidates with rewards 1 and 0 (for a *-rw loss: with its scores, if the row has them).

    `num_contrastive` None means one group per prompt, which needs the same number of candidates in every row; with a
    number, rows with fewer are noted in `left_out`. Raises InputError that lists the first ten faults with file, line,
    field, value and fix.
    """
    group_size = num_contrastive
    text_of = _Reader(tokenizer)
    left_out = LeftOut() if left_out is None else left_out
    by_rewards, scored = loss_type.endswith("-rw"), set[bool | None]()

    def convert(place: Place, record: Any) -> Example | None:
        nonlocal group_size
        row = text_of(record)
        example = examples.candidates(place, row, scored_pairs=by_rewards)
        scored.add(examples.scored(row))
        group_size = group_size or max(len(example.completions), 2)
        if enough(example.completions, group_size, num_contrastive):
            return example
        left_out.add(FEW, place)
        return None

    found = collect(source, read_records(source, tokenizer), convert)
    if not found:
        raise InputError(
            f"{source}: no row has num_contrastive={num_contrastive} candidates; set it to a smaller number."
        )
    if by_rewards and {True, False} <= scored:
        raise InputError(f"{source}: {examples.ALL_OR_NONE}")
    return found


def load_pairs(
    source: Source, *, tokenizer: Tokenizer = None, left_out: LeftOut | None = None, scored_pairs: bool = False
) -> list[Example]:
    """Load preferences: two candidates each, the better one first, with rewards 1 and 0. With `scored_pairs` a
    preference that has scores keeps them.

    From more than two candidates with rewards it takes the best and the worst (the first of equals). Rows whose
    rewards are all equal, or whose best and worst are the same text, teach nothing: they are left out, noted in
    `left_out` and printed.
    Raises InputError as load_examples does.
    """
    text_of = _Reader(tokenizer)
    left_out = LeftOut() if left_out is None else left_out

    def convert(place: Place, record: Any) -> Example | None:
        row = text_of(record)
        example = examples.candidates(place, row)
        need_two(example.completions, "remove the row, or sample more")
        best, worst = int(np.argmax(example.rewards)), int(np.argmin(example.rewards))
        equal = example.rewards[best] == example.rewards[worst]
        if equal or example.completions[best] == example.completions[worst]:
            left_out.add(EQUAL if equal else ALIKE, place)
            return None

        def both(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[best], values[worst]]

        texts, ids, spans = (both(v) for v in (example.completions, example.completion_ids, example.spans))
        rewards = examples.candidates(place, row, scored_pairs=True).rewards if scored_pairs else [1.0, 0.0]
        return Example(place, example.prompt, texts, rewards if "completions" not in row else [1.0, 0.0], ids, spans)

    pairs = collect(source, read_records(source, tokenizer), convert)
    lines = left_out.lines(str(source))
    if not pairs:
        raise InputError("no pair is left to learn from:\n  " + "\n  ".join(lines))
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)
    return pairs


def load_sft(source: Source, *, tokenizer: Tokenizer = None, learn: Learn = "last") -> list[Example]:
    """Load prompts with the one completion to learn, and reward 0. `text` alone is a completion of an empty prompt.
    From `messages` the assistant's last message is learned, or with `learn` "all" all its messages. Candidates beside
    them are ignored, and so are messages of others after the assistant's last.

    Raises InputError as load_examples does.
    """
    text_of = _Reader(tokenizer, learn)

    def convert(place: Place, raw: Any) -> Example:
        _check_is_row(raw)
        row = forms.standard(raw)
        if isinstance(messages := row.get("messages"), list):
            row = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "completions")}
            said = [index for index, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"]
            if not said:
                raise BadField("messages", messages, "no message is the assistant's, whose words are learned.")
            row["messages"] = messages[: said[-1] + 1]
        return examples.sft(place, text_of(row))

    return collect(source, read_records(source, tokenizer), convert)


def load_samples(source: Source, *, tokenizer: Tokenizer = None) -> list[Example]:
    """Load prompts with any number of completions, to be scored. Raises InputError as load_examples does."""
    text_of = _Reader(tokenizer)
    return collect(source, read_records(source, tokenizer), lambda place, row: examples.samples(place, text_of(row)))


def load_texts(source: Source, *, tokenizer: Tokenizer = None) -> list[Text]:
    """Load texts with their class. Raises InputError as load_examples does."""
    text_of = _Reader(tokenizer)
    return collect(source, read_records(source, tokenizer), lambda place, row: examples.text(place, text_of(row)))


def load_prompts(source: Source, *, tokenizer: Tokenizer = None) -> list[str]:
    """Load the prompts, each once, in the order in which they come first; for conversations, the generation prompts.
    Raises InputError as load_examples does."""
    prompt_of = _Reader(tokenizer).prompt
    found = collect(source, read_records(source, tokenizer), lambda _, row: prompt_of(row))
    return list(dict.fromkeys(found))


class _Reader:
    """Rows of any accepted form, with text in place of messages."""

    def __init__(self, tokenizer: Tokenizer, learn: Learn = "last"):
        self.rows = None if tokenizer is None else RowTokenizer(tokenizer)
        self.learn = learn

    def __call__(self, row: Any) -> dict[str, Any]:
        _check_is_row(row)
        if self.rows is None:
            return _text_only(row)
        return self.rows.text_of(row, self.learn)

    def prompt(self, row: Any) -> str:
        """Return the prompt alone."""
        _check_is_row(row)
        if self.rows is None:
            return examples.prompt(_text_only(row))
        row = forms.standard(row)
        return examples.prompt(row) if conversation_field(row) is None else self.rows.chat.prompt(row)


def _check_is_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise BadField("(the whole row)", row, "an object with the fields prompt, completions, rewards is needed.")


def _text_only(row: dict[str, Any]) -> dict[str, Any]:
    row = forms.standard(row)
    if (name := conversation_field(row)) is not None:
        raise examples.conversation_without_template(name, row[name])
    return row
