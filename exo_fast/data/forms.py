"""Rows as other tools write them, in the fields of this library.

    ShareGPT         conversations: [{from, value}, …]; `system`, `tools`; LLaMA-Factory's `chosen` and `rejected`
    Alpaca           instruction, input, output; `history`, `system`; or `chosen`, `rejected` in place of `output`
    ms-swift         messages, rejected_response
    Orca             question, chosen, rejected (or `response`); `system`
    UltraFeedback    instruction, completions: [{response, overall_score}, …]
    one message      `chosen` and `rejected` as a message each, in place of a list of them

All of these are conversations: they become lists of messages, and the model's own chat template makes text of them.
Rows with our field names come back unchanged, without the nulls that Arrow writes for keys that only other rows have.
"""

import json
from typing import Any

from exo_fast.data.fields import BadField

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
CALL = "function_call"  # ShareGPT's role of an assistant's call, whose value is the call as JSON
HELD = ("messages", "prompt", "chosen", "rejected", "completion")  # fields that may hold messages
ACCEPTED = (
    "Rows have: prompt, completions, rewards; prompt, chosen, rejected; prompt, completion; messages; text (and "
    "label); or ShareGPT's conversations, Alpaca's instruction, output, UltraFeedback's instruction, completions, or "
    "question, chosen, rejected, or messages, rejected_response."
)
Row = dict[str, Any]
Messages = list[dict[str, Any]]


def standard(row: Row) -> Row:
    """Return `row` in the fields of this library; one that has them comes back with its own values.

    A null field counts as missing. Raises BadField for a role or a value that its form does not have.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if "conversations" in row and "messages" not in row:
        row = _sharegpt(row)
    elif isinstance(row.get("instruction"), str) and "prompt" not in row and "messages" not in row:
        row = _instruction(row)
    elif isinstance(row.get("question"), str) and "prompt" not in row and "messages" not in row:
        row = _question(row)
    if "rejected_response" in row and isinstance(row.get("messages"), list):
        row = _rejected_response(row)
    changed: Row = {name: _messages(name, row[name]) for name in HELD if holds_messages(row.get(name))}
    if isinstance(row.get("completions"), list):
        changed["completions"] = [
            _messages(f"completions[{index}]", value) if holds_messages(value) else value
            for index, value in enumerate(row["completions"])
        ]
    if row.get("tools") is not None:
        changed["tools"] = _tools(row["tools"])
    if row.get("chat_template_kwargs") is not None:
        changed["chat_template_kwargs"] = without_nulls(_from_json("chat_template_kwargs", row["chat_template_kwargs"]))
    return {**row, **changed}


def without_nulls(value: Any) -> Any:
    """Return `value` without the null keys of objects: Arrow has one type for a column, so a key that one row has is
    null in all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def holds_messages(value: Any) -> bool:
    """Return whether a field holds messages: one, or a list with some in it."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def _messages(name: str, value: Any) -> Messages:
    """Return a list of messages with `role` and `content`, from such a list, from ShareGPT's, or from one message."""
    found = value if isinstance(value, list) else [value]
    return [_message(f"{name}[{index}]", item) for index, item in enumerate(found)]


def _message(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value  # checked when the messages are read
    if "role" in value or "from" not in value:
        kept = {key: item if key == "content" else without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None or key == "content"}
    speaker, words = value["from"], value.get("value")
    if speaker == CALL:
        call = _from_json(name, words)
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise BadField(name, value, f"`from` must be one of {', '.join((*ROLES, CALL))}.")
    return {"role": ROLES[speaker.lower()], "content": words}


def _from_json(name: str, value: Any) -> Any:
    """Return a value that may be given as its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadField(name, value, f"not valid JSON ({error}); give the value itself, or its JSON.") from error


def _tools(value: Any) -> Any:
    """Return a list of tool schemas, from such a list, from its JSON (TRL's form), or from a list of JSON texts."""
    value = _from_json("tools", value)
    if value is None:
        return None
    found = [
        _from_json(f"tools[{index}]", tool) for index, tool in enumerate(value if isinstance(value, list) else [0])
    ]
    if not all(isinstance(tool, dict) for tool in found):
        raise BadField("tools", value, "a list of tool schemas is needed, or the JSON text of one.")
    return without_nulls(found)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _system(row: Row, *names: str) -> Messages:
    text = next((row[name] for name in names if isinstance(row.get(name), str) and row[name]), None)
    return [] if text is None else [{"role": "system", "content": text}]


def _as_answer(value: Any) -> Any:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _with_answers(row: Row, prompt: Messages, **answer: str) -> Row:
    """Return a row of a conversation and its answers, from fields that hold text; `answer` maps our name of a single
    answer to its field. Converted fields are left out."""
    found: Row = {"prompt": prompt}
    for name in ("chosen", "rejected", "completion"):
        if name in row:
            found[name] = _as_answer(row[name])
    if isinstance(row.get("completions"), list):
        found["completions"] = [_as_answer(value) for value in row["completions"]]
    for ours, theirs in answer.items():
        if ours not in found and theirs in row:
            found[ours] = _as_answer(row[theirs])
    used = {"instruction", "input", "output", "history", "system", "system_prompt", "question", "response"}
    return {**{name: value for name, value in row.items() if name not in used}, **found}


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadField("conversations", turns, "a list of messages with `from` and `value` is needed.")
    messages = _messages("conversations", turns)
    if not (isinstance(messages[0], dict) and messages[0].get("role") == "system"):
        messages = _system(row, "system") + messages
    rest = {name: value for name, value in row.items() if name not in ("conversations", "system")}
    answered = any(name in row for name in ("chosen", "rejected", "completions"))
    return {**rest, "prompt" if answered else "messages": messages}


def _instruction(row: Row) -> Row:
    """Convert Alpaca's rows, and UltraFeedback's, whose completions are objects."""
    words = row["instruction"]
    if isinstance(more := row.get("input"), str) and more:
        words = f"{words}\n{more}"
    prompt = _system(row, "system")
    for index, turn in enumerate(row.get("history") or ()):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadField(f"history[{index}]", turn, "a list of a question and its answer is needed.")
        prompt += [_user(turn[0]), {"role": "assistant", "content": turn[1]}]
    prompt.append(_user(words))
    judged = row.get("completions")
    if isinstance(judged, list) and judged and all(isinstance(one, dict) and "response" in one for one in judged):
        row = {**row, "completions": [one["response"] for one in judged]}
        if "rewards" not in row and all("overall_score" in one for one in judged):
            row["rewards"] = [one["overall_score"] for one in judged]
    return _with_answers(row, prompt, completion="output")


def _question(row: Row) -> Row:
    return _with_answers(row, [*_system(row, "system", "system_prompt"), _user(row["question"])], completion="response")


def _rejected_response(row: Row) -> Row:
    messages, rest = row["messages"], {name: row[name] for name in row if name not in ("messages", "rejected_response")}
    if len(messages) < 2:
        raise BadField("messages", messages, "a prompt and the answer that was chosen are needed.")
    return {**rest, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": _as_answer(row["rejected_response"])}
