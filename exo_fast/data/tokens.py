"""Token ids of prompts and candidates: one function for every caller, so training learns the ids that inference sees.

- A prompt is its text as the tokenizer reads it alone, after the ids that the tokenizer puts before a text (BOS),
  once: also if a chat template has written them already.
- A candidate is the rest of the text, tokenised *after* the prompt: the ids of both together, without the prompt's ids
  (the end of its text is enough context). If the two would melt into one token at their boundary, the prompt keeps its
  ids, because the model is asked with them, and the candidate is tokenised as it reads in the middle of a text.
  (Tokenised alone, a SentencePiece tokenizer would put a space before it.)
- A candidate ends with EOS, or with the end of turn that the chat template writes, and never with both.
- Ids that were drawn are taken as they are: with EOS if that was drawn, without if sampling was cut short. They
  must be the ids of the completion's text; else another model has drawn them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from exo_fast.data.conversations import ChatTemplate, Learn
from exo_fast.data.examples import Example
from exo_fast.data.fields import BadField
from exo_fast.data.forms import Row, standard

CONTEXT = 128  # characters before a text that decide how it begins: words are shorter
CARRIERS = ("\n", ".", "a", "1")  # put before a text, so that it is not the beginning


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and its candidates, and which of the candidates' ids count (None: all)."""

    prompt: list[int]
    candidates: list[list[int]]
    learned: list[list[bool]] | None = None


class RowTokenizer:
    """A tokenizer, with the facts that the rule above needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer)

    # Facts

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer puts before a text (BOS, if any), found by comparing with and without."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []

    @cached_property
    def eos(self) -> int:
        """The id of EOS. Raises ValueError for a tokenizer without one."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token, which ends every completion; set "
                "one with tokenizer.add_special_tokens({'eos_token': …}) and save it."
            )
        return self.tokenizer.eos_token_id

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end a completion: EOS, and the chat template's end of the assistant's turn."""
        turns = self.tokenizer.convert_tokens_to_ids(list(self.chat.ends)) if self.tokenizer.chat_template else []
        return frozenset({*turns, self.tokenizer.eos_token_id} - {None})

    @cached_property
    def known(self) -> frozenset[int]:
        """The ids that the tokenizer has a token for."""
        return frozenset(self.tokenizer.get_vocab().values())

    # Rows

    def text_of(self, row: Row, learn: Learn = "last") -> Row:
        """Return a row of any accepted form (`forms`) with text in place of messages (`ChatTemplate.text_of`)."""
        return self.chat.text_of(standard(row), learn)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt, BOS included; empty for a text of no tokens without BOS."""
        return [self.prefix + ids for ids in self._bodies(texts)]

    def tokens(self, examples: Sequence[Example]) -> list[Tokens]:
        """Return the ids of the prompt and of the candidates of each example.

        Raises BadField, a ValueError, with the example's place if it has one, for ids that another tokenizer drew;
        ValueError for a tokenizer without EOS if there is text.
        """
        self._check_drawn(examples)
        prompts = self._bodies([example.prompt for example in examples])
        written = [list(_pieces(example)) for example in examples]
        behind = [
            [(example.prompt + "".join(parts[:index]))[-CONTEXT:] for index in range(len(parts))]
            for example, candidates in zip(examples, written, strict=True)
            for parts, _ in candidates
        ]
        texts = [parts for candidates in written for parts, _ in candidates]
        pairs = [pair for before, parts in zip(behind, texts, strict=True) for pair in zip(before, parts, strict=True)]
        contexts = list(dict.fromkeys(before for before, _ in pairs))
        known = dict(zip(contexts, self._bodies(contexts), strict=True))
        wholes = self._bodies([before + part for before, part in pairs])
        ids_of = iter(
            whole[len(known[before]) :] if self._begins(whole, known[before]) else self._after(part)
            for whole, (before, part) in zip(wholes, pairs, strict=True)
        )
        found = []
        for example, prompt, candidates in zip(examples, prompts, written, strict=True):
            ids, learned = list(example.completion_ids or ()), []
            for _, counts in candidates:
                pieces = [(next(ids_of), count) for count in counts]
                candidate = [i for piece, _ in pieces for i in piece]
                marks = [count for piece, count in pieces for _ in piece]
                if not candidate or candidate[-1] not in self.ends:
                    candidate.append(self.eos)
                    marks.append(True)
                ids.append(candidate)
                learned.append(marks)
            partly = example.spans is not None and not all(map(all, learned))
            found.append(Tokens(self.prefix + prompt, ids, learned if partly else None))
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text alone, with nothing put before or after."""
        if not texts:  # tokenizers refuse an empty list
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return found["input_ids"]

    def _check_drawn(self, examples: Sequence[Example]) -> None:
        """Raise BadField if `completion_ids` do not decode to the completion's text.

        Ids without a token are skipped; the model's own check finds out whether it has a row for them.
        """
        drawn = [(e, index, ids) for e in examples for index, ids in enumerate(e.completion_ids or ())]
        if not drawn:
            return
        ids_of_text = [[i for i in ids if i in self.known] for *_, ids in drawn]
        for (example, index, ids), text in zip(
            drawn, self.tokenizer.batch_decode(ids_of_text, skip_special_tokens=True), strict=True
        ):
            completion = example.completions[index]
            # A conversation's text has the end of turn. Spaces are ignored, because decoding may tidy them.
            forms = {"".join(form.split()) for form in (completion, self.chat.without_special(completion))}
            if "".join(text.split()) not in forms:
                raise BadField(
                    f"completion_ids[{index}]",
                    ids,
                    f"the tokenizer {self.tokenizer.name_or_path!r} makes {text!r} of it, and the completion is "
                    f"{completion!r}. Was it sampled with another model? Name that one, or remove `completion_ids` to "
                    "tokenise the text.",
                    place=example.place,
                )

    def _bodies(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt without BOS, which a template may have written already."""
        return [self._unprefixed(ids) for ids in self.encode(texts)]

    def _unprefixed(self, ids: list[int]) -> list[int]:
        return ids[len(self.prefix) :] if self.prefix and ids[: len(self.prefix)] == self.prefix else ids

    def _begins(self, whole: list[int], part: list[int]) -> bool:
        """Return whether the text of `whole` was cut at the end of the text of `part`. An unknown token may cover more
        text in one than in the other, so nothing is known after it."""
        unknown = bool(part) and part[-1] == self.tokenizer.unk_token_id
        return whole[: len(part)] == part and not unknown

    def _after(self, text: str) -> list[int]:
        """Return the ids of a text in the middle of another."""
        for carrier in (*CARRIERS, self.tokenizer.eos_token or ""):
            before, both = self.encode([carrier, carrier + text])
            if before and self._begins(both, before):
                return both[len(before) :]
        return self.encode([text])[0]


def need_prompts(examples: Sequence[Example], found: Sequence[Tokens]) -> None:
    """Raise BadField for a prompt of no tokens, from which no completion could be predicted."""
    for example, tokens in zip(examples, found, strict=True):
        if not tokens.prompt:
            fix = "no tokens, and the tokenizer adds no BOS; at least one is needed, to predict a first token from."
            raise BadField("prompt", example.prompt, fix, place=example.place)


def _pieces(example: Example) -> Any:
    """Yield for each candidate that is text its pieces in order, and whether each counts."""
    if example.completion_ids is not None:
        return
    for index, text in enumerate(example.completions):
        if example.spans is None:
            yield [text], [True]
            continue
        edges = sorted({0, len(text), *(edge for span in example.spans[index] for edge in span)})
        inside = [any(begin <= edge < end for begin, end in example.spans[index]) for edge in edges[:-1]]
        yield [text[begin:end] for begin, end in pairwise(edges)] or [""], inside or [True]
