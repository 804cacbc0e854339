"""From lists of messages to text, through the chat template of a model's tokenizer.

The forms are TRL's: `prompt` and its `completion`, `chosen`, `rejected` or `completions` as lists of messages; or the
whole conversation, as `messages` or (the prompt implicit in what they share) in `chosen` and `rejected`. The text is
TRL's too, but for two things. A completion ends with the EOS that the template writes: the line break that many put
after it would be a token that no model is ever asked for. And where the prompt ends with words of the assistant, the
completion goes on with that message instead of beginning another.
"""

import os
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from exo_fast.training.data.faults import BadField
from exo_fast.training.errors import InputError

RESERVED = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}
SINGLE = ("chosen", "rejected", "completion")  # fields that hold one completion; `completions` holds a list of them
Messages = list[dict[str, Any]]


def conversation_field(record: dict[str, Any]) -> str | None:
    """The first field of `record` that holds messages; None where all is text."""
    for name in ("messages", "prompt", *SINGLE):
        if name in record and _holds_messages(record[name]):
            return name
    candidates = record.get("completions")
    return "completions" if isinstance(candidates, list) and any(map(_holds_messages, candidates)) else None


def render(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`record` with text in place of messages; `messages` become `prompt` and, if the assistant has the last word,
    `completion`. A record of text alone comes back as it is.

    `tools` and `chat_template_kwargs` of the record go to the template. Raises BadField for messages that are none or
    that the template refuses, and InputError for a tokenizer without a chat template.
    """
    field = conversation_field(record)
    if field is None:
        return record
    if not tokenizer.chat_template:
        raise InputError(
            f"field `{field}` holds a conversation, and the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template; name a model that was made for conversations, or set tokenizer.chat_template and save it."
        )
    prompt, candidates = _split(record)
    options = {"tools": record.get("tools") or None, **_template_options(record)}

    def text(name: str, messages: Messages, **how: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **how, **options)
        except Exception as error:  # a template is a program, which may raise anything
            raise BadField(name, messages, f"the chat template refuses it: {error}") from error

    continued = prompt[-1]["role"] == "assistant"
    prompt_text = text("prompt", prompt, add_generation_prompt=not continued, continue_final_message=continued)
    whole = {key: text(key, _join(prompt, candidate)) for key, candidate in candidates.items()}
    # Some templates write more after a generation prompt than before an answer that is there: as in TRL, what they
    # share is the prompt.
    prompt_text = os.path.commonprefix([prompt_text, *whole.values()])  # noqa: RUF071 - of characters
    texts = {key: _end(full[len(prompt_text) :], tokenizer.eos_token) for key, full in whole.items()}
    rendered = {name: value for name, value in record.items() if name not in ("messages", "completions")}
    rendered |= {"prompt": prompt_text} | {key: value for key, value in texts.items() if key in SINGLE}
    if "completions" in record:
        rendered["completions"] = [value for key, value in texts.items() if key not in SINGLE]
    return rendered


def _template_options(record: dict[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs`, which are for the template: not for the function that runs it, nor another template."""
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadField("chat_template_kwargs", options, "an object of names and values is needed.")
    for name in options:
        if name in RESERVED:
            raise BadField("chat_template_kwargs", options, f"`{name}` is not the template's to take; remove it.")
    return options


def _holds_messages(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def _split(record: dict[str, Any]) -> tuple[Messages, dict[str, Messages]]:
    """The messages of the prompt, and those of each candidate by its name in the record."""
    if "messages" in record:
        messages = _messages("messages", record["messages"])
        if messages[-1]["role"] != "assistant":
            return messages, {}
        _need_prompt("messages", messages, len(messages) - 1)
        return messages[:-1], {"completion": messages[-1:]}
    values = {name: record[name] for name in SINGLE if name in record}
    if isinstance(record.get("completions"), list):
        values |= {f"completions[{index}]": value for index, value in enumerate(record["completions"])}
    candidates = {name: _messages(name, value) for name, value in values.items()}
    if isinstance(record.get("prompt"), list) or not candidates:
        prompt = _messages("prompt", record.get("prompt"))
        if prompt[-1]["role"] not in ("user", "tool", "assistant"):
            raise BadField("prompt", prompt, "the last message must come from user, tool or assistant.")
        return prompt, candidates
    # The prompt is implicit: what the conversations share. A `prompt` of text beside them only repeats it.
    shared = min(map(len, candidates.values())) - 1  # at least one message is each one's own
    first, *others = candidates.values()
    while any(other[:shared] != first[:shared] for other in others):
        shared -= 1
    _need_prompt(next(iter(candidates)), first, shared)
    return first[:shared], {name: messages[shared:] for name, messages in candidates.items()}


def _need_prompt(name: str, messages: Messages, length: int) -> None:
    if not length:
        raise BadField(name, messages, "there is no message before the answer; add the prompt's messages.")


def _messages(name: str, value: Any) -> Messages:
    if isinstance(value, str):
        raise BadField(name, value, "text beside a conversation; a list of messages is needed here too.")
    if not isinstance(value, list) or not value:
        raise BadField(name, value, "a list of messages is needed.")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadField(f"{name}[{index}]", message, "a message with `role` and `content` is needed.")
    return value


def _join(prompt: Messages, completion: Messages) -> Messages:
    last, first = prompt[-1], completion[0]
    contents = last["content"], first["content"] or ""
    if last["role"] == first["role"] == "assistant" and all(isinstance(content, str) for content in contents):
        merged = {**last, **first, "content": "".join(contents)}
        return [*prompt[:-1], merged, *completion[1:]]
    return [*prompt, *completion]


def _end(text: str, eos: str | None) -> str:
    """`text` without what a template writes after the last EOS."""
    if eos is None:
        return text
    head, found, tail = text.rpartition(eos)
    return head + found if found and not tail.strip() else text
