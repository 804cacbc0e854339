"""Conversion of lists of messages to text, through the chat template of a model's tokenizer.

The rule: **training learns the text that inference sees.** The prompt is the generation prompt, as a server writes it
before the model answers. A candidate is the rest of the template's text, up to the template's own end of turn. Text
that no model is ever asked for (a line break after `<|im_end|>`, an EOS after that) is not learned. Three cases need
more:

- Some templates write more after a generation prompt than before a given answer (an opened thought). The
  prompt then ends where the *tokens* of the generation prompt and of all candidates still agree, never inside one.
- If the prompt ends with words of the assistant and the candidates go on with the assistant's, each candidate
  continues that message instead of beginning another.
- If a candidate has several turns, only the assistant's words count. The template's `{% generation %}` marks show
  where they are; without marks they are found by rendering turn by turn.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from exo_fast.data.fields import BadField, is_unicode
from exo_fast.data.forms import Messages, Row, holds_messages

RESERVED = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}
SINGLE = ("chosen", "rejected", "completion")  # fields that hold one candidate; `completions` holds a list of them
PROBE = "4821973650"  # a word that a template writes unchanged, whatever it does with letters
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASKED = "hello"
Spans = list[tuple[int, int]]  # [begin, end) of the characters of a candidate that count
Learn = Literal["last", "all"]


def conversation_field(row: Row) -> str | None:
    """Return the first field of `row` that holds messages; None if all is text."""
    for name in ("messages", "prompt", *SINGLE):
        if name in row and holds_messages(row[name]):
            return name
    candidates = row.get("completions")
    return "completions" if isinstance(candidates, list) and any(map(holds_messages, candidates)) else None


@dataclass(frozen=True)
class Turn:
    """The text of one candidate as the template writes it, from its first own word to its end of turn."""

    text: str
    spans: Spans | None  # None: all of it counts


class ChatTemplate:
    """The chat template of a tokenizer, the tokens that end its turns, and the text of rows that hold messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    # The template's text after an answer

    @cached_property
    def tail(self) -> str:
        """The text that the template writes after the words of an answer; empty if it refuses the test conversation."""
        return "".join(self._split_by_probe(PROBE)[-1:])

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that the template ends the assistant's turn with: the first special token after an answer, and the
        token that ends a tool call if that is another. Empty for a template that ends turns in plain text."""
        found = self._tokens_in(self.tail)[:1]
        eos = self.tokenizer.eos_token
        both = "".join([*found, eos or ""])
        # The answer's end, and right behind it the turn's end. An EOS that only ends the text does not count.
        between = "".join(self._split_by_probe(PROBE, last=False)[1:]).partition(ASKED)[0]
        if found and eos and both in self.tail and both in between:
            found = [eos]
        called = self._ends_of_call()
        if found and found[0] not in called:
            found += called[:1]
        return tuple(found)

    def _ends_of_call(self) -> list[str]:
        """Return the special tokens that the template writes after an answer's calls, but not between two of them."""
        call = {"type": "function", "function": {"name": "call", "arguments": {"a": PROBE}}}
        for calls in ([call, call], [call]):  # some templates refuse two
            _, *between, tail = self._split_by_probe("", tool_calls=calls) or [""] * 2
            if tail and len(between) + 1 == len(calls):
                inside = self._tokens_in("".join(between))
                return [token for token in self._tokens_in(tail, special=True) if token not in inside]
        return []

    @cached_property
    def header(self) -> str:
        """The text that the template writes before a requested answer."""
        try:
            asked = [_message("user", PROBE)]
            return self._apply(asked, add_generation_prompt=True).removeprefix(self._apply(asked))
        except Exception:
            return ""

    def _split_by_probe(self, words: str, *, last: bool = True, **more: Any) -> list[str]:
        """Cut the text of an answer, the last message or not, at the probe; return an empty list if the template
        refuses that answer."""
        for content in (str, lambda text: [{"type": "text", "text": text}]):  # some templates read only these
            asked = {"role": "user", "content": content(ASKED)}
            try:
                answer = {"role": "assistant", "content": content(words), **more}
                text = self._apply([asked, answer] if last else [asked, answer, asked])
            except Exception:  # a template is a program: one that refuses this conversation may take others
                continue
            if PROBE in text:
                return text.split(PROBE)
        return []

    def _tokens_in(self, text: str, *, special: bool = False) -> list[str]:
        """Return the added tokens in `text`, or only the special ones, in order."""
        return (self._special if special else self._added).findall(text)

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return _any_of({str(token) for token in self.tokenizer.added_tokens_decoder.values()} | self._named)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return _any_of({str(token) for token in added if token.special} | self._named)

    @property
    def _named(self) -> set[str]:
        return set(self.tokenizer.all_special_tokens)

    def without_special(self, text: str) -> str:
        """Return `text` without the special tokens that are written out in it."""
        return self._special.sub("", text)

    def trimmed(self, text: str) -> str:
        """Return `text` up to the end of its last turn, without the template's text after it."""
        if self.tail and text.endswith(self.tail):
            stops = [self.tail.index(end) + len(end) for end in self.ends if end in self.tail]
            return text.removesuffix(self.tail) + self.tail[: min(stops, default=len(self.tail.rstrip()))]
        stop = max((text.rfind(end) + len(end) for end in self.ends if end in text), default=len(text))
        return text if self.without_special(text[stop:]).strip() else text[:stop]

    def completed(self, text: str) -> str | None:
        """Return the text of a conversation with all that the template writes at its end; None if the text holds no end
        of a turn, so is no conversation."""
        if not any(end in text for end in self.ends):
            return None
        if text.endswith(self.tail):
            return text
        stop = min((self.tail.index(end) + len(end) for end in self.ends if end in self.tail), default=0)
        return text + (self.tail[stop:] if text.endswith(self.ends) else self.tail)

    # Rows

    def prompt(self, row: Row) -> str:
        """Return the generation prompt of `row`, the text a model is asked with. Raises as `text_of` does."""
        self._need_template(row)
        prompt, _ = _split(row, "last")
        return self._opening("prompt", prompt, _is_open(prompt), _options(row))

    def text_of(self, row: Row, learn: Learn = "last") -> Row:
        """Return `row` with text in place of messages; `messages` become `prompt` and, if the assistant has the last
        word, `completion`. A row of text alone comes back unchanged.

        If not all words of a candidate count, `completion_spans` has a list of [begin, end) characters for each
        candidate. `learn` says whether `messages` give their last assistant turn or all of them. Raises BadField if the
        messages are invalid or the template refuses them, and for a tokenizer without a chat template.
        """
        if conversation_field(row) is None:
            return row
        self._need_template(row)
        options = _options(row)
        prompt, candidates = _split(row, learn)
        answered = all(messages[0]["role"] == "assistant" for messages in candidates.values())
        continued = _is_open(prompt) and all(map(_continues, candidates.values()))
        opening = self._opening("prompt", prompt, continued, options, answer=answered)
        whole_text = {
            key: self._text(key, _join(prompt, messages, continued), options) for key, messages in candidates.items()
        }
        start = self._begin("prompt", prompt, opening, [*whole_text.values()], continued, options)
        if start < 0:
            raise BadField(
                "prompt",
                prompt,
                "the chat template writes these messages otherwise when an answer follows, so that their words cannot "
                "be told from the answer's; write them as it keeps them (the system's words in the user's message, "
                "say), or mend the template.",
            )
        turns = {}
        for key, text in whole_text.items():
            self._check_written(key, prompt, candidates[key], continued, text, start, options)
            kept = self.trimmed(text)
            spans = self._spans(key, prompt, candidates[key], kept, start, continued, options)
            turns[key] = Turn(kept[start:], spans)
        rendered = {name: value for name, value in row.items() if name not in ("messages", "completions")}
        rendered |= {"prompt": opening[:start]} | {key: turn.text for key, turn in turns.items() if key in SINGLE}
        if "completions" in row:
            rendered["completions"] = [turn.text for key, turn in turns.items() if key not in SINGLE]
        if any(turn.spans is not None for turn in turns.values()):
            rendered["completion_spans"] = [
                [[0, len(turn.text)]] if turn.spans is None else [list(span) for span in turn.spans]
                for turn in turns.values()
            ]
        return rendered

    def _need_template(self, row: Row) -> None:
        if not self.tokenizer.chat_template:
            field = conversation_field(row)
            raise BadField(
                field or "(the whole row)",
                row[field] if field else row,
                f"a conversation, and the tokenizer {self.tokenizer.name_or_path!r} has no chat template; name a model "
                "that was made for conversations, or set tokenizer.chat_template and save it.",
            )

    def _apply(self, messages: Messages, **how: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)

    def _text(self, name: str, messages: Messages, options: dict[str, Any], **how: Any) -> str:
        try:
            text = self._apply(messages, **how, **options)
        except Exception as error:  # a template is a program, which may raise anything
            raise BadField(name, messages, f"the chat template refuses it: {error}") from error
        if not is_unicode(text):
            raise BadField(name, messages, "half a surrogate pair, which is no character; mend or remove the row.")
        return text

    def _opening(
        self, name: str, prompt: Messages, continued: bool, options: dict[str, Any], *, answer: bool = True
    ) -> str:
        """Return the text before the candidates: the generation prompt, an answer that was begun, or (if candidates
        do not begin with the assistant's words) the messages alone."""
        how = {"continue_final_message": True} if continued else {"add_generation_prompt": answer}
        return self._text(name, prompt, options, **how)

    def _begin(
        self, name: str, before: Messages, opening: str, texts: list[str], continued: bool, options: dict[str, Any]
    ) -> int:
        """Return the place in `texts` where the answers to the messages `before` begin; `opening` is their generation
        prompt. Return -1 if the template writes these messages differently when an answer follows, so that their words
        and the answer's cannot be told apart."""
        if all(text.startswith(opening) for text in texts):
            return len(opening)
        alone = opening if continued else self._text(name, before, options)
        said = os.path.commonprefix([opening, alone]).rstrip()  # noqa: RUF071 - of characters
        start = self._agreed([opening, *texts])
        return start if start >= len(said) else -1

    def _check_written(
        self, name: str, prompt: Messages, answer: Messages, continued: bool, text: str, start: int, options: dict
    ) -> None:
        """Raise BadField if the template leaves out the assistant's words: other words give the same `text`."""
        for index, message in enumerate(answer):
            said = message.get("content") or message.get("tool_calls")
            if message["role"] != "assistant" or not said or (isinstance(said, str) and said.strip() in text[start:]):
                continue
            other = {key: value for key, value in message.items() if key != "tool_calls"}
            other["content"] = PROBE if message.get("content") else ""
            others = _join(prompt, [*answer[:index], other, *answer[index + 1 :]], continued)
            try:
                same = self._apply(others, **options) == text
            except Exception:  # so it reads the replaced words
                continue
            if same:
                raise BadField(
                    name,
                    message,
                    "the chat template writes nothing of what the assistant says here, so nothing is there to learn; "
                    "give it in a form that the template has (text, a list of parts, or no calls of tools).",
                )

    def _agreed(self, texts: Sequence[str]) -> int:
        """Return how many characters the texts share in whole tokens that are the same in all."""
        ids = self._encode(list(texts))
        longest = len(os.path.commonprefix(list(texts)))  # noqa: RUF071 - of characters
        stops: Iterable[int] = range(longest, 0, -1)
        if self.tokenizer.is_fast:  # a fast tokenizer gives the end of each token
            places = self.tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            same = len(os.path.commonprefix(ids))  # noqa: RUF071 - of ids
            stops = [end for _, end in reversed(places[:same]) if end <= longest]
        for stop in stops:
            (shared,) = self._encode([texts[0][:stop]])
            if all(row[: len(shared)] == shared for row in ids):
                return stop
        return 0

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    # Whose words count

    def _spans(
        self, name: str, prompt: Messages, answer: Messages, text: str, start: int, continued: bool, options: dict
    ) -> Spans | None:
        """Return the assistant's words in `text` from `start` on, counted from there; None if it is one answer."""
        speakers = [message["role"] for message in answer]
        if speakers == ["assistant"]:
            return None
        if "assistant" not in speakers:
            raise BadField(name, answer, "no message of the assistant, whose words are learned.")
        messages, first = _join(prompt, answer, continued), len(prompt) - continued
        marked = self._marked(name, messages, start, len(text), options)
        found = self._turn_by_turn(name, messages, first, text, start, options) if marked is None else marked
        return [(begin - start, end - start) for begin, end in found]

    def _marked(self, name: str, messages: Messages, start: int, stop: int, options: dict) -> Spans | None:
        """Return spans by the template's `{% generation %}`, each with its end of turn; None if it marks nothing."""
        template = self.tokenizer.get_chat_template(None, options.get("tools"))
        if not MARKED.search(template):
            return None
        named = {**self.tokenizer.special_tokens_map, **options}
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            (text,), (places,) = render_jinja_template(
                conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **named
            )
        except Exception as error:
            raise BadField(name, messages, f"the chat template refuses it: {error}") from error
        end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, self.ends))})" if self.ends else "")
        spans: Spans = []
        for begin, end in sorted(places):
            follows = end_of_turn.match(text, end)
            begin += len(self.header) if text.startswith(self.header, begin) else 0
            turn = self.trimmed(text[begin : follows.end() if follows else end])  # no line break after the end of turn
            begin, end = max(begin, start), min(begin + len(turn), stop)
            if begin < end and spans and begin <= spans[-1][1]:  # the end of turn may be marked by itself
                spans[-1] = (min(begin, spans[-1][0]), max(end, spans[-1][1]))
            elif begin < end:
                spans.append((begin, end))
        if not spans:
            raise BadField(name, messages, "the template's {% generation %} marks none of the assistant's words.")
        return spans

    def _turn_by_turn(self, name: str, messages: Messages, first: int, text: str, start: int, options: dict) -> Spans:
        """Return spans by the generation prompt before each answer, and the end of turn after it."""
        spans: Spans = []
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        for index in range(first, last + 1):
            if messages[index]["role"] != "assistant":
                continue
            reached = spans[-1][1] if spans else start
            begin = start
            if index > first:
                opening = self._opening(name, messages[:index], False, options)
                begin = self._begin(name, messages[:index], opening, [text], False, options)
            end = (
                len(text)
                if index == len(messages) - 1
                else self._end_of_turn(name, messages, index, text, begin, options)
            )
            if not reached <= begin < end:
                raise BadField(
                    name,
                    messages,
                    f"the chat template writes message {index} otherwise when others follow it, so that its words "
                    "cannot be told from theirs; give each answer a row of its own, or a template with "
                    "{% generation %}.",
                )
            spans.append((begin, end))
        return spans

    def _end_of_turn(
        self, name: str, messages: Messages, index: int, text: str, begin: int, options: dict[str, Any]
    ) -> int:
        """Return the end in `text` of the answer that begins at `begin`: message `index`, which others follow; -1 if it
        cannot be found."""
        upto = self.trimmed(self._text(name, messages[: index + 1], options))
        if text.startswith(upto):
            return len(upto)
        # The template writes it differently as the last message. An end of turn then precedes the words of the next
        # message, which may have one of their own.
        other = {**messages[index + 1], "content": PROBE}
        others = self._text(name, [*messages[: index + 1], other, *messages[index + 2 :]], options)
        before = os.path.commonprefix([text, others])  # noqa: RUF071 - of characters
        ends = [before.find(token, begin) + len(token) for token in self.ends if token in before[begin:]]
        return min(ends, default=-1)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Return a pattern of these tokens, the longest first."""
    listed = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed)) or r"(?!)")


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _options(row: Row) -> dict[str, Any]:
    """Return `tools` and `chat_template_kwargs` for the template. Raises BadField for arguments of the function that
    runs it, and for another template."""
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadField("chat_template_kwargs", options, "an object of names and values is needed.")
    for name in options:
        if name in RESERVED:
            raise BadField("chat_template_kwargs", options, f"`{name}` is not the template's to take; remove it.")
    return {"tools": row.get("tools") or None, **options}


def _split(row: Row, learn: Learn) -> tuple[Messages, dict[str, Messages]]:
    """Return the messages of the prompt, and each candidate's messages by its name in the row."""
    values = {name: row[name] for name in SINGLE if name in row}
    if isinstance(row.get("completions"), list):
        values |= {f"completions[{index}]": value for index, value in enumerate(row["completions"])}
    if "messages" in row and not values:  # beside candidates they only repeat one
        messages = _messages("messages", row["messages"])
        if messages[-1]["role"] != "assistant":
            return messages, {}
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked_for = [index for index in answers if index > 0]  # the first may be a greeting
        first = (asked_for[0] if learn == "all" else asked_for[-1]) if asked_for else 0
        _need_prompt("messages", messages, first)
        return messages[:first], {"completion": messages[first:]}
    asked = row.get("prompt")
    if isinstance(asked, list):  # a text beside messages is the assistant's
        values = {key: [_message("assistant", v)] if isinstance(v, str) else v for key, v in values.items()}
    candidates = {name: _messages(name, value) for name, value in values.items()}
    candidates = {name: upto_answer(messages) for name, messages in candidates.items()}
    if isinstance(asked, list) or not candidates:
        prompt = _messages("prompt", asked)
        if prompt[-1]["role"] not in ("user", "tool", "assistant"):
            raise BadField("prompt", prompt, "the last message must come from user, tool or assistant.")
        whole = [messages for messages in candidates.values() if messages[: len(prompt)] == prompt != messages]
        if candidates and len(whole) == len(candidates):  # each repeats the prompt
            candidates = {name: messages[len(prompt) :] for name, messages in candidates.items()}
        return prompt, candidates
    if isinstance(asked, str) and asked and all(found[0]["role"] == "assistant" for found in candidates.values()):
        return [_message("user", asked)], candidates
    # The prompt is implicit: the messages that the conversations share. A `prompt` of text beside them only repeats it.
    shared = min(map(len, candidates.values())) - 1  # at least one message is each one's own
    one, *others = candidates.values()
    while any(other[:shared] != one[:shared] for other in others):
        shared -= 1
    _need_prompt(next(iter(candidates)), one, shared)
    return one[:shared], {name: messages[shared:] for name, messages in candidates.items()}


def upto_answer(messages: Messages) -> Messages:
    """Return the messages up to the assistant's last words."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1] + 1] if answers else messages


def _need_prompt(name: str, messages: Messages, length: int) -> None:
    if length < 1:
        raise BadField(name, messages, "there is no message before the answer; add the prompt's messages.")


def _messages(name: str, value: Any) -> Messages:
    if isinstance(value, str):
        raise BadField(name, value, "text beside a conversation; a list of messages is needed here too.")
    if not isinstance(value, list) or not value:
        raise BadField(name, value, "a list of messages is needed.")
    for index, message in enumerate(value):
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not whole or not ("content" in message or message.get("tool_calls")):
            raise BadField(f"{name}[{index}]", message, "a message with `role` and `content` is needed.")
    return value


def _is_open(prompt: Messages) -> bool:
    """Return whether the prompt ends with words of the assistant that an answer can go on with."""
    last = prompt[-1]
    return last["role"] == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


def _continues(answer: Messages) -> bool:
    """Return whether a candidate can go on with a message that the prompt has begun."""
    return answer[0]["role"] == "assistant" and isinstance(answer[0].get("content") or "", str)


def _join(prompt: Messages, answer: Messages, continued: bool) -> Messages:
    if not continued:
        return [*prompt, *answer]
    last, first = prompt[-1], answer[0]
    merged = {**last, **first, "content": last["content"] + (first.get("content") or "")}
    return [*prompt[:-1], merged, *answer[1:]]
